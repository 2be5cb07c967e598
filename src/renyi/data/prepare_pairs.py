"""Turns preference rows into tokens. Training, scoring and display all use it.

`prepare_pairs` gives the same tokens as TRL's DPOTrainer; a test checks that. Where TRL would drop a pair, cut the end
of its prompt, or train on two equal sides, `prepare_pairs` raises an error that names the row.

Read next: `training/dpo.py`, the trainer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from renyi.data.files import new_fingerprint
from renyi.data.groups import GROUP_COLUMN, check_groups, check_has_group, group_of, with_group
from renyi.data.pairs import PREPARED, check_pairs, pair_form, read_pair
from renyi.data.prepare import (
    NO_LIMITS,
    CompletionPreparation,
    Limits,
    check_ids,
    closed,
    common_length,
    countable,
    nothing_left,
)
from renyi.data.rendering import chat_text, chat_tokens, check_can_tokenise, for_template, text_tokens
from renyi.data.rows import Form, are_exact, check_not_empty, columns_of, numbered_rows, only_columns, row_name
from renyi.data.votes import ANNOTATIONS, ANNOTATOR, LABELS, VOTE_COLUMNS, Annotation, read_annotations, read_votes
from renyi.errors import DataError

_SIDES = ("chosen", "rejected")
_BY = ANNOTATIONS  # the column of tokenised pairs that is turned into rows
_VERSION = 3  # version of this computation: prepared datasets on disk from another version are not used
Rows = TypeVar("Rows", Dataset, IterableDataset)


@dataclass(frozen=True)
class PairPreparation(CompletionPreparation):
    """The settings that decide the tokens of preference pairs.

    Attributes:
        max_length: number of tokens after which a prompt with its completion is cut; None for the model's limit only.
        truncation_mode: which end is kept, "keep_start" or "keep_end".
        routing_group: the column of the groups whose rows share a responsibility; None if every row has its own.
            "annotator" makes a row of each of a pair's annotations.
    """

    truncation_mode: str = "keep_start"
    routing_group: str | None = None

    def check(self, rows: Dataset, name: str = "dataset") -> Form:
        form = check_pairs(rows, name)
        if self.routing_group is None:
            return form
        if self.by_annotation(form):
            for row, at in numbered_rows(rows, (ANNOTATIONS,), name):
                _named(read_annotations(row, at), at)
        else:
            check_groups(rows, self.routing_group, name)
        return with_group(form, rows, self.routing_group)

    def form(self, rows: Any, name: str = "dataset") -> Form:
        return with_group(pair_form(rows, name), rows, self.routing_group)

    def by_annotation(self, form: Form) -> bool:
        """Whether the rows have annotations, and these are grouped by their annotator."""
        return self.routing_group == ANNOTATOR and ANNOTATIONS in form.kept

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        if set(PREPARED) <= set(columns_of(rows)):
            return rows
        form = self.form(rows, name)
        if self.routing_group is not None and not self.by_annotation(form):
            check_has_group(rows, self.routing_group, name)
        return only_columns(rows, form)

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
    """Turn pairs of any form into rows with columns `prompt_ids`, `chosen_ids` and `rejected_ids`, in the same order.

    TRL's DPOTrainer trains on these rows with the same settings. Its collator then cuts them to `max_length`.

    Args:
        rows: rows as loaded, streamed or not; they may be numbered by `number_rows`. Rows that are already prepared
            are returned as they are.
        tokenizer: the base's tokenizer.
        settings: how to prepare the pairs.
        name: a name of the dataset, for messages.
        limits: the limits of the base. Tokens beyond its positions count as lost. An id without an embedding is an
            error.
        num_proc: number of processes that share the work.

    Raises:
        DataError: a row is malformed, loses the end of its prompt, or leaves nothing to compare.
        TokenizerError: the rows are text and the tokenizer has no end-of-text token, or they are messages and it has no
            chat template.
    """
    if isinstance(rows, Dataset):
        check_not_empty(rows, name)
    columns = columns_of(rows)
    if set(PREPARED) <= set(columns):
        return rows
    form = settings.form(rows, name)
    one = _Tokenise(tokenizer, settings.within(limits), form, are_exact(rows, form.columns), name, limits)
    if not isinstance(rows, Dataset):
        tokens = rows.map(one, with_indices=True, remove_columns=columns)
        return tokens.map(_by_annotator, batched=True, remove_columns=[_BY]) if settings.by_annotation(form) else tokens
    prepared = rows.map(
        one,
        with_indices=True,
        fn_kwargs={"version": _VERSION, "is_streamed": False},
        remove_columns=columns,
        features=one.features,
        num_proc=num_proc,
        new_fingerprint=new_fingerprint(rows),
        desc=f"Tokenising {name}",
    )
    _check_left(prepared, rows, settings.within(limits), name)
    if settings.by_annotation(form):
        features = Features({c: f for c, f in one.features.items() if c != _BY} | {GROUP_COLUMN: Value("string")})
        prepared = prepared.map(
            _by_annotator,
            batched=True,
            features=features,
            remove_columns=[_BY],
            fn_kwargs={"version": _VERSION},
            new_fingerprint=new_fingerprint(prepared),
        )
    return prepared


class _Tokenise:
    """Turns one pair into tokens."""

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
        self.votes = tuple(c for c in form.kept if c != settings.routing_group)
        self.by_annotation = settings.by_annotation(form)
        self.grouped = settings.routing_group in form.kept

    @property
    def features(self) -> Features:
        """The columns of prepared pairs."""
        features: dict[str, Any] = {column: List(Value("int32")) for column in PREPARED}
        if self.by_annotation:
            features[_BY] = List({ANNOTATOR: Value("string"), "label": Value("string")})
        if self.votes:
            features |= {column: Value("int32") for column in VOTE_COLUMNS}
        if self.grouped:
            features[GROUP_COLUMN] = Value("string")
        return Features(features)

    def __call__(
        self, row: Mapping[str, Any], index: int, version: int = _VERSION, is_streamed: bool = True
    ) -> dict[str, Any]:
        where = row_name(row, index, self.name)
        read = read_pair(row, self.form, where, self.exact)
        is_text = isinstance(read["chosen"], str)
        check_can_tokenise(self.tokenizer, is_text)
        prompt, sides = self._text(read, where) if is_text else self._chat(read, where)
        shared = min(common_length(prompt, side) for side in sides)
        if shared < len(prompt) and not is_text:
            self._check_prompt(read, prompt[shared:], where)
        for side in sides:
            check_ids(side, self.limits, where, self.tokenizer)
        made: dict[str, Any] = dict(zip(PREPARED, (prompt[:shared], *(side[shared:] for side in sides)), strict=True))
        if is_streamed:
            self._check_left(made, where)
        votes = read_votes(row, self.votes, where)
        if votes is not None:
            made |= dict(zip(VOTE_COLUMNS, votes, strict=True))
        if self.by_annotation:
            made[_BY] = [a._asdict() for a in _named(read_annotations(row, where), where)]
        if self.grouped and self.settings.routing_group is not None:
            made[GROUP_COLUMN] = group_of(row, self.settings.routing_group, where)
        return made

    def _text(self, read: Mapping[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
        """The tokens of the prompt, and the tokens of the prompt with each of the two completions."""
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
        """Raise `DataError` if the rendered conversation does not begin with the rendered prompt.

        The texts are compared and not the tokens. A token may hold the end of the prompt and the beginning of the
        answer, as in plain text; then nothing is lost.
        """
        options = for_template(read)
        prompt = chat_text(self.tokenizer, read["prompt"], where, {"add_generation_prompt": True, **options})
        whole = [chat_text(self.tokenizer, [*read["prompt"], *read[side]], where, options) for side in _SIDES]
        if all(text.startswith(prompt) for text in whole):
            return
        raise DataError(
            "the rendered conversation does not begin with the rendered prompt, so the end of the prompt is lost: "
            f"{self.tokenizer.decode(lost)!r}",
            where=where,
            hint="The chat template must render a prompt in the same way with and without an answer. Give another "
            "template (chat_template_path), or set its options in a column chat_template_kwargs.",
        )

    def _check_left(self, made: Mapping[str, list[int]], where: str) -> None:
        """The check of the function `_check_left`, for one row of a streamed dataset."""
        lengths = np.array([[len(made[column])] for column in PREPARED])
        tokens, trained = _kept(lengths, self.settings)
        if not (trained > 0).all():
            raise DataError("no trained token is left", where=where, hint=_lost_hint(self.settings))
        if (tokens[0] == tokens[1]).all() and (trained[0] == trained[1]).all():
            _check_different(made, self.settings, where)


def _named(annotations: list[Annotation], where: str) -> list[Annotation]:
    if any(a.annotator is None for a in annotations):
        raise DataError(
            "has an annotation without an annotator",
            where=f"{where}, column {ANNOTATIONS}",
            hint="With routing_group: annotator every annotation needs the name of its annotator.",
        )
    return annotations


def _by_annotator(columns: dict[str, list[Any]], version: int = _VERSION) -> dict[str, list[Any]]:
    """A row for each annotation of a pair: the pair with this one vote, and the annotator as its group."""
    rows = [(i, a) for i, annotations in enumerate(columns.pop(_BY)) for a in annotations]
    made: dict[str, list[Any]] = {c: [columns[c][i] for i, _ in rows] for c in PREPARED}
    for column, label in zip(VOTE_COLUMNS, LABELS, strict=True):
        made[column] = [int(a["label"] == label) for _, a in rows]
    return made | {GROUP_COLUMN: [a[ANNOTATOR] for _, a in rows]}


def _lost_hint(settings: PairPreparation) -> str:
    return (
        f"With max_length {settings.max_length} its prompt leaves no room for an answer: raise max_length, shorten "
        "the row, or remove it."
    )


def _check_left(prepared: Dataset, rows: Dataset, settings: PairPreparation, name: str) -> None:
    """Raise `DataError` if a side has no trained token after the cut, or if both sides are equal."""
    tokens, trained = _kept(_lengths(prepared), settings)
    lost = np.flatnonzero(~(trained > 0).all(axis=0))
    if len(lost):
        raise nothing_left(rows, lost.tolist(), _lost_hint(settings), name)
    # Only sides of equal lengths can be equal.
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
    """The part of a completion that is left after the cut, if the prompt has `prompt` tokens."""
    if settings.max_length is None:
        return slice(None)
    if settings.truncation_mode == "keep_start":
        return slice(settings.max_length - prompt)
    return slice(-settings.max_length, None)


class PairCounts(NamedTuple):
    """The size of a prepared dataset of pairs within `max_length`. Both sides count, each with its prompt."""

    pairs: int
    tokens: int
    trained: int


def count_pairs(prepared: Dataset | IterableDataset, settings: PairPreparation) -> PairCounts:
    """Count the pairs, their tokens, and the trained tokens of their completions.

    Raises:
        ConfigError: the dataset is streamed, so its size is unknown.
    """
    prepared = countable(prepared, "pairs")
    tokens, trained = _kept(_lengths(prepared), settings)
    return PairCounts(len(prepared), int(tokens.sum()), int(trained.sum()))


def count_cut_pairs(prepared: Dataset | IterableDataset, settings: PairPreparation) -> int:
    """The number of pairs that are cut at `max_length`; 0 if the dataset is streamed."""
    if not isinstance(prepared, Dataset) or settings.max_length is None:
        return 0
    prompt, *completions = _lengths(prepared)
    return int((prompt + np.stack(completions).max(axis=0) > settings.max_length).sum())


def _kept(lengths: np.ndarray, settings: PairPreparation) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens [2, pairs] of chosen and rejected with their prompt after the cut, and of trained tokens.

    A sequence's first token is never predicted, so it never counts as trained.
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
