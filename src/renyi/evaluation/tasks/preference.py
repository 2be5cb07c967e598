"""Pairs: which completion the mixture and every member prefer, and the pairs on which members contradict each other.

Pairs are prepared, cut and compared with the reference as in the ensemble's training. Read next:
`renyi.evaluation.preference_quality`, the figures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from renyi.errors import DataError
from renyi.evaluation.files import File, Groups, column_values, group_names
from renyi.evaluation.sections import Cell, Chart, Column, Example, Examples, Note, Report, Section, Table, shortened
from renyi.evaluation.shared_sections import calibration_charts, detection, who_knows_what
from renyi.evaluation.task import Compared, Grouped, Models, Resampled, Task, as_json, is_positive, setting
from renyi.text import plural

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from renyi.evaluation.preference_quality import PreferenceEvaluation
    from renyi.evaluation.task import Model
    from renyi.evaluation.vote_quality import VoteQuality
    from renyi.inference import PairScore
    from renyi.objectives import PreferenceLoss

EXAMPLES = 10
LONGEST_TEXT = 180  # characters shown of a prompt or a completion
LEAD = 30  # characters shown of what both completions begin with


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(Grouped, Resampled, Compared):
    """Settings of the preference task."""

    contested: str | None = setting(
        None,
        "a column that is true where annotators contradict each other; says how well uncertainty finds these",
        "COLUMN",
    )
    reference: Literal["kept", "base"] = setting(
        "kept", "what margins are measured against: kept, as in training, or base"
    )
    beta: float | None = setting(None, "temperature of the margins; by default as in training", "FLOAT")

    def validate(self) -> None:
        super().validate()
        self.require(self.beta is None or is_positive(self.beta), "beta", "Give a number above 0.")


class Read(NamedTuple):
    """The rows, their groups, and which are contested."""

    file: File
    groups: Groups | None
    contested: list[bool] | None


class Asked(NamedTuple):
    """Scores of all pairs, what they were made with, and the texts of pairs as the model sees them."""

    scores: "list[PairScore]"
    weights: "Tensor"
    loss: "PreferenceLoss"
    against: str
    pairs: "Dataset"
    tokenizer: "PreTrainedTokenizerBase"
    baselines: "dict[str, Asked]"


class Preference(Task):
    """Preferences."""

    name = "preference"
    Settings = PreferenceSettings

    def read(self, files: Sequence[File], settings: PreferenceSettings) -> Read:
        (file,) = files
        groups = Groups(settings.group, group_names(file.rows, settings.group)) if settings.group else None
        return Read(file, groups, _contested(file, settings.contested) if settings.contested else None)

    def ask(self, models: Models, data: Read, settings: PreferenceSettings) -> Asked:
        asked = self._scores(models, models.model, models.folder, data, settings)
        for name, other in models.baselines(settings.baseline):
            asked.baselines[name] = self._scores(models, other, other.folder, data, settings)
        return asked

    def _scores(
        self, models: Models, model: "Model", folder: "Path | None", data: Read, settings: PreferenceSettings
    ) -> Asked:
        from renyi.data import Limits, PairPreparation
        from renyi.ensemble import Reference, read_preference
        from renyi.inference import score_pairs
        from renyi.objectives import PreferenceLoss

        ensemble, tokenizer = model.ensemble, model.tokenizer
        if folder is None:
            preparation, loss, reference = PairPreparation(), PreferenceLoss(), Reference(ensemble)
        else:
            preparation = replace(PairPreparation.read(folder), routing_group=None)  # a score for each row
            loss, reference = read_preference(folder, ensemble)
        loss = loss if settings.beta is None else replace(loss, beta=settings.beta)
        reference = reference if settings.reference == "kept" else Reference(ensemble)
        pairs = preparation.prepare(data.file.rows, tokenizer, data.file.name, Limits.of(ensemble.base))
        with models.progress("scoring", len(pairs)) as progress:
            scores = score_pairs(ensemble, pairs, loss, reference, preparation, progress=progress)
        against = "base" if reference.start is None else "start"
        return Asked(scores, ensemble.weights, loss, against, pairs, tokenizer, {})

    def evaluate(self, data: Read, answers: Asked, settings: PreferenceSettings) -> "PreferenceEvaluation":
        from renyi.evaluation.preference_quality import evaluate_preference
        from renyi.evaluation.vote_quality import evaluate_votes

        groups = data.groups.of_rows if data.groups else None
        found = evaluate_preference(answers.scores, answers.weights, groups, data.contested)
        if answers.scores[0].votes is None:
            return found
        systems = {"mixture": answers, **answers.baselines}
        votes = [evaluate_votes(a.scores, a.weights, a.loss.tie_strength, name) for name, a in systems.items()]
        if len(answers.weights) > 1:
            votes.insert(1, evaluate_votes(*_moments(answers), name="members' mean and variance"))
        return found._replace(votes=votes)

    def result(
        self, data: Read, answers: Asked, found: "PreferenceEvaluation", settings: PreferenceSettings
    ) -> dict[str, Any]:
        made_with = {"loss_type": answers.loss.loss_type, "beta": answers.loss.beta, "reference": answers.against}
        return {"task": self.name, **as_json(made_with), **as_json(found)}

    def lines(
        self, data: Read, answers: Asked, found: "PreferenceEvaluation", settings: PreferenceSettings
    ) -> Iterator[dict[str, Any]]:
        lines = ({**s._asdict(), "epistemic_share": s.epistemic_share} for s in answers.scores)
        return ({name: value for name, value in line.items() if value is not None} for line in lines)

    def report(self, data: Read, answers: Asked, found: "PreferenceEvaluation", settings: PreferenceSettings) -> Report:
        doubt = (
            f"epistemic uncertainty {found.epistemic:.4f} nats a pair, "
            f"on average {found.epistemic_share:.1%} of a pair's uncertainty"
        )
        sections: list[Section] = [
            _quality(found, answers.weights.tolist()),
            *_votes(found),
            Note("How much is disagreement?", doubt),
        ]
        if data.groups and found.groups is not None:
            rows: list[list[Cell]] = [[shortened(g.group, 40), g.pairs, g.accuracy, g.epistemic] for g in found.groups]
            figures = [Column("pairs", ","), Column("accuracy", ".1%"), Column("epistemic", ".4f")]
            sizes = [g.pairs for g in found.groups]
            worst = f"worst: {found.worst_group:.1%}"
            title = f"By {data.groups.name}"
            sections.append(Table(title, [data.groups.name, *figures], rows, worst, sizes=sizes))
        if found.contested is not None:
            names = ("epistemic uncertainty", "its share of the total", "total uncertainty")
            values = (found.contested.epistemic, found.contested.epistemic_share, found.contested.total)
            note = f"true of {found.contested.pairs:,} of {plural(found.pairs, 'pair')}"
            columns: list[Column | str] = ["found by", Column("AUROC", ".3f", "high")]
            sections.append(
                Table(f"Finding {settings.contested}", columns, list(zip(names, values, strict=True)), note)
            )
        sections += _most_contested(found, answers)
        margins = "the base" if answers.against == "base" else "each member as its training began"
        subtitle = (
            f"{plural(found.pairs, 'pair')} · {' + '.join(answers.loss.loss_type)}, beta {answers.loss.beta:g} · "
            f"margins against {margins}"
        )
        return Report("Preferences", subtitle, sections, lambda: _page(data, answers, settings, found))


def _contested(file: File, name: str) -> list[bool]:
    """A column of true and false, or of 1 and 0, in which both occur."""
    values = column_values(file.rows, name, "contested")
    for number, value in enumerate(values, start=1):
        if value not in (True, False):
            raise DataError(
                f"is {value!r}",
                where=f"{file.name}, row {number}, column {name}",
                hint="Give true or false in every row.",
            )
    if len(set(values)) == 1:
        raise DataError(
            f"is {'true' if values[0] else 'false'} in every row",
            where=f"{file.name}, column {name}",
            hint="Contested pairs are told from others: there must be both.",
        )
    return list(map(bool, values))


# ---- Sections --------------------------------------------------------------------------------------------------------


def _quality(found: "PreferenceEvaluation", weights: Sequence[float]) -> Table:
    """The mixture and every member."""
    names = ["mixture", *(f"member {m}" for m in range(len(weights)))]
    of_weights = ["", *(f"{weight:.3f}" for weight in weights)]
    rows: list[list[Cell]] = [
        [name, weight, q.accuracy, q.nll, q.brier, q.ece]
        for name, weight, q in zip(names, of_weights, [found.mixture, *found.members], strict=True)
    ]
    columns: list[Column | str] = [
        *("", "weight"),
        Column("accuracy", ".1%", "high"),
        Column("NLL", ".4f", "low"),
        Column("Brier", ".4f", "low"),
        Column("ECE", ".4f", "low"),
    ]
    note = (
        "accuracy: chosen preferred · NLL in nats a pair; a coin has 0.6931 · Brier: (1 − p)², 0 to 1; a coin has "
        "0.25 · ECE in 15 bins"
    )
    return Table("How good are the preferences?", columns, rows, note)


def _votes(found: "PreferenceEvaluation") -> list[Section]:
    """How well every system foretells the annotators' votes; nothing without votes."""
    if found.votes is None:
        return []
    rows: list[list[Cell]] = [
        [
            *(shortened(v.name, 32), v.accuracy, v.nll, v.nll_held_out, v.calibration, v.probability_calibration),
            *(v.split_auroc, v.split_auroc_total),
        ]
        for v in found.votes
    ]
    columns: list[Column | str] = [
        "",
        Column("majority", ".1%", "high"),
        Column("NLL", ".4f", "low"),
        Column("held out", ".4f", "low"),
        Column("calibration", ".4f", "low"),
        Column("of P", ".4f", "low"),
        Column("split: epistemic", ".3f", "high"),
        Column("total", ".3f", "high"),
    ]
    note = (
        "majority: preferred as most annotators do · NLL in nats a label; held out: given the pair's other labels · "
        "calibration: mean squared difference of the share of members that prefer a completion and the share of "
        "annotators; of P: the mixture's probability instead · split: AUROC for pairs that annotators split on"
    )
    return [Table("How are votes foretold?", columns, rows, note)]


