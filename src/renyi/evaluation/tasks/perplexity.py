"""How likely text is to the mixture, its members and baselines, by group.

Rows are prepared as they were for the ensemble's training. Read next: `renyi.evaluation.text_quality`, the figures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from renyi.evaluation.files import File, Groups, file_groups
from renyi.evaluation.sections import Cell, Column, Report, Section, Table
from renyi.evaluation.shared_sections import best_member, who_knows_what
from renyi.evaluation.task import Dropped, Grouped, Model, Models, Resampled, Task
from renyi.text import plural

if TYPE_CHECKING:
    from renyi.evaluation.text_quality import PerplexityEvaluation
    from renyi.inference import Score


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings(Grouped, Dropped, Resampled):
    """Settings of the perplexity task."""


class Read(NamedTuple):
    """The rows of all files, and their groups."""

    files: Sequence[File]
    groups: Groups | None


class Asked(NamedTuple):
    """Scores of all rows, numbered through, under the ensemble and under each baseline."""

    scores: "list[Score]"
    weights: Any
    baselines: "dict[str, list[Score]]"


class Perplexity(Task):
    """The likelihood of text."""

    name = "perplexity"
    Settings = PerplexitySettings
    reads_several = True

    def read(self, files: Sequence[File], settings: PerplexitySettings) -> Read:
        return Read(files, file_groups(files, settings.group))

    def ask(self, models: Models, data: Read, settings: PerplexitySettings) -> Asked:
        model = models.model
        scores = _scores(models, model, model, data.files, "scoring")
        baselines: dict[str, list[Score]] = {}
        for name, other, drops in settings.rivals(models):

            def ask(number: int, name: str = name, other: Model = other) -> "list[Score]":
                return _scores(models, other, model, data.files, f"scoring {name}")

            baselines[name] = _mean(settings.passes(other.ensemble, ask)) if drops else ask(0)
        return Asked(scores, model.ensemble.weights, baselines)

    def evaluate(self, data: Read, answers: Asked, settings: PerplexitySettings) -> "PerplexityEvaluation":
        from renyi.evaluation.text_quality import evaluate_perplexity

        return evaluate_perplexity(
            answers.scores,
            answers.weights,
            baselines=answers.baselines,
            groups=data.groups.of_rows if data.groups else None,
            resamples=settings.resamples,
        )

    def report(self, data: Read, answers: Asked, found: "PerplexityEvaluation", settings: PerplexitySettings) -> Report:
        columns: list[Column | str] = ["", Column("NLL", ".4f", "low"), Column("perplexity", ",.2f", "low")]
        rows: list[list[Cell]] = [[s.name, s.nll, s.perplexity] for s in found.systems]
        note = "NLL in nats a token · intervals of 95 % over examples"
        sections: list[Section] = [
            Table("How likely is the text?", columns, rows, note, has_intervals=settings.resamples > 0)
        ]
        if data.groups and found.groups is not None and found.specialisation is not None:
            sections += [_groups(found, data.groups.name)]
            sections += who_knows_what(found.specialisation, data.groups.name, "examples")
        subtitle = (
            f"{plural(found.examples, 'example')}, {plural(found.tokens, 'token')} · "
            f"Jensen gap {found.jensen_gap:.4f} nats a token"
        )
        return Report("Perplexity", subtitle, sections)

    def lines(
        self, data: Read, answers: Asked, found: "PerplexityEvaluation", settings: PerplexitySettings
    ) -> Iterator[dict[str, Any]]:
        return (one._asdict() for one in answers.scores)


def _scores(models: Models, model: Model, prepared_as: Model, files: Sequence[File], what: str) -> "list[Score]":
    """Scores of the rows of all files, numbered through; baselines see the same tokens as the ensemble."""
    from renyi.data import Limits, Preparation
    from renyi.inference import score

    preparation = Preparation() if prepared_as.folder is None else Preparation.read(prepared_as.folder)
    found: list[Score] = []
    for file in files:
        rows = preparation.prepare(file.rows, prepared_as.tokenizer, file.name, Limits.of(model.ensemble.base))
        with models.progress(what, len(rows)) as progress:
            scores = score(model.ensemble, rows, progress=progress)
        start = len(found)
        found += [s._replace(index=start + s.index) for s in scores]
    return found


def _mean(passes: "Sequence[list[Score]]") -> "list[Score]":
    """Scores of the mixture of all passes of the first member."""
    import torch

    from renyi.objectives import renyi_loss

    ell_SN = torch.tensor([[s.log_likelihood[0] for s in scores] for scores in passes], dtype=torch.float64)
    return [s._replace(mixture_nll=nll) for s, nll in zip(passes[0], renyi_loss(ell_SN, 1.0).tolist(), strict=True)]


def _groups(found: "PerplexityEvaluation", column: str) -> Table:
    groups = found.groups or []
    members = [Column(f"member {m}", ".4f") for m in range(len(groups[0].members))]
    rows: list[list[Cell]] = [
        [g.group, g.examples, g.tokens, g.nll, g.jensen_gap, best_member(g.members, ".4f", min), *g.members]
        for g in groups
    ]
    counts = [Column("examples", ","), Column("tokens", ",")]
    columns: list[Column | str] = [
        column,
        *counts,
        Column("NLL", ".4f"),
        Column("Jensen gap", ".4f"),
        "best member",
        *members,
    ]
    note = "nats a token; the members' columns are their NLL"
    return Table(f"By {column}", columns, rows, note, sizes=[g.tokens for g in groups], narrow=6)


TASK = Perplexity()
