"""Trainers over an ensemble and their configs."""

from renyi.training.dpo import RenyiDPOConfig, RenyiDPOTrainer
from renyi.training.sft import RenyiSFTConfig, RenyiSFTTrainer

__all__ = ["RenyiDPOConfig", "RenyiDPOTrainer", "RenyiSFTConfig", "RenyiSFTTrainer"]
