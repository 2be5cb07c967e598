"""The ensemble folder: what is in it, and writing it so that a crash never leaves half of one.

    OUT/ensemble.json                      this file's `Manifest`
    OUT/member_0/adapter_config.json       an ordinary PEFT adapter, and so on for every member
    OUT/member_0/adapter_model.safetensors

`ensemble.json` is written last and removed first: where it stands, the members beside it are whole.
This file knows nothing about models.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from renyi.errors import EnsembleFormatError, SaveError
from renyi.layout import FORMAT_VERSION, MANIFEST_FILE


@dataclass
class Manifest:
    """What `ensemble.json` holds.

    Attributes:
        base_model: hub id or folder of the frozen base.
        members: folder names of the members, in order.
        weights: mixture weight of each member; they sum to one.
        alpha: Rényi order the ensemble was trained with; the order of its responsibilities.
        routing_quantity: what was routed, "sequence" or "length_normalised".
        member_kind: what a member is; see `renyi.members`.
        renyi_version: version that wrote the folder.
        format_version: of this layout.
    """

    base_model: str
    members: list[str]
    weights: list[float]
    alpha: float
    routing_quantity: str = "sequence"
    member_kind: str = "point"
    renyi_version: str = ""
    format_version: int = FORMAT_VERSION


def resolve_folder(path: str | Path) -> Path:
    """The local folder of an ensemble given as a folder or a Hugging Face hub id.

    Raises:
        EnsembleFormatError: neither a folder nor a repository of the hub.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EnsembleFormatError(
            "there is no such folder, and no such repository could be fetched from the hub",
            where=str(path),
            hint="Give the output folder of a training run, or a hub id such as user/ensemble.",
        ) from error


def read_manifest(folder: Path) -> Manifest:
    """Read and check `ensemble.json`.

    Raises:
        EnsembleFormatError: it is missing, damaged, of a newer format, or names a member that is not there.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        _refuse_whole_model(folder)
        raise EnsembleFormatError(
            f"there is no {MANIFEST_FILE}",
            where=str(folder),
            hint="Either this is not an ensemble, or its saving was interrupted: run the training command again.",
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        newer = fields.get("format_version", 0) > FORMAT_VERSION
        if not newer:
            manifest = Manifest(**{k: v for k, v in fields.items() if k in Manifest.__dataclass_fields__})
            _check_fields(manifest)
    except (ValueError, TypeError) as error:
        raise EnsembleFormatError(
            f"cannot be read ({error})",
            where=str(file),
            hint="Restore it from a checkpoint folder of the same run; it is a small JSON file.",
        ) from error
    if newer:
        raise EnsembleFormatError(
            f"format version {fields['format_version']} is newer than this renyi reads ({FORMAT_VERSION})",
            where=str(file),
            hint="Upgrade renyi.",
        )
    for name in manifest.members:
        if not (folder / name).is_dir():
            raise EnsembleFormatError(
                f"names {name}, but there is no such folder beside it",
                where=str(file),
                hint="Copy the whole ensemble folder, or drop the member with LoraEnsemble.drop_member.",
            )
    return manifest


def _refuse_whole_model(folder: Path) -> None:
    """Raise `EnsembleFormatError` if the folder is a model by itself, named by its architecture."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = ", ".join(map(str, config["architectures"]))
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise EnsembleFormatError(
        f"is a whole model ({architecture}), not an ensemble of adapters",
        where=str(folder),
        hint=f"Train an ensemble on it: renyi sft --model_name_or_path {folder} …",
    )


def _check_fields(manifest: Manifest) -> None:
    """Raise `ValueError` or `TypeError` unless every field is of its kind and in its range."""
    names = [*manifest.members, manifest.base_model, manifest.routing_quantity]
    if not isinstance(manifest.members, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("a name is not text")
    weights_fit = len(manifest.weights) == len(manifest.members) > 0 and abs(sum(manifest.weights) - 1) < 1e-3
    if not weights_fit or min(manifest.weights) < 0:
        raise ValueError("members and weights do not match, or the weights do not sum to one")
    if not 0 <= manifest.alpha <= 1:
        raise ValueError(f"alpha is {manifest.alpha}, not between 0 and 1")


def write_folder(folder: Path, manifest: Manifest, write_member: Callable[[int, Path], None]) -> None:
    """Write an ensemble folder; other files in `folder` stay.

    Members are written beside their places first and moved there only when all of them are whole.

    Args:
        folder: made if it does not exist.
        manifest: what to write as `ensemble.json`.
        write_member: called with a member's index and a folder to make.

    Raises:
        SaveError: something could not be written. What was there before the call is still there, or, if only moving
            failed, the new ensemble is whole in `.partial`.
    """
    staging = folder / ".partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for member, name in enumerate(manifest.members):
            write_member(member, staging / name)
        (staging / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise SaveError(
            f"could not be written ({error})",
            where=str(folder),
            hint="Free some space and run the command again.",
        ) from error
    try:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for old in folder.iterdir():
            if old.is_dir() and re.fullmatch(r"member_\d+", old.name):
                shutil.rmtree(old)
        for name in manifest.members:
            os.replace(staging / name, folder / name)
        os.replace(staging / MANIFEST_FILE, folder / MANIFEST_FILE)
        staging.rmdir()
    except OSError as error:
        raise SaveError(
            f"the members could not be moved into place ({error})",
            where=str(folder),
            hint=f"Save again, or move what is in {staging} there by hand, {MANIFEST_FILE} last.",
        ) from error
