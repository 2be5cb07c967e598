"""Whether a sample is right: compared with a column of answers, or by a user's own function.

Texts are compared after the normalisation of `renyi.evaluation.sample_quality`. Start with `read_check`.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from renyi.errors import ConfigError, DataError
from renyi.evaluation.files import column_values
from renyi.named import named_function

if TYPE_CHECKING:
    from datasets import Dataset

ANSWER = "answer"
REGEX = "regex:"
CHECKS = "exact, contains, regex:PATTERN or package.module:function"
_CALLED_WITH = "a prompt, a sample and the row, and returns true or false"
_WHERE = "check"


class Verdict(NamedTuple):
    """What a sample answers (None: nothing), and whether that is right (None: the right answer is not known)."""

    answer: str | None
    right: bool | None


Judge = Callable[[int, str], Verdict]  # of a row, counted from 0, and a sample


class Check(NamedTuple):
    """How answers are checked, in a user's words, and the function that checks; None if there is no check."""

    how: str | None
    judge: Judge


def read_check(rows: "Dataset", column: str | None, how: str | None, data: str) -> Check:
    """The check that flags ask for, of samples of rows with a column `prompt`.

    Args:
        rows: the dataset.
        column: the column with the right answer, or with a list of right answers; by default `answer`, if it exists.
        how: one of `CHECKS`; by default exact, or nothing if no column holds answers.
        data: the name of the dataset, for errors.

    Raises:
        ConfigError, DataError: there is nothing to check by, an answer is missing, or a pattern or function is wrong.
    """
    from renyi.evaluation.sample_quality import contains_answer, normalised

    if how is not None and not how.startswith(REGEX) and ":" in how:
        return Check(how, _by_function(how, rows))
    if column is None and ANSWER not in rows.column_names:
        if how is None:
            return Check(None, lambda row, sample: Verdict(normalised(sample), None))
        raise ConfigError(
            f"there is no column {ANSWER!r} to check samples against",
            where=_WHERE,
            hint=f"Name one with --answer; the columns are {', '.join(rows.column_names)}.",
        )
    accepted = _accepted(rows, column or ANSWER, data)
    how = how or "exact"
    if how == "contains":
        return Check(
            how,
            lambda row, sample: Verdict(normalised(sample), any(contains_answer(sample, a) for a in accepted[row])),
        )
    right = [{normalised(answer) for answer in answers} for answers in accepted]
    if how == "exact":
        return Check(how, lambda row, sample: Verdict(normalised(sample), normalised(sample) in right[row]))
    if how.startswith(REGEX):
        pattern = _pattern(how.removeprefix(REGEX))

        def by_pattern(row: int, sample: str) -> Verdict:
            match = pattern.search(sample)
            answer = normalised(match[1]) if match and match[1] is not None else None
            return Verdict(answer, answer in right[row])

        return Check(how, by_pattern)
    raise ConfigError(f"{how!r} is no check", where=_WHERE, hint=f"Give {CHECKS}.")


def _accepted(rows: "Dataset", column: str, data: str) -> list[list[str]]:
    """The right answers of every row, at least one each."""
    from renyi.evaluation.sample_quality import normalised

    found = []
    for number, value in enumerate(column_values(rows, column, "answer"), start=1):
        answers = [_as_text(one) for one in (value if isinstance(value, list) else [value])]
        if not answers or not all(answer is not None and normalised(answer) for answer in answers):
            raise DataError(
                f"is {value!r}",
                where=f"{data}, row {number}, column {column}",
                hint="Give text that is more than punctuation, a number, or a list of them, or remove the row.",
            )
        found.append([answer for answer in answers if answer is not None])
    return found


def _as_text(value: Any) -> str | None:
    """An answer as text. 3.0 becomes "3", because a column with gaps holds 3 as 3.0."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, str | int) else None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ConfigError(f"{text!r} is no regular expression ({error})", where=_WHERE, hint="Correct it.") from error
    if not pattern.groups:
        hint = "Put what is compared with the answer into parentheses, as in regex:The answer is (.+)"
        raise ConfigError(f"{text!r} has no group", where=_WHERE, hint=hint)
    return pattern


def _by_function(name: str, rows: "Dataset") -> Judge:
    """A user's function as a judge. An error in it is reported together with the row that caused it."""
    import numpy as np

    from renyi.evaluation.sample_quality import normalised

    function = named_function(name, _WHERE, _CALLED_WITH)

    def by_function(row: int, sample: str) -> Verdict:
        where, values = f"{_WHERE}, on row {row + 1}", rows[row]
        prompt = values["prompt"] if isinstance(values["prompt"], str) else values["prompt"][-1]["content"]
        try:
            right = function(prompt, sample, values)
        except Exception as error:
            raise ConfigError(
                f"{name} raised {type(error).__name__} ({error})",
                where=where,
                hint=f"It is called with {_CALLED_WITH}.",
            ) from error
        if not isinstance(right, bool | np.bool_):
            raise ConfigError(
                f"{name} gave {right!r}", where=where, hint="Return true if the sample is right, or false."
            )
        return Verdict(normalised(sample), bool(right))

    return by_function
