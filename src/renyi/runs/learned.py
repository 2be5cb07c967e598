"""What each member of a run learned: its members are asked at its end, and the answers stay in its folder as a table.

A command shows the same table. Read next: `renyi.inference.members`, which sums up what members were asked.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from renyi.evaluation.sections import one_line
from renyi.files import write_whole
from renyi.inference import (
    MemberTable,
    members_table,
    score,
    score_pairs,
    score_rewards,
    score_thumbs,
    summarise_members,
)
from renyi.inference.policies import summarise_policies
from renyi.labels import IGNORED
from renyi.runs.build import Run
from renyi.runs.settings import METHODS
from renyi.text import number_text
from renyi.training.target import reference_in_words

LEARNED_FILE = "learned.txt"
TITLE = "What each member learned"
SNIPPET = 24  # characters of either side of a pair
ROLLOUTS = 8  # of each prompt, to say what a policy learned
SHOWN = 3  # prompts of which a rollout is kept
LONGEST = 200  # characters of a prompt or a rollout


def ask_members(run: Run) -> MemberTable:
    """Ask every member what it learned, of held-out rows if there are any, and write `LEARNED_FILE`.

    Every process asks, and the first one writes.

    Args:
        run: trained.

    Raises:
        EnsembleFormatError: a member gives no finite answer.
        SaveError: the file could not be written.
    """
    method, is_held_out = METHODS[run.settings.method], run.eval_rows is not None
    prepared = run.prepared(run.train_rows if run.eval_rows is None else run.eval_rows, method.sampled)
    of = f"{len(prepared)} {'held-out' if is_held_out else 'training'} {method.example}s"
    with run.trainer.accelerator.autocast():
        table = _ASK[run.settings.method](run, prepared, of)
    if run.trainer.is_world_process_zero():
        write_whole(run.output_dir / LEARNED_FILE, table.as_text().encode())
    return table


def _of_texts(run: Run, prepared: Dataset, of: str) -> MemberTable:
    def trained_tokens(example: int) -> str:
        tokens = zip(prepared[example]["input_ids"], prepared[example]["labels"], strict=True)
        return _line(run.tokenizer, [token for token, label in tokens if label != IGNORED])

    return _of_scores(run, score(run.ensemble, prepared), f"from {of}", trained_tokens)


def _of_pairs(run: Run, prepared: Dataset, of: str) -> MemberTable:
    trainer: Any = run.trainer
    loss = trainer.args.preference_loss
    scores = score_pairs(run.ensemble, prepared, loss, trainer.reference, trainer.preparation)
    right = sum(score.preference > 0.5 for score in scores) / len(scores)
    return _of_scores(
        run,
        scores,
        f"from {of}; the mixture prefers the chosen completion in {right:.1%} of them",
        lambda example: _both_sides(run.tokenizer, prepared[example]),
        example="pair",
        nll="NLL of the label in nats a pair" if loss.loss_type == ("sigmoid",) else "NLL: the loss of a pair",
    )


def _of_thumbs(run: Run, prepared: Dataset, of: str) -> MemberTable:
    trainer: Any = run.trainer
    scores = score_thumbs(run.ensemble, prepared, trainer.kept, trainer.preparation)
    right = sum((s.approval > 0.5) == up for s, up in zip(scores, prepared["label"], strict=True)) / len(scores)

    def signed(example: int) -> str:
        row = prepared[example]
        return f"{'+' if row['label'] else '−'} {_line(run.tokenizer, row['completion_ids'])}"

    about = f"from {of}; the mixture predicts {right:.1%} of them"
    return _of_scores(run, scores, about, signed, example="thumb", nll="NLL: the loss of a thumb")


def _of_scores(run: Run, scores: Any, about: str, text_of: Callable[[int], str], **words: str) -> MemberTable:
    members = summarise_members(scores, run.ensemble.weights)
    clearest = ["–" if m.clearest is None else text_of(m.clearest) for m in members]
    return members_table(members, TITLE, about, clearest, **words)


def _of_rewards(run: Run, prepared: Dataset, of: str) -> MemberTable:
    trainer: Any = run.trainer
    sides = [
        score_rewards(run.ensemble, list(prepared[f"{side}_ids"]), run.tokenizer, trainer.kept)
        for side in ("chosen", "rejected")
    ]
    margins = [[c - r for c, r in zip(a.rewards, b.rewards, strict=True)] for a, b in zip(*sides, strict=True)]
    rows = []
    for m, weight in enumerate(run.ensemble.weights.tolist()):
        of_member = [margin[m] for margin in margins]
        right, mean = (sum(of) / len(of_member) for of in ([x > 0 for x in of_member], of_member))
        rows.append([str(m), f"{weight:.3f}", f"{right:.1%}", f"{mean:.3f}"])
    spread = sum(score.std for side in sides for score in side) / (2 * len(margins))
    about = f"from {of}; members' rewards of an answer differ by {spread:.3f} on average (standard deviation)"
    return MemberTable(TITLE, about, ["member", "weight", "prefers the chosen", "mean margin"], rows)


def _of_policies(run: Run, prepared: Dataset, of: str) -> MemberTable:
    """What the base and each policy write, with the same random numbers."""
    trainer: Any = run.trainer
    base, *policies = summarise_policies(
        run.ensemble,
        prepared["input_ids"],
        run.tokenizer,
        trainer.base_score,
        rollouts=ROLLOUTS,
        max_new_tokens=trainer.args.max_completion_length,
        seed=trainer.args.seed,
    )
    named = {"base": base} | {f"policy {m}" if len(policies) > 1 else "policy": p for m, p in enumerate(policies)}
    rows = [
        [
            name,
            f"{policy.log_base:.3f}",
            f"{policy.log_policy:.3f}",
            "–" if math.isnan(policy.slope) else f"{policy.slope:.2f}",
            f"{policy.mean_length:.1f}",
            f"{policy.truncated:.0%}",
        ]
        for name, policy in named.items()
    ]
    prompts = [str(run.tokenizer.decode(ids)) for ids in prepared["input_ids"][:SHOWN]]
    return MemberTable(
        "What the policy learned" if len(policies) == 1 else "What each policy learned",
        f"from {ROLLOUTS} fresh rollouts of each of {of}",
        ["", "log p", "log π", "slope", "tokens", "cut"],
        rows,
        _legend_of_policies(trainer),
        texts=[""],
        written=[
            (one_line(prompt, LONGEST), [(name, one_line(policy.first[i], LONGEST)) for name, policy in named.items()])
            for i, prompt in enumerate(prompts)
        ],
    )


def _legend_of_policies(trainer: Any) -> str:
    args = trainer.args
    parts = [
        f"log p: log-probability of a token under {reference_in_words(args, trainer.base_score)}, and log π under what "
        "wrote it, nats",
        f"slope: of log π/tokens on log p/tokens within a prompt, {args.power:g} at the target",
        f"cut: share without an end after {number_text(args.max_completion_length)} tokens",
    ]
    return " · ".join(part for part in parts if args.balance == "length_aware" or not part.startswith("slope"))


# How each of `METHODS` asks: from a run, prepared rows, and a name of these.
_ASK: Mapping[str, Callable[[Run, Dataset, str], MemberTable]] = {
    "sft": _of_texts,
    "dpo": _of_pairs,
    "kto": _of_thumbs,
    "reward": _of_rewards,
    "powerflow": _of_policies,
}


def _both_sides(tokenizer: PreTrainedTokenizerBase, pair: Mapping[str, list[int]]) -> str:
    """Both completions of a pair on one line, from the point at which they differ."""
    sides = [_line(tokenizer, pair[column]) for column in ("chosen_ids", "rejected_ids")]
    shared = next((i for i, (one, other) in enumerate(zip(*sides, strict=False)) if one != other), 0)
    if shared > SNIPPET // 2:
        sides = [f"…{side[shared:]}" for side in sides]
    return " ≻ ".join(one_line(side, SNIPPET) for side in sides)


def _line(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The beginning of a text on one line."""
    return one_line(str(tokenizer.decode(ids[:60], skip_special_tokens=True)))
