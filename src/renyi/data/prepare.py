"""From rows to tokens and labels, exactly as training sees them.

TRL's own preparation does the work, in training inside its trainer and here without one; this file adds what it leaves
out: an error, naming the row, where TRL would drop a row in silence. It knows nothing about models or batches.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from renyi.data.rows import ROW_COLUMN, check_rows, number_rows, with_messages
from renyi.errors import ConfigError, DataError, EnsembleFormatError, TokenizerError

PREPARATION_FILE = "preparation.json"
IGNORED = -100  # the label of a token that is not trained, as everywhere in transformers


@dataclass(frozen=True)
class RowPreparation(ABC):
    """The settings that decide a row's tokens, under TRL's names. An ensemble keeps those of its training."""

    @classmethod
    def of(cls, settings: Any) -> Self:
        """Read off anything with attributes of these names, such as TRL's config of the same method."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The settings kept in an ensemble's folder, or the defaults if it keeps none.

        Raises:
            EnsembleFormatError: the file is damaged.
        """
        file = folder / PREPARATION_FILE
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
    def check(self, rows: Dataset, name: str = "dataset") -> str:
        """The form of the rows; raises `DataError` that names the first bad one."""

    @abstractmethod
    def readable(self, rows: Any, name: str = "dataset") -> Any:
        """The rows, streamed or not, with ShareGPT's columns as TRL reads them; raises `DataError`."""

    @abstractmethod
    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str = "dataset") -> Dataset:
        """The rows as tokens, as training sees them; raises `DataError` and `TokenizerError`."""


@dataclass(frozen=True)
class Preparation(RowPreparation):
    """The settings that decide the tokens and labels of rows for supervised fine-tuning.

    Attributes:
        max_length: tokens after which a row is cut; None for no limit.
        truncation_mode: which end is kept.
        dataset_text_field: the column that holds the text of a row of text.
        completion_only_loss: whether only a completion is trained; None: where there is one.
        assistant_only_loss: whether only the assistant's messages are trained.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False

    def check(self, rows: Dataset, name: str = "dataset") -> str:
        return check_rows(rows, self.dataset_text_field, self.assistant_only_loss, name)

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        return with_messages(rows, name)

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str = "dataset") -> Dataset:
        return prepare(rows, tokenizer, self, name)


def prepare(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Preparation, name: str = "dataset"
) -> Dataset:
    """Turn rows of any of TRL's forms into columns `input_ids` and `labels`, one row each, in order.

    Labels are −100 where a token is not trained. This is what `RenyiSFTTrainer` trains on with the same settings.

    Raises:
        DataError: a row is malformed, or nothing of it would be trained.
        TokenizerError: text needs an end-of-text token to close it, and there is none.
    """
    dataset = with_messages(dataset, name)
    first = dataset[0] if len(dataset) else {}
    completion_only = settings.completion_only_loss
    if completion_only is None:
        completion_only = "prompt" in first and "completion" in first
    chat_template = training_template(tokenizer) if settings.assistant_only_loss else None
    trainer = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=completion_only, chat_template=chat_template)
    args = SimpleNamespace(**asdict(settings), dataset_num_proc=None, shuffle_dataset=False)

    def by_trl(rows: Dataset) -> Dataset:
        # The one private thing used here: as a plain function, the method needs nothing but these three attributes.
        return SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, name)  # type: ignore[arg-type]

    return checked(dataset, tokenizer, settings, name, by_trl)


def checked(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: Preparation,
    name: str,
    by_trl: Callable[[Dataset], Dataset],
    well_formed: bool = False,
) -> Dataset:
    """Prepare a dataset with `by_trl`, and raise where TRL would fail obscurely or lose a row in silence.

    Args:
        dataset: as it was loaded; may be numbered by `number_rows` already.
        tokenizer: what `by_trl` tokenises with.
        settings: what `by_trl` prepares for.
        name: what to call the dataset.
        by_trl: TRL's preparation, without packing.
        well_formed: leave the rows' form to `by_trl`, because a formatting function makes them.

    Raises:
        DataError, TokenizerError: as `prepare`.
    """
    if not well_formed:
        form = settings.check(dataset, name)
        is_text = form == "text" or (form == "prompt-completion" and isinstance(dataset[0]["completion"], str))
        if form != "tokenised":
            check_can_tokenise(tokenizer, is_text)
    numbered = number_rows(dataset)
    with _explained_masks():
        prepared = by_trl(numbered)
    _check_trained(prepared, numbered, settings.max_length, name)
    return prepared.remove_columns(ROW_COLUMN)


def check_can_tokenise(tokenizer: PreTrainedTokenizerBase, is_text: bool) -> None:
    """Raise `TokenizerError` unless the tokenizer can close a text, or render a conversation."""
    if not is_text:
        check_has_template(tokenizer)
    elif tokenizer.eos_token is None:
        raise TokenizerError(
            "has no eos token to close a text with", where="tokenizer", hint="Choose one with --eos_token."
        )


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that marks the assistant's tokens, or None if the tokenizer's own template does.

    Raises:
        TokenizerError: there is no template.
        DataError: the template marks nothing, and TRL knows no marked version of it.
    """
    check_has_template(tokenizer)
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise _no_masks() from error


