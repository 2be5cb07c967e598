"""`renyi powerflow`: tune policies toward a power of the base distribution, from settings in a YAML file and flags.

This file has only what differs from other training commands. Read next: `training.py`, what they share.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import RenderableType
from rich.text import Text

from renyi.cli.command import TrainingCommand
from renyi.cli.training import run_training
from renyi.text import number_text, plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.build import Run


def run(argv: Sequence[str]) -> int:
    return run_training(PowerFlow(), argv)


class PowerFlow(TrainingCommand):
    method = "powerflow"
    trl_config = "GRPOConfig"
    about = "Tune a policy toward a power of the base distribution, without labels or rewards."
    keys: ClassVar = {
        "Target": "power reference reference_pool format_penalty format_penalty_size length_penalty balance",
        "Partition": "partition partition_learning_rate",
        "Rollouts": "num_generations max_completion_length max_prompt_length num_iterations steps_per_generation "
        "epsilon epsilon_high use_vllm vllm_mode",
        "Data": "dataset_train_split dataset_test_split test_split_size chat_template_path pad_token eos_token",
    }
    first_keys = "power partition num_generations max_completion_length"
    holds_out = False
    for_tiny_model: ClassVar = {"max_completion_length": 16}  # it reads 256 tokens
    row = "rollout"
    member = "policy"
    members = "policies"

    def plan(self, ready: "Run") -> dict[str, str]:
        from renyi.training.target import target_in_words

        trainer: Any = ready.trainer
        return {
            "target": target_in_words(trainer.args, trainer.base_score),
            **_form(trainer.args),
            "partition": _partition(trainer.args),
            "rollouts": _rollouts(trainer.args),
        }

    def sizes(self, ready: "Run", prepared: "Dataset") -> str:
        """The number of prompts and their tokens. They are counted here: GRPO's trainer tokenises prompts later."""
        rows = ready.preparation.prepare(prepared, ready.tokenizer)
        lengths = [len(ids) for ids in rows["input_ids"]]
        tokens = f"{plural(sum(lengths), 'token')}, the longest has {number_text(max(lengths))}"
        return f"{plural(len(lengths), 'prompt')} · {tokens}"

    def first(self, ready: "Run", prepared: "Dataset", coloured: bool) -> RenderableType:
        from renyi.cli.tokens import example_panel, shown

        ids = prepared[0]["input_ids"]
        prompt = shown(str(ready.tokenizer.decode(ids)), None, coloured)
        what = f"{plural(len(ids), 'token')}; the policy goes on {'in green' if coloured else 'between « »'}"
        return example_panel(Text.assemble(prompt, " ", shown("…", "green", coloured)), "first prompt", what)

    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        return f"renyi generate {folder} --input {dataset_name} --temperature 1", f"renyi info {folder}"


# ---- Before ----------------------------------------------------------------------------------------------------------


def _form(args: Any) -> dict[str, str]:
    """The penalties of completions, if there are any."""
    lost = []
    if args.format_penalty is not None:
        is_function = ":" in args.format_penalty and "(" not in args.format_penalty
        size = f"−{args.format_penalty_size:g} a token without a match of {args.format_penalty}"
        lost.append(f"of {args.format_penalty}" if is_function else size)
    if args.length_penalty:
        lost.append(f"−{args.length_penalty:g} a token if cut at the longest length")
    return {"ψ, nats": "; ".join(lost)} if lost else {}


def _partition(args: Any) -> str:
    if args.partition == "learned":
        return f"log Z' of a prompt from a linear head, learning rate {args.partition_learning_rate:g}"
    return f"log Z' of a prompt is the mean over its {args.num_generations} rollouts"


def _rollouts(args: Any) -> str:
    prompts = args.generation_batch_size // args.num_generations
    updates = args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps
    engine = f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers"
    used = "a step" if updates == 1 else f"for every {updates} steps"
    each = f"{plural(prompts, 'prompt')} × {args.num_generations} {used}"
    return f"{each}, each of at most {number_text(args.max_completion_length)} tokens, by {engine}"
