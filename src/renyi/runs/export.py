"""Members in the forms that other programs read: PEFT adapters, plain models, and vLLM's command line.

It reads an ensemble's folder and writes another folder, completely or not at all. Read next: `renyi.members.adapters`,
a member as a PEFT adapter.
"""

import copy
import json
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi import __version__
from renyi.data import end_tokens, load_tokenizer_of
from renyi.ensemble import LoraEnsemble
from renyi.ensemble.storage import read_ensemble, resolve_folder
from renyi.errors import ConfigError, EnsembleFormatError, SaveError
from renyi.members.adapters import Adapter, layer_scaling, read_adapter, write_adapter
from renyi.vllm import SERVE_FLAGS

EXPORT_FILE = "export.json"
SERVE_FILE = "serve.sh"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for --max-lora-rank


class Export(NamedTuple):
    """Members that other programs can read.

    Attributes:
        members: their folders.
        weights: mixture weight of each; they sum to one.
        base_model: hub id or folder of their base.
        command: the command that serves them with vLLM; None for merged members, or if `unfit`.
        unfit: why vLLM cannot serve these adapters as they are.
    """

    members: list[Path]
    weights: list[float]
    base_model: str
    command: str | None = None
    unfit: str | None = None


@contextmanager
def drawn(ensemble: str | Path, draws: int, seed: int = 0, base: str | None = None) -> Iterator[Path]:
    """A folder of an ensemble of points: `draws` draws of each member. It is there as long as the context lasts.

    Raises:
        ConfigError: the members are points.
        EnsembleFormatError: the ensemble is damaged.
    """
    folder = resolve_folder(ensemble).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        loaded = LoraEnsemble.load(folder, base=base)
        loaded.draw(draws, seed).save(scratch)
        if _has_tokenizer(folder):
            load_tokenizer_of(folder, loaded.base_model_name).save_pretrained(scratch)
        yield Path(scratch)


def export_adapters(
    ensemble: str | Path,
    output: str | Path,
    members: Sequence[int] | None = None,
    base: str | None = None,
    pad_rank: bool = False,
    origin: str | Path | None = None,
    mixture: bool = False,
) -> Export:
    """Write members as ordinary PEFT adapter folders, and `serve.sh`, which serves them with vLLM.

    Args:
        ensemble: folder of an ensemble, or a hub id.
        output: folder to make; the folder of an earlier export is replaced.
        members: numbers of the members to export; all by default.
        base: the base that adapters name, if it is no longer where the ensemble says.
        pad_rank: widen A and B with zeros to the next of `VLLM_RANKS`; see `padded`.
        origin: the ensemble to name in the export, if `ensemble` is a folder from `drawn`.
        mixture: whether the command has the plugin `renyi.vllm`, which mixes the members.

    Raises:
        ConfigError: there is no such member, `output` holds something else, or a rank is too large to be padded.
        EnsembleFormatError: the ensemble is damaged.
        SaveError: something could not be written; what was there before is untouched.
    """
    source = _read(ensemble, members, base)
    adapters = [read_adapter(folder) for folder in source.folders]
    if pad_rank:
        adapters = [padded(adapter, vllm_rank(_rank(adapter))) for adapter in adapters]
    target = Path(output).resolve()
    command, unfit = None, _unfit_for_vllm(adapters)
    with _written(target, "adapters", source, origin) as staging:
        for folder, adapter in zip(source.folders, adapters, strict=True):
            config = copy.deepcopy(adapter.config)
            config.base_model_name_or_path = source.base
            write_adapter(staging / folder.name, Adapter(config, adapter.weights, head=adapter.head))
        has_tokenizer = _has_tokenizer(source.folder)
        if has_tokenizer:
            load_tokenizer_of(source.folder, source.base).save_pretrained(str(staging))
        if unfit is None:
            here = [f"./{folder.name}" for folder in source.folders]
            served = _command(source, here, adapters, "." if has_tokenizer else None, mixture)
            script = f'#!/bin/sh\ncd "$(dirname "$0")" && exec {served} "$@"\n'
            (staging / SERVE_FILE).write_text(script, encoding="utf-8")
            (staging / SERVE_FILE).chmod(0o755)
            there = [str(target / folder.name) for folder in source.folders]
            command = _command(source, there, adapters, str(target) if has_tokenizer else None, mixture)
    return Export([target / folder.name for folder in source.folders], source.weights, source.base, command, unfit)


