"""The two streams that a command writes to, its errors and warnings, and functions that silence libraries.

Results and reports go to stdout; progress, warnings and errors to stderr, so that a pipe carries results only.
"""

import json
import logging
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from renyi.errors import RenyiError
from renyi.text import printable

WIDEST = 108
_LIBRARIES = ("transformers", "datasets", "trl", "accelerate", "peft", "torch", "huggingface_hub", "bitsandbytes")


class _Terminal(Console):
    """A console that interprets nothing in a text: `[bold]` and `:smile:` are text, control characters are escaped.

    For a style, pass a `rich.text.Text`.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def stream(stderr: bool = False) -> Console:
    """A console on stdout or stderr: as wide as the terminal, at most `WIDEST`; silent on all but the first process."""
    is_first = os.environ.get("RANK", "0") == "0"
    console = _Terminal(stderr=stderr, highlight=False, markup=False, emoji=False, quiet=not is_first)
    console.width = min(console.width, WIDEST) if console.is_terminal else WIDEST
    return console


def show_error(error: RenyiError) -> None:
    """Print one error: where it is, what is wrong, and what to do about it."""
    where = f"{error.where}: " if error.where else ""
    say("error", "bold red", where + error.what, error.hint)


def say(kind: str, style: str, what: str, hint: str | None = None) -> None:
    """One message on stderr, `kind: what`, with its hint below."""
    message = Text.assemble((f"{kind}: ", style), what)
    if hint:
        message.append(f"\n{typed(hint)}", style="dim")
    stream(stderr=True).print(message, soft_wrap=True)


def typed(text: str) -> str:
    """A text whose command lines work when a user pastes them, also if the environment is not activated.

    If the shell finds no program `renyi`, `renyi` becomes the path by which this one was started, such as
    `.venv/bin/renyi`, and `pip` becomes that of the same environment.
    """
    started, python = Path(sys.argv[0]), shlex.quote(sys.executable)
    program = f"{python} -m renyi"
    if started.name == "renyi":
        program, python = (shlex.quote(str(path)) for path in (started, started.with_name("python")))
    elif started.parts[-2:] != ("renyi", "__main__.py"):
        return text
    if shutil.which("renyi"):
        return text
    text = re.sub(r"(?<![\w/.-])renyi(?= [A-Za-z-])", lambda _: program, text)
    return re.sub(r"(?<![\w/.-])pip install", lambda _: f"{python} -m pip install", text)


class _Warnings(logging.Handler):
    """Shows our own logger's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        say("warning", "bold yellow", record.getMessage())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' warnings and progress bars; show our own warnings."""
    ours = logging.getLogger("renyi")
    handler = _Warnings(logging.WARNING)
    ours.addHandler(handler)
    propagate, ours.propagate = ours.propagate, False
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "critical")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their errors are raised as exceptions
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.removeHandler(handler)
        ours.propagate = propagate


def quiet_progress_bars() -> None:
    """Silence the bars of loaded libraries, except for downloads, which a user waits for."""
    import datasets
    import huggingface_hub
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    if stream(stderr=True).is_terminal:
        huggingface_hub.utils.enable_progress_bars()


def facts(title: str, rows: dict[str, RenderableType]) -> Panel:
    """A panel of names and values."""
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, value in rows.items():
        grid.add_row(name, value)
    return Panel(grid, title=Text(title, "bold"), title_align="left", border_style="dim", padding=(0, 1))


def headed(heading: str, text: str = "") -> Text:
    """An empty line, a heading on a line of its own, and plain text after it."""
    return Text.assemble("\n", (heading, "bold"), f" {text}" if text else "")


def emit_json(value: dict[str, Any], stderr: bool = False) -> None:
    """One JSON object on a line of its own."""
    print(json.dumps(value), file=sys.stderr if stderr else sys.stdout)


def bytes_text(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
