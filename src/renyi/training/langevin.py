"""Langevin dynamics: noise after each optimizer step turns members into samples, and snapshots keep earlier samples.

The optimizer minimises U/N: U is the loss summed over the N units of the training data plus the prior's energy, and M
times its gradient reaches each member. A step of rate η with preconditioner P moves a member by −η P ∇U/N. With noise
of variance 2 η T P/N the members are samples of exp(−U/T), the predictively oriented posterior (arXiv 2510.01915), as
η → 0. For Adam P is 1/(√v̂ + ε), as in preconditioned SGLD (Li et al. 2016, arXiv 1512.07666), without its small
correction term. Momentum widens the samples a little; `adam_beta1: 0` turns it off.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from renyi.ensemble import LoraEnsemble
from renyi.ensemble.ensemble import Snapshot
from renyi.errors import ConfigError

SNAPSHOTS = "snapshots"


def check_noise(args: Any, units: int) -> None:
    """Raise `ConfigError` if a step could move an entry without gradient by more than a tenth of the prior's width.

    Adam divides by √v̂ + ε, and the noise by its root. Where the gradient is 0, as in A while B is 0, only ε is left.
    Its usual value, 1e-8, would let the noise destroy A in the first step.

    Args:
        args: an `EnsembleConfig`.
        units: N.
    """
    if str(getattr(args.optim, "value", args.optim)) == "sgd":
        return
    limit = 0.1 * (args.prior_std or 0.1)
    variance = 2 * args.learning_rate * args.langevin_temperature / units
    if variance > limit**2 * args.adam_epsilon:
        raise ConfigError(
            f"is {args.adam_epsilon:g}: noise would move an entry without gradient by "
            f"{(variance / args.adam_epsilon) ** 0.5:.2g} in a step",
            where="adam_epsilon",
            hint=f"Give at least {variance / limit**2:.1g}, or a lower learning_rate or langevin_temperature.",
        )


class LangevinNoise(TrainerCallback):
    """Moves the members by noise after each optimizer step.

    Args:
        ensemble: its members; each has noise of its own, the same in every layout of processes.
        units: N, how many units (tokens, or pairs) of the training data the reported loss is a mean over.
        temperature: T; 0 for no noise.
    """

    def __init__(self, ensemble: LoraEnsemble, units: int, temperature: float):
        self.ensemble, self.units, self.temperature = ensemble, units, temperature

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        generator = torch.Generator(self.ensemble.device).manual_seed(args.seed * 1_000_003 + state.global_step)
        add_noise(kwargs["optimizer"], self.temperature / self.units, generator, self.ensemble)


@torch.no_grad()
def add_noise(
    optimizer: Any, temperature: float, generator: torch.Generator, ensemble: LoraEnsemble | None = None
) -> None:
    """Add √(2 η T P) ξ to each parameter [M, …] of an optimizer that has just taken a step.

    Args:
        optimizer: Adam, AdamW, or SGD without momentum.
        temperature: T of the function that the optimizer minimises.
        generator: of ξ.
        ensemble: says which of all members a process holds; None if all.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            variance = 2 * group["lr"] * temperature * preconditioner(optimizer.state.get(parameter, {}), group)
            members = range(len(parameter)) if ensemble is None else ensemble.members
            shape = (len(parameter) if ensemble is None else ensemble.num_members, *parameter.shape[1:])
            noise = torch.randn(shape, generator=generator, device=parameter.device, dtype=torch.float32)
            own = noise[members.start : members.stop].to(parameter.dtype)
            parameter.add_(own * variance**0.5)


def preconditioner(state: dict[str, Any], group: dict[str, Any]) -> Tensor | float:
    """P, the factor on the gradient in the optimizer's step: 1/(√v̂ + ε) for Adam, 1 for SGD."""
    if "exp_avg_sq" not in state:
        return 1.0
    corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    return 1 / (corrected.sqrt() + group["eps"])


class KeepSnapshots(TrainerCallback):
    """Saves the members at evenly spaced steps of the second half of training, each time in a folder of their own.

    Args:
        ensemble: whose members are saved.
        number: how many times.
    """

    def __init__(self, ensemble: LoraEnsemble, number: int):
        self.ensemble, self.number = ensemble, number

    def folders(self, output_dir: str | Path, max_steps: int) -> dict[int, Path]:
        """The folder of each step at which members are saved."""
        steps = sorted({max_steps // 2 + k * (max_steps - max_steps // 2) // self.number for k in range(self.number)})
        return {step: Path(output_dir) / SNAPSHOTS / f"step_{step}" for step in steps}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = self.folders(args.output_dir or "", state.max_steps).get(state.global_step)
        if folder is not None and args.should_save:
            self.ensemble.save(folder)

    def with_snapshots(self, output_dir: str | Path, max_steps: int) -> Snapshot:
        """The members as they are now, and all that were saved, as one set of points of which each set weighs the same.

        Raises:
            ConfigError: a set is missing, because training did not get that far or the folder was emptied.
        """
        sets = [self.ensemble.snapshot()]
        for folder in self.folders(output_dir, max_steps).values():
            if not folder.is_dir():
                raise ConfigError(f"there is no {folder}", where="keep_snapshots", hint="Train to the end first.")
            sets.append(self.ensemble.read_snapshot(folder))
        layers = [
            (torch.cat([A for A, _ in of_layer]), torch.cat([B for _, B in of_layer]))
            for of_layer in zip(*(found.layers for found in sets), strict=True)
        ]
        return Snapshot(torch.cat([found.weights for found in sets]) / len(sets), layers)
