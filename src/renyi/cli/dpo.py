"""`renyi dpo`: train an ensemble on preference pairs, from settings in a YAML file and flags.

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
    return run_training(DPO(), argv)


class DPO(TrainingCommand):
    method = "dpo"
    trl_config = "DPOConfig"
    keys: ClassVar = {
        "Preference": "beta loss_type loss_weights label_smoothing f_divergence_type ld_alpha tie_strength "
        "reference precompute_ref_log_probs",
        "Data": DATA,
    }
    first_keys = "beta loss_type"
    row = "pair"

    def plan(self, ready: "Run") -> dict[str, str]:
        trainer: Any = ready.trainer
        against = "the base" if trainer.reference.start is None else f"each member's start, from {ready.start}"
        once = ", once for all members" if trainer.reference.start is None else ""
        computed = ", precomputed" if trainer.args.precompute_ref_log_probs else once
        return {"preference": f"{_loss(trainer.args)}, against {against}{computed}"}

    def sizes(self, ready: "Run", prepared: "Dataset") -> str:
        from renyi.data import count_pairs

        preparation: Any = ready.preparation
        counts = count_pairs(prepared, preparation)
        return (
            f"{plural(counts.pairs, 'pair')} · {plural(counts.tokens, 'token')}, "
            f"{number_text(counts.trained)} of them trained"
        )

    def first(self, ready: "Run", prepared: "Dataset", coloured: bool) -> RenderableType:
        from renyi.cli.tokens import example_panel, shown, spans

        batch = ready.trainer.data_collator([prepared[0]])  # it cuts to max_length
        prompts, completions, trained = [], [], []
        for row in range(2):
            there = batch["attention_mask"][row].bool()
            ids, is_completion = (batch[name][row][there].tolist() for name in ("input_ids", "completion_mask"))
            *before, (completion, _) = spans(ready.tokenizer, ids, list(map(bool, is_completion)))
            prompts.append(before[0][0].strip() if before else "")
            completions.append(completion.strip())
            trained.append(sum(is_completion[1:]))  # nothing predicts the first token
        prompt = max(prompts, key=len)  # if prompts are cut from the left, the pair's shorter side keeps more of it
        lines = [shown(prompt, None, coloured)] if prompt else []
        for side, colour, completion in zip(("chosen", "rejected"), ("green", "red"), completions, strict=True):
            lines.append(Text.assemble((f"{side:8}  ", "dim"), shown(completion, colour, coloured)))
        colours = (" (green)", " (red)") if coloured else ("", "")
        what = f"{trained[0]} chosen{colours[0]} and {trained[1]} rejected{colours[1]} tokens are trained"
        return example_panel(Text("\n").join(lines), "first pair", what if coloured else f"{what}, between « »")

    def files(self, ready: "Run") -> dict[str, str]:
        from renyi.layout import PREFERENCE_FILE

        return {PREFERENCE_FILE: "the loss, and what margins are measured against"}

    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        return f"renyi evaluate {folder} {dataset_name} --task preference", f"renyi info {folder}"


def _loss(args: Any) -> str:
    """The loss in one line, with every setting that differs from plain DPO."""
    parts = [" + ".join(args.loss_type)]
    parts += [f"weights {' and '.join(f'{w:g}' for w in args.loss_weights)}"] if args.loss_weights else []
    parts += [f"beta {args.beta:g}"]
    parts += [f"label_smoothing {args.label_smoothing:g}"] if args.label_smoothing else []
    parts += [args.f_divergence_type] if args.f_divergence_type != "reverse_kl" else []
    parts += [f"ld_alpha {args.ld_alpha:g}"] if args.ld_alpha is not None else []
    parts += [f"tie_strength {args.tie_strength:.3g}"] if args.tie_strength else []
    return ", ".join(parts)
