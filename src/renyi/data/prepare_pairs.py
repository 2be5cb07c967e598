"""From preference rows to tokens: the one way for training, scoring and what is shown.

`prepare_pairs` gives what TRL's DPOTrainer would (a test holds it to that), and an error that names the row where TRL
would drop a pair, cut the end of its prompt, or train on two sides that are the same. `pairs.py` says what a row means.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from renyi.data.files import new_fingerprint
from renyi.data.pairs import PREPARED, check_pairs, pair_form, read_pair
from renyi.data.prepare import (
    NO_LIMITS,
    Limits,
    RowPreparation,
    check_cut,
    check_ids,
    closed,
    common_length,
    countable,
    nothing_left,
)
from renyi.data.rendering import chat_text, chat_tokens, check_can_tokenise, for_template, text_tokens
from renyi.data.rows import Form, are_exact, check_not_empty, columns_of, only_columns, row_name
from renyi.errors import DataError

_SIDES = ("chosen", "rejected")
_VERSION = 2  # of what is computed here, for the datasets that are kept on disk
Rows = TypeVar("Rows", Dataset, IterableDataset)


@dataclass(frozen=True)
class PairPreparation(RowPreparation):
    """The settings that decide the tokens of preference pairs; a prompt and a completion are cut together.

    Attributes:
        max_length: tokens after which they are cut; None for no limit but the model's.
        truncation_mode: which end is kept.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        check_cut(self.max_length, self.truncation_mode)

    def check(self, rows: Dataset, name: str = "dataset") -> Form:
        return check_pairs(rows, name)

    def form(self, rows: Any, name: str = "dataset") -> Form:
        return pair_form(rows, name)

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        if set(PREPARED) <= set(columns_of(rows)):
            return rows
        return only_columns(rows, self.form(rows, name))

    def within(self, limits: Limits) -> Self:
        """The same, cut at the positions of a base at the latest."""
        return replace(self, max_length=limits.longest(self.max_length))

    def prepare(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str = "dataset", limits: Limits = NO_LIMITS
    ) -> Any:
        return prepare_pairs(rows, tokenizer, self, name, limits)


def prepare_pairs(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    settings: PairPreparation,
    name: str = "dataset",
    limits: Limits = NO_LIMITS,
    num_proc: int | None = None,
) -> Rows:
    """Turn pairs of any form into columns `prompt_ids`, `chosen_ids` and `rejected_ids`, one row each, in order.

    This is what TRL's DPOTrainer trains on with the same settings; its collator then cuts to `max_length`.

    Args:
        rows: as loaded, streamed or not; may be numbered by `number_rows`. Prepared rows come out as they are.
        tokenizer: of the base.
        settings: how.
        name: what to call the dataset.
        limits: of the base; what its positions would cut counts as lost, and an id without an embedding is an error.
        num_proc: processes that share the work.

    Raises:
        DataError: a row is malformed, loses the end of its prompt, or leaves nothing to compare.
        TokenizerError: text needs an end-of-text token to close it, or messages a chat template, and there is none.
    """
    if isinstance(rows, Dataset):
        check_not_empty(rows, name)
    columns = columns_of(rows)
    if set(PREPARED) <= set(columns):
        return rows
    form = pair_form(rows, name)
    one = _Tokenise(tokenizer, settings.within(limits), form, are_exact(rows, form.columns), name, limits)
    if not isinstance(rows, Dataset):
        return rows.map(one, with_indices=True, remove_columns=columns)
    prepared = rows.map(
        one,
        with_indices=True,
        fn_kwargs={"version": _VERSION, "is_streamed": False},
        remove_columns=columns,
        features=Features({column: List(Value("int32")) for column in PREPARED}),
        num_proc=num_proc,
        new_fingerprint=new_fingerprint(rows),
        desc=f"Tokenising {name}",
    )
    _check_left(prepared, rows, settings.within(limits), name)
    return prepared


