"""Progress of training: a bar with the main figures. Without a terminal, a plain line for the first step and each log.

It shows what the trainer logs. Read next: `watch.py`, which uses it.
"""

import time
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from renyi.cli.console import stream

_BARS = " ▁▂▃▄▅▆▇█"


class Progress(TrainerCallback):
    """Shows a run. It is a context manager: leaving it removes the bar, also after an error."""

    def __init__(self) -> None:
        self._out, self._err = stream(), stream(stderr=True)
        self._live = Live(console=self._err, refresh_per_second=4, transient=True) if self._err.is_terminal else None
        self._logs: dict[str, float] = {}
        self._doing = "training"
        self._started = time.monotonic()
        self._first_step = self._steps = 0

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            if self._logs:
                figures = ", ".join(f"{name} {value}" for name, value in _figures(self._logs).items())
                self._out.print(f"trained {self._steps} steps in {_clock(time.monotonic() - self._started)}: {figures}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._doing = "training"
        self._steps = state.global_step - self._first_step
        is_logged = args.logging_first_step or state.logging_steps == 1
        if self._live is None and self._steps == 1 and not is_logged:  # the first log may be minutes away
            self._out.print(_plain_line(state, {}, self._left(state)), soft_wrap=True)
        self._show(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._doing = "evaluating"
        self._show(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._doing = "training"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._logs = logs
        if self._live is None and ("loss" in logs or "eval_loss" in logs):
            self._out.print(_plain_line(state, logs, self._left(state)), soft_wrap=True)
        self._show(state)

    def _left(self, state: TrainerState) -> str:
        """Time left at the pace of this session, as h:mm:ss."""
        done = state.global_step - self._first_step
        if not done:
            return "-:--:--"
        return _clock((time.monotonic() - self._started) / done * (state.max_steps - state.global_step))

    def _show(self, state: TrainerState) -> None:
        if self._live:
            self._live.update(_bar(self._doing, state, self._logs, self._left(state)))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _bar(doing: str, state: TrainerState, logs: dict[str, float], left: str) -> RenderableType:
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(width=10)
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    total = max(state.max_steps, 1)
    bar = ProgressBar(total, state.global_step, style="dim", complete_style="cyan", finished_style="cyan")
    line.add_row(doing, bar, Text.assemble(f"{state.global_step}/{state.max_steps}", (f"  {left} left", "dim")))
    if not logs:
        return line
    named = [Text.assemble((f"{name} ", "dim"), value) for name, value in _figures(logs).items()]
    figures = Columns(named, padding=(0, 2))  # in further lines where the terminal is narrow
    if not _loads(logs):
        return Group(line, figures)
    loads = Text("loads ", style="dim", no_wrap=True, overflow="ellipsis")
    for load in _loads(logs):
        loads.append(_BARS[min(int(load * 9), 8)], style="cyan").append(f" {load:.0%}  ")
    return Group(line, figures, loads)


def _plain_line(state: TrainerState, logs: dict[str, float], left: str) -> str:
    prefix = "eval_" if "eval_loss" in logs else ""
    logs = {name.removeprefix(prefix): value for name, value in logs.items()}
    figures = "  ".join(f"{name} {value}" for name, value in _figures(logs).items())
    loads = " ".join(f"{load:.2f}" for load in _loads(logs))
    loads = f"  loads {loads}" if loads else ""
    what = "held out" if prefix else f"{left} left"
    width = len(str(state.max_steps))
    return f"step {state.global_step:{width}}/{state.max_steps}  {figures}{loads}  {what}"


def _figures(logs: dict[str, float]) -> dict[str, str]:
    """The main figures, under the names of the metrics."""
    formats = {"loss": ".3f", "nll_mixture": ".3f", "rewards/accuracies": ".2f", "jensen_gap": ".3f"}
    formats |= {"log_partition": ".2f", "logps/base": ".2f", "logps/policy": ".2f"}
    formats |= {"completions/mean_length": ".1f", "completions/clipped_ratio": ".0%"}
    formats |= {"effective_members": ".2f", "alpha": ".2f"} if _loads(logs) else {}
    return {name: format(logs[name], spec) for name, spec in formats.items() if name in logs}


def _loads(logs: dict[str, float]) -> list[float]:
    """The load of each member; empty for a single member."""
    members = sum(name.startswith("member_load/") for name in logs)
    return [logs[f"member_load/{m}"] for m in range(members)] if members > 1 else []
