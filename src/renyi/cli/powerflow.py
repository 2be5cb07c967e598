"""`renyi powerflow`: tune policies toward a power of the base distribution, from settings in a YAML file and flags.

This file has only what differs from other training commands. Read next: `training.py`, what they share.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.command import TrainingCommand
from renyi.cli.tables import figures_table, shortened, titled
from renyi.cli.training import run_training
from renyi.text import number_text, plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.inference.policies import PolicySummary
    from renyi.runs.build import Run

ROLLOUTS = 8  # of each prompt, to say what a policy learned
SHOWN = 3  # prompts of which a rollout is shown
LONGEST = 200  # characters shown of a prompt or a rollout


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
    example = "prompt"
    row = "rollout"
    member = "policy"
    members = "policies"
    sampled = 8

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

    def learned(self, ready: "Run", prepared: "Dataset", of: str) -> RenderableType:
        from renyi.inference.policies import summarise_policies

        trainer: Any = ready.trainer
        base, *policies = summarise_policies(
            ready.ensemble,
            prepared["input_ids"],
            ready.tokenizer,
            trainer.base_score,
            rollouts=ROLLOUTS,
            max_new_tokens=trainer.args.max_completion_length,
            seed=trainer.args.seed,
        )
        named = {"base": base} | {f"policy {m}" if len(policies) > 1 else "policy": p for m, p in enumerate(policies)}
        prompts = [str(ready.tokenizer.decode(ids)) for ids in prepared["input_ids"][:SHOWN]]
        title = "What the policy learned" if len(policies) == 1 else "What each policy learned"
        parts: list[RenderableType] = [titled(title)]
        parts += [Text(f"from {ROLLOUTS} fresh rollouts of each of {of}", "dim"), _figures(named)]
        parts += [Text(_legend(trainer), "dim")]
        return Group(*parts, *_side_by_side(prompts, named))

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


# ---- After -----------------------------------------------------------------------------------------------------------


def _figures(named: "dict[str, PolicySummary]") -> Table:
    table = figures_table(["", "log p", "log π", "slope", "tokens", "cut"])
    for name, policy in named.items():
        slope = "–" if math.isnan(policy.slope) else f"{policy.slope:.2f}"
        cells = (name, f"{policy.log_base:.3f}", f"{policy.log_policy:.3f}", slope)
        table.add_row(*map(Text, (*cells, f"{policy.mean_length:.1f}", f"{policy.truncated:.0%}")))
    return table


def _legend(trainer: Any) -> str:
    from renyi.training.target import reference_in_words

    args = trainer.args
    parts = [
        f"log p: log-probability of a token under {reference_in_words(args, trainer.base_score)}, and log π under what "
        "wrote it, nats",
        f"slope: of log π/tokens on log p/tokens within a prompt, {args.power:g} at the target",
        f"cut: share without an end after {number_text(args.max_completion_length)} tokens",
    ]
    return " · ".join(part for part in parts if args.balance == "length_aware" or not part.startswith("slope"))


def _side_by_side(prompts: Sequence[str], named: "dict[str, PolicySummary]") -> list[RenderableType]:
    """What the base and each policy write to some prompts, with the same random numbers."""
    shown: list[RenderableType] = []
    for i, prompt in enumerate(prompts):
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, policy in named.items():
            table.add_row(f"  {name}", Text(shortened(" ".join(policy.first[i].split()), LONGEST)))
        shown += [Text(f"\n{shortened(' '.join(prompt.split()), LONGEST)}", "dim"), table]
    return shown
