"""The votes of a preference pair: how many annotators chose each side, and how many called it a tie.

A row has counts (`votes_chosen`, `votes_rejected`, `votes_tie`), or a list `annotations` of `{annotator, label}` with
labels "chosen", "rejected" and "tie". A row without either has one vote for its chosen completion. Read next:
`pairs.py`, which reads the rest of the row, and `renyi.objectives.votes`, the likelihood of votes.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from renyi.errors import DataError

LABELS = ("chosen", "rejected", "tie")
VOTE_COLUMNS = ("votes_chosen", "votes_rejected", "votes_tie")  # in rows, and in prepared rows
ANNOTATIONS, ANNOTATOR = "annotations", "annotator"


class VoteCounts(NamedTuple):
    """How many labels of each kind a pair has."""

    chosen: int
    rejected: int = 0
    tie: int = 0


class Annotation(NamedTuple):
    """One label of one annotator; the annotator may have no name."""

    annotator: str | None
    label: str


def vote_columns(columns: Iterable[str], where: str) -> tuple[str, ...]:
    """The columns of votes that a dataset has.

    Raises:
        DataError: it has counts and annotations, or counts of ties only.
    """
    there = tuple(c for c in (*VOTE_COLUMNS, ANNOTATIONS) if c in set(columns))
    if ANNOTATIONS in there and len(there) > 1:
        raise DataError(
            f"has {ANNOTATIONS} and {there[0]}, which say the same",
            where=where,
            hint="Keep the counts or the annotations, and remove the other column.",
        )
    if there and ANNOTATIONS not in there and VOTE_COLUMNS[0] not in there:
        raise DataError(
            f"has {there[0]} without votes_chosen", where=where, hint="Give votes_chosen and votes_rejected."
        )
    return there


def read_votes(row: Mapping[str, Any], columns: Iterable[str], where: str) -> VoteCounts | None:
    """The votes of a row; None if its dataset has no columns of votes.

    Args:
        row: the row as it was loaded.
        columns: of the dataset, as `vote_columns` gives them.
        where: the row's name, for messages.

    Raises:
        DataError: a count is negative or no whole number, there is no vote, a label is unknown, or an annotator has two
            opposite labels.
    """
    columns = tuple(columns)
    if not columns:
        return None
    if ANNOTATIONS in columns:
        labels = [a.label for a in read_annotations(row, where)]
        return VoteCounts(*(labels.count(label) for label in LABELS))
    votes = VoteCounts(*(_count(row.get(c), f"{where}, column {c}") if c in columns else 0 for c in VOTE_COLUMNS))
    if not any(votes):
        raise DataError(
            "has no vote: all counts are 0",
            where=f"{where}, column {columns[0]}",
            hint="Remove the row: nobody labelled it.",
        )
    return votes


def read_annotations(row: Mapping[str, Any], where: str) -> list[Annotation]:
    """The labels of a row with their annotators. Raises `DataError` as `read_votes`."""
    at = f"{where}, column {ANNOTATIONS}"
    given = row.get(ANNOTATIONS)
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except ValueError as error:
            raise DataError("is not JSON", where=at, hint=_FORM) from error
    if not isinstance(given, list) or not given:
        raise DataError("is empty" if not given else f"is {given!r}"[:80], where=at, hint=_FORM)
    found, label_of = [], dict[str, str]()
    for number, one in enumerate(given, start=1):
        if not isinstance(one, Mapping) or "label" not in one:
            raise DataError(f"has no label at place {number}", where=at, hint=_FORM)
        label, annotator = one["label"], one.get(ANNOTATOR)
        if label not in LABELS:
            raise DataError(f"has the label {label!r} at place {number}", where=at, hint=_FORM)
        if annotator is not None and not isinstance(annotator, str | int):
            raise DataError(f"has the annotator {annotator!r} at place {number}", where=at, hint="Give a name.")
        name = None if annotator is None else str(annotator)
        if name is not None and label_of.setdefault(name, label) != label:
            raise DataError(
                f"says that annotator {name!r} gave {label_of[name]!r} and {label!r}", where=at, hint=_ONE_LABEL
            )
        found.append(Annotation(name, label))
    return found


class OppositeLabels:
    """Finds an annotator who labels one pair twice, in two rows, in opposite ways."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bytes], tuple[str, str]] = {}

    def see(self, pair: Mapping[str, Any], annotations: Iterable[Annotation], where: str) -> None:
        """Look at the labels of one pair, as `read_pair` gives it. Raises `DataError` at the second, opposite one."""
        sides = [json.dumps(pair[side], sort_keys=True, default=str) for side in ("chosen", "rejected")]
        turned = sides[0] > sides[1]
        text = json.dumps([pair["prompt"], sorted(sides)], sort_keys=True, default=str)
        digest = blake2b(text.encode(), digest_size=16).digest()
        for annotation in annotations:
            if annotation.annotator is None:
                continue
            label = annotation.label
            if turned and label != "tie":
                label = "rejected" if label == "chosen" else "chosen"
            before, at = self._seen.setdefault((annotation.annotator, digest), (label, where))
            if before != label:
                raise DataError(
                    f"annotator {annotation.annotator!r} labels the pair of {at} in another way",
                    where=f"{where}, column {ANNOTATIONS}",
                    hint=_ONE_LABEL,
                )


def check_not_all_ties(votes: Iterable[VoteCounts], where: str) -> None:
    """Raise `DataError` if every label of a dataset is a tie."""
    if not any(v.chosen or v.rejected for v in votes):
        raise DataError("every label is a tie", where=where, hint="Nothing is preferred, so there is nothing to learn.")


def _count(value: Any, where: str) -> int:
    if value is None:
        return 0
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise DataError(f"is {value!r}", where=where, hint="Give a number of votes: a whole number from 0.")
    return int(value)


_FORM = 'Give a list such as [{"annotator": "ann", "label": "chosen"}], with the labels chosen, rejected and tie.'
_ONE_LABEL = "Keep one label of each annotator for a pair, or give the second one as another annotator's."
