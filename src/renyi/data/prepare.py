"""Turns rows into tokens and labels. Training, scoring and display all use it.

`prepare` gives the same tokens and labels as TRL's SFTTrainer with the same settings; a test checks that. Where TRL
would crash, train on something else, or drop a row silently, `prepare` raises an error that names the row.

Read next: `prepare_pairs.py`, the same for preference pairs, or `training/sft.py`, the trainer.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from renyi.data.files import exact_dataset, new_fingerprint
from renyi.data.groups import GROUP_COLUMN, check_groups, check_has_group, group_of, with_group
from renyi.data.messages import is_messages
from renyi.data.rendering import (
    chat_tokens,
    check_can_tokenise,
    end_of_turn,
    for_template,
    no_masks,
    text_tokens,
    training_template,
)
from renyi.data.rows import (
    FILE_COLUMN,
    ROW_COLUMN,
    WHOLE_LENGTH,
    Form,
    are_exact,
    check_losses,
    check_not_empty,
    check_rows,
    form_of,
    only_columns,
    read_row,
    row_name,
)
from renyi.errors import ConfigError, DataError, EnsembleFormatError
from renyi.labels import IGNORED

PREPARATION_FILE = "preparation.json"
_VERSION = 3  # version of this computation: prepared datasets on disk from another version are not used

Rows = TypeVar("Rows", Dataset, IterableDataset)


class Limits(NamedTuple):
    """The limits of a base model's input.

    Attributes:
        positions: the greatest number of tokens in a row; None for no limit.
        vocabulary: the number of embeddings: token ids must be below it. None if it is not known.
    """

    positions: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: Any) -> "Limits":
        """Read the limits from a transformers model."""
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        embedding = model.get_input_embeddings()
        size = getattr(embedding, "num_embeddings", None) or getattr(config, "vocab_size", None)
        return cls(positions if isinstance(positions, int) and positions > 0 else None, size)

    def longest(self, max_length: int | None) -> int | None:
        """The greatest number of tokens in a row: `max_length`, or the model's positions if these are fewer."""
        return min((n for n in (max_length, self.positions) if n is not None), default=None)


NO_LIMITS = Limits()