class _Tokenise:
    """A pair as tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: PairPreparation,
        form: Form,
        exact: Mapping[str, bool],
        name: str,
        limits: Limits,
    ):
        self.tokenizer, self.settings, self.form, self.exact = tokenizer, settings, form, exact
        self.name, self.limits = name, limits

    def __call__(
        self, row: Mapping[str, Any], index: int, version: int = _VERSION, is_streamed: bool = True
    ) -> dict[str, list[int]]:
        where = row_name(row, index, self.name)
        read = read_pair(row, self.form, where, self.exact)
        is_text = isinstance(read["chosen"], str)
        check_can_tokenise(self.tokenizer, is_text)
        prompt, sides = self._text(read, where) if is_text else self._chat(read, where)
        shared = min(common_length(prompt, side) for side in sides)
        if shared < len(prompt) and not is_text:
            self._check_prompt(read, prompt[shared:], where)
        for side in sides:
            check_ids(side, self.limits, where)
        made = dict(zip(PREPARED, (prompt[:shared], *(side[shared:] for side in sides)), strict=True))
        if is_streamed:
            self._check_left(made, where)
        return made

    def _text(self, read: Mapping[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
        """The tokens of a prompt, and of the prompt and either completion."""
        whole = [read["prompt"] + closed(read[side], self.tokenizer) for side in _SIDES]
        sides = [text_tokens(self.tokenizer, text, where) for text in whole]
        return text_tokens(self.tokenizer, read["prompt"], where), sides

    def _chat(self, read: Mapping[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
        options = for_template(read)
        opened = {"add_generation_prompt": True, **options}
        prompt = chat_tokens(self.tokenizer, read["prompt"], where, opened)["input_ids"]
        whole = [[*read["prompt"], *read[side]] for side in _SIDES]
        return prompt, [chat_tokens(self.tokenizer, messages, where, options)["input_ids"] for messages in whole]

    def _check_prompt(self, read: Mapping[str, Any], lost: list[int], where: str) -> None:
        """Raise `DataError` for a conversation that does not begin with its prompt once both are rendered.

        Text is compared: where only tokens of the prompt merged with the answer's, as in plain text, nothing is lost.
        """
        options = for_template(read)
        prompt = chat_text(self.tokenizer, read["prompt"], where, {"add_generation_prompt": True, **options})
        whole = [chat_text(self.tokenizer, [*read["prompt"], *read[side]], where, options) for side in _SIDES]
        if all(text.startswith(prompt) for text in whole):
            return
        raise DataError(
            "the rendered conversation does not begin with the rendered prompt, whose end is lost: "
            f"{self.tokenizer.decode(lost)!r}",
            where=where,
            hint="Use a chat template that renders a prompt alone as it does before an answer (chat_template_path), "
            "or settings that make it (a column chat_template_kwargs).",
        )

    def _check_left(self, made: Mapping[str, list[int]], where: str) -> None:
        """As the function of this name, for one row."""
        lengths = np.array([[len(made[column])] for column in PREPARED])
        tokens, trained = _kept(lengths, self.settings)
        if not (trained > 0).all():
            raise DataError("no trained token is left", where=where, hint=_lost_hint(self.settings))
        if (tokens[0] == tokens[1]).all() and (trained[0] == trained[1]).all():
            _check_different(made, self.settings, where)


def _lost_hint(settings: PairPreparation) -> str:
    return (
        f"With max_length {settings.max_length} its prompt leaves no room for an answer: raise max_length, shorten "
        "the row, or remove it."
    )


def _check_left(prepared: Dataset, rows: Dataset, settings: PairPreparation, name: str) -> None:
    """Raise `DataError` if a side has no trained token after the cut, or both sides are the same."""
    tokens, trained = _kept(_lengths(prepared), settings)
    lost = np.flatnonzero(~(trained > 0).all(axis=0))
    if len(lost):
        raise nothing_left(rows, lost.tolist(), _lost_hint(settings), name)
    # Only sides of the same lengths can be the same.
    for i in np.flatnonzero((tokens[0] == tokens[1]) & (trained[0] == trained[1])):
        _check_different(prepared[int(i)], settings, row_name(rows[int(i)], int(i), name))


def _check_different(made: Mapping[str, list[int]], settings: PairPreparation, where: str) -> None:
    left_of = _cut(len(made["prompt_ids"]), settings)
    if made["chosen_ids"][left_of] == made["rejected_ids"][left_of]:
        are_cut = made["chosen_ids"] != made["rejected_ids"]
        raise DataError(
            "chosen and rejected are the same tokens" + (f" within max_length {settings.max_length}" * are_cut),
            where=where,
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
    tokens, trained = _kept(_lengths(prepared), settings)
    return PairCounts(len(prepared), int(tokens.sum()), int(trained.sum()))


def count_cut_pairs(prepared: Dataset | IterableDataset, settings: PairPreparation) -> int:
    """How many pairs lose tokens to `max_length`; 0 if the dataset is streamed."""
    if not isinstance(prepared, Dataset) or settings.max_length is None:
        return 0
    prompt, *completions = _lengths(prepared)
    return int((prompt + np.stack(completions).max(axis=0) > settings.max_length).sum())


def _kept(lengths: np.ndarray, settings: PairPreparation) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [2, pairs] that the cut leaves of chosen and rejected with their prompt, and how many are trained.

    A sequence's first token is never predicted, so never trained.
    """
    prompt, *completions = lengths
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
    chunks = [np.zeros((3, 0), int)]
    for table in prepared.select_columns(list(PREPARED)).with_format("arrow").iter(batch_size=1000):
        lengths = [table[column].combine_chunks().value_lengths() for column in PREPARED]
        chunks.append(np.stack([column.to_numpy(zero_copy_only=False) for column in lengths]))
    return np.concatenate(chunks, axis=1)
