"""Which checkpoints are whole.

A checkpoint is sealed when everything in it is written: the seal lists every file with its size. A run that was
killed while writing leaves an unsealed folder, which nobody resumes from. This file knows nothing about trainers.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

SEAL_FILE = "complete.json"


class Checkpoints(NamedTuple):
    """What an output folder holds: the newest complete checkpoint, if any, and newer ones that are half-written."""

    newest: Path | None
    half_written: list[Path]


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint folder as complete."""
    sizes = {str(f.relative_to(checkpoint)): f.stat().st_size for f in _files(checkpoint)}
    part = checkpoint / f"{SEAL_FILE}.partial"
    with part.open("w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(checkpoint / SEAL_FILE)


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


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(SEAL_FILE))