def check_has_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `TokenizerError` unless the tokenizer can render a conversation."""
    if tokenizer.chat_template is None:
        raise TokenizerError(
            "has no chat template, and the rows are conversations",
            where="tokenizer",
            hint="Give one by --chat_template_path: a .jinja file, or the id of a model that has one.",
        )


@contextmanager
def _explained_masks() -> Iterator[None]:
    """Turn TRL's error about all-zero assistant masks into ours."""
    try:
        yield
    except RuntimeError as error:
        if "assistant" not in str(error):
            raise
        raise _no_masks() from error


def _no_masks() -> DataError:
    return DataError(
        "the chat template marks no assistant tokens, so nothing would be trained",
        where="assistant_only_loss",
        hint="Give a template with {% generation %} markers by chat_template_path, use prompt + completion rows, "
        "or drop assistant_only_loss.",
    )


def _check_trained(prepared: Dataset, numbered: Dataset, max_length: int | None, name: str) -> None:
    """Raise `DataError` if preparation left some of the rows without a trained token."""
    kept = set(prepared[ROW_COLUMN])
    lost = [row for row in numbered[ROW_COLUMN] if row not in kept]
    if not lost:  # TRL drops such rows only where it cuts; look at the labels of the rest
        nothing = np.concatenate([trained == 0 for trained in _trained_by_row(prepared)])
        lost = np.asarray(prepared[ROW_COLUMN])[nothing].tolist()
    if lost:
        raise nothing_left(
            lost,
            f"With max_length {max_length} its prompt leaves no room for an answer, or the template masks it all: "
            "raise max_length, shorten the row, or remove it.",
            name,
        )


def nothing_left(rows: Sequence[int], hint: str, name: str) -> DataError:
    """The error that names the first of some rows, numbered from 0, of which nothing would be trained."""
    others = f" (nor in {len(rows) - 1} other rows)" if len(rows) > 1 else ""
    return DataError(f"no trained token is left{others}", where=f"{name}, row {min(rows) + 1}", hint=hint)


class Counts(NamedTuple):
    """How much a prepared dataset holds; an example's first token is never predicted, so never trained."""

    examples: int
    tokens: int
    trained: int


def count_tokens(prepared: Dataset | IterableDataset) -> Counts:
    """Count the examples, tokens and trained tokens of a prepared dataset; a packed row holds several examples.

    Raises:
        ConfigError: the dataset is streamed, so nobody knows.
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
    """The dataset itself, unless it is streamed: then `ConfigError`."""
    if isinstance(prepared, Dataset):
        return prepared
    raise ConfigError(
        f"the number of {what} of a streamed dataset is unknown",
        where="prior_std",
        hint="Load the dataset whole, or train without a prior.",
    )


def _labels(prepared: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunk by chunk, the lengths of the examples and, for all their tokens in a row, whether each is trained."""
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
    """Chunk by chunk, the number of trained tokens of each row of an unpacked dataset."""
    for lengths, is_trained in _labels(prepared):
        ends = np.cumsum(lengths)
        total = np.concatenate([[0], np.cumsum(is_trained)])
        yield total[ends] - total[ends - lengths]


def sample(dataset: Dataset | IterableDataset, size: int) -> Dataset:
    """At most `size` rows, evenly spaced over the dataset; of a streamed one the first."""
    if not isinstance(dataset, Dataset):
        return Dataset.from_list(list(dataset.take(size)))
    size = min(size, len(dataset))
    return dataset.select([i * len(dataset) // size for i in range(size)])
