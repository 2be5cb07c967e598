"""From preference rows to tokens, exactly as training sees them.

As in `prepare.py`, TRL's own preparation does the work; this file adds an error, naming the row, where TRL would drop a
pair, cut the end of its prompt, or train on two sides that are the same. It knows nothing about models or batches.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from renyi.data.pairs import check_pairs, template_settings, with_pairs
from renyi.data.prepare import RowPreparation, check_can_tokenise, countable, nothing_left
from renyi.data.rows import ROW_COLUMN, number_rows
from renyi.errors import DataError

_SIDES = ("chosen", "rejected")
_TEMPLATE_ERRORS = (TemplateError, TypeError)  # a template says no, or meets what it does not expect


@dataclass(frozen=True)
class PairPreparation(RowPreparation):
    """The settings that decide the tokens of preference pairs; a prompt and a completion are cut together.

    Attributes:
        max_length: tokens after which they are cut; None for no limit.
        truncation_mode: which end is kept.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"

    def check(self, rows: Dataset, name: str = "dataset") -> str:
        return check_pairs(rows, name)

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        return with_pairs(rows, name)

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str = "dataset") -> Dataset:
        return prepare_pairs(rows, tokenizer, self, name)


def prepare_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: PairPreparation, name: str = "dataset"
) -> Dataset:
    """Turn pairs of any form into columns `prompt_ids`, `chosen_ids` and `rejected_ids`, one row each, in order.

    This is what TRL's DPOTrainer trains on with the same settings; its collator then cuts to `max_length`.

    Raises:
        DataError: a row is malformed, loses the end of its prompt, or leaves nothing to compare.
        TokenizerError: text needs an end-of-text token to close it, or messages a chat template, and there is none.
    """
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(**asdict(settings), dataset_num_proc=None)

    def by_trl(rows: Dataset) -> Dataset:
        # The one private thing used here: as a plain function, the method needs nothing but this attribute.
        return DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, name)  # type: ignore[arg-type]

    return checked_pairs(dataset, tokenizer, settings, name, by_trl)


def checked_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: PairPreparation,
    name: str,
    by_trl: Callable[[Dataset], Dataset],
) -> Dataset:
    """Prepare pairs with `by_trl`, and raise where TRL would fail obscurely or lose something in silence.

    Args:
        dataset: as it was loaded; may be numbered by `number_rows` already.
        tokenizer: what `by_trl` tokenises with.
        settings: what `by_trl` prepares for.
        name: what to call the dataset.
        by_trl: the preparation of TRL's DPOTrainer.

    Raises:
        DataError, TokenizerError: as `prepare_pairs`.
    """
    dataset = with_pairs(dataset, name)
    check_pairs(dataset, name)
    is_text = isinstance(dataset[0]["chosen"], str)
    check_can_tokenise(tokenizer, is_text)
    # TRL may look at these columns, too, to tell text from messages.
    numbered = number_rows(dataset.remove_columns([c for c in ("messages", "completion") if c in dataset.column_names]))
    try:
        prepared = by_trl(numbered)
    except _TEMPLATE_ERRORS:
        if not is_text:
            _check_rendering(numbered, tokenizer, name)
        raise
    if not is_text:
        _check_prompts(prepared, tokenizer, name)
    _check_left(prepared, numbered, settings, name)
    return prepared.remove_columns(ROW_COLUMN)


def _check_rendering(numbered: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `DataError` for the first row whose conversations the chat template refuses."""
    for row in numbered:
        try:
            for side in _SIDES:
                _rendered(tokenizer, row.get("prompt", []) + row[side], row)
        except _TEMPLATE_ERRORS as error:
            raise DataError(
                f"the chat template refuses the conversation ({error})",
                where=f"{name}, row {row[ROW_COLUMN] + 1}",
                hint="Change the row, or give another template by --chat_template_path.",
            ) from error


def _check_prompts(prepared: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `DataError` for the first conversation that does not begin with its prompt once both are rendered.

    Text is compared: where only tokens of the prompt merged with the answer's, as in plain text, nothing is lost.
    """
    for row in prepared:
        prompt = _rendered(tokenizer, row["prompt"], row, add_generation_prompt=True)
        if all(_rendered(tokenizer, row["prompt"] + row[side], row).startswith(prompt) for side in _SIDES):
            continue
        ids: Any = _rendered(tokenizer, row["prompt"], row, add_generation_prompt=True, tokenize=True)
        raise DataError(
            "the rendered conversation does not begin with the rendered prompt, whose end is lost: "
            f"{tokenizer.decode(ids[len(row['prompt_ids']) :])!r}",
            where=f"{name}, row {row[ROW_COLUMN] + 1}",
            hint="Use a chat template that renders a prompt alone as it does before an answer (chat_template_path), "
            "or settings that make it (a column chat_template_kwargs).",
        )


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Any], row: dict[str, Any], **options: Any) -> Any:
    """Messages of a row as TRL renders them, as text unless `tokenize` is set."""
    return tokenizer.apply_chat_template(
        messages, **{"tokenize": False, "return_dict": False, **template_settings(row), **options}
    )


