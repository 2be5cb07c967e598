"""Loading a dataset from a file or the hub, and a tokenizer that can be trained with.

Every way in which that fails says what was looked for and where. It knows nothing about what a row means.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from renyi.errors import ConfigError, DataError, TokenizerError

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# In a csv file only an empty cell is nothing: pandas would take the texts "None", "NA" and "null" for missing, too.
_SETTINGS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False, "na_values": [""]}}


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """Load a local json, jsonl, csv or parquet file (as split "train"), a folder of such, or a hub dataset.

    Raises:
        DataError: the file is missing, empty or cannot be parsed; names the line for jsonl.
    """
    path = Path(name)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None and (path.is_file() or (not path.exists() and name.count("/") > 1)):
        what = f"is a {path.suffix or 'nameless'} file" if path.is_file() else "there is no such file or folder"
        raise DataError(what, where=name, hint="Give a json, jsonl, csv or parquet file, or the id of a hub dataset.")
    if kind and not path.is_file():
        raise DataError("there is no such file", where=name, hint=f"Looked in {path.absolute().parent}.")
    if kind and path.stat().st_size == 0:
        raise _empty(name)
    try:
        if kind:
            return load_dataset(kind, data_files={"train": str(path)}, streaming=streaming, **_SETTINGS.get(kind, {}))
        return load_dataset(name, config, streaming=streaming)
    except (DatasetGenerationError, DatasetNotFoundError, ConnectionError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise _empty(name) from error
        line = _first_bad_line(path) if path.suffix == ".jsonl" else None
        raise DataError(
            f"could not be loaded ({_first_line(error.__cause__ or error)})",
            where=f"{name}, line {line}" if line else name,
            hint="Give a json, jsonl, csv or parquet file with one example a row, or the id of a hub dataset.",
        ) from error


def choose_split(splits: DatasetDict, split: str, name: str, key: str) -> Dataset | IterableDataset:
    """One split of a loaded dataset.

    Args:
        splits: as `load_splits` returns them.
        split: its name.
        name: of the dataset, for the message.
        key: of the setting that chose the split, for the message.

    Raises:
        ConfigError: there is no such split.
        DataError: it has no rows.
    """
    if split not in splits:
        raise ConfigError(
            f"{name} has no split {split!r}", where=key, hint=f"Its splits are {', '.join(map(repr, splits))}."
        )
    rows = splits[split]
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise _empty(name)
    return rows


def _empty(name: str) -> DataError:
    return DataError("the dataset is empty", where=name, hint="A dataset needs at least one row.")


def load_tokenizer(name: str, pad_token: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and settle its pad token.

    Padding is masked by length, so training never depends on the pad token; but a tokenizer saved with pad = end of
    text teaches the next tool to mask the end of text away, so it must be asked for.

    Raises:
        TokenizerError: there is no pad token, or it is the end of text, and `pad_token` does not settle it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"could not be loaded ({_first_line(error)})", where=f"tokenizer of {name}") from error
    vocabulary = tokenizer.get_vocab()
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise TokenizerError(
                f"{pad_token!r} is not in the vocabulary", where="pad_token", hint=f"For example: {_spare(tokenizer)}."
            )
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        problem = "has no pad token" if tokenizer.pad_token is None else f"has pad = eos = {tokenizer.pad_token!r}"
        raise TokenizerError(
            problem,
            where=f"tokenizer of {name}",
            hint=f"Choose one with --pad_token, for example {_spare(tokenizer)} (pass {tokenizer.eos_token!r} to keep "
            "pad = eos; training is unaffected, but other tools may mask the end of text).",
        )
    return tokenizer


def load_tokenizer_of(folder: Path, base_name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that an ensemble's folder keeps, or its base's; for reading only, so its pad token is no matter.

    Raises:
        TokenizerError: there is none.
    """
    name = str(folder) if (folder / "tokenizer_config.json").is_file() else base_name
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"could not be loaded ({_first_line(error)})", where=f"tokenizer of {name}") from error


def load_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give `tokenizer` the chat template of a Jinja file or of another model's tokenizer.

    With another model's template comes its end of text, because that is what closes a turn.

    Raises:
        TokenizerError: there is no such template, or it needs tokens that this vocabulary lacks.
    """
    where = f"chat_template_path {path}"
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise TokenizerError("there is no such file", where=where)
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    try:
        source = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"could not be loaded ({_first_line(error)})",
            where=where,
            hint="Give a .jinja file, a folder with a tokenizer, or a hub id.",
        ) from error
    if source.chat_template is None:
        raise TokenizerError("has no chat template", where=where, hint="Give a .jinja file or another tokenizer.")
    added = [token.content for token in source.added_tokens_decoder.values()]
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in added if t in source.chat_template and t not in vocabulary]
    missing += [t for t in (source.eos_token,) if t and t not in vocabulary]
    if missing:
        raise TokenizerError(
            f"its template uses {', '.join(map(repr, dict.fromkeys(missing)))}, which this vocabulary lacks",
            where=where,
            hint="The base is frozen, so no new tokens can be learned: give a .jinja file that uses only known ones.",
        )
    tokenizer.chat_template, tokenizer.eos_token = source.chat_template, source.eos_token


def _spare(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token that could serve as padding."""
    candidates = [t for t in tokenizer.get_vocab() if any(s in t.lower() for s in ("pad", "reserved", "unused"))]
    candidates += [t for t in (tokenizer.unk_token,) if t]
    return repr(min(candidates, key=len) if candidates else tokenizer.eos_token)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _first_bad_line(path: Path) -> int | None:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError:
                return number
    return None
