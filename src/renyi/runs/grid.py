"""A sweep over alpha and the number of members: every cell is one run, measured on the same held-out examples.

`sweep` does all of it. A cell is a run of `single.py`. Read next: `renyi.evaluation.sweep_choice`, what the figures
mean and which cell to choose.
"""

import gc
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from renyi.errors import ConfigError, EnsembleFormatError, TrainingDivergedError
from renyi.evaluation.sweep_choice import Cell, HeldOut, SweepEvaluation, evaluate_sweep, why
from renyi.evaluation.task import as_json
from renyi.files import write_whole
from renyi.inference import score, score_pairs
from renyi.inference.confidence import token_confidence
from renyi.runs.build import Run, Watch, save, train
from renyi.runs.output import no_empty_folder
from renyi.runs.record import HARMLESS, given_and_deciding
from renyi.runs.settings import SweepSettings
from renyi.runs.single import prepare
from renyi.training import RenyiDPOTrainer

RESULT_FILE, FIGURE_FILE = "sweep.json", "sweep.png"
SECONDS_FILE, FAILED_FILE = "seconds.json", "failed.json"


class Outcome(NamedTuple):
    """What a cell gives on the held-out examples, or why it failed, and its seconds of training."""

    held_out: HeldOut | None
    failed: str | None
    seconds: float | None


# ---- The sweep as a whole --------------------------------------------------------------------------------------------


class SweepWatch(Watch):
    """What happens in a sweep: in the run of each cell, and between cells."""

    def cell(self, number: int, of: int, cell: Cell, run: Run) -> None:
        """A cell is loaded and checked; its training begins. `number` counts from 1."""

    def failed(self, number: int, of: int, cell: Cell, reason: str, before: bool) -> None:
        """A cell failed, now or when this sweep ran before."""


class Sweep(NamedTuple):
    """A finished sweep.

    Attributes:
        outcomes: of every cell.
        found: figures of the cells that did not fail, and the choice.
        result: what `sweep.json` holds.
    """

    outcomes: dict[Cell, Outcome]
    found: SweepEvaluation
    result: dict[str, Any]


def sweep(settings: SweepSettings, watch: SweepWatch | None = None) -> Sweep:
    """Train every cell, measure them on the same held-out examples, choose one: what `renyi sweep` does.

    Finished cells are measured again and not trained; half-done ones go on.

    Args:
        settings: such as `SweepSettings.of("sft", alphas=[0.0, 0.8], members=[1, 4], test_split_size=0.1, …)`.
        watch: told about progress.

    Raises:
        RenyiError: whatever is wrong with settings, data or folder, before anything is trained.
        TrainingDivergedError: every cell failed.
    """
    watch = watch or SweepWatch()
    kept = {"method": settings.run.method, **given_and_deciding(settings.run)}
    folder = folder_of(settings)
    check_same_sweep(folder, kept)
    outcomes = {}
    for number, cell in enumerate(settings.cells, start=1):
        place = folder / folder_name(cell)
        outcome = failed_before(place)
        before = outcome is not None
        if outcome is None:
            with no_empty_folder(place):
                ready = prepare_cell(settings, cell, watch)
                if not (folder / RESULT_FILE).exists():
                    write_result(folder, {"settings": kept, "cells": [], "chosen": None})
                watch.cell(number, len(settings.cells), cell, ready)
                outcome = run_cell(ready, watch)
                del ready  # free its base before the next one is loaded
        if outcome.failed:
            watch.failed(number, len(settings.cells), cell, outcome.failed, before)
        outcomes[cell] = outcome
    held_out = {cell: o.held_out for cell, o in outcomes.items() if o.held_out is not None}
    if not held_out:
        reasons = {o.failed for o in outcomes.values()}
        raise TrainingDivergedError("every cell failed", where=str(folder), hint="; ".join(map(str, reasons)))
    with watch.doing("evaluating"):
        from renyi.evaluation.sweep_figure import draw_sweep

        unit = settings.run.trainer.unit
        found = evaluate_sweep(held_out)
        result = _result(settings, kept, outcomes, found)
        write_result(folder, result, draw_sweep(found.cells, found.chosen, unit))
    return Sweep(outcomes, found, result)


