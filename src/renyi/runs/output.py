"""The output folder of a run: check that what it holds belongs to this run, and remove it if it stayed empty.

This file compares what a checkpoint or an ensemble says about itself. Read next: `record.py`, about `run.json`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig

from renyi.ensemble import LoraEnsemble
from renyi.ensemble.storage import read_manifest
from renyi.errors import ConfigError
from renyi.keys import Where
from renyi.layout import MANIFEST_FILE
from renyi.members.adapters import read_adapter
from renyi.training.checkpoints import Checkpoints, find_checkpoints
from renyi.training.config import EnsembleConfig


def check_output_dir(output_dir: Path, base_name: str, args: EnsembleConfig, model: ModelConfig) -> None:
    """Raise `ConfigError` if the folder holds an ensemble or checkpoint of another base, size or rank."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"{output_dir} is a file", where="output_dir", hint="Choose another output_dir.")
    folder = _ensemble_in(output_dir)
    if folder is None:
        return
    manifest = read_manifest(folder)
    base = str(Path(base_name).resolve()) if Path(base_name).is_dir() else base_name
    _same("base model", manifest.base_model, base, folder)
    _same("num_members", len(manifest.members), args.num_members, folder)
    config = PeftConfig.from_pretrained(str(folder / manifest.members[0]))
    _same("lora_r", config.r, model.lora_r, folder)
    _same("lora_alpha", config.lora_alpha, model.lora_alpha, folder)
    _same("use_rslora", config.use_rslora, model.use_rslora, folder)


def check_targets(output_dir: Path, ensemble: LoraEnsemble) -> None:
    """The same for the adapted layers, which are known only once the base is loaded."""
    folder = _ensemble_in(output_dir)
    if folder is None:
        return
    there = set(read_adapter(folder / read_manifest(folder).members[0]).weights)
    wanted = set(ensemble.adapter(ensemble.members[0]))
    kinds = [{name.rpartition(".")[2] for name in names} for names in (there, wanted)]
    first, second = kinds if kinds[0] != kinds[1] else (there, wanted)
    _same("lora_target_modules", ", ".join(sorted(first)), ", ".join(sorted(second)), folder)


def check_length(newest: Path | None, num_steps: int, where: Where = str) -> None:
    """Raise `ConfigError` if a run would be shorter than the steps that its newest checkpoint has already taken."""
    taken = int(newest.name.rpartition("-")[2]) if newest and newest.name.rpartition("-")[2].isdigit() else 0
    if taken > num_steps:
        raise ConfigError(
            f"this run has {num_steps} steps, and {newest} has taken {taken}",
            where=where("max_steps"),
            hint="Choose another output_dir, or give at least as many steps.",
        )


def steps_of(checkpoint: Path | None) -> int | None:
    """The total steps of the run that wrote a checkpoint."""
    if checkpoint is None:
        return None
    return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["max_steps"])


def _ensemble_in(output_dir: Path) -> Path | None:
    """The folder with the newest ensemble: the newest complete checkpoint, or the output folder itself."""
    newest = find_checkpoints(output_dir).newest
    if newest is not None:
        return newest
    return output_dir if (output_dir / MANIFEST_FILE).exists() else None


def _same(what: str, there: Any, wanted: Any, folder: Path) -> None:
    if there != wanted:
        raise ConfigError(
            f"{folder} holds an ensemble with {what} {there}, and this run has {wanted}",
            where="output_dir",
            hint="Choose another output_dir, or give the settings it was trained with to go on training it.",
        )


def checkpoints_of(args: EnsembleConfig) -> Checkpoints:
    """What a run goes on from: the checkpoint that was asked for, or what the output folder holds.

    Raises:
        ConfigError: what was asked for is no checkpoint, or the folder holds an ensemble and nothing to go on from.
    """
    output_dir = Path(args.output_dir or "")
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ConfigError(
                f"{checkpoint} is no checkpoint",
                where="resume_from_checkpoint",
                hint="Leave it out to go on from the newest complete checkpoint in output_dir.",
            )
        return Checkpoints(checkpoint, [])
    found = find_checkpoints(output_dir)
    if found.newest is None and (output_dir / MANIFEST_FILE).exists():
        raise ConfigError(
            f"{output_dir} holds a trained ensemble and no checkpoint to go on from",
            where="output_dir",
            hint="Choose another output_dir, or remove the folder to train from the beginning.",
        )
    return found


@contextmanager
def no_empty_folder(output_dir: str | Path | None) -> Iterator[None]:
    """At the end, also after an error, remove folders that were made for a run and stayed empty."""
    path = Path(output_dir or ".").absolute()
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