def _vote_chart(votes: "Sequence[VoteQuality]") -> Chart:
    def draw() -> bytes:
        from renyi.evaluation import plots

        return plots.draw_vote_shares({v.name: v.share_bins for v in votes})

    return Chart(
        "Does it know how many would prefer it?",
        "vote_shares",
        draw,
        "On the diagonal, as many annotators prefer a completion as the system's probability says.",
    )


def _moments(answers: Asked) -> "tuple[list[PairScore], Tensor, float]":
    """One member in place of all: a reward that is Gaussian, with the mean and the variance of the members' margins.

    Its probability E σ(Δ) is taken by MacKay's approximation, σ(mean / √(1 + π variance / 8)).
    """
    import torch

    weights = answers.weights.double().cpu()
    margin_MN = torch.tensor([s.margin for s in answers.scores], dtype=torch.float64).T
    mean_N = (weights[:, None] * margin_MN).sum(dim=0)
    variance_N = (weights[:, None] * (margin_MN - mean_N).square()).sum(dim=0)
    margin_N = mean_N / (1 + torch.pi / 8 * variance_N).sqrt()
    scores = [s._replace(margin=[m]) for s, m in zip(answers.scores, margin_N.tolist(), strict=True)]
    return scores, torch.ones(1), answers.loss.tie_strength