@dataclass(frozen=True)
class RowPreparation(ABC):
    """The settings that decide a row's tokens, under TRL's names. An ensemble's folder keeps those of its training."""

    @classmethod
    def of(cls, settings: Any) -> Self:
        """Take the settings from an object with attributes of these names, such as TRL's config of the same method."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Read the settings from an ensemble's folder. Without a file there, they are the defaults.

        Raises:
            EnsembleFormatError: the file is damaged.
        """
        file = Path(folder) / PREPARATION_FILE
        if not file.is_file():
            return cls()
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in kept.items() if name in cls.__dataclass_fields__})
        except (ValueError, AttributeError) as error:
            raise EnsembleFormatError(
                f"cannot be read ({error})", where=str(file), hint="Delete it to prepare data in the default way."
            ) from error

    def write(self, folder: Path) -> None:
        (folder / PREPARATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @abstractmethod
    def check(self, rows: Dataset, name: str = "dataset") -> Form:
        """Read every row and return the form. Raises `DataError` that names the first bad row."""

    @abstractmethod
    def form(self, rows: Any, name: str = "dataset") -> Form:
        """The form of the rows from the names of their columns only. Raises `DataError` if there is no such form."""

    @abstractmethod
    def readable(self, rows: Any, name: str = "dataset") -> Any:
        """The rows, streamed or not, without the columns that are not read. Raises `DataError`."""

    @abstractmethod
    def prepare(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str = "dataset", limits: Limits = NO_LIMITS
    ) -> Any:
        """The rows as tokens, as in training. Raises `DataError` and `TokenizerError`."""


@dataclass(frozen=True)
class Preparation(RowPreparation):
    """The settings that decide the tokens and labels of rows for supervised fine-tuning.

    Attributes:
        max_length: number of tokens after which a row is cut; None for the model's limit only.
        truncation_mode: which end of a row is kept, "keep_start" or "keep_end".
        dataset_text_field: the column that holds the text of a row of text.
        completion_only_loss: whether only a completion is trained; None means: if rows have completions.
        assistant_only_loss: whether only the assistant's messages are trained.
        routing_group: the column of the groups whose rows share a responsibility; None if every row has its own.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    routing_group: str | None = None

    def __post_init__(self) -> None:
        check_cut(self.max_length, self.truncation_mode)

    def check(self, rows: Dataset, name: str = "dataset") -> Form:
        form = check_rows(rows, self.dataset_text_field, self.assistant_only_loss, name, self.completion_only_loss)
        if self.routing_group is not None:
            check_groups(rows, self.routing_group, name)
        return with_group(form, rows, self.routing_group)

    def form(self, rows: Any, name: str = "dataset") -> Form:
        form = form_of(rows, self.dataset_text_field, name)
        check_losses(form, self.assistant_only_loss, self.completion_only_loss)
        return with_group(form, rows, self._group_column(form))

    def _group_column(self, form: Form) -> str | None:
        is_prepared = self.routing_group is not None and WHOLE_LENGTH in form.columns
        return GROUP_COLUMN if is_prepared else self.routing_group

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        column = self._group_column(self.form(rows, name))
        if column is not None:
            check_has_group(rows, column, name)
        return only_columns(rows, self.form(rows, name))

    def prepare(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str = "dataset", limits: Limits = NO_LIMITS
    ) -> Any:
        return prepare(rows, tokenizer, self, name, limits)


@dataclass(frozen=True)
class CompletionPreparation(RowPreparation):
    """What the settings of pairs, thumbs and rated pairs share: the length of a prompt with its completion.

    Attributes:
        max_length: number of tokens after which a prompt with its completion is cut; None for the model's limit only.
    """

    max_length: int | None = 1024

    def __post_init__(self) -> None:
        check_cut(self.max_length, getattr(self, "truncation_mode", "keep_start"))

    def within(self, limits: Limits) -> Self:
        """The same settings, with `max_length` lowered to the base's positions if these are fewer."""
        return replace(self, max_length=limits.longest(self.max_length))


def check_cut(max_length: int | None, truncation_mode: str) -> None:
    """Raise `ConfigError` unless both settings are allowed."""
    if max_length is not None and max_length < 1:
        hint = "Give the greatest number of tokens in a row, or null for no limit."
        raise ConfigError(f"{max_length} is not allowed", where="max_length", hint=hint)
    if truncation_mode not in ("keep_start", "keep_end"):
        hint = "Write keep_start or keep_end."
        raise ConfigError(f"{truncation_mode!r} is not allowed", where="truncation_mode", hint=hint)


def prepare(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    settings: Preparation,
    name: str = "dataset",
    limits: Limits = NO_LIMITS,
    keep: Sequence[str] = (),
    num_proc: int | None = None,
) -> Rows:
    """Turn rows of any form into rows with columns `input_ids`, `labels` and `WHOLE_LENGTH`, in the same order.

    Labels are −100 where a token is not trained. `RenyiSFTTrainer` trains on these rows with the same settings.

    Args:
        rows: rows as loaded, streamed or not; they may be numbered by `number_rows`. Rows that are already prepared
            are returned as they are.
        tokenizer: the base's tokenizer.
        settings: how to prepare the rows.
        name: a name of the dataset, for messages.
        limits: the limits of the base. A row is cut at its positions. An id without an embedding is an error.
        keep: columns to keep beside the tokens, such as the column of `routing_group`.
        num_proc: number of processes that share the work.

    Raises:
        ConfigError: the settings train a part of rows that these rows do not have.
        DataError: a row is malformed, or no token of it would be trained. A streamed dataset raises when it reaches the
            row.
        TokenizerError: the rows are text and the tokenizer has no end-of-text token, or they are messages and it has no
            chat template.
    """
    if isinstance(rows, Dataset):
        check_not_empty(rows, name)
    form: Form = settings.form(rows, name)
    if WHOLE_LENGTH in form.columns:
        return rows
    template = training_template(tokenizer) if settings.assistant_only_loss and form.name != "tokenised" else None
    if form.name not in ("tokenised", "prompt-completion"):
        check_can_tokenise(tokenizer, form.name == "text")
    one = _Tokenise(tokenizer, settings, form, are_exact(rows, form.columns), template, name, limits)
    if not isinstance(rows, Dataset):
        gone = [c for c in rows.column_names or [*form.columns, *form.left_out] if c not in keep]
        return rows.map(one, with_indices=True, remove_columns=gone)
    features = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), WHOLE_LENGTH: Value("int32")}
    if settings.routing_group in form.kept:
        features[GROUP_COLUMN] = Value("string")
    prepared = rows.map(
        one,
        with_indices=True,
        fn_kwargs={"version": _VERSION, "lost_is_an_error": False},
        remove_columns=[c for c in rows.column_names if c not in keep],
        features=Features({**{c: rows.features[c] for c in keep}, **features}),
        num_proc=num_proc,
        new_fingerprint=new_fingerprint(rows),
        desc=f"Tokenising {name}",
    )
    _check_trained(prepared, rows, settings, name)
    return prepared