def export_merged(
    ensemble: str | Path,
    output: str | Path,
    members: Sequence[int] | None = None,
    base: str | None = None,
    origin: str | Path | None = None,
) -> Export:
    """Write members as plain transformers models with their tokenizer, updates merged into copies of the base.

    In a half-precision base the sum of weight and update is rounded to that precision.

    Raises:
        ConfigError: as in `export_adapters`; also if the base is quantised.
        EnsembleFormatError: the ensemble is damaged, or its base cannot be loaded.
        SaveError: something could not be written; what was there before is untouched.
    """
    source = _read(ensemble, members, base)
    target = Path(output).resolve()
    with _written(target, "merged", source, origin) as staging:
        loaded = LoraEnsemble.load(source.folder, base=source.base)
        if getattr(loaded.base, "is_quantized", False):
            raise ConfigError(
                "the base is quantised, and merging would round every update to its few bits",
                where=source.base,
                hint="Name the unquantised model with --base, or export adapters.",
            )
        tokenizer = load_tokenizer_of(source.folder, source.base)
        for member, folder in zip(source.members, source.folders, strict=True):
            plain = loaded.merged(member)
            if hasattr(plain, "generation_config"):  # a reward model has none
                plain.generation_config.eos_token_id = _ends(plain.generation_config.eos_token_id, tokenizer)
            plain.save_pretrained(staging / folder.name)
            tokenizer.save_pretrained(str(staging / folder.name))
    return Export([target / folder.name for folder in source.folders], source.weights, source.base)


def vllm_command(
    ensemble: str | Path, members: Sequence[int] | None = None, base: str | None = None, mixture: bool = False
) -> Export:
    """The command line that serves an ensemble's members with vLLM from their present folders. It writes nothing.

    Arguments are those of `export_adapters`.

    Raises:
        ConfigError: there is no such member, or vLLM cannot serve the adapters as they are.
        EnsembleFormatError: the ensemble is damaged.
    """
    source = _read(ensemble, members, base)
    adapters = [read_adapter(folder) for folder in source.folders]
    if unfit := _unfit_for_vllm(adapters):
        raise ConfigError(
            unfit,
            where=str(source.folder),
            hint="Give --output DIR and --pad_rank: one rank for all layers, the same updates.",
        )
    tokenizer = str(source.folder) if _has_tokenizer(source.folder) else None
    command = _command(source, [str(folder) for folder in source.folders], adapters, tokenizer, mixture)
    return Export(source.folders, source.weights, source.base, command)


# ---- Ranks -----------------------------------------------------------------------------------------------------------


def vllm_rank(rank: int) -> int:
    """The smallest of `VLLM_RANKS` that is at least `rank`; raises `ConfigError` if there is none."""
    if rank > VLLM_RANKS[-1]:
        raise ConfigError(f"is {rank}, but vLLM serves ranks up to {VLLM_RANKS[-1]}", where="rank of the adapters")
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def padded(adapter: Adapter, rank: int) -> Adapter:
    """An adapter with the same update BA · scaling, but with one rank and one scaling in all layers.

    Rows of zeros below A and columns of zeros right of B add nothing to BA. `lora_alpha` is rewritten so that
    lora_alpha / rank is the old scaling, also for rsLoRA. If `rank_pattern` or `alpha_pattern` give a layer another
    scaling, its B is multiplied by the ratio.
    """
    scalings = {layer: layer_scaling(adapter.config, layer, len(A)) for layer, (A, _) in adapter.weights.items()}
    scaling = max(scalings.values())
    weights = {}
    for layer, (A, B) in adapter.weights.items():
        if scalings[layer] != scaling:
            B = B * (scalings[layer] / scaling)
        weights[layer] = (_widened(A, 0, rank), _widened(B, 1, rank))
    config = copy.deepcopy(adapter.config)
    config.r, config.use_rslora, config.rank_pattern, config.alpha_pattern = rank, False, {}, {}
    lora_alpha = scaling * rank
    config.lora_alpha = round(lora_alpha) if math.isclose(lora_alpha, round(lora_alpha)) else lora_alpha  # type: ignore[assignment]
    return Adapter(config, weights, head=adapter.head)


def _widened(matrix: Tensor, dim: int, size: int) -> Tensor:
    shape = list(matrix.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)


def _rank(adapter: Adapter) -> int:
    return max(len(A) for A, _ in adapter.weights.values())


def _unfit_for_vllm(adapters: Sequence[Adapter]) -> str | None:
    """Why vLLM would refuse these adapters or compute something else. It knows one scaling for each adapter."""
    if (rank := max(map(_rank, adapters))) > VLLM_RANKS[-1]:
        return f"the rank is {rank}, and vLLM serves ranks up to {VLLM_RANKS[-1]}"
    if any(adapter.head is not None for adapter in adapters):
        return "members are reward models, and vLLM reads no heads from adapters"
    for config, weights, *_ in adapters:
        of_layers = {layer_scaling(config, layer, len(A)) for layer, (A, _) in weights.items()}
        if of_layers != {config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)}:
            return (
                "layers have several ranks or scalings (rank_pattern, alpha_pattern), and vLLM reads r and lora_alpha"
            )
    return None


