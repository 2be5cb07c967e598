"""Multiple-choice questions: the ensemble beside its members and baselines, and the threshold for abstention.

Read next: `renyi.inference.choices`, which scores options, and `renyi.evaluation.choice_quality`, the figures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from renyi.errors import ConfigError
from renyi.evaluation.files import File, Groups, file_groups, load_files
from renyi.evaluation.sections import Cell, Column, Example, Examples, Note, Report, Section, Table, shortened
from renyi.evaluation.shared_sections import calibration_charts, detection, groups_table, system_name, who_knows_what
from renyi.evaluation.task import Dropped, Grouped, Model, Models, Resampled, Task, as_json, setting
from renyi.layout import ABSTENTION_FILE
from renyi.text import plural

if TYPE_CHECKING:
    from renyi.data import Question
    from renyi.evaluation.choice_quality import ChoiceEvaluation, Opinion
    from renyi.evaluation.selective import RiskThreshold
    from renyi.inference import ChoiceScores

OF_ONE = ("total", "max_probability", "perplexity")  # scores that a single member also has
Score = Literal[
    "total",
    "max_probability",
    "perplexity",
    "aleatoric",
    "epistemic",
    "expected_pairwise_kl",
    "reverse_mi",
    "variation_ratio",
]
EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings(Grouped, Dropped, Resampled):
    """Settings of the choice task."""

    choice_by: Literal["letter", "text", "text_normalised"] = setting(
        "letter", "what is scored: letter, text, or text_normalised"
    )
    ood: str | None = setting(None, "questions from elsewhere: can uncertainty separate them from DATA?", "DATA2")
    ood_split: str | None = setting(None, "split of --ood to read; by default test if there is one", "SPLIT")
    calibration: float | None = setting(
        None,
        "share of the questions not evaluated but calibrated on; by default 0.2, or 0.5 with --target_risk",
        "SHARE",
    )
    target_risk: float | None = setting(None, "find a threshold and write abstention.json", "RISK")
    delta: float = setting(0.1, "probability that the threshold's promise fails", "P")
    abstain_by: Score = setting("total", "the uncertainty that the threshold bounds", "SCORE")

    def validate(self) -> None:
        super().validate()
        hint = "Give a number between 0 and 1."
        self.require(self.target_risk is None or 0 < self.target_risk < 1, "target_risk", hint)
        self.require(0 < self.delta < 1, "delta", hint)
        self.require(
            self.calibration is None or 0 <= self.calibration < 1, "calibration", "Give a share from 0 to below 1."
        )

    @property
    def share_aside(self) -> float:
        """The share of the questions that is calibrated on."""
        default = 0.2 if self.target_risk is None else 0.5
        return default if self.calibration is None else self.calibration


class Read(NamedTuple):
    """Questions with their groups, and those of another dataset."""

    questions: "list[Question]"
    groups: Groups | None
    elsewhere: "list[Question]"


class Asked(NamedTuple):
    """Opinions of the ensemble and of each baseline, also on the other dataset, and how many prompts were cut."""

    ensemble: "Opinion"
    baselines: "dict[str, Opinion]"
    elsewhere: "dict[str, Opinion]"
    cut: int
    folder: Path | None


class Found(NamedTuple):
    """The figures, which questions were calibrated on, and the threshold with what is to be said of it."""

    evaluation: "ChoiceEvaluation"
    aside: list[int]
    threshold: "RiskThreshold | None"
    told: str | None


class Choice(Task):
    """Multiple choice."""

    name = "choice"
    Settings = ChoiceSettings
    reads_several = True

    def read(self, files: Sequence[File], settings: ChoiceSettings) -> Read:
        from renyi.data import read_questions

        elsewhere = load_files([settings.ood], settings.ood_split) if settings.ood else []
        groups = file_groups(files, settings.group)
        return Read(
            [q for file in files for q in read_questions(file.rows, file.name)],
            groups,
            [q for file in elsewhere for q in read_questions(file.rows, file.name)],
        )

    def ask(self, models: Models, data: Read, settings: ChoiceSettings) -> Asked:
        model = models.model
        if settings.abstain_by not in OF_ONE and model.ensemble.num_members == 1:
            raise ConfigError("a single member does not disagree", where="abstain_by", hint="Give total.")
        ensemble, cut = _opinion(models, model, data.questions, settings, "scoring")
        elsewhere: dict[str, Opinion] = {}
        baselines: dict[str, Opinion] = {}
        if data.elsewhere:
            elsewhere["mixture"], _ = _opinion(models, model, data.elsewhere, settings, "scoring --ood")
        for name, other, drops in settings.rivals(models):
            ask = _with_dropout if drops else _opinion
            baselines[name], _ = ask(models, other, data.questions, settings, f"scoring {name}")
            if data.elsewhere:
                elsewhere[name], _ = ask(models, other, data.elsewhere, settings, f"scoring --ood, {name}")
        return Asked(ensemble, baselines, elsewhere, cut, models.folder)

    def evaluate(self, data: Read, answers: Asked, settings: ChoiceSettings) -> Found:
        from renyi.evaluation.choice_quality import calibration_split, evaluate_choice

        labels = [q.answer for q in data.questions]
        aside, _ = calibration_split(len(labels), settings.share_aside)
        evaluation = evaluate_choice(
            answers.ensemble,
            labels,
            baselines=answers.baselines,
            groups=data.groups.of_rows if data.groups else None,
            out_of_distribution=answers.elsewhere,
            calibration=aside,
            resamples=settings.resamples,
        )
        threshold, told = _abstention(
            answers.ensemble.rows(aside), [labels[i] for i in aside], settings, answers.folder
        )
        return Found(evaluation, aside.tolist(), threshold, told)

    def result(self, data: Read, answers: Asked, found: Found, settings: ChoiceSettings) -> dict[str, Any]:
        # Risk–coverage curves have a value a question: they are for the chart.
        without_curves = [s._replace(risk={}) for s in found.evaluation.systems]
        return {
            "task": self.name,
            "choice_by": settings.choice_by,
            "questions_cut": answers.cut,
            **as_json(found.evaluation._replace(systems=without_curves)),
            "abstention": as_json(found.threshold),
        }

    def lines(self, data: Read, answers: Asked, found: Found, settings: ChoiceSettings) -> Iterator[dict[str, Any]]:
        mixture, members = answers.ensemble.mixture(), answers.ensemble.members()
        scores, aside = answers.ensemble.uncertainty(), set(found.aside)
        for i, question in enumerate(data.questions):
            options = len(question.choices)
            line: dict[str, Any] = {"index": i, "answer": question.answer, "choice": int(mixture[i].argmax())}
            line |= {"probabilities": mixture[i, :options].tolist()}
            line |= {"members": [p[i, :options].tolist() for p in members]}
            line |= {name: float(values[i]) for name, values in scores.items()}
            line |= {"group": data.groups.of_rows[i]} if data.groups else {}
            yield as_json(line | {"calibration": i in aside})

    def report(self, data: Read, answers: Asked, found: Found, settings: ChoiceSettings) -> Report:
        evaluation, has_intervals = found.evaluation, settings.resamples > 0
        subtitle = f"{plural(evaluation.questions, 'question')} by {settings.choice_by}"
        if evaluation.calibration_questions:
            subtitle += f", {evaluation.calibration_questions:,} more to calibrate on"
        if answers.cut:
            subtitle += f" · {plural(answers.cut, 'prompt')} cut to the model's context"
        sections: list[Section] = [
            _quality(evaluation, has_intervals),
            detection(evaluation.systems, has_intervals),
        ]
        if data.elsewhere:
            sections.append(_elsewhere(evaluation, len(data.elsewhere), has_intervals))
        labels = [q.answer for q in data.questions]
        kept = evaluation.most_contested
        sections += calibration_charts(evaluation.systems, answers.ensemble, kept, labels, settings.target_risk)
        if data.groups and evaluation.groups is not None and evaluation.specialisation is not None:
            sections.append(groups_table(evaluation, data.groups.name, "questions"))
            sections += who_knows_what(evaluation.specialisation, data.groups.name, "questions")
        sections += _contested(evaluation, answers.ensemble, data.questions)
        if found.told:
            sections.append(Note("Abstention", found.told))
        return Report("Multiple choice", subtitle, sections)


def _opinion(
    models: Models, model: Model, questions: "Sequence[Question]", settings: ChoiceSettings, what: str
) -> "tuple[Opinion, int]":
    """What an ensemble thinks of the questions, and how many of them were cut."""
    from renyi.evaluation.choice_quality import Opinion
    from renyi.inference import choice_log_probs, score_choices

    with models.progress(what, len(questions)) as progress:
        scores = score_choices(model.ensemble, questions, model.tokenizer, settings.choice_by, progress=progress)
    log_probs, weights = choice_log_probs(scores, settings.choice_by), model.ensemble.weights.cpu()
    num_draws = model.ensemble.num_draws
    return Opinion(log_probs, weights, scores.log_likelihood, scores.tokens, num_draws), scores.cut


def _with_dropout(
    models: Models, model: Model, questions: "Sequence[Question]", settings: ChoiceSettings, what: str
) -> "tuple[Opinion, int]":
    """What the first member thinks of the questions in several passes with dropout; each pass counts as a member."""
    import torch

    from renyi.evaluation.choice_quality import Opinion
    from renyi.inference import choice_log_probs, score_choices

    with models.progress(what, settings.mc_dropout * len(questions)) as progress:

        def ask(number: int) -> "ChoiceScores":
            scores = score_choices(model.ensemble, questions, model.tokenizer, settings.choice_by)
            progress((number + 1) * len(questions))
            return scores

        passes = settings.passes(model.ensemble, ask)
    log_probs = torch.cat([choice_log_probs(scores, settings.choice_by)[:1] for scores in passes])
    ell = torch.cat([scores.log_likelihood[:1] for scores in passes])
    weights = torch.full((len(passes),), 1 / len(passes))
    return Opinion(log_probs, weights, ell, passes[0].tokens), passes[0].cut


# ---- Abstention ------------------------------------------------------------------------------------------------------


def _abstention(
    opinion: "Opinion", labels: Sequence[int], settings: ChoiceSettings, folder: Path | None
) -> "tuple[RiskThreshold | None, str | None]":
    """Find the threshold on the calibration questions, keep it in the ensemble's folder, and say so.

    If none is found, an earlier threshold is removed. Its promise was for other questions or another risk, and a user
    would believe that it came from this search.
    """
    from renyi.evaluation.metrics import is_right
    from renyi.evaluation.selective import risk_threshold
    from renyi.inference.abstention import remove_abstention, write_abstention

    if settings.target_risk is None:
        return None, None
    found = None
    if labels:
        correct, score = is_right(opinion.mixture(), labels), opinion.uncertainty()[settings.abstain_by]
        found = risk_threshold(score, correct, settings.target_risk, settings.delta)
    if found is None:
        told = (
            f"No threshold on {settings.abstain_by} keeps the risk at or below {settings.target_risk:g} with "
            f"probability {1 - settings.delta:g}; nothing is written. Calibrate on more questions, or allow more."
        )
        if folder is not None and remove_abstention(folder):
            told += f" The threshold of an earlier search in {folder / ABSTENTION_FILE} is removed."
        return None, told
    told = (
        f"Answering where {settings.abstain_by} ≤ {found.threshold:.4f} keeps the risk at or below "
        f"{found.target_risk:g} with probability {1 - found.delta:g} over {found.calibration_examples:,} calibration "
        f"questions; it answers {found.coverage:.1%} of them, {found.risk:.1%} wrongly."
    )
    if folder is None:
        return found, f"{told} It is not kept: the ensemble has no folder."
    kept = {
        "score": settings.abstain_by,
        "threshold": found.threshold,
        "target_risk": found.target_risk,
        "delta": found.delta,
        "calibration_examples": found.calibration_examples,
        "coverage": found.coverage,
        "task": "choice",
        "choice_by": settings.choice_by,
    }
    return found, f"{told} Kept in {write_abstention(folder, kept)}."


# ---- Sections --------------------------------------------------------------------------------------------------------


def _quality(evaluation: "ChoiceEvaluation", has_intervals: bool) -> Table:
    rows: list[list[Cell]] = [
        [system_name(s), s.accuracy, s.nll, s.brier, s.ece, s.adaptive_ece] for s in evaluation.systems
    ]
    columns: list[Column | str] = [
        "",
        Column("accuracy", ".1%", "high"),
        Column("NLL", ".3f", "low"),
        Column("Brier", ".3f", "low"),
        Column("ECE", ".3f", "low"),
        Column("adaptive ECE", ".3f", "low"),
    ]
    note = (
        "NLL in nats a question · Brier: sum over the options, 0 to 2 · ECE in 15 bins of equal width, adaptive of "
        "equal mass · intervals of 95 %"
    )
    return Table("How good are the answers?", columns, rows, note, has_intervals=has_intervals)


def _elsewhere(evaluation: "ChoiceEvaluation", number: int, has_intervals: bool) -> Table:
    rows: list[list[Cell]] = [
        [shortened(s.name, 24), name, found.auroc, found.aupr]
        for i, s in enumerate(evaluation.systems)
        for name, found in s.out_of_distribution.items()
        if i == 0 or name == "total"
    ]
    columns: list[Column | str] = ["", "uncertainty", Column("AUROC", ".3f", "high"), Column("AUPR", ".3f", "high")]
    title = f"Telling {plural(number, 'question')} from elsewhere"
    return Table(title, columns, rows, has_intervals=has_intervals)


def _contested(evaluation: "ChoiceEvaluation", opinion: "Opinion", questions: "Sequence[Question]") -> list[Section]:
    from renyi.data import LETTERS

    if len(opinion.weights) == 1:
        return []
    mixture, members = opinion.mixture(), opinion.members()
    epistemic = opinion.uncertainty()["epistemic"]
    shown = [i for i in evaluation.most_contested[:EXAMPLES] if epistemic[i] > 0]
    examples = [
        Example(
            f"row {i + 1}",
            f"epistemic {epistemic[i]:.3f} nats",
            questions[i].question.strip(),
            ["", "mixture", *(str(m) for m in range(len(members)))],
            [
                [f"{LETTERS[c]}. {text}", *(f"{p[i, c]:.2f}" for p in (mixture, *members))]
                for c, text in enumerate(questions[i].choices)
            ],
            {questions[i].answer: "good"},
        )
        for i in shown
    ]
    note = "probability of each option: the mixture, then each member; the right one is green · rows counted from 1"
    return [Examples("Most contested questions", note, examples)] if examples else []


TASK = Choice()