class _Tokenise:
    """Turns one row into tokens and labels."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: Preparation,
        form: Form,
        exact: Mapping[str, bool],
        template: str | None,
        name: str,
        limits: Limits,
    ):
        self.tokenizer, self.settings, self.form, self.exact, self.template = tokenizer, settings, form, exact, template
        self.name, self.limits = name, limits
        self.end = end_of_turn(tokenizer) if settings.assistant_only_loss else None

    def __call__(
        self, row: Mapping[str, Any], index: int, version: int = _VERSION, lost_is_an_error: bool = True
    ) -> dict[str, Any]:
        where = row_name(row, index, self.name)
        read = read_row(row, self.form, where, self.settings.assistant_only_loss, self.exact)
        ids, labels = self._tokens(read, where)
        check_ids(ids, self.limits, where, self.tokenizer)
        whole = len(ids)
        longest = self.limits.longest(self.settings.max_length)
        if longest is not None:
            kept = slice(longest) if self.settings.truncation_mode == "keep_start" else slice(-longest, None)
            ids, labels = ids[kept], labels[kept]
        if lost_is_an_error and not any(label != IGNORED for label in labels[1:]):
            raise DataError("no trained token is left", where=where, hint=_lost_hint(self.settings))
        made = {"input_ids": ids, "labels": labels, WHOLE_LENGTH: whole}
        group = self.settings.routing_group
        return made | {GROUP_COLUMN: group_of(row, group, where)} if group in self.form.kept and group else made

    def _tokens(self, read: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
        """All tokens of a row, and their labels."""
        tokenizer, settings = self.tokenizer, self.settings
        masks: list[Sequence[int]] = []
        if "input_ids" in read:
            ids = read["input_ids"]
            if "labels" in read:
                check_ids([label for label in read["labels"] if label != IGNORED], self.limits, where)
                return ids, read["labels"]
            completion, assistant = read.get("completion_mask"), read.get("assistant_masks")
            masks = [m for m in (completion if settings.completion_only_loss is not False else None, assistant) if m]
        elif "text" in read:
            ids = text_tokens(tokenizer, closed(read["text"], tokenizer), where)
        elif "messages" in read:
            tokens = self._chat(read["messages"], read, where)
            ids = tokens["input_ids"]
            masks = [tokens["assistant_masks"]] if settings.assistant_only_loss else []
        else:
            before, tokens = self._with_prompt(read, where)
            ids = tokens["input_ids"]
            if settings.completion_only_loss is not False:
                masks.append([0] * before + [1] * (len(ids) - before))
            if settings.assistant_only_loss:
                masks.append(tokens["assistant_masks"])
        return ids, [token if all(bits) else IGNORED for token, *bits in zip(ids, *masks, strict=True)]

    def _chat(self, messages: Any, read: Mapping[str, Any], where: str) -> dict[str, list[int]]:
        masked = self.settings.assistant_only_loss
        options = {"chat_template": self.template, "return_assistant_tokens_mask": masked, **for_template(read)}
        tokens = chat_tokens(self.tokenizer, messages, where, options)
        if masked:
            mask = tokens["assistant_masks"]
            if 1 not in mask:
                raise no_masks()
            # The token that ends an assistant's turn is trained, too, although some templates do not mark it.
            tokens["assistant_masks"] = [
                int(bit or (i > 0 and mask[i - 1] == 1 and token == self.end))
                for i, (bit, token) in enumerate(zip(mask, tokens["input_ids"], strict=True))
            ]
        return tokens

    def _with_prompt(self, read: Mapping[str, Any], where: str) -> tuple[int, dict[str, list[int]]]:
        """The number of tokens of the prompt, and the tokens of prompt and completion together."""
        prompt, completion = read["prompt"], read["completion"]
        check_can_tokenise(self.tokenizer, not is_messages(completion))
        if isinstance(completion, str):
            alone = text_tokens(self.tokenizer, prompt, where)
            ids = text_tokens(self.tokenizer, prompt + closed(completion, self.tokenizer), where)
            return common_length(alone, ids), {"input_ids": ids}
        options = {"chat_template": self.template, "add_generation_prompt": True, **for_template(read)}
        alone = chat_tokens(self.tokenizer, prompt, where, options)["input_ids"] if prompt else []
        tokens = self._chat([*prompt, *completion], read, where)
        return common_length(alone, tokens["input_ids"]), tokens


def closed(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with the end-of-text token after it, unless the text already ends with it."""
    end = str(tokenizer.eos_token)
    return text if text.endswith(end) else text + end


