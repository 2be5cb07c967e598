"""Rows of thumbs: a prompt, a completion, and a label that says whether a person found the completion good.

The tokens are those of TRL's KTOTrainer; a test checks that. Where TRL would drop a row, or read a label such as
"no" as true, `prepare_thumbs` raises an error that names the row. Read next: `training/kto.py`, the trainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from renyi.data.files import new_fingerprint
from renyi.data.groups import GROUP_COLUMN, check_groups, check_has_group, group_of, with_group
from renyi.data.prepare import (
    NO_LIMITS,
    CompletionPreparation,
    Limits,
    Preparation,
    countable,
    nothing_left,
    prepare,
)
from renyi.data.rows import (
    FILE_COLUMN,
    RIVALS,
    ROW_COLUMN,
    WHOLE_LENGTH,
    Form,
    are_exact,
    check_not_empty,
    columns_of,
    form_of,
    numbered_rows,
    read_row,
    row_name,
)
from renyi.errors import DataError
from renyi.labels import IGNORED

LABEL = "label"
PREPARED_THUMBS = ("prompt_ids", "completion_ids", LABEL)
_A_THUMB = "A row is `prompt` + `completion` + `label`, and the label is true (thumbs up) or false (thumbs down)"
_READ_AS = {"true": True, "false": False, "1": True, "0": False}  # every cell of a csv file is text
_VERSION = 1  # version of this computation: prepared datasets on disk from another version are not used
Rows = TypeVar("Rows", Dataset, IterableDataset)


@dataclass(frozen=True)
class ThumbPreparation(CompletionPreparation):
    """The settings that decide the tokens of thumbs.

    Attributes:
        max_length: number of tokens after which a prompt with its completion is cut; None for the model's limit only.
        routing_group: the column of the groups whose rows share a responsibility, such as the user who gave the thumbs;
            None if every row has its own.
    """

    routing_group: str | None = None

    def check(self, rows: Dataset, name: str = "dataset") -> Form:
        check_not_empty(rows, name)
        form = self.form(rows, name)
        exact = are_exact(rows, form.columns)
        of_row = form_of(rows, where=name)
        for row, at in numbered_rows(rows, (*form.columns, *RIVALS), name):
            read_row(row, of_row, at, exact=exact)
            read_label(row, at)
        if self.routing_group is not None:
            check_groups(rows, self.routing_group, name)
        return form

    def form(self, rows: Any, name: str = "dataset") -> Form:
        there = [c for c in columns_of(rows) if c not in (ROW_COLUMN, FILE_COLUMN)]
        missing = [c for c in ("prompt", "completion", LABEL) if c not in there]
        if missing:
            what = f"there is no column {missing[0]}: the columns are {', '.join(sorted(there))}"
            hint = f"{_A_THUMB}; rename the columns."
            if {"chosen", "rejected"} <= set(there):
                hint = f"These are pairs, which `renyi dpo` trains on. {_A_THUMB}."
            raise DataError(what, where=name, hint=hint)
        form = form_of(rows, where=name)
        if form.name != "prompt-completion":
            raise DataError(f"has a column {form.columns[0]}", where=name, hint=f"{_A_THUMB}; drop that column.")
        left_out = tuple(c for c in form.left_out if c != LABEL)
        return with_group(Form("thumbs", (*form.columns, LABEL), left_out), rows, self.routing_group)

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        if set(PREPARED_THUMBS) <= set(columns_of(rows)):
            return rows
        form = self.form(rows, name)
        if self.routing_group is not None:
            check_has_group(rows, self.routing_group, name)
        kept = {*form.columns, *form.kept, *RIVALS, ROW_COLUMN, FILE_COLUMN}
        return rows.remove_columns([c for c in columns_of(rows) if c not in kept])

    def prepare(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str = "dataset", limits: Limits = NO_LIMITS
    ) -> Any:
        return prepare_thumbs(rows, tokenizer, self, name, limits)


def read_label(row: Mapping[str, Any], where: str) -> bool:
    """Whether the thumb of a row is up.

    Raises:
        DataError: the label is missing, or it is not true or false (or 1 or 0).
    """
    value, at = row.get(LABEL), f"{where}, column {LABEL}"
    if value is None or value == "":
        raise DataError("is missing", where=at, hint="Write true (thumbs up) or false (down), or remove the row.")
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    read = _READ_AS.get(value.strip().lower()) if isinstance(value, str) else None
    if read is None:
        raise DataError(f"is {value!r}, not true or false", where=at, hint="Write true (thumbs up) or false (down).")
    return read


def prepare_thumbs(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    settings: ThumbPreparation,
    name: str = "dataset",
    limits: Limits = NO_LIMITS,
    num_proc: int | None = None,
) -> Rows:
    """Turn thumbs into rows with columns `prompt_ids`, `completion_ids` and `label`, in the same order.

    Nothing is cut here: TRL's collator cuts rows to `max_length`.

    Args:
        rows: rows as loaded, streamed or not; they may be numbered by `number_rows`. Rows that are already prepared
            are returned as they are.
        tokenizer: the base's tokenizer.
        settings: how to prepare the rows.
        name: a name of the dataset, for messages.
        limits: the limits of the base. Tokens beyond its positions count as lost. An id without an embedding is an
            error.
        num_proc: number of processes that share the work.

    Raises:
        DataError: a row is malformed, its label is no label, or no token of its completion is left after the cut.
        TokenizerError: as `prepare`.
    """
    if set(PREPARED_THUMBS) <= set(columns_of(rows)):
        return rows
    grouped: tuple[str, ...] = settings.form(rows, name).kept
    whole = Preparation(max_length=None, completion_only_loss=True)
    numbers: list[str] = [c for c in (ROW_COLUMN, FILE_COLUMN) if c in columns_of(rows)]
    keep = [LABEL, *grouped, *numbers]
    tokens: Any = prepare(rows, tokenizer, whole, name, Limits(None, limits.vocabulary), keep, num_proc)
    split = _Split(name, settings.within(limits), raises=not isinstance(rows, Dataset))
    if not isinstance(rows, Dataset):
        gone = ["input_ids", "labels", WHOLE_LENGTH, *grouped, *numbers]
        return tokens.map(split, with_indices=True, remove_columns=gone)
    ids = List(Value("int32"))
    prepared = tokens.map(
        split,
        with_indices=True,
        fn_kwargs={"version": _VERSION},
        remove_columns=tokens.column_names,
        features=Features(
            {"prompt_ids": ids, "completion_ids": ids, LABEL: Value("bool")}
            | ({GROUP_COLUMN: Value("string")} if grouped else {})
        ),
        num_proc=num_proc,
        new_fingerprint=new_fingerprint(tokens),
        desc=f"Splitting {name}",
    )
    lost = np.flatnonzero(_kept(prepared, settings.within(limits))[1] == 0)
    if len(lost):
        raise nothing_left(rows, lost.tolist(), _lost_hint(split.settings), name)
    return prepared


class _Split:
    """Splits a row's tokens where its completion begins, and reads its label."""

    def __init__(self, name: str, settings: ThumbPreparation, raises: bool):
        self.name, self.settings, self.raises = name, settings, raises

    def __call__(self, row: Mapping[str, Any], index: int, version: int = _VERSION) -> dict[str, Any]:
        where = row_name(row, index, self.name)
        ids, labels = row["input_ids"], row["labels"]
        begin = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
        longest = self.settings.max_length
        if self.raises and max(begin, 1) >= min(len(ids), longest or len(ids)):
            raise DataError("no trained token is left", where=where, hint=_lost_hint(self.settings))
        made = {"prompt_ids": ids[:begin], "completion_ids": ids[begin:], LABEL: read_label(row, where)}
        if self.settings.routing_group is not None and self.settings.routing_group in row:
            made[GROUP_COLUMN] = group_of(row, self.settings.routing_group, where)
        return made


