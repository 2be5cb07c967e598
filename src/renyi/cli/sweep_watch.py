"""What a user sees while a sweep runs: the plan, every cell when it begins, and cells that fail."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text
from transformers import TrainerCallback

from renyi.cli.command import TrainingCommand
from renyi.cli.console import facts, headed, say
from renyi.cli.progress import Progress
from renyi.evaluation.sweep_choice import Cell
from renyi.runs.build import Run
from renyi.runs.grid import SweepWatch, folder_name, folder_of, prepare_cell
from renyi.runs.output import no_empty_folder
from renyi.runs.settings import SweepSettings
from renyi.text import number_text


class ShownSweep(SweepWatch):
    """Shows a sweep. If silent, it shows only failures and, on a terminal, what takes a while."""

    def __init__(self, settings: SweepSettings, command: TrainingCommand, out: Console, err: Console, is_silent: bool):
        self._settings, self._command, self._err, self._is_silent = settings, command, err, is_silent
        self._out = Console(quiet=True) if is_silent else out
        self._has_plan = False

    def doing(self, what: str) -> AbstractContextManager[Any]:
        return self._err.status(what)

    @contextmanager
    def training(self) -> Iterator[Sequence[TrainerCallback]]:
        if self._is_silent:
            yield []
            return
        with Progress() as progress:
            yield [progress]

    def cell(self, number: int, of: int, cell: Cell, run: Run) -> None:
        if not self._has_plan:
            self._out.print(_plan(self._settings, self._command, run))
            self._has_plan = True
        self._out.print(headed(f"{number}/{of}", f"{cell}{_from_where(run)}"))

    def failed(self, number: int, of: int, cell: Cell, reason: str, before: bool) -> None:
        if before:
            folder = folder_of(self._settings) / folder_name(cell)
            text = f"{cell}: failed before; remove {folder} to try again"
            self._out.print(headed(f"{number}/{of}", text), soft_wrap=True)
        say("failed", "bold yellow", f"{cell}: {reason}")

    def dry_run(self) -> None:
        """Say what would be done, by preparing the first cell."""
        cell = self._settings.cells[0]
        with no_empty_folder(folder_of(self._settings) / folder_name(cell)):
            self._out.print(_plan(self._settings, self._command, prepare_cell(self._settings, cell, self)))
        self._out.print("\nA dry run: nothing was written. Without --dry_run this trains.")


def _from_where(ready: Run) -> str:
    newest, half_written = ready.checkpoints
    if newest is None:
        return "; a half-written checkpoint is ignored" if half_written else ""
    return ": finished already" if ready.finished else f": resuming from {newest.name} of {ready.trainer.num_steps}"


def _plan(settings: SweepSettings, command: TrainingCommand, ready: Run) -> RenderableType:
    """The plan, with the settings of the first cell that is trained."""
    cells, trainer = settings.cells, ready.trainer
    several = sorted({c.members for c in cells if c.members > 1})
    parts = ["one adapter"] if any(c.members == 1 for c in cells) else []
    if several:
        alphas = ", ".join(f"{a:g}" for a in sorted(settings.alphas))
        parts.append(f"{' and '.join(map(str, several))} members at alpha {alphas}")
    assert ready.eval_rows is not None
    prepared = ready.prepared(ready.eval_rows)
    rows = {
        "base": f"{ready.ensemble.base_model_name} · {str(ready.ensemble.dtype).removeprefix('torch.')} "
        f"on {trainer.args.device}",
        "method": settings.run.method,
        "cells": f"{len(cells)}: {'; '.join(parts)}",
        "data": f"{ready.settings.values['dataset_name']} · {ready.form}",
        "train": command.sizes(ready, trainer.train_dataset),
        "held out": command.sizes(ready, prepared),
        "steps": f"{number_text(trainer.num_steps)} in every cell, seed {trainer.args.seed}",
        "output": str(folder_of(settings)),
    }
    return facts("renyi sweep", {name: Text(value) for name, value in rows.items()})
