"""Reads multiple-choice questions from rows. An error names the bad row by its number.

Answers may be written in several ways. Which way it is, is decided once for the whole column, see `read_questions`.
Read next: `inference/choices.py`, which turns questions into prompts.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from renyi.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBERED = re.compile(r"(?:choice|option)_?(\d+)|([A-Z])")


class Question(NamedTuple):
    """A question, its options (2 to 26), and the number of the right option, counted from 0."""

    question: str
    choices: list[str]
    answer: int


def read_questions(rows: Dataset, name: str = "dataset") -> list[Question]:
    """Read the columns `question`, `answer`, and options: a list `choices`, or `choice0`, `choice1`, … or `A`, `B`, ….

    An answer may be a label, an option's text, a letter, or a number counted from 0. All answers of a column are read
    in the same way, which must fit every row:

    1. As labels, if every answer is a label of its row. Options have labels if `choices` is
       `{"text": [...], "label": [...]}`. For columns such as `option1`, `option2` or `A`, `B`, the labels are the
       numbers or letters in the columns' names.
    2. Otherwise as texts, as letters or as numbers: the one way that fits every row. If two ways fit and give different
       options for a row, this is an error.

    Raises:
        DataError: there are no such columns, a row does not fit them, or an answer can be read in two ways.
    """
    there = rows.column_names
    numbered = sorted(c for c in there if (m := _NUMBERED.fullmatch(c)) and (m[1] or "B" in there))
    numbered.sort(key=lambda c: (len(c), c))
    if not {"question", "answer"}.issubset(there) or not (numbered or "choices" in there):
        raise DataError(
            f"the columns are {', '.join(there)}",
            where=name,
            hint="A multiple-choice row has `question`, `answer`, and `choices` (or choice0, choice1, …).",
        )
    read = [_row(row, numbered, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
    answers = _answers(read, name)
    return [Question(row.question, row.choices, answer) for row, answer in zip(read, answers, strict=True)]


class _Row(NamedTuple):
    question: str
    choices: list[str]
    labels: list[str] | None
    answer: Any


def _row(row: Mapping[str, Any], numbered: list[str], where: str) -> _Row:
    choices, labels = row["choices"] if "choices" in row else [row[c] for c in numbered], None
    while "choices" not in row and choices and choices[-1] is None:  # other rows have more options
        choices = choices[:-1]
    if "choices" not in row:
        labels = [match[1] or match[2] for c in numbered[: len(choices)] if (match := _NUMBERED.fullmatch(c))]
    elif isinstance(choices, Mapping) and isinstance(choices.get("text"), list):  # as ARC and OpenBookQA have it
        choices, labels = choices["text"], choices.get("label")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        what = f"does not have 2 to {len(LETTERS)} options"
        raise DataError(what, where=where, hint="Give `choices` as a list of texts.")
    texts = [_text(c) for c in choices]
    if row["question"] is None or not str(row["question"]).strip():
        raise DataError("is empty", where=f"{where}, column question", hint="Remove the row.")
    if any(c is None for c in choices) or not all(texts):
        raise DataError("an option is empty", where=where, hint="Fill it, or remove the row.")
    if labels is not None and len(labels) != len(texts):
        raise DataError(
            f"has {len(labels)} labels for {len(texts)} options",
            where=where,
            hint="Give a label for every option, or no labels.",
        )
    return _Row(str(row["question"]), texts, None if labels is None else [_text(x) for x in labels], row["answer"])


def _text(value: Any) -> str:
    """A cell as text. 3.0 becomes "3", because a column of integers with gaps holds floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


# ---- Answers ---------------------------------------------------------------------------------------------------------


def _by_label(row: _Row, text: str) -> int | None:
    return row.labels.index(text) if row.labels is not None and row.labels.count(text) == 1 else None


def _by_text(row: _Row, text: str) -> int | None:
    return row.choices.index(text) if row.choices.count(text) == 1 else None


def _by_letter(row: _Row, text: str) -> int | None:
    is_letter = len(text) == 1 and text.upper() in LETTERS[: len(row.choices)]
    return LETTERS.index(text.upper()) if is_letter else None


def _by_number(row: _Row, text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) < len(row.choices) else None


_Reading = Callable[[_Row, str], int | None]
_READINGS: dict[str, _Reading] = {"text": _by_text, "letter": _by_letter, "number": _by_number}


def _answers(rows: Sequence[_Row], name: str) -> list[int]:
    """The option that each answer means, counted from 0."""
    for number, row in enumerate(rows, start=1):
        if row.answer is None or (isinstance(row.answer, float) and math.isnan(row.answer)):
            raise DataError(
                "is missing (None)",
                where=f"{name}, row {number}, column answer",
                hint="Give the right option, or remove the row.",
            )
    texts = [_text(row.answer) for row in rows]
    by_label = [_by_label(row, text) for row, text in zip(rows, texts, strict=True)]
    if None not in by_label:
        return [answer for answer in by_label if answer is not None]
    found = {
        kind: [reading(row, text) for row, text in zip(rows, texts, strict=True)] for kind, reading in _READINGS.items()
    }
    fitting = {kind: answers for kind, answers in found.items() if None not in answers}
    if not fitting:
        raise _no_reading(rows, found, name)
    (kind, answers), *others = fitting.items()
    for other, also in others:
        for number, (row, one, two) in enumerate(zip(rows, answers, also, strict=True), start=1):
            if one is not None and two is not None and one != two:
                raise DataError(
                    f"is {row.answer!r}, which may be the {kind} of option {LETTERS[one]} ({row.choices[one]!r}) or "
                    f"the {other} of option {LETTERS[two]} ({row.choices[two]!r})",
                    where=f"{name}, row {number}, column answer",
                    hint='Give `choices` as {"text": [...], "label": [...]}, and the label as the answer.',
                )
    return [answer for answer in answers if answer is not None]


def _no_reading(rows: Sequence[_Row], found: dict[str, list[int | None]], name: str) -> DataError:
    """The error for answers that no way of reading fits. It names the first row that does not fit."""
    possible = set(found)
    for number, row in enumerate(rows, start=1):
        here = {kind for kind, answers in found.items() if answers[number - 1] is not None}
        where = f"{name}, row {number}, column answer"
        last = len(row.choices) - 1
        if not here:
            return DataError(
                f"is {row.answer!r}, and there are {last + 1} options",
                where=where,
                hint=f"Give 0 to {last}, A to {LETTERS[last]}, or the text of an option.",
            )
        if not here & possible:
            before = " or ".join(kind for kind in found if kind in possible)
            return DataError(
                f"is {row.answer!r}, read by {' or '.join(k for k in found if k in here)}, and rows before it are read "
                f"by {before}",
                where=where,
                hint="Give all answers of the column in one way: numbers from 0, letters, or texts of options.",
            )
        possible &= here
    raise AssertionError("every row fits one reading")
