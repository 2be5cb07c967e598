"""`renyi sft`: train an ensemble on a dataset, from settings in a YAML file and flags.

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

CHATS = ("conversational", "ShareGPT")  # forms of rows


def run(argv: Sequence[str]) -> int:
    return run_training(SFT(), argv)


class SFT(TrainingCommand):
    method = "sft"
    trl_config = "SFTConfig"
    keys: ClassVar = {
        "Data": "max_length completion_only_loss assistant_only_loss packing dataset_text_field dataset_train_split "
        "dataset_test_split test_split_size chat_template_path pad_token eos_token",
        "Routing": "routing_refresh",
    }
    first_keys = "max_length"
    row = "row"

    def plan(self, ready: "Run") -> dict[str, str]:
        """Of chats, that questions are trained, too: it is TRL's default, and often not what is wanted."""
        args: Any = ready.trainer.args
        if ready.form.name not in CHATS or args.assistant_only_loss:
            return {}
        answers = "for answers alone: --assistant_only_loss true, or rows of prompt and completion"
        return {"loss": f"on all tokens of a chat; {answers}"}

    def sizes(self, ready: "Run", prepared: "Dataset") -> str:
        from renyi.data import count_tokens

        if "labels" not in prepared.column_names:  # TRL was told to leave them to its collator
            return plural(len(prepared), "example")
        counts = count_tokens(prepared)
        packed = f" packed in {plural(len(prepared), 'row')}" if len(prepared) != counts.examples else ""
        return (
            f"{plural(counts.examples, 'example')}{packed} · {plural(counts.tokens, 'token')}, "
            f"{number_text(counts.trained)} of them trained"
        )

    def first(self, ready: "Run", prepared: "Dataset", coloured: bool) -> RenderableType:
        from renyi.cli.tokens import example_panel, shown, spans
        from renyi.labels import IGNORED

        ids, is_trained = prepared[0]["input_ids"], [label != IGNORED for label in prepared[0]["labels"]]
        is_trained[0] = False  # nothing predicts the first token
        pieces = spans(ready.tokenizer, ids, is_trained)
        text = Text().join(shown(piece, "green" if trained else None, coloured) for piece, trained in pieces)
        how = "in green" if coloured else "between « »"
        return example_panel(text, "first example", f"{sum(is_trained)} of {len(ids)} tokens are trained, {how}")

    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        return f"renyi info {folder}", f"renyi score {folder} {dataset_name} --output scores.jsonl"
