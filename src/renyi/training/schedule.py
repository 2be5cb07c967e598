"""The alpha schedule: stay at 0, then rise, then stay at the final value. And the learning rate of a resumed run.

If alpha has its final value from the first step, routing freezes on noise: the members' log-likelihoods differ by many
nats by chance, a few members take every example, and the rest starve. While alpha is 0, every member learns what all
the data agree on. As alpha rises, members part where the data disagree. Read next: `objective.py`, which uses it.
"""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def scheduled_alpha(progress: float, alpha: float, hold_ratio: float, ramp_ratio: float) -> float:
    """Alpha at a point of training: 0 while holding, then linear up to `alpha`.

    Args:
        progress: share of all steps already done, in [0, 1].
        alpha: the order to arrive at, in [0, 1].
        hold_ratio: share of training with alpha 0.
        ramp_ratio: share of training in which alpha rises from 0 to `alpha`.
    """
    if progress < hold_ratio:
        return 0.0
    if progress >= hold_ratio + ramp_ratio:
        return alpha
    return alpha * (progress - hold_ratio) / ramp_ratio


def follow_schedule(scheduler: Any) -> None:
    """Give the optimizer the learning rates of its schedule at the step where it stands.

    A checkpoint has the rates of the schedule that it was written under. A run that goes on for longer has another
    schedule. It would take its first step at the old rate, which is 0 at the end of a linear schedule.
    """
    if isinstance(scheduler, LambdaLR):
        step = scheduler.last_epoch
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})  # `_last_lr` is what is logged
