"""What a PowerFlow run tunes toward, in words: for the plan before it and the model card after it.

Read next: `powerflow.py`, which has the settings and the loss.
"""

from typing import Any

from renyi.ensemble import BaseScore
from renyi.training.card import Method


def reference_in_words(args: Any, score: Any) -> str:
    """The distribution that the target is a power of, in words.

    Args:
        args: a `PowerFlowConfig`.
        score: the trainer's `base_score`.
    """
    if not isinstance(score, BaseScore):
        return "a score of your own"
    if score.members is None:
        return "the base"
    many = len(score.members.weights)
    whose = "policies as training began" if args.reference == "start" else f"members of {args.reference}"
    if many == 1:
        return f"the {'policy as training began' if args.reference == 'start' else f'member of {args.reference}'}"
    if score.pool == "member":
        return f"each policy's own one of the {many} {whose}"
    return f"the {'mixture' if score.pool == 'arithmetic' else 'geometric mean'} of the {many} {whose}"


def target_in_words(args: Any, score: Any) -> str:
    """The target, and how it is tilted. The fixed point of this loss is a power of the base with a tilt by length."""
    of, power = reference_in_words(args, score), f"{args.power:g}"
    if args.balance == "trajectory":
        return f"p^{power} of {of}, made to sum to one (plain trajectory balance)"
    if args.balance == "token_mean":
        return f"exp({power} × mean log p a token) of {of}, for comparison: it favours what is long"
    if args.power == 0:
        return "power 0: every next token alike"
    if args.power == 1:
        return f"{of} itself (power 1)"
    return f"p^{power} of {of}, tilted in length: log π = {power}·log p − λ·tokens"


def card_of(args: Any, score: Any) -> Method:
    """What the model card says."""
    return Method(
        introduction="tuned without labels or rewards toward a power of a distribution\n"
        f"([PowerFlow](https://arxiv.org/abs/2603.18363)): {target_in_words(args, score)}.",
        settings={
            "power": f"{args.power:g}",
            "reference": reference_in_words(args, score),
            "loss": f"{args.balance}, {args.partition} partition",
            "rollouts": f"{args.num_generations} a prompt, at most {args.max_completion_length} tokens",
        },
        measured="measure, of the last rollouts",
        measures={
            "log-probability under the reference, nats a token": "logps/base",
            "under the policies": "logps/policy",
            "log Z', nats a token": "log_partition",
            "variance of the residual": "residual/variance",
            "tokens a rollout": "completions/mean_length",
            "share cut at the longest length": "completions/clipped_ratio",
        },
    )
