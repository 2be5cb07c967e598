"""Reads and writes the ensemble folder.

`ensemble.json` is written last and removed first. So if it is there, the members beside it are complete, even after a
crash. Names in the file are checked, so that they cannot point outside of the folder.

Read next: `layout.py`, which has the names of the files.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from renyi.errors import EnsembleFormatError, SaveError
from renyi.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    DISTRIBUTION_FILE,
    FORMAT_VERSION,
    HUB_FILES,
    MANIFEST_FILE,
)

_MEMBER_FILES = {ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, DISTRIBUTION_FILE, "README.md"}


@dataclass
class Manifest:
    """The content of `ensemble.json`.

    Attributes:
        base_model: hub id or folder of the frozen base.
        members: folder names of the members, in order.
        weights: mixture weight of each member; they sum to one.
        alpha: Rényi order of the training, and of responsibilities.
        routing_quantity: what responsibilities are computed from, "sequence", "length_normalised" or "token".
        member_kind: the kind of the members; see `renyi.members`.
        num_draws: how many members, one after another, are draws of one member that is a distribution.
        divergence: KL divergence of each member from its prior at the end of training, nats; None without a prior.
        renyi_version: the version of renyi that wrote the folder.
        format_version: the version of this layout.
    """

    base_model: str
    members: list[str]
    weights: list[float]
    alpha: float
    routing_quantity: str = "sequence"
    member_kind: str = "point"
    num_draws: int = 1
    divergence: list[float] | None = None
    renyi_version: str = ""
    format_version: int = FORMAT_VERSION


def resolve_folder(path: str | Path) -> Path:
    """The local folder of an ensemble that is given as a folder or a Hugging Face hub id.

    Raises:
        EnsembleFormatError: it is neither a folder nor a repository on the hub.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES, ignore_patterns=["checkpoint-*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EnsembleFormatError(
            "there is no such folder, and no such repository could be fetched from the hub",
            where=str(path),
            hint="Give the output folder of a training run, or a hub id such as user/ensemble.",
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a single PEFT adapter and not an ensemble."""
    return (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / MANIFEST_FILE).is_file()


def read_ensemble(folder: Path, base: str | None = None) -> Manifest:
    """`ensemble.json`, or what it would say of the folder of one PEFT adapter, which is an ensemble of one.

    Args:
        folder: of an ensemble, or of an adapter.
        base: for an adapter that does not name its base.

    Raises:
        EnsembleFormatError: as `read_manifest`; or the adapter does not name its base.
    """
    if not is_adapter(folder):
        return read_manifest(folder)
    file = folder / ADAPTER_CONFIG_FILE
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or base
    except (OSError, ValueError, AttributeError) as error:
        raise EnsembleFormatError(f"cannot be read ({error})", where=str(file), hint="Copy it again.") from error
    if not named or not isinstance(named, str):
        raise EnsembleFormatError(
            "names no base model", where=str(file), hint="Write its base_model_name_or_path: a folder or a hub id."
        )
    return Manifest(base_model=named, members=["."], weights=[1.0], alpha=1.0)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `ensemble.json`.

    Raises:
        EnsembleFormatError: the file is missing, damaged, or of a newer format, or it names a missing member.
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
        if (folder / name).is_symlink():
            raise EnsembleFormatError(
                f"names {name}, which is a link", where=str(file), hint="Put a copy of the folder in its place."
            )
        if not (folder / name).is_dir():
            raise EnsembleFormatError(
                f"names {name}, but there is no such folder beside it",
                where=str(file),
                hint="Copy the whole ensemble folder, or drop the member with LoraEnsemble.drop_member.",
            )
    return manifest


def _refuse_whole_model(folder: Path) -> None:
    """Raise `EnsembleFormatError` if the folder holds a whole model. The message names its architecture."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = ", ".join(map(str, config["architectures"]))
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise EnsembleFormatError(
        f"is a whole model ({architecture}), not an ensemble of adapters",
        where=str(folder),
        hint=f"Train an ensemble on it: renyi sft --model_name_or_path {folder} --dataset_name DATA --output_dir OUT",
    )


def _check_fields(manifest: Manifest) -> None:
    """Raise `ValueError` or `TypeError` unless every field has the right type and is in its range."""
    names = [*manifest.members, manifest.base_model, manifest.routing_quantity, manifest.member_kind]
    if not isinstance(manifest.members, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("a name is not text")
    for name in manifest.members:
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"the member name {name!r} leads out of the folder")
    if len(set(manifest.members)) < len(manifest.members):
        raise ValueError("a member is named twice")
    if manifest.base_model.startswith("-"):
        raise ValueError(f"base_model is {manifest.base_model!r}, which a command would read as an option")
    # Versions before 0.1 could write weights rounded to bfloat16.
    weights_fit = len(manifest.weights) == len(manifest.members) and abs(sum(manifest.weights) - 1) < 0.01
    if not weights_fit or min(manifest.weights) < 0:
        raise ValueError("members and weights do not match, or the weights do not sum to one")
    if abs(sum(manifest.weights) - 1) > 1e-5:
        manifest.weights = [weight / sum(manifest.weights) for weight in manifest.weights]
    draws = manifest.num_draws
    if not isinstance(draws, int) or draws < 1 or len(manifest.members) % draws:
        raise ValueError(f"num_draws is {draws}, which does not divide the number of members")
    kept = manifest.divergence
    if kept is not None:
        if not isinstance(kept, list) or not all(isinstance(x, int | float) for x in kept):
            raise TypeError("divergence is not a list of numbers")
        if len(kept) != len(manifest.members):
            raise ValueError(f"divergence has {len(kept)} numbers for {len(manifest.members)} members")
    if not 0 <= manifest.alpha <= 1:
        raise ValueError(f"alpha is {manifest.alpha}, not between 0 and 1")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder, so that only one process writes to it. Without such locks on the system it does nothing."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_folder(folder: Path, manifest: Manifest, write_member: Callable[[int, Path], None]) -> None:
    """Write an ensemble folder. Other files in `folder` are not changed.

    Members are first written to the subfolder `.partial`. They are moved into place when all of them are complete.

    Args:
        folder: the folder; it is created if it does not exist.
        manifest: the content of `ensemble.json`.
        write_member: called with a member's index and the folder that it has to create.

    Raises:
        SaveError: a file could not be written. Then the earlier content of the folder is still there. Only if moving
            failed, it may be gone; then the new ensemble is in `.partial`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from error
    with alone_in(folder):
        _write_folder(folder, manifest, write_member)


def _write_folder(folder: Path, manifest: Manifest, write_member: Callable[[int, Path], None]) -> None:
    staging = folder / ".partial"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for member, name in enumerate(manifest.members):
            write_member(member, staging / name)
        (staging / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        old = _replaceable(folder, manifest.members)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise error if isinstance(error, SaveError) else _not_written(folder, error) from error
    try:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for member_folder in old:
            shutil.rmtree(member_folder)
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


def _not_written(folder: Path, error: Exception) -> SaveError:
    return SaveError(
        f"could not be written ({error})", where=str(folder), hint="Free some space and run the command again."
    )


def _replaceable(folder: Path, new: list[str]) -> list[Path]:
    """The folders that a save removes: the members of the earlier ensemble, and folders that new members replace.

    Raises:
        SaveError: a new member would replace something that is not a member.
    """
    old: list[str] = []
    with suppress(EnsembleFormatError):  # an earlier save was interrupted, or the folder holds no ensemble
        old = read_manifest(folder).members
    for name in new:
        there = folder / name
        inside = {file.name for file in there.iterdir()} if there.is_dir() and not there.is_symlink() else None
        is_member = inside is not None and ADAPTER_CONFIG_FILE in inside and inside <= _MEMBER_FILES
        if name not in old and os.path.lexists(there) and not is_member:
            what = f"{name} exists already and is not a member of an ensemble"
            raise SaveError(what, where=str(folder), hint="Move it away.")
    return [folder / name for name in dict.fromkeys([*old, *new]) if (folder / name).is_dir()]
