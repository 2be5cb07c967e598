"""Trainers of an ensemble, and their configs. Read next: `sft.py`, the shortest trainer."""

from renyi.training.dpo import RenyiDPOConfig, RenyiDPOTrainer
from renyi.training.kto import RenyiKTOConfig, RenyiKTOTrainer
from renyi.training.powerflow import PowerFlowConfig, PowerFlowTrainer
from renyi.training.reward import RenyiRewardConfig, RenyiRewardTrainer
from renyi.training.sft import RenyiSFTConfig, RenyiSFTTrainer

__all__ = [
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
]