def _page(
    data: Read, answers: Asked, settings: PreferenceSettings, evaluation: "PreferenceEvaluation"
) -> list[Section]:
    """The page's additional sections. A pair counts as a question whose right answer is the chosen completion."""
    import torch
    from torch.nn.functional import logsigmoid

    from renyi.evaluation.choice_quality import Opinion, evaluate_choice

    margin_MN = torch.tensor([s.margin for s in answers.scores], dtype=torch.float64).T
    opinion = Opinion(logsigmoid(torch.stack([margin_MN, -margin_MN], dim=-1)), answers.weights.cpu())
    groups = data.groups.of_rows if data.groups else None
    right = [0] * len(answers.scores)
    found = evaluate_choice(opinion, right, groups=groups, resamples=settings.resamples)
    sections: list[Section] = [detection(found.systems, settings.resamples > 0)]
    sections += calibration_charts(found.systems, opinion, found.most_contested, right, None)
    if evaluation.votes is not None:
        sections.append(_vote_chart(evaluation.votes))
    if data.groups and found.specialisation is not None:
        sections += who_knows_what(found.specialisation, data.groups.name, "pairs")
    return sections


def _most_contested(found: "PreferenceEvaluation", answers: Asked) -> list[Section]:
    import torch

    by_row = {score.index: score for score in answers.scores}
    scores = [by_row[i] for i in found.most_contested[:EXAMPLES] if by_row[i].epistemic > 0]
    examples = []
    for score in scores:
        of_members = torch.tensor(score.margin, dtype=torch.float64).sigmoid().tolist()
        views = " ".join(f"{p:.2f}" for p in of_members)
        examples.append(
            Example(
                f"row {score.index + 1}",
                f"P {score.preference:.2f}   members {views}   epistemic {score.epistemic:.3f} nats, "
                f"{score.epistemic_share:.0%} of the uncertainty",
                "",
                [],
                _texts(answers.pairs[score.index], answers.tokenizer),
                {1: "good", 2: "bad"},
            )
        )
    note = "P: probability that the chosen completion is preferred · rows counted from 1"
    return [Examples("Most contested pairs", note, examples)] if examples else []


def _texts(pair: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[list[str]]:
    """A pair as the model sees it, shortened: the end of the prompt, and the completions from where they differ."""
    prompt, chosen, rejected = (
        " ".join(str(tokenizer.decode(pair[column], skip_special_tokens=True)).split())
        for column in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    start = alike - LEAD if alike > LONGEST_TEXT // 2 else 0
    return [
        ["prompt", prompt if len(prompt) <= LONGEST_TEXT else f"…{prompt[1 - LONGEST_TEXT :]}"],
        *(
            [name, shortened("…" * (start > 0) + text[start:], LONGEST_TEXT)]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        ),
    ]


TASK = Preference()
