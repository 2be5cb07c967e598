"""Thumbs: how well the mixture, every member and baselines foretell whether a completion was found good.

Rows are prepared and compared with the reference as in the ensemble's training by `renyi kto`. Read next:
`renyi.evaluation.thumb_quality`, the figures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from renyi.errors import ConfigError
from renyi.evaluation.files import File, Groups, group_names
from renyi.evaluation.sections import Cell, Column, Example, Examples, Note, Report, Section, Table, one_line
from renyi.evaluation.shared_sections import calibration_charts, detection, groups_table, system_name, who_knows_what
from renyi.evaluation.task import Dropped, Grouped, Model, Models, Resampled, Task, as_json
from renyi.text import plural

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from renyi.evaluation.choice_quality import Opinion
    from renyi.evaluation.thumb_quality import ThumbEvaluation
    from renyi.inference import ThumbScore

EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class ThumbSettings(Grouped, Dropped, Resampled):
    """Settings of the thumbs task."""


class Read(NamedTuple):
    """The rows and their groups."""

    file: File
    groups: Groups | None


class Answers(NamedTuple):
    """What one model says of the thumbs: its scores, and its probabilities as an opinion on down and up."""

    scores: "list[ThumbScore]"
    opinion: "Opinion"
    rows: "Dataset"
    loss: str


class Asked(NamedTuple):
    """The answers of the ensemble and the opinions of its baselines."""

    ensemble: Answers
    baselines: "dict[str, Opinion]"
    tokenizer: "PreTrainedTokenizerBase"


class Thumbs(Task):
    """Thumbs."""

    name = "thumbs"
    Settings = ThumbSettings

    def read(self, files: Sequence[File], settings: ThumbSettings) -> Read:
        from renyi.data import ThumbPreparation

        (file,) = files
        ThumbPreparation().check(file.rows, file.name)
        return Read(file, Groups(settings.group, group_names(file.rows, settings.group)) if settings.group else None)

    def ask(self, models: Models, data: Read, settings: ThumbSettings) -> Asked:
        ensemble = _answers(models, models.model, data.file, settings, "scoring")
        baselines = {
            name: _answers(models, other, data.file, settings, f"scoring {name}", drops).opinion
            for name, other, drops in settings.rivals(models)
        }
        return Asked(ensemble, baselines, models.model.tokenizer)

    def evaluate(self, data: Read, answers: Asked, settings: ThumbSettings) -> "ThumbEvaluation":
        from renyi.evaluation.thumb_quality import evaluate_thumbs

        return evaluate_thumbs(
            answers.ensemble.opinion,
            answers.ensemble.rows["label"],
            baselines=answers.baselines,
            groups=data.groups.of_rows if data.groups else None,
            resamples=settings.resamples,
        )

    def result(self, data: Read, answers: Asked, found: "ThumbEvaluation", settings: ThumbSettings) -> dict[str, Any]:
        # Risk–coverage curves have a value a thumb: they are for the chart.
        figures = as_json(found.figures._replace(systems=[s._replace(risk={}) for s in found.figures.systems]))
        told = {"task": self.name, "thumbs": figures.pop("questions"), "loss": answers.ensemble.loss, "up": found.up}
        figures.pop("calibration_questions")
        return {**told, "auroc": as_json(found.auroc), **figures}

    def lines(
        self, data: Read, answers: Asked, found: "ThumbEvaluation", settings: ThumbSettings
    ) -> Iterator[dict[str, Any]]:
        for score, label in zip(answers.ensemble.scores, answers.ensemble.rows["label"], strict=True):
            yield {name: value for name, value in {**score._asdict(), "label": label}.items() if value is not None}

    def report(self, data: Read, answers: Asked, found: "ThumbEvaluation", settings: ThumbSettings) -> Report:
        figures, scores, has_intervals = found.figures, answers.ensemble.scores, settings.resamples > 0
        labels = [int(up) for up in answers.ensemble.rows["label"]]
        doubt = _doubt(scores)
        sections: list[Section] = [
            _quality(found, has_intervals),
            *([Note("How much is disagreement?", doubt)] if len(answers.ensemble.opinion.weights) > 1 else []),
            detection(figures.systems, has_intervals),
            *calibration_charts(figures.systems, answers.ensemble.opinion, figures.most_contested, labels, None),
        ]
        if data.groups and figures.specialisation is not None:
            sections.append(groups_table(figures, data.groups.name, "thumbs"))
            sections += who_knows_what(figures.specialisation, data.groups.name, "thumbs")
        sections += _most_contested(found, answers)
        subtitle = f"{plural(figures.questions, 'thumb')}, {found.up:.1%} of them up · {answers.ensemble.loss}"
        return Report("Thumbs", subtitle, sections)


def _answers(
    models: Models, model: Model, file: File, settings: ThumbSettings, what: str, drops: bool = False
) -> Answers:
    """What a model says of the thumbs; with `drops`, what its first member says in passes with dropout."""
    import torch
    from torch.nn.functional import logsigmoid

    from renyi.data import Limits, ThumbPreparation
    from renyi.ensemble import needed_thumbs
    from renyi.evaluation.choice_quality import Opinion
    from renyi.inference import score_thumbs

    if model.folder is None:
        hint = "Save it, and give its folder: a reward needs the reference points of training."
        raise ConfigError("has no folder", where="model", hint=hint)
    kept, ensemble = needed_thumbs(model.folder, model.ensemble), model.ensemble
    preparation = replace(ThumbPreparation.read(model.folder), routing_group=None)  # a score for each row
    rows = preparation.prepare(file.rows, model.tokenizer, file.name, Limits.of(ensemble.base))
    passes = settings.mc_dropout if drops else 1
    with models.progress(what, passes * len(rows)) as progress:

        def ask(number: int) -> "list[ThumbScore]":
            before = number * len(rows)
            return score_thumbs(ensemble, rows, kept, preparation, progress=lambda done: progress(before + done))

        found = settings.passes(ensemble, ask) if drops else [ask(0)]
    # The probability of thumbs up is σ(reward − β z), z being the member's reference point.
    point_M = (kept.loss.beta * kept.reference_point).double()
    logit_MN = torch.tensor([[s.reward for s in scores] for scores in found], dtype=torch.float64) - point_M
    logit_MN = logit_MN[:, :, 0] if drops else logit_MN[0].T
    weights = torch.full((passes,), 1 / passes) if drops else ensemble.weights.cpu()
    log_probs = logsigmoid(torch.stack([-logit_MN, logit_MN], dim=-1))
    opinion = Opinion(log_probs, weights, num_draws=1 if drops else ensemble.num_draws)
    return Answers(found[0], opinion, rows, f"{kept.loss.loss_type}, beta {kept.loss.beta:g}")


# ---- Sections --------------------------------------------------------------------------------------------------------


def _quality(found: "ThumbEvaluation", has_intervals: bool) -> Table:
    rows: list[list[Cell]] = [
        [system_name(s), s.accuracy, found.auroc.get(s.name), s.nll, s.brier, s.ece] for s in found.figures.systems
    ]
    columns: list[Column | str] = [
        "",
        Column("accuracy", ".1%", "high"),
        Column("AUROC", ".3f", "high"),
        Column("NLL", ".4f", "low"),
        Column("Brier", ".4f", "low"),
        Column("ECE", ".4f", "low"),
    ]
    always = max(found.up, 1 - found.up)
    note = (
        f"accuracy: thumbs foretold; always the more frequent one: {always:.1%} · AUROC of the probability of thumbs "
        "up · NLL in nats a thumb; a coin has 0.6931 · Brier: (1 − p)², 0 to 1 · ECE in 15 bins · intervals of 95 %"
    )
    return Table("How well are thumbs foretold?", columns, rows, note, has_intervals=has_intervals)


def _doubt(scores: "list[ThumbScore]") -> str:
    def mean(name: str) -> float:
        return sum(getattr(s, name) for s in scores) / len(scores)

    told = f"epistemic uncertainty {mean('epistemic'):.4f} of {mean('total'):.4f} nats a thumb"
    if scores[0].within_members is not None:
        told += f": {mean('within_members'):.4f} within members, {mean('between_members'):.4f} between them"
    return f"{told} · members' rewards differ by {mean('reward_std'):.4f} on average (standard deviation)"


def _most_contested(found: "ThumbEvaluation", answers: Asked) -> list[Section]:
    scores, rows, tokenizer = answers.ensemble.scores, answers.ensemble.rows, answers.tokenizer
    up_MN = answers.ensemble.opinion.log_probs[..., 1].exp()
    examples = []
    for i in found.figures.most_contested[:EXAMPLES]:
        if not scores[i].epistemic > 0:
            continue
        texts = [
            [name, one_line(str(tokenizer.decode(rows[i][f"{name}_ids"], skip_special_tokens=True)))]
            for name in ("prompt", "completion")
        ]
        views = " ".join(f"{p:.2f}" for p in up_MN[:, i].tolist())
        aside = f"P {scores[i].approval:.2f}   members {views}   epistemic {scores[i].epistemic:.3f} nats"
        thumb = "up" if rows[i]["label"] else "down"
        examples.append(Example(f"row {i + 1}, thumb {thumb}", aside, "", [], texts))
    note = "P: probability of thumbs up · rows counted from 1"
    return [Examples("Most contested thumbs", note, examples)] if examples else []


TASK = Thumbs()