def _command(
    source: "_Source", folders: Sequence[str], adapters: Sequence[Adapter], tokenizer: str | None, mixture: bool
) -> str:
    words = ["vllm", "serve", source.base, *(["--tokenizer", tokenizer] if tokenizer else []), "--enable-lora"]
    words += ["--max-loras", str(len(folders)), "--max-lora-rank", str(vllm_rank(max(map(_rank, adapters))))]
    words += SERVE_FLAGS if mixture else ()
    # Without this list vLLM wraps a head that no adapter changes, too. Its CPU build then crashed as it scored prompts.
    words += [
        "--lora-target-modules",
        *sorted({layer.rpartition(".")[2] for each in adapters for layer in each.weights}),
    ]
    modules = [f"{member.name}={folder}" for member, folder in zip(source.folders, folders, strict=True)]
    return shlex.join([*words, "--lora-modules", *modules])


# ---- Folders ---------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """What is exported: some members of an ensemble's folder, and their base."""

    folder: Path
    members: list[int]
    folders: list[Path]
    weights: list[float]
    base: str
    alpha: float


def _read(ensemble: str | Path, members: Sequence[int] | None, base: str | None) -> _Source:
    folder = resolve_folder(ensemble).resolve()
    manifest = read_ensemble(folder, base)
    known = range(len(manifest.members))
    chosen = list(known if members is None else members)
    for member in chosen:
        if member not in known:
            raise ConfigError(
                f"there is no member {member}", where="--member", hint=f"Members are 0 to {len(known) - 1}."
            )
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ConfigError(
            f"{chosen} names no member, or one member twice", where="--member", hint="Name each member once."
        )
    weights = [manifest.weights[m] for m in chosen]
    if sum(weights) == 0:
        raise EnsembleFormatError("every member chosen has weight 0", where=str(folder), hint="Choose others.")
    named = base or manifest.base_model
    if named.startswith("-"):
        raise ConfigError(f"{named!r} is no model: vLLM would take it for an option", where="--base")
    return _Source(
        folder,
        chosen,
        [folder / manifest.members[m] for m in chosen],
        [w / sum(weights) for w in weights],
        str(Path(named).resolve()) if Path(named).is_dir() else named,
        manifest.alpha,
    )


def _ends(of_base: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """The tokens that end an answer: the base's, the tokenizer's, and the one that ends a turn of the chat template."""
    found = [of_base] if isinstance(of_base, int) else list(of_base or [])
    found = list(dict.fromkeys([*found, *end_tokens(tokenizer)]))
    return found[0] if len(found) == 1 else found or None


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


@contextmanager
def _written(output: Path, form: str, source: _Source, origin: str | Path | None = None) -> Iterator[Path]:
    """A temporary folder to write to. At the end it becomes `output`; if anything fails it is removed."""
    _check_replaceable(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        staging.chmod(0o755)  # like any new folder: others may read an export
    except OSError as error:
        raise _not_written(output, error) from error
    old = staging.with_name(staging.name.replace(".partial-", ".old-"))  # a name that only this process uses
    try:
        yield staging
        facts = {
            "format": form,
            "ensemble": str(source.folder if origin is None else resolve_folder(origin).resolve()),
            "base_model": source.base,
            "members": [folder.name for folder in source.folders],
            "weights": source.weights,
            "alpha": source.alpha,
            "renyi_version": __version__,
            "files": sorted([*os.listdir(staging), EXPORT_FILE]),
        }
        (staging / EXPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        _check_replaceable(output)
        if output.exists():
            output.replace(old)
        try:
            staging.replace(output)
        except OSError:
            if old.exists():
                old.replace(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _not_written(output, error) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _not_written(output: Path, error: Exception) -> SaveError:
    return SaveError(
        f"could not be written ({error})", where=str(output), hint="Free some space and run the command again."
    )


def _check_replaceable(output: Path) -> None:
    """Raise `ConfigError` unless `output` is free, empty, or holds nothing but an earlier export."""
    if not output.exists():
        return
    try:
        there = set(os.listdir(output))
        ours = set(json.loads((output / EXPORT_FILE).read_text(encoding="utf-8"))["files"]) if there else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = None
    if ours is None or not there <= ours:
        raise ConfigError(
            "exists and is not an earlier export alone, so it is not replaced",
            where=f"--output {output}",
            hint="Name a new folder.",
        )
