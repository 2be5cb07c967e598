"""Trainers over an ensemble and their configs."""

from renyi.training.sft import RenyiSFTConfig, RenyiSFTTrainer

__all__ = ["RenyiSFTConfig", "RenyiSFTTrainer"]