def common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """The number of tokens that two sequences share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


def check_ids(ids: Sequence[int], limits: Limits, where: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise `DataError` for an id that the base has no embedding for; with a tokenizer, it says which token that is."""
    if limits.vocabulary is not None and ids and max(ids) >= limits.vocabulary:
        place = next(i for i, token in enumerate(ids) if token >= limits.vocabulary)
        token = None if tokenizer is None else tokenizer.convert_ids_to_tokens(ids[place])
        written = "" if token is None else f" {token!r}"  # a tokenizer has no name for an id beyond its own
        raise DataError(
            f"has the token {ids[place]}{written} at place {place + 1}, and the base has "
            f"{limits.vocabulary} embeddings",
            where=where,
            hint="Use the tokenizer of this base. Another tokenizer may have more tokens.",
        )


# ---- Rows without trained tokens, rows that are cut, and counts ------------------------------------------------------


def _lost_hint(settings: Preparation) -> str:
    return (
        f"With max_length {settings.max_length} its prompt leaves no room for an answer, or the template masks it all: "
        "raise max_length, shorten the row, or remove it."
    )


def _check_trained(prepared: Dataset, rows: Dataset, settings: Preparation, name: str) -> None:
    """Raise `DataError` if some prepared rows have no trained token."""
    nothing = np.concatenate([trained == 0 for trained in _trained_by_row(prepared)])
    if nothing.any():
        raise nothing_left(rows, np.flatnonzero(nothing).tolist(), _lost_hint(settings), name)


def nothing_left(rows: Dataset, lost: Sequence[int], hint: str, name: str) -> DataError:
    """The error for rows without a trained token. It names the first one. `lost` are their places in the dataset."""
    others = f" (nor in {len(lost) - 1} other rows)" if len(lost) > 1 else ""
    columns = [c for c in (ROW_COLUMN, FILE_COLUMN) if c in rows.column_names]
    numbers = rows.select_columns(columns) if columns else None
    names = {i: row_name(numbers[i] if numbers else {}, i, name) for i in lost}
    first = min(lost, key=lambda i: numbers[i][ROW_COLUMN] if numbers and len(columns) == 1 else i)
    return DataError(f"no trained token is left{others}", where=names[first], hint=hint)


