"""`renyi reward`: train an ensemble of reward models on preference pairs, from settings in a YAML file and flags.

This file has only what differs from other training commands. Read next: `training.py`, what they share.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.command import TrainingCommand
from renyi.cli.console import headed
from renyi.cli.training import run_training
from renyi.text import plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.build import Run

PAIRS_ASKED = 64


def run(argv: Sequence[str]) -> int:
    return run_training(Reward(), argv)


class Reward(TrainingCommand):
    method = "reward"
    trl_config = "RewardConfig"
    about = "Train an α-Rényi ensemble of reward models: LoRA adapters with a reward head each."
    keys: ClassVar = {
        "Reward": "center_rewards_coefficient tie_strength",
        "Data": "max_length dataset_train_split dataset_test_split test_split_size chat_template_path pad_token "
        "eos_token",
    }
    example = "pair"
    row = "pair"
    sampled = PAIRS_ASKED

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

    def learned(self, ready: "Run", prepared: "Dataset", of: str) -> RenderableType:
        from renyi.inference import score_rewards

        trainer: Any = ready.trainer
        sides = [
            score_rewards(ready.ensemble, list(prepared[f"{side}_ids"]), ready.tokenizer, trainer.kept)
            for side in ("chosen", "rejected")
        ]
        margins = [[c - r for c, r in zip(a.rewards, b.rewards, strict=True)] for a, b in zip(*sides, strict=True)]
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for column in ("member", "weight", "prefers the chosen", "mean margin"):
            table.add_column(column, justify="right")
        for m, weight in enumerate(ready.ensemble.weights.tolist()):
            of_member = [margin[m] for margin in margins]
            right = sum(x > 0 for x in of_member) / len(of_member)
            table.add_row(str(m), f"{weight:.3f}", f"{right:.1%}", f"{sum(of_member) / len(of_member):.3f}")
        spread = sum(score.std for side in sides for score in side) / (2 * len(margins))
        said = f"from {of}; members' rewards of an answer differ by {spread:.3f} on average (standard deviation)"
        return Group(headed("What each member learned"), Text(said, "dim"), table)

    def files(self, ready: "Run") -> dict[str, str]:
        from renyi.layout import REWARD_FILE

        return {REWARD_FILE: "what each member's rewards are centred by"}

    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        return f"renyi score {folder} ANSWERS.jsonl --reward lcb", f"renyi info {folder}"
