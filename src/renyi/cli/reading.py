"""What the commands that read an ensemble share: their flags, opening the ensemble, and lines written whole.

Read next: `renyi.runs.load`, whose `Loaded` has a method for what each command does.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from renyi.cli.parser import StrictParser, converted
from renyi.errors import ConfigError
from renyi.files import write_whole
from renyi.text import printable

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.load import Loaded


def add_ensemble_flags(parser: StrictParser) -> None:
    """Add ENSEMBLE, and the flags that say where its base is and where it runs."""
    parser.add_argument("ensemble", metavar="ENSEMBLE", help="folder of an ensemble or of a PEFT adapter, or a hub id")
    parser.add_argument("--base", help="base model, if it is no longer where the ensemble says")
    parser.add_argument("--device", help="cuda, cpu, …; by default cuda if there is one")


def add_draw_flags(parser: StrictParser, seed_help: str = "seed of the draws (default: 0)") -> None:
    """Add the flags that replace members by draws of them; `--seed` only if it is not there yet."""
    parser.add_argument(
        "--draws", metavar="S", help="use S draws of each member that is a distribution, instead of its mean"
    )
    if "--seed" not in parser._option_string_actions:
        parser.add_argument("--seed", metavar="N", help=seed_help)


def draws_of(args: Any) -> tuple[int | None, int]:
    """What `--draws` and `--seed` say: the number of draws of each member (None for the means), and their seed."""
    draws = getattr(args, "draws", None)
    if draws is None:
        return None, 0
    seed = getattr(args, "seed", None)
    return converted(draws, int, None, "--draws"), 0 if seed is None else converted(seed, int, None, "--seed")


def add_reading_flags(parser: StrictParser, output_help: str, json_help: str, several: bool = False) -> None:
    """Add ENSEMBLE, DATA (a list if `several`), the flags that say where they are, and the flags for results."""
    add_ensemble_flags(parser)
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


def check_output(output: Path | None) -> None:
    """Raise `ConfigError` if the file cannot be written, before anything else is done."""
    if output is None:
        return
    folder = output.absolute().parent
    if output.is_dir():
        raise ConfigError(f"{output} is a folder", where="--output", hint="Give the name of a file.")
    if not folder.is_dir():
        what = f"{output.parent} is a file" if folder.exists() else f"there is no folder {output.parent}"
        raise ConfigError(what, where="--output", hint="Make the folder first, or write elsewhere.")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{output.parent} is not yours to write to", where="--output", hint="Write elsewhere.")


def load_rows(args: Any) -> "Dataset":
    """The rows that DATA, `--dataset_config` and `--split` name."""
    from renyi import data

    with naming_flags(args):
        return data.read_rows(args.data, args.split, args.dataset_config)


def load_ensemble(args: Any) -> "Loaded":
    """What ENSEMBLE, `--base` and `--device` name."""
    from renyi import load

    draws, seed = draws_of(args)
    with naming_flags(args):
        loaded = load(args.ensemble, base=args.base, device=args.device)
        return loaded if draws is None else loaded.draw(draws, seed)


@contextmanager
def naming_flags(args: Any) -> Iterator[None]:
    """Let an error about a setting name the flag that gave it."""
    try:
        yield
    except ConfigError as error:
        if error.where is None or error.where not in vars(args):
            raise
        raise ConfigError(error.what, where=f"--{error.where}", hint=error.hint) from error


@contextmanager
def progress_bar(err: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, gone when done; call what it gives with the number of rows done."""
    # The description may have a user's folder in it. So it is read neither as markup nor as a format string.
    named = TextColumn("{task.description}", markup=False)
    columns = (named, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(printable(what, keep=""), total=total)
        yield lambda done: bar.update(task, completed=done)


def write_lines(lines: Iterable[Mapping[str, Any]], output: Path | None) -> None:
    """Write one JSON object on each line, to `output` or stdout. The file appears only when it is complete."""
    texts = (json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
    if output is None:
        for text in texts:
            print(text, end="")
        return
    write_whole(output, texts)


def finite(value: Any) -> Any:
    """The value in a form that JSON can hold: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
