"""Thumbs of two kinds of users with opposite tastes, learned by an ensemble that is not told who is of which kind.

Every thumb is about a matter of taste: a user likes an answer of one manner and dislikes one of the other. Each user
gives ten thumbs, which share one responsibility. It measures on users and people that training never saw: is a user's
kind found from the ten thumbs? Read next: `preferences.py`, the world, and `annotators.py`, the same for pairs.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peft import LoraConfig
from sklearn.metrics import adjusted_rand_score
from transformers import PrinterCallback, ProgressCallback

from renyi.data import ThumbPreparation
from renyi.inference import score_thumbs
from renyi.training import RenyiKTOConfig, RenyiKTOTrainer
from renyi.zoo.base import load_base
from renyi.zoo.preferences import PreferenceWorld

TRAIN_THUMBS, HELD_OUT_THUMBS = 4_000, 480


class ThumbsFound(NamedTuple):
    """The measures of a run with M members, on held-out users.

    Attributes:
        users_found: adjusted Rand index of the member that explains a user's thumbs best, and the user's kind.
        thumbs_found: the same for single thumbs.
        member_load: mean responsibility of each member for users, [M].
    """

    users_found: float
    thumbs_found: float
    member_load: list[float]


def train_thumbs(
    world: PreferenceWorld, num_members: int, alpha: float, output_dir: Path, seed: int = 0, **overrides: Any
) -> RenyiKTOTrainer:
    """Train the zoo's base on the world's thumbs."""
    base, tokenizer = load_base()
    settings: dict[str, Any] = {
        "num_members": num_members,
        "alpha": alpha,
        "routing_group": "user",
        "alpha_hold_ratio": 0.05,  # thumbs that contradict each other leave nothing to agree on first
        "alpha_ramp_ratio": 0.15,
        "beta": 0.3,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 40,
        "max_steps": 160,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": seed,
        **overrides,
    }
    trainer = RenyiKTOTrainer(
        base,
        RenyiKTOConfig(str(output_dir), **settings),
        train_dataset=world.thumbs(TRAIN_THUMBS, seed),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=tokenizer,
    )
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    trainer.train()
    return trainer


def measure_thumbs(trainer: RenyiKTOTrainer, world: PreferenceWorld) -> ThumbsFound:
    """Measure a trained ensemble on the thumbs of held-out users."""
    rows = world.thumbs(HELD_OUT_THUMBS, trainer.args.seed, held_out=True)
    tokenizer: Any = trainer.processing_class
    preparation = ThumbPreparation(routing_group="user")
    scores = score_thumbs(trainer.model, preparation.prepare(rows, tokenizer), trainer.kept, preparation)
    kind_of = dict(zip(rows["user"], rows["group"], strict=True))
    shared = {score.group: np.array(score.group_responsibilities) for score in scores}
    thumbs = np.array([score.log_likelihood for score in scores]).argmax(axis=1)
    users = [shared[user].argmax() for user in kind_of]
    return ThumbsFound(
        users_found=float(adjusted_rand_score(list(kind_of.values()), users)),
        thumbs_found=float(adjusted_rand_score(rows["group"], thumbs)),
        member_load=np.mean(list(shared.values()), axis=0).tolist(),
    )