def _lost_hint(settings: ThumbPreparation) -> str:
    return (
        f"With max_length {settings.max_length} its prompt leaves no room for an answer: raise max_length, shorten "
        "the row, or remove it."
    )


def check_both_kinds(labels: Sequence[bool], where: str) -> None:
    """Raise `DataError` if all thumbs point the same way: then nothing says what is good and what is bad."""
    if len(set(labels)) == 1:
        raise DataError(
            f"all {len(labels)} labels are {str(bool(labels[0])).lower()}",
            where=where,
            hint="Training on thumbs needs both kinds. To imitate answers that are all good, use `renyi sft`.",
        )


class ThumbCounts(NamedTuple):
    """The size of a prepared dataset of thumbs within `max_length`, and how many thumbs are up."""

    thumbs: int
    up: int
    tokens: int
    trained: int


def count_thumbs(prepared: Dataset | IterableDataset, settings: ThumbPreparation) -> ThumbCounts:
    """Count the thumbs, their tokens, and the trained tokens of their completions.

    Raises:
        ConfigError: the dataset is streamed, so its size is unknown.
    """
    prepared = countable(prepared, "thumbs")
    tokens, trained = _kept(prepared, settings)
    return ThumbCounts(len(prepared), int(sum(prepared[LABEL])), int(tokens.sum()), int(trained.sum()))


def count_cut_thumbs(prepared: Dataset | IterableDataset, settings: ThumbPreparation) -> int:
    """The number of rows that are cut at `max_length`; 0 if the dataset is streamed."""
    if not isinstance(prepared, Dataset) or settings.max_length is None:
        return 0
    return int((_lengths(prepared).sum(axis=0) > settings.max_length).sum())


def _kept(prepared: Dataset, settings: ThumbPreparation) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row after the cut, and how many of them are trained. A first token is never predicted."""
    prompt, completion = _lengths(prepared)
    tokens = prompt + completion
    if settings.max_length is not None:
        tokens = np.minimum(tokens, settings.max_length)
    return tokens, np.maximum(tokens - np.maximum(prompt, 1), 0)


def _lengths(prepared: Dataset) -> np.ndarray:
    """The lengths [2, rows] of prompts and completions, in tokens."""
    chunks = [np.zeros((2, 0), int)]
    for table in prepared.select_columns(list(PREPARED_THUMBS[:2])).with_format("arrow").iter(batch_size=1000):
        lengths = [table[column].combine_chunks().value_lengths() for column in PREPARED_THUMBS[:2]]
        chunks.append(np.stack([column.to_numpy(zero_copy_only=False) for column in lengths]))
    return np.concatenate(chunks, axis=1)
