"""An ensemble with its tokenizer, opened from a folder. Scoring, generation and evaluation begin with it.

Read next: `renyi.runs.load`, which adds what else the folder holds.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from renyi.data import load_tokenizer_of
from renyi.ensemble import LoraEnsemble
from renyi.ensemble.attention import HALF
from renyi.ensemble.storage import resolve_folder
from renyi.errors import ConfigError
from renyi.machine import LEAST_PARAMETERS, half_gain, main_memory

ROOM = 1 / 4  # the share of main memory that a base in float32 may take


class LoadedModel(NamedTuple):
    """An ensemble on its device, in evaluation mode, with its folder and its tokenizer."""

    folder: Path
    ensemble: LoraEnsemble
    tokenizer: PreTrainedTokenizerBase


def load_model(name: str | Path, base: str | Path | None = None, device: str | None = None) -> LoadedModel:
    """Open an ensemble and its tokenizer, in the precision of `fastest`.

    Args:
        name: folder of an ensemble, or of a single PEFT adapter (it becomes an ensemble of one); or a hub id.
        base: the base model, if it is no longer where the ensemble says.
        device: "cpu", "cuda", …; by default cuda if there is one.

    Raises:
        EnsembleFormatError: it is not an ensemble, or a part of it is missing or damaged.
        TokenizerError: there is no tokenizer.
        ConfigError: there is no such device.
    """
    folder = resolve_folder(name)
    ensemble = LoraEnsemble.load(folder, base=base)
    ensemble.folder = folder
    tokenizer = load_tokenizer_of(folder, ensemble.base_model_name)
    try:
        ensemble.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was not compiled for the device
        what = str(error).strip().partition("\n")[0]
        raise ConfigError(f"is {device!r} ({what})", where="device", hint="Give cpu, or a device there is.") from error
    return LoadedModel(folder, fastest(ensemble), tokenizer)


def fastest(ensemble: LoraEnsemble) -> LoraEnsemble:
    """The ensemble, raised to float32 on a CPU that multiplies in its half precision more slowly, if memory has room.

    Without instructions for bfloat16 a CPU takes many times as long. No weight changes, because float32 has all numbers
    of half precision, and results are those that training in float32 saw.
    """
    base: Any = ensemble.base
    parameters = base.num_parameters()
    is_half = base.device.type == "cpu" and base.dtype in HALF and not getattr(base, "is_quantized", False)
    has_room = 4 * parameters <= ROOM * main_memory()
    if is_half and has_room and parameters >= LEAST_PARAMETERS and half_gain(base.dtype) < 1:
        base.float()
    return ensemble