def _check_left(prepared: Dataset, numbered: Dataset, settings: PairPreparation, name: str) -> None:
    """Raise `DataError` if a side has no trained token after the cut, or both sides are the same."""
    rows = np.asarray(prepared[ROW_COLUMN])
    tokens, trained = _kept(prepared, settings)
    left = rows[(trained > 0).all(axis=0)]
    lost = np.setdiff1d(numbered[ROW_COLUMN], left)
    if len(lost):
        hint = (
            f"With max_length {settings.max_length} its prompt leaves no room for an answer: raise max_length, shorten "
            "the row, or remove it."
        )
        raise nothing_left(lost.tolist(), hint, name)
    # Only sides of the same lengths can be the same.
    for i in np.flatnonzero((tokens[0] == tokens[1]) & (trained[0] == trained[1])):
        row = prepared[int(i)]
        left_of = _cut(len(row["prompt_ids"]), settings)
        if row["chosen_ids"][left_of] == row["rejected_ids"][left_of]:
            are_cut = row["chosen_ids"] != row["rejected_ids"]
            raise DataError(
                "chosen and rejected are the same tokens" + (f" within max_length {settings.max_length}" * are_cut),
                where=f"{name}, row {rows[i] + 1}",
                hint="Raise max_length, shorten the row, or remove it." if are_cut else "Remove the row.",
            )


def _cut(prompt: int, settings: PairPreparation) -> slice:
    """What is left of a completion after a prompt of so many tokens."""
    if settings.max_length is None:
        return slice(None)
    if settings.truncation_mode == "keep_start":
        return slice(settings.max_length - prompt)
    return slice(-settings.max_length, None)


class PairCounts(NamedTuple):
    """How much a prepared dataset of pairs holds within `max_length`: both sides, each with its prompt."""

    pairs: int
    tokens: int
    trained: int


def count_pairs(prepared: Dataset | IterableDataset, settings: PairPreparation) -> PairCounts:
    """Count the pairs, their tokens, and the tokens of their completions that are predicted.

    Raises:
        ConfigError: the dataset is streamed, so nobody knows.
    """
    prepared = countable(prepared, "pairs")
    tokens, trained = _kept(prepared, settings)
    return PairCounts(len(prepared), int(tokens.sum()), int(trained.sum()))


def _kept(prepared: Dataset, settings: PairPreparation) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [2, pairs] that the cut leaves of chosen and rejected with their prompt, and how many are trained.

    A sequence's first token is never predicted, so never trained.
    """
    prompt, *completions = _lengths(prepared)
    completion = np.stack(completions)
    tokens = prompt + completion
    if settings.max_length is not None:
        tokens = np.minimum(tokens, settings.max_length)
    if settings.truncation_mode == "keep_start":
        trained = tokens - np.maximum(prompt, 1)
    else:
        trained = np.minimum(completion, tokens - 1)
    return tokens, np.maximum(trained, 0)


def _lengths(prepared: Dataset) -> np.ndarray:
    """The lengths [3, pairs] of prompts, chosen and rejected completions, in tokens."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    chunks = [np.zeros((3, 0), int)]
    for table in prepared.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        lengths = [table[column].combine_chunks().value_lengths() for column in columns]
        chunks.append(np.stack([column.to_numpy(zero_copy_only=False) for column in lengths]))
    return np.concatenate(chunks, axis=1)
