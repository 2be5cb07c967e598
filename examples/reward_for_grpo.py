"""An ensemble of reward models, and a policy that TRL's GRPOTrainer trains on the lower bound of its rewards.

The rewards come from preference pairs about a tiny world: people like fluent answers, and two groups like opposite
manners. The lower confidence bound pays the policy for what all reward models agree on, which is fluency. Run it:

    python examples/reward_for_grpo.py

With --steps 2 it only shows that everything fits together.
"""

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import renyi
from renyi.zoo.base import base_path, load_base
from renyi.zoo.preferences import PreferenceWorld

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200, help="of the rewards; the policy takes a tenth of them")
parser.add_argument("--output_dir", type=Path, default=Path(tempfile.mkdtemp()))
args = parser.parse_args()

plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
adapter = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
world = PreferenceWorld()
_, tokenizer = load_base()

# 1. Reward models: members with a head each, trained together on pairs.
trainer = renyi.RenyiRewardTrainer(
    str(base_path()),
    renyi.RenyiRewardConfig(
        str(args.output_dir / "rewards"),
        num_members=3,
        learning_rate=2e-3,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        save_strategy="no",
        **plain,
    ),
    train_dataset=world.dataset(2000),
    peft_config=LoraConfig(task_type="SEQ_CLS", **adapter),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()

# 2. The reward of an answer: mean − spread over the members.
reward = renyi.load(args.output_dir / "rewards").reward_function("lcb")

# 3. A policy, by TRL alone.
held_out = world.dataset(64, held_out=True)
policy = GRPOTrainer(
    str(base_path()),
    reward_funcs=reward,
    args=GRPOConfig(
        str(args.output_dir / "policy"),
        learning_rate=1e-3,
        max_steps=max(2, args.steps // 10),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        logging_steps=1,
        save_strategy="no",
        **plain,
    ),
    train_dataset=Dataset.from_dict({"prompt": held_out["prompt"]}),
    peft_config=LoraConfig(task_type="CAUSAL_LM", **adapter),
    processing_class=tokenizer,
)
policy.train()
rewards = [row["reward"] for row in policy.state.log_history if "reward" in row]
print(f"lower bound of the reward, first and last step: {rewards[0]:.3f} and {rewards[-1]:.3f}")
