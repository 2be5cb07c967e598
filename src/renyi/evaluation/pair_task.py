"""What the tasks that evaluate pairs share: `tasks/preference.py` and `tasks/reward.py`.

A pair is asked for the margin of its chosen over its rejected completion under every member. From margins alone follow
preferences, votes, uncertainty and the pairs on which members contradict each other. Read next:
`preference_quality.py`, the figures.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from renyi.errors import DataError
from renyi.evaluation.files import File, Groups, column_values, group_names
from renyi.evaluation.sections import Cell, Chart, Column, Example, Examples, Note, Report, Section, Table, shortened
from renyi.evaluation.shared_sections import LONGEST_NAME, calibration_charts, detection, who_knows_what
from renyi.evaluation.task import Dropped, Grouped, Model, Models, Resampled, Task, as_json, setting
from renyi.text import plural

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from renyi.evaluation.choice_quality import Opinion
    from renyi.evaluation.preference_quality import PreferenceEvaluation
    from renyi.evaluation.vote_quality import VoteQuality
    from renyi.inference import PairScore, RewardScore

EXAMPLES = 10
LONGEST_TEXT = 180  # characters shown of a prompt or a completion
LEAD = 30  # characters shown of what both completions begin with


@dataclass(frozen=True, kw_only=True)
class PairSettings(Grouped, Resampled, Dropped):
    """Settings of tasks that evaluate pairs."""

    contested: str | None = setting(
        None,
        "a column that is true where annotators contradict each other; says how well uncertainty finds these",
        "COLUMN",
    )


class Read(NamedTuple):
    """The rows, their groups, and which are contested."""

    file: File
    groups: Groups | None
    contested: list[bool] | None


class Asked(NamedTuple):
    """Scores of all pairs, what they were made with, and the texts of pairs as the model sees them.

    Attributes:
        scores: of every pair.
        weights: of the members; or of the passes, if the first member was asked with dropout.
        tie_strength: ν of votes.
        made_with: what margins are, for a machine.
        told: the same for a person.
        pairs: with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        tokenizer: of the model.
        baselines: other systems' answers, by name.
        num_draws: how many members, one after another, are draws of one.
        rewards: of each pair's two answers, if the members are reward models.
    """

    scores: "list[PairScore]"
    weights: "Tensor"
    tie_strength: float
    made_with: dict[str, Any]
    told: str
    pairs: "Dataset"
    tokenizer: "PreTrainedTokenizerBase"
    baselines: "dict[str, Asked]"
    num_draws: int = 1
    rewards: "list[tuple[RewardScore, RewardScore]] | None" = None


class PairTask(Task):
    """A task that evaluates pairs. A subclass says what members' margins are, in `scores`."""

    title: ClassVar[str]

    def read(self, files: Sequence[File], settings: PairSettings) -> Read:
        (file,) = files
        groups = Groups(settings.group, group_names(file.rows, settings.group)) if settings.group else None
        return Read(file, groups, _contested(file, settings.contested) if settings.contested else None)

    def ask(self, models: Models, data: Read, settings: PairSettings) -> Asked:
        asked = self._asked(models, models.model, data, settings, "scoring", False)
        for name, other, drops in settings.rivals(models):
            asked.baselines[name] = self._asked(models, other, data, settings, f"scoring {name}", drops)
        return asked

    def _asked(self, models: Models, model: Model, data: Read, settings: PairSettings, what: str, drops: bool) -> Asked:
        """The answers of one model; with `drops` the margins of its first member in every pass with dropout."""
        import torch

        passes, rows = settings.mc_dropout if drops else 1, len(data.file.rows)
        with models.progress(what, passes * rows) as progress:

            def ask(number: int) -> Asked:
                return self.scores(model, data, settings, lambda done: progress(number * rows + done))

            found = settings.passes(model.ensemble, ask) if drops else [ask(0)]
        if not drops:
            return found[0]
        together = zip(*(asked.scores for asked in found), strict=True)
        scores = [of_pair[0]._replace(margin=[s.margin[0] for s in of_pair]) for of_pair in together]
        return found[0]._replace(scores=scores, weights=torch.full((passes,), 1 / passes), num_draws=1)

    @abstractmethod
    def scores(self, model: Model, data: Read, settings: Any, progress: Callable[[int], object]) -> Asked:
        """Scores of all pairs under every member of a model."""

    def evaluate(self, data: Read, answers: Asked, settings: Any) -> "PreferenceEvaluation":
        from renyi.evaluation.preference_quality import evaluate_preference
        from renyi.evaluation.vote_quality import evaluate_votes

        groups = data.groups.of_rows if data.groups else None
        rivals = {**answers.baselines, **_with_temperature(answers)}
        given = {name: (a.scores, a.weights) for name, a in rivals.items()}
        found = evaluate_preference(answers.scores, answers.weights, groups, data.contested, given)
        if answers.scores[0].votes is None:
            return found
        systems = {"mixture": answers, **rivals}
        votes = [evaluate_votes(a.scores, a.weights, a.tie_strength, name) for name, a in systems.items()]
        if len(answers.weights) > 1:
            votes.insert(1, evaluate_votes(*_moments(answers), name="members' mean and variance"))
        return found._replace(votes=votes)

    def result(
        self, data: Read, answers: Asked, found: "PreferenceEvaluation", settings: PairSettings
    ) -> dict[str, Any]:
        return {"task": self.name, **as_json(answers.made_with), **as_json(found)}

    def lines(
        self, data: Read, answers: Asked, found: "PreferenceEvaluation", settings: PairSettings
    ) -> Iterator[dict[str, Any]]:
        lines = ({**s._asdict(), "epistemic_share": s.epistemic_share} for s in answers.scores)
        return ({name: value for name, value in line.items() if value is not None} for line in lines)

    def report(self, data: Read, answers: Asked, found: "PreferenceEvaluation", settings: PairSettings) -> Report:
        doubt = (
            f"epistemic uncertainty {found.epistemic:.4f} nats a pair, "
            f"on average {found.epistemic_share:.1%} of a pair's uncertainty"
        )
        if found.within_members is not None:
            doubt += f" · {found.within_members:.4f} within members, {found.between_members:.4f} between them"
        sections: list[Section] = [
            _quality(found, answers.weights.tolist()),
            *self.own_sections(found, settings),
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
        subtitle = f"{plural(found.pairs, 'pair')} · {answers.told}"
        return Report(self.title, subtitle, sections, lambda: _page(data, answers, settings, found))

    def own_sections(self, found: "PreferenceEvaluation", settings: Any) -> list[Section]:
        """What a subclass has to show beside."""
        return []


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
    """The mixture, every member and the baselines."""
    systems = [("mixture", "", found.mixture)]
    systems += [(f"member {m}", f"{w:.3f}", q) for m, (w, q) in enumerate(zip(weights, found.members, strict=True))]
    systems += [(name, "", q) for name, q in (found.baselines or {}).items()]
    rows: list[list[Cell]] = [
        [shortened(name, LONGEST_NAME), weight, q.accuracy, q.nll, q.brier, q.ece] for name, weight, q in systems
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
            *(
                shortened(v.name, LONGEST_NAME),
                v.accuracy,
                v.nll,
                v.nll_held_out,
                v.calibration,
                v.probability_calibration,
            ),
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
    return scores, torch.ones(1), answers.tie_strength


def _with_temperature(answers: Asked) -> dict[str, Asked]:
    """A single member's margins over a temperature: the first baseline of one member, or member 0.

    The temperature of each half of the pairs is fitted on the other half. One pair has no other half.
    """
    import torch

    from renyi.evaluation.metrics import cross_fitted_temperatures

    rivals = answers.baselines.items()
    name, single = next(((n, a) for n, a in rivals if len(a.weights) == 1), ("member 0", answers))
    if len(single.scores) < 2:
        return {}
    opinion = _opinion(single).log_probs[0].numpy()
    temperatures = cross_fitted_temperatures(opinion, _right(single)).tolist()
    scores = [s._replace(margin=[s.margin[0] / t]) for s, t in zip(single.scores, temperatures, strict=True)]
    return {f"{name}, temperature": single._replace(scores=scores, weights=torch.ones(1), num_draws=1)}


def _opinion(answers: Asked) -> "Opinion":
    """Which completion each member prefers, as its opinion on a question with two options."""
    import torch
    from torch.nn.functional import logsigmoid

    from renyi.evaluation.choice_quality import Opinion

    margin_MN = torch.tensor([s.margin for s in answers.scores], dtype=torch.float64).T
    return Opinion(
        logsigmoid(torch.stack([margin_MN, -margin_MN], dim=-1)), answers.weights.cpu(), num_draws=answers.num_draws
    )


def _right(answers: Asked) -> list[int]:
    """The right option of each pair: 0, the chosen completion, or 1 if most votes are for the rejected one."""
    from renyi.evaluation.preference_quality import is_turned

    return [int(is_turned(score)) for score in answers.scores]


def _page(data: Read, answers: Asked, settings: PairSettings, evaluation: "PreferenceEvaluation") -> list[Section]:
    """The page's additional sections. A pair counts as a question whose right answer is the preferred completion."""
    from renyi.evaluation.choice_quality import evaluate_choice

    opinion, right = _opinion(answers), _right(answers)
    rivals = {**answers.baselines, **_with_temperature(answers)}
    found = evaluate_choice(
        opinion,
        right,
        baselines={name: _opinion(rival) for name, rival in rivals.items()},
        groups=data.groups.of_rows if data.groups else None,
        resamples=settings.resamples,
    )
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