def count_cut(prepared: Dataset | IterableDataset) -> int:
    """The number of prepared rows that were cut at `max_length` or at the model's positions; 0 if streamed."""
    if not isinstance(prepared, Dataset) or WHOLE_LENGTH not in prepared.column_names:
        return 0
    cut = 0
    for table in prepared.select_columns(["input_ids", WHOLE_LENGTH]).with_format("arrow").iter(batch_size=1000):
        kept = table["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        cut += int((table[WHOLE_LENGTH].to_numpy() > kept).sum())
    return cut


def told_cut(cut: int, max_length: int | None, limits: Limits = NO_LIMITS) -> str | None:
    """A line of the printed plan about rows that are cut; None if no row is cut."""
    if not cut:
        return None
    longest = limits.longest(max_length)
    at = f"max_length {longest}" if longest == max_length else f"the {longest} positions of the base"
    return f"{cut} row{'s' if cut > 1 else ''} cut at {at}"


class Counts(NamedTuple):
    """The size of a prepared dataset. An example's first token is never predicted, so it never counts as trained."""

    examples: int
    tokens: int
    trained: int


def count_tokens(prepared: Dataset | IterableDataset) -> Counts:
    """Count the examples, tokens and trained tokens of a prepared dataset. A packed row holds several examples.

    Raises:
        ConfigError: the dataset is streamed, so its size is unknown.
    """
    prepared = countable(prepared, "trained tokens")
    examples = tokens = trained = 0
    for lengths, is_trained in _labels(prepared):
        examples, tokens, trained = (
            examples + len(lengths),
            tokens + int(lengths.sum()),
            trained + int(is_trained.sum()),
        )
    return Counts(examples, tokens, trained)


def countable(prepared: Dataset | IterableDataset, what: str) -> Dataset:
    """Return the dataset, or raise `ConfigError` if it is streamed. `what` is to be counted, for the message."""
    if isinstance(prepared, Dataset):
        return prepared
    raise ConfigError(
        f"the number of {what} of a streamed dataset is unknown",
        where="prior_std",
        hint="Load the dataset whole, or train without a prior.",
    )


def _labels(prepared: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each chunk of rows: the lengths of its examples, and for each of their tokens whether it is trained."""
    columns = [c for c in ("labels", "seq_lengths") if c in prepared.column_names]
    for table in prepared.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        rows = table["labels"].combine_chunks()
        by_example = (
            table["seq_lengths"].combine_chunks().flatten() if "seq_lengths" in columns else rows.value_lengths()
        )
        lengths = by_example.to_numpy(zero_copy_only=False)
        is_trained = rows.flatten().to_numpy(zero_copy_only=False) != IGNORED
        is_trained[np.cumsum(lengths)[:-1]] = False
        is_trained[:1] = False
        yield lengths, is_trained


def _trained_by_row(prepared: Dataset) -> Iterator[np.ndarray]:
    """For each chunk of an unpacked dataset: the number of trained tokens of each row."""
    for lengths, is_trained in _labels(prepared):
        ends = np.cumsum(lengths)
        total = np.concatenate([[0], np.cumsum(is_trained)])
        yield total[ends] - total[ends - lengths]


def sample(dataset: Dataset | IterableDataset, size: int) -> Dataset:
    """At most `size` rows, evenly spaced over the dataset. From a streamed dataset it takes the first rows."""
    if not isinstance(dataset, Dataset):
        rows = list(dataset.take(size))
        return exact_dataset(rows) if dataset.features is None else Dataset.from_list(rows, features=dataset.features)
    size = min(size, len(dataset))
    return dataset.select([i * len(dataset) // size for i in range(size)])
