"""Checkpoints of a run: find the complete ones, write one completely or not at all, and see whether a run ended there.

A checkpoint is sealed when everything in it is written: the seal lists every file with its size. A run that was
killed while writing leaves an unsealed folder, and no run resumes from that. Read next: `trainer.py`, whose hooks use
this.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from renyi.errors import RenyiError, SaveError
from renyi.files import write_whole

SEAL_FILE = "complete.json"


class Checkpoints(NamedTuple):
    """What an output folder holds: the newest complete checkpoint, if any, and newer ones that are half-written."""

    newest: Path | None
    half_written: list[Path]


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint folder as complete."""
    sizes = {str(f.relative_to(checkpoint)): f.stat().st_size for f in _files(checkpoint)}
    write_whole(checkpoint / SEAL_FILE, json.dumps(sizes, indent=1).encode())


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint folder carries a seal and every file that the seal lists, in full."""
    try:
        sizes = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def find_checkpoints(output_dir: str | Path) -> Checkpoints:
    """The newest complete checkpoint of a run and the half-written ones after it."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir()]
    found = [(int(m[1]), p) for p in folders if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    half_written: list[Path] = []
    for _, checkpoint in sorted(found, reverse=True):
        if is_complete(checkpoint):
            return Checkpoints(checkpoint, half_written)
        half_written.append(checkpoint)
    return Checkpoints(None, half_written)


@contextmanager
def written_whole(checkpoint: Path, is_writer: bool, wait_for_everyone: Callable[[], None]) -> Iterator[None]:
    """Write a checkpoint folder inside: it is sealed at the end, or gone if something could not be written.

    Args:
        checkpoint: the folder. What an earlier run left half-written there is removed first.
        is_writer: whether this process removes and seals.
        wait_for_everyone: returns when every process has called it.

    Raises:
        SaveError: a file could not be written. Earlier checkpoints are untouched.
    """
    if is_writer:
        shutil.rmtree(checkpoint, ignore_errors=True)  # a sealed checkpoint is never written twice
    wait_for_everyone()  # only then may other processes write their own random state there
    try:
        yield
        wait_for_everyone()
        if is_writer:
            seal(checkpoint)
    except Exception as error:
        if not is_write_error(error):
            raise
        (checkpoint / SEAL_FILE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
        survivor = find_checkpoints(checkpoint.parent).newest
        raise SaveError(
            f"the checkpoint could not be written ({_first_line(error)})",
            where=str(checkpoint),
            hint=(f"{survivor} is untouched. " if survivor else "")
            + "Free some space and run the same command: it goes on from there.",
        ) from error


@contextmanager
def saved(folder: Path) -> Iterator[None]:
    """Write the result of a run inside.

    Raises:
        SaveError: a file could not be written. Checkpoints are untouched.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SaveError) or not is_write_error(error):
            raise
        survivor = find_checkpoints(folder).newest
        raise SaveError(
            f"the result could not be written ({_first_line(error)})",
            where=str(folder),
            hint=(f"{survivor} is untouched. " if survivor else "") + "Free some space and run the same command.",
        ) from error


def is_write_error(error: BaseException) -> bool:
    """Whether an error says that a file could not be written.

    torch raises RuntimeError for that, safetensors an error of its own, and tokenizers a plain Exception.
    """
    if isinstance(error, RenyiError):
        return isinstance(error, SaveError)
    return isinstance(error, OSError | RuntimeError | SafetensorError) or type(error) is Exception


def state_at_end(checkpoint: Path, num_steps: int) -> TrainerState | None:
    """The trainer's state in `checkpoint` if a run of `num_steps` ended there: after all steps, or stopped early."""
    state_file = checkpoint / TRAINER_STATE_NAME
    if not state_file.is_file():
        return None
    state = TrainerState.load_from_json(str(state_file))
    control = state.stateful_callbacks.get("TrainerControl", {})
    stopped = control.get("args", {}).get("should_training_stop", False)
    ended = state.global_step >= num_steps or (stopped and state.global_step < state.max_steps)
    return state if ended else None


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name != SEAL_FILE)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
