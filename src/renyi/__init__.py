"""renyi: post-train a language model into a distribution over LoRA adapters."""

from typing import TYPE_CHECKING

from renyi.lazy import lazy_names

__version__ = "0.2.0"
__all__ = [
    "LoraEnsemble",
    "PowerFlowConfig",
    "PowerFlowTrainer",
    "RenyiDPOConfig",
    "RenyiDPOTrainer",
    "RenyiKTOConfig",
    "RenyiKTOTrainer",
    "RenyiRewardConfig",
    "RenyiRewardTrainer",
    "RenyiSFTConfig",
    "RenyiSFTTrainer",
    "load",
]

if TYPE_CHECKING:
    from renyi.ensemble import LoraEnsemble
    from renyi.runs.load import load
    from renyi.training import (
        PowerFlowConfig,
        PowerFlowTrainer,
        RenyiDPOConfig,
        RenyiDPOTrainer,
        RenyiKTOConfig,
        RenyiKTOTrainer,
        RenyiRewardConfig,
        RenyiRewardTrainer,
        RenyiSFTConfig,
        RenyiSFTTrainer,
    )

__getattr__ = lazy_names(
    __name__,
    {
        "renyi.ensemble": ("LoraEnsemble",),
        "renyi.runs.load": ("load",),
        "renyi.training": (
            "PowerFlowConfig",
            "PowerFlowTrainer",
            "RenyiDPOConfig",
            "RenyiDPOTrainer",
            "RenyiKTOConfig",
            "RenyiKTOTrainer",
            "RenyiRewardConfig",
            "RenyiRewardTrainer",
            "RenyiSFTConfig",
            "RenyiSFTTrainer",
        ),
    },
)
