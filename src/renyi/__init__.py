"""renyi: post-train a language model into a distribution over LoRA adapters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LoraEnsemble",
    "PowerFlowConfig",
    "PowerFlowTrainer",
    "RenyiDPOConfig",
    "RenyiDPOTrainer",
    "RenyiSFTConfig",
    "RenyiSFTTrainer",
]

if TYPE_CHECKING:
    from renyi.ensemble import LoraEnsemble
    from renyi.training import (
        PowerFlowConfig,
        PowerFlowTrainer,
        RenyiDPOConfig,
        RenyiDPOTrainer,
        RenyiSFTConfig,
        RenyiSFTTrainer,
    )

_HOMES = {
    "LoraEnsemble": "renyi.ensemble",
    "PowerFlowConfig": "renyi.training",
    "PowerFlowTrainer": "renyi.training",
    "RenyiDPOConfig": "renyi.training",
    "RenyiDPOTrainer": "renyi.training",
    "RenyiSFTConfig": "renyi.training",
    "RenyiSFTTrainer": "renyi.training",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: TRL takes seconds to import, and `import renyi.objectives` needs none of it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'renyi' has no attribute {name!r}")
