"""Prepares preference pairs for reward models: whole texts instead of prompts and completions, margins and votes.

The tokens are those of TRL's RewardTrainer; a test checks that. A text is never cut, because its reward is read at its
end. Where TRL would drop a pair that is too long, `prepare_rated` raises an error that names the row. Read next:
`prepare_pairs.py`, whose tokens these are, and `training/reward.py`, the trainer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from renyi.data.pairs import check_pairs, pair_form
from renyi.data.prepare import NO_LIMITS, CompletionPreparation, Limits, closed
from renyi.data.prepare_pairs import PairPreparation, prepare_pairs
from renyi.data.rendering import chat_tokens, text_tokens
from renyi.data.rows import FILE_COLUMN, RIVALS, ROW_COLUMN, Form, columns_of, numbered_rows, row_name
from renyi.errors import DataError

MARGIN = "margin"
PREPARED_RATED = ("chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class RatedPreparation(CompletionPreparation):
    """The settings that decide the tokens of pairs for a reward model.

    Attributes:
        max_length: the greatest number of tokens of a prompt with its completion; None for the model's limit only.
    """

    def check(self, rows: Dataset, name: str = "dataset") -> Form:
        form = check_pairs(rows, name)
        if MARGIN in rows.column_names:
            for row, at in numbered_rows(rows, (MARGIN,), name):
                _margin(row, at)
        return self._with_margin(form, name)

    def form(self, rows: Any, name: str = "dataset") -> Form:
        return self._with_margin(pair_form(rows, name), name)

    @staticmethod
    def _with_margin(form: Form, name: str) -> Form:
        if MARGIN not in form.left_out:
            return form
        if form.kept:
            hint = "Drop one of the two: votes say by themselves how sure the annotators are."
            raise DataError(f"does not go with {form.kept[0]}", where=f"{name}, column {MARGIN}", hint=hint)
        left_out = tuple(c for c in form.left_out if c != MARGIN)
        return replace(form, columns=(*form.columns, MARGIN), left_out=left_out)

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        if set(PREPARED_RATED) <= set(columns_of(rows)):
            return rows
        form = self.form(rows, name)
        kept = {*form.columns, *form.kept, *RIVALS, ROW_COLUMN, FILE_COLUMN}
        return rows.remove_columns([c for c in columns_of(rows) if c not in kept])

    def prepare(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str = "dataset", limits: Limits = NO_LIMITS
    ) -> Any:
        return prepare_rated(rows, tokenizer, self, name, limits)


def prepare_rated(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: RatedPreparation,
    name: str = "dataset",
    limits: Limits = NO_LIMITS,
    num_proc: int | None = None,
) -> Any:
    """Turn pairs of any form into rows of `chosen_ids` and `rejected_ids`, with a margin or votes if they have them.

    Args:
        rows: rows as loaded, streamed or not; they may be numbered by `number_rows`. Rows that are already prepared
            are returned as they are.
        tokenizer: the base's tokenizer.
        settings: how to prepare the pairs.
        name: a name of the dataset, for messages.
        limits: the limits of the base. An id without an embedding is an error.
        num_proc: number of processes that share the work.

    Raises:
        DataError: a row is malformed, or a side is longer than `max_length`; a margin is no number.
        TokenizerError: as `prepare_pairs`.
    """
    if set(PREPARED_RATED) <= set(columns_of(rows)):
        return rows
    longest = settings.within(limits).max_length
    whole = prepare_pairs(
        rows, tokenizer, PairPreparation(max_length=None), name, Limits(None, limits.vocabulary), num_proc
    )
    margins = MARGIN in columns_of(rows)
    if not isinstance(rows, Dataset):
        if margins:
            what = "margins of a streamed dataset are not read"
            raise DataError(what, where=f"{name}, column {MARGIN}", hint="Load the dataset whole, or drop the column.")
        return whole.map(_Join(None, longest, name), with_indices=True, remove_columns=["prompt_ids"])
    numbers = [c for c in (ROW_COLUMN, FILE_COLUMN, MARGIN) if c in rows.column_names]
    join = _Join(rows.select_columns(numbers) if numbers else None, longest, name)
    joined = whole.map(join, with_indices=True, remove_columns=["prompt_ids"])
    if margins:
        values = [_margin(row, row_name(row, i, name)) for i, row in enumerate(rows.select_columns(numbers))]
        joined = joined.add_column(MARGIN, values)
    return joined


def rated_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, where: str = "row") -> list[int]:
    """The tokens of an answer with its prompt as a reward model is trained on them: both text, or both messages.

    Raises:
        DataError: the text cannot be encoded, or the chat template refuses the conversation.
    """
    if isinstance(completion, str):
        return text_tokens(tokenizer, prompt + closed(completion, tokenizer), where)
    return chat_tokens(tokenizer, [*prompt, *completion], where, {})["input_ids"]


class _Join:
    """Puts a pair's prompt before both of its completions, and checks their lengths."""

    def __init__(self, numbers: Dataset | None, longest: int | None, name: str):
        self.numbers, self.longest, self.name = numbers, longest, name

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        made = {column: [*row["prompt_ids"], *row[column]] for column in PREPARED_RATED}
        for column, ids in made.items():
            if self.longest is not None and len(ids) > self.longest:
                where = row_name(self.numbers[index] if self.numbers is not None else {}, index, self.name)
                raise DataError(
                    f"has {len(ids):,} tokens with its prompt, and max_length is {self.longest:,}",
                    where=f"{where}, column {column.removesuffix('_ids')}",
                    hint="A reward is read at the end of a text, so none is cut: raise max_length, or remove the row.",
                )
        return made


def _margin(row: Mapping[str, Any], where: str) -> float:
    value, at = row.get(MARGIN), f"{where}, column {MARGIN}"
    try:
        number = float(value)  # type: ignore[arg-type]  # a cell of a csv file is text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise DataError(f"is {value!r}, not a number", where=at, hint="Give a number, 0 for no margin.")
    return number
