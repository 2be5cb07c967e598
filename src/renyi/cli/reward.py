"""`renyi reward`: train an ensemble of reward models on preference pairs, from settings in a YAML file and flags.

This file has only what differs from other training commands. Read next: `training.py`, what they share.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.console import RenderableType
from rich.text import Text

from renyi.cli.command import DATA, TrainingCommand
from renyi.cli.training import run_training
from renyi.text import plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.build import Run


def run(argv: Sequence[str]) -> int:
    return run_training(Reward(), argv)


class Reward(TrainingCommand):
    method = "reward"
    trl_config = "RewardConfig"
    about = "Train an α-Rényi ensemble of reward models: LoRA adapters with a reward head each."
    keys: ClassVar = {
        "Reward": "center_rewards_coefficient tie_strength",
        "Data": DATA,
    }
    row = "pair"

    def plan(self, ready: "Run") -> dict[str, str]:
        args, head = ready.trainer.args, ready.ensemble.stack.head
        assert head is not None
        center = args.center_rewards_coefficient
        margins = " with margins" if "margin" in ready.form.columns else " of votes" if ready.form.kept else ""
        margins += f", ties {args.tie_strength:.3g}" if args.tie_strength else ""
        centred = f", rewards centred with weight {center:g}" if center is not None else ""
        return {"reward": f"Bradley–Terry{margins}{centred}, a head of {head.weight.shape[-1]} weights a member"}

    def sizes(self, ready: "Run", prepared: "Dataset") -> str:
        tokens = sum(len(ids) for column in ("chosen_ids", "rejected_ids") for ids in prepared[column])
        return f"{plural(len(prepared), 'pair')} · {plural(tokens, 'token')}"

    def first(self, ready: "Run", prepared: "Dataset", coloured: bool) -> RenderableType:
        from renyi.cli.tokens import example_panel, shown, spans

        lines = []
        for side, colour in (("chosen", "green"), ("rejected", "red")):
            ids = prepared[0][f"{side}_ids"]
            pieces = spans(ready.tokenizer, ids, [False] * (len(ids) - 1) + [True])
            text = Text().join(shown(piece, colour if rated else None, coloured) for piece, rated in pieces)
            lines.append(Text.assemble((f"{side:8}  ", "dim"), text))
        how = "in colour" if coloured else "between « »"
        return example_panel(Text("\n").join(lines), "first pair", f"rewards are read at the last token, {how}")

    def files(self, ready: "Run") -> dict[str, str]:
        from renyi.layout import REWARD_FILE

        return {REWARD_FILE: "what each member's rewards are centred by"}

    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        return f"renyi score {folder} ANSWERS.jsonl --reward lcb", f"renyi info {folder}"
