"""Multiple-choice questions from rows, each bad row refused by its number.

It knows the columns that such files have. It does not know about prompts or tokens.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from renyi.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBERED = re.compile(r"(?:choice|option)_?(\d+)|([A-Z])")


class Question(NamedTuple):
    """A question, its options (two at least, 26 at most), and which of them is right, counted from 0."""

    question: str
    choices: list[str]
    answer: int


def read_questions(rows: Dataset, name: str = "dataset") -> list[Question]:
    """Read the columns `question`, `answer`, and options: a list `choices`, or `choice0`, `choice1`, … or `A`, `B`, ….

    The answer is a number counted from 0, a letter, or the text of an option.

    Raises:
        DataError: there are no such columns, or a row does not fit them.
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
    return [_question(row, numbered, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]


def _question(row: Mapping[str, Any], numbered: list[str], where: str) -> Question:
    choices = row["choices"] if "choices" in row else [row[c] for c in numbered]
    while "choices" not in row and choices and choices[-1] is None:  # other rows have more options
        choices = choices[:-1]
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), list):  # as ARC and OpenBookQA have it
        choices = choices["text"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"has no 2 to {len(LETTERS)} options", where=where, hint="Give `choices` as a list of texts.")
    texts = [str(c).strip() for c in choices]
    if row["question"] is None or not str(row["question"]).strip():
        raise DataError("is empty", where=f"{where}, column question", hint="Remove the row.")
    if any(c is None for c in choices) or not all(texts):
        raise DataError("an option is empty", where=where, hint="Fill it, or remove the row.")
    return Question(str(row["question"]), texts, _answer(row["answer"], texts, f"{where}, column answer"))


def _answer(value: Any, choices: list[str], where: str) -> int:
    text = str(value).strip()
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(text.upper())
    if choices.count(text) == 1:
        return choices.index(text)
    raise DataError(
        f"is {value!r}, and there are {len(choices)} options",
        where=where,
        hint=f"Give 0 to {len(choices) - 1}, A to {LETTERS[len(choices) - 1]}, or the text of an option.",
    )
