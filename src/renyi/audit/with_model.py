"""An audit that a model adds to: what reading alone found, and what one adapter or an ensemble says of the rows.

Read next: `measuring.py` (the figures), `judging.py` (what follows from them). `renyi.runs.audited` fits the models.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from renyi.audit.examples import Examples
from renyi.audit.findings import Audit, Group, verdicts_of
from renyi.audit.judging import (
    probable_errors,
    same_questions,
    variation_group,
    variation_of_members,
    variations_along,
    with_owners,
)
from renyi.audit.kept import Kept
from renyi.audit.measuring import Judge, Reading, candidates, exchanges, laid, read_examples
from renyi.errors import ConfigError
from renyi.inference.diagnose import Diagnosis

Progress = Callable[[int], object]
# A context around long work: what is done, and how many there are to do. It gives what is called with the number done.
Stages = Callable[[str, int], AbstractContextManager[Progress]]

MOST_DIRECTIONS = 4  # leading directions that are looked at for variations


def no_stages(what: str, total: int) -> AbstractContextManager[Progress]:
    """Shows nothing."""
    return nullcontext(lambda done: None)


class Diagnosed(NamedTuple):
    """What the stability diagnosis of an adapter left: its figures, and leading directions [P, k]."""

    figures: dict[str, Any]
    directions: Tensor

    @classmethod
    def of(cls, found: Diagnosis) -> "Diagnosed":
        figures = {
            "critical_alpha": found.critical_alpha,
            "low": found.low,
            "high": found.high,
            "contradicted": found.contradicted,
            "undecided": found.undecided,
            "eigenvalues": found.eigenvalues[:MOST_DIRECTIONS],
            "alpha": found.alpha,
            "members": found.members,
            "rows": len(found.examples),
        }
        return cls(figures, found.directions[:, :MOST_DIRECTIONS].float().contiguous())


def judged(
    found: Audit,
    examples: Examples,
    judges: Sequence[Judge],
    diagnosed: Diagnosed | None = None,
    *,
    kept: Kept | None = None,
    seed: int = 0,
    stages: Stages = no_stages,
) -> Audit:
    """An audit with what models say of some of its rows.

    Args:
        found: by reading alone, of all rows; it stays as it is.
        examples: the rows that the models read.
        judges: models; together they read every example once. One judge may have several members.
        diagnosed: directions of the first judge along which examples are laid.
        kept: figures measured before; by default nothing is kept.
        seed: of the choice of other prompts.
        stages: shows progress.

    Raises:
        ConfigError: the judges do not read every example exactly once.
        DataError, EnsembleFormatError: as `renyi.inference.score`.
    """
    if sorted(place for judge in judges for place in judge.unseen) != list(range(len(examples.rows))):
        raise ConfigError("do not read every example exactly once", where="judges")
    kept = kept or Kept(None, {})
    parts = []
    with stages("reading with the model", len(examples.rows)) as progress:
        before = 0
        for number, judge in enumerate(judges):
            ahead = before
            parts.append(
                read_examples(
                    judge,
                    examples,
                    judge.unseen,
                    kept,
                    str(number),
                    seed,
                    lambda done, ahead=ahead: progress(ahead + done),  # type: ignore[misc]
                )
            )
            before += len(judge.unseen)
    reading = Reading.joined(parts)
    groups = [Group(**vars(group)) for group in found.groups]
    added = probable_errors(examples, reading)
    wrong = np.isin(examples.rows, [row for group in added for row in group.rows])
    if not np.isnan(reading.unrelated).all():
        with stages("comparing prompts", 2 * len(candidates(examples))) as progress:
            alike = exchanges(judges, examples, reading, kept, progress)
        added += same_questions(examples, alike, groups)
    loadings = None
    if diagnosed is not None:
        with stages("laying rows along directions", len(examples.rows)) as progress:
            loadings = laid(judges[0], examples, diagnosed.directions, kept, "directions", progress)
        regular = np.array(loadings)
        regular[wrong] = 0.0  # an error is alone, and says nothing about a direction
        added += [variation_group(examples, v, reading) for v in variations_along(regular)[:1]]
    of_members = variation_of_members(reading) if len(reading.responsibilities) > 1 else None
    if of_members is not None:
        added.append(variation_group(examples, of_members, reading))
    with_owners([*groups, *added], examples, reading)
    places = [(v.file, v.row) for v in found.verdicts]
    for group in added:
        group.where = [[_place(*places[row]) for row in side.rows] for side in group.sides]
    groups = sorted([*groups, *added], key=lambda g: (g.score, -len(g.rows), g.rows[:1]))
    return Audit(
        verdicts_of(groups, places),
        groups,
        found.statements,
        found.settings,
        _measures(examples, reading, loadings, judges),
        diagnosed.figures if diagnosed is not None else None,
    )


def _place(file: str, row: int) -> str:
    return f"{file}:{row}" if file else f"row {row}"


def _measures(
    examples: Examples, reading: Reading, loadings: Any, judges: Sequence[Judge]
) -> dict[int, dict[str, Any]]:
    """What was measured of each row, by its number."""
    scale = np.ones(1) if loadings is None else np.sqrt(np.mean(loadings**2, axis=0)) + 1e-30
    several = len(reading.responsibilities) > 1
    unseen = set(judges[0].unseen)
    measures = {}
    for place, row in enumerate(examples.rows):
        fit = float(reading.fit[place])
        of_row: dict[str, Any] = {
            "fit": None if math.isnan(fit) else fit,
            "nll": float(reading.nll[place]),
            "tokens": int(reading.tokens[place]),
        }
        if loadings is not None:
            of_row["loadings"] = [float(x) for x in loadings[place] / scale]
            of_row["held_out"] = place in unseen
        if several:
            of_row["responsibilities"] = reading.responsibilities[:, place].tolist()
            of_row["owner"] = int(reading.responsibilities[:, place].argmax())
            of_row["epistemic"] = float(reading.epistemic[place])
        measures[row] = of_row
    return measures