def folder_of(settings: SweepSettings) -> Path:
    return Path(settings.run.values["output_dir"])


def folder_name(cell: Cell) -> str:
    return "members_1" if cell.members == 1 else f"alpha_{cell.alpha:g}_members_{cell.members}"


def check_same_sweep(folder: Path, settings: Mapping[str, str]) -> None:
    """Raise `ConfigError` if the folder holds a sweep with other settings, whose cells would count as this sweep's."""
    file = folder / RESULT_FILE
    if not file.exists():
        return
    try:
        there = dict(json.loads(file.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("is not the result of a sweep", where=str(file), hint="Choose another output_dir.") from error
    there = {key: value for key, value in there.items() if key not in HARMLESS}
    for key in sorted(there.keys() | settings.keys()):
        if there.get(key) != settings.get(key):
            old, new = (repr(s[key]) if key in s else "its default" for s in (there, settings))
            raise ConfigError(
                f"{folder} holds a sweep with {key} {old}, and this one has {new}",
                where="output_dir",
                hint="Choose another output_dir, or give the settings it began with; alphas and members may be others.",
            )


def write_result(folder: Path, result: Mapping[str, Any], figure: bytes | None = None) -> None:
    """Write `sweep.json`, and `sweep.png` if there is one, each whole or not at all.

    Raises:
        SaveError: a file could not be written.
    """
    files = {RESULT_FILE: (json.dumps(result, indent=1) + "\n").encode()} | ({FIGURE_FILE: figure} if figure else {})
    for name, content in files.items():
        write_whole(folder / name, content)


def _result(
    settings: SweepSettings, kept: Mapping[str, str], outcomes: Mapping[Cell, Outcome], found: SweepEvaluation
) -> dict[str, Any]:
    """The object of `sweep.json` and `renyi sweep --json`."""
    cells = []
    for cell, outcome in sorted(outcomes.items()):
        quality = found.cells.get(cell)
        cells.append(
            {
                "folder": folder_name(cell),
                "members": cell.members,
                "alpha": None if cell.members == 1 else cell.alpha,
                "failed": outcome.failed,
                "seconds": outcome.seconds,
                **(as_json(quality) if quality else {}),
            }
        )
    units = next(o.held_out.units for o in outcomes.values() if o.held_out is not None)
    unit = settings.run.trainer.unit
    return {
        "settings": dict(kept),
        "examples": len(units),
        "unit": unit,
        "units": int(units.sum()),
        "cells": cells,
        "best": folder_name(found.best),
        "chosen": folder_name(found.chosen),
        "runner_up": folder_name(found.runner_up) if found.runner_up else None,
        "why": why(found, unit),
        "figure": str(folder_of(settings) / FIGURE_FILE),
    }


# ---- A cell ----------------------------------------------------------------------------------------------------------


def prepare_cell(settings: SweepSettings, cell: Cell, watch: Watch | None = None) -> Run:
    """Everything of a cell up to its training.

    Raises:
        RenyiError: whatever is wrong with settings, data or folder, before anything is written; also if nothing is held
            out.
    """
    gc.collect()  # trainer and callbacks refer to each other, so the previous cell's base is still in memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    place = folder_of(settings) / folder_name(cell)
    run = prepare(settings.run.replaced(num_members=cell.members, alpha=cell.alpha, output_dir=place), watch)
    where = settings.run.where
    if run.eval_rows is None:
        raise ConfigError(
            "nothing is held out to measure the cells on",
            where=where("test_split_size"),
            hint="Hold out a share with --test_split_size 0.1, or set --eval_strategy epoch where the data have a test "
            "split.",
        )
    if not isinstance(run.eval_rows, Dataset):
        raise ConfigError(
            "the held-out rows are streamed, and every cell is measured on all of them",
            where=where("dataset_streaming"),
            hint="Load the dataset whole.",
        )
    return run


def run_cell(run: Run, watch: Watch | None = None) -> Outcome:
    """Train a cell, or go on with it, save its ensemble and measure it.

    A loss or a likelihood that is not a number, and a lack of memory on the device, are failures of this cell. They are
    written to its folder, and the cell is not tried again until the folder is removed.

    Raises:
        SaveError: something could not be written; the same sweep goes on from there.
    """
    watch, folder = watch or Watch(), run.output_dir
    try:
        with watch.training() as callbacks:
            train(run, [*callbacks, _Clock(folder)])
        with watch.doing("measuring"):
            save(run)
            held_out = _measure(run)
    except (TrainingDivergedError, torch.OutOfMemoryError) as error:
        is_ours = isinstance(error, TrainingDivergedError)
        reason = str(error).splitlines()[0] if is_ours else "the device has too little memory for it"
        write_whole(folder / FAILED_FILE, (json.dumps({"reason": reason}) + "\n").encode())
        return Outcome(None, reason, _read_seconds(folder))
    finally:
        run.trainer.end()
    return Outcome(held_out, None, _read_seconds(folder))


def failed_before(folder: Path) -> Outcome | None:
    """The outcome of a cell that failed when this sweep ran before."""
    file = folder / FAILED_FILE
    if not file.is_file():
        return None
    return Outcome(None, str(json.loads(file.read_text(encoding="utf-8"))["reason"]), _read_seconds(folder))


def _measure(run: Run) -> HeldOut:
    assert isinstance(run.eval_rows, Dataset)
    prepared = run.prepared(run.eval_rows)
    measured = _measured_pairs if isinstance(run.trainer, RenyiDPOTrainer) else _measured_texts
    try:
        with run.trainer.accelerator.autocast():
            return measured(run, prepared)
    except EnsembleFormatError as error:  # members that were just trained give no finite likelihood
        raise TrainingDivergedError(error.what, where=f"held out, {error.where}", hint=error.hint) from error


def _measured_texts(run: Run, prepared: Dataset) -> HeldOut:
    ensemble = run.ensemble
    scores = score(ensemble, prepared)
    sure = token_confidence(ensemble, prepared)
    ell_MN = torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T
    tokens_N = torch.tensor([s.tokens for s in scores])
    return HeldOut(ell_MN, tokens_N, ensemble.weights.cpu(), sure.confidence, sure.is_right)


def _measured_pairs(run: Run, prepared: Dataset) -> HeldOut:
    """The figures of held-out pairs. A label's likelihood is Bradley–Terry's σ(Δ), with every training loss."""
    ensemble, trainer, preparation = run.ensemble, run.trainer, run.preparation
    assert isinstance(trainer, RenyiDPOTrainer)
    pairs: Any = preparation
    scores = score_pairs(ensemble, prepared, trainer.args.preference_loss, trainer.reference, pairs)
    ell_MN = logsigmoid(torch.tensor([s.margin for s in scores], dtype=torch.float64).T)
    p_N = torch.tensor([s.preference for s in scores], dtype=torch.float64)
    return HeldOut(ell_MN, torch.ones(len(scores)), ensemble.weights.cpu(), torch.maximum(p_N, 1 - p_N), p_N > 0.5)


class _Clock(TrainerCallback):
    """Keeps a cell's seconds of training. It includes killed runs up to their last checkpoint."""

    def __init__(self, folder: Path):
        self._folder, self._before, self._since = folder, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = (_read_seconds(self._folder) or 0.0) if state.global_step else 0.0
        self._since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._keep()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep()

    def _keep(self) -> None:
        seconds = self._before + time.perf_counter() - self._since
        write_whole(self._folder / SECONDS_FILE, f"{seconds:.3f}\n".encode())


def _read_seconds(folder: Path) -> float | None:
    try:
        return float((folder / SECONDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
