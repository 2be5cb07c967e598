"""`renyi kto`: train an ensemble on thumbs up and down, from settings in a YAML file and flags.

This file has only what differs from other training commands. Read next: `training.py`, what they share.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import RenderableType
from rich.text import Text

from renyi.cli.command import DATA, TrainingCommand
from renyi.cli.training import run_training
from renyi.text import number_text, plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.build import Run


def run(argv: Sequence[str]) -> int:
    return run_training(KTO(), argv)


class KTO(TrainingCommand):
    method = "kto"
    trl_config = "KTOConfig"
    keys: ClassVar = {
        "Thumbs": "beta loss_type desirable_weight undesirable_weight reference precompute_ref_log_probs",
        "Data": DATA,
    }
    first_keys = "beta"
    row = "row"

    def plan(self, ready: "Run") -> dict[str, str]:
        trainer: Any = ready.trainer
        args = trainer.args
        weights = (
            ""
            if args.desirable_weight == args.undesirable_weight == 1
            else (f", weights {args.desirable_weight:g} up and {args.undesirable_weight:g} down")
        )
        computed = ", precomputed" if args.precompute_ref_log_probs else ""
        return {"thumbs": f"{args.loss_type}, beta {args.beta:g}{weights}, against {trainer.against}{computed}"}

    def sizes(self, ready: "Run", prepared: "Dataset") -> str:
        from renyi.data import count_thumbs

        preparation: Any = ready.preparation
        counts = count_thumbs(prepared, preparation)
        return (
            f"{plural(counts.thumbs, 'thumb')}, {number_text(counts.up)} of them up · "
            f"{plural(counts.tokens, 'token')}, {number_text(counts.trained)} of them trained"
        )

    def first(self, ready: "Run", prepared: "Dataset", coloured: bool) -> RenderableType:
        from renyi.cli.tokens import example_panel, shown, spans

        preparation: Any = ready.preparation
        row, longest = prepared[0], preparation.within(ready.trainer.limits).max_length
        ids = [*row["prompt_ids"], *row["completion_ids"]][:longest]
        is_trained = [i >= max(len(row["prompt_ids"]), 1) for i in range(len(ids))]
        pieces = spans(ready.tokenizer, ids, is_trained)
        colour, thumb = ("green", "up") if row["label"] else ("red", "down")
        text = Text().join(shown(piece, colour if trained else None, coloured) for piece, trained in pieces)
        how = f"in {colour}" if coloured else "between « »"
        what = f"thumbs {thumb}: {sum(is_trained)} of {len(ids)} tokens are trained, {how}"
        return example_panel(text, "first row", what)

    def files(self, ready: "Run") -> dict[str, str]:
        from renyi.layout import THUMBS_FILE

        return {THUMBS_FILE: "the loss, what rewards are measured against, and the reference points"}

    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        return f"renyi score {folder} {dataset_name} --output scores.jsonl", f"renyi info {folder}"
