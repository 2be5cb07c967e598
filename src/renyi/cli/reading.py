"""What the commands that read an ensemble and a dataset share: their flags, loading both, and lines written whole.

It knows nothing about what a command asks of them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from renyi.cli.parser import StrictParser
from renyi.errors import ConfigError, SaveError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from renyi import LoraEnsemble


def add_reading_flags(parser: StrictParser, output_help: str, json_help: str, several: bool = False) -> None:
    """Add ENSEMBLE, DATA (`several` of it as a list) and the flags that say where either is and where results go."""
    parser.add_argument("ensemble", metavar="ENSEMBLE", help="folder of an ensemble, or a hub id")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="+" if several else None,
        help="a json, jsonl, csv or parquet file, or the id of a hub dataset",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=output_help)
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--split", help="split to read; by default test if there is one")
    parser.add_argument("--dataset_config", help="configuration of a hub dataset")
    parser.add_argument("--base", help="base model, if it is no longer where the ensemble says")
    parser.add_argument("--device", help="cuda, cpu, …; by default cuda if there is one")


def check_output(output: Path | None) -> None:
    """Raise `ConfigError` if there is no folder for the file."""
    if output and not output.absolute().parent.is_dir():
        raise ConfigError(
            f"there is no folder {output.parent}", where="--output", hint="Make it first, or write elsewhere."
        )


def load_rows(args: Any) -> "Dataset":
    """The rows that DATA, `--dataset_config` and `--split` name."""
    from datasets import Dataset

    from renyi import data

    splits = data.load_splits(args.data, args.dataset_config)
    split = args.split or ("test" if "test" in splits else next(iter(splits)))
    rows = data.choose_split(splits, split, args.data, "--split")
    assert isinstance(rows, Dataset)
    return rows


class Loaded(NamedTuple):
    """An ensemble on its device, with its folder and tokenizer."""

    folder: Path
    ensemble: "LoraEnsemble"
    tokenizer: "PreTrainedTokenizerBase"


def load_ensemble(args: Any) -> Loaded:
    """What ENSEMBLE, `--base` and `--device` name."""
    import torch

    from renyi import LoraEnsemble, data
    from renyi.ensemble.storage import resolve_folder

    folder = resolve_folder(args.ensemble)
    ensemble = LoraEnsemble.load(folder, base=args.base)
    tokenizer = data.load_tokenizer_of(folder, ensemble.base_model_name)
    ensemble.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Loaded(folder, ensemble, tokenizer)


@contextmanager
def progress_bar(err: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, gone when done; call what it gives with the number of rows done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def write_lines(lines: Iterable[Mapping[str, Any]], output: Path | None) -> None:
    """One JSON object a line, to stdout without a file; a file appears only when it is whole."""
    texts = (json.dumps(line) + "\n" for line in lines)
    if output is None:
        for text in texts:
            print(text, end="")
        return
    partial = output.with_name(f".{output.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(texts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"could not be written ({error})", where=str(output), hint="Free some space.") from error
