"""What each kind of member makes of contested, agreed, rare and never seen facts, and what a training step of it costs.

    python benchmarks/distributions.py [--seeds 0 1 2] [--runs NAME …] [--draws 16] [--set key=value …]
    python benchmarks/distributions.py --cost [--rounds 5]

The world is that of `contested_or_rare.py`: sixty facts. Two schools contradict each other on 24, 18 are agreed
and rare, 18 are agreed and common. Never seen are the facts about ten other people, which the base knows and no
record mentions. Printed for each kind of fact: the epistemic uncertainty in nats, a mean over facts and three forms of
question; of members that are distributions also how much of it lies within members. Then the mixture's NLL in nats an
answer on held-out records, its accuracy on agreed facts (common and rare), and the AUROC of finding the contested facts
among contested and rare ones by epistemic uncertainty.

`--cost` trains the demo's batch and prints the median seconds of a step and its ratio to that of four points, measured
in turns.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import disable_progress_bars
from sklearn.metrics import roc_auc_score
from transformers import TrainerCallback

from renyi.measures import draw_uncertainty, token_uncertainty
from renyi.objectives import renyi_loss
from renyi.zoo import World
from renyi.zoo.demo import train
from renyi.zoo.measure import answer_log_probs, held_out_log_likelihood
from renyi.zoo.world import NUM_FORMS, YESTERDAY

GAUSSIAN: dict[str, Any] = {"member_kind": "gaussian", "initial_std": 0.05, "prior_std": 0.2, "kl_warmup_ratio": 0.2}
LANGEVIN: dict[str, Any] = {
    "member_kind": "langevin",
    "prior_std": 0.2,
    "max_grad_norm": 0.0,
    "adam_beta1": 0.0,
    "adam_epsilon": 1e-3,
}
RUNS: dict[str, dict[str, Any]] = {
    "four points": {},
    "two points": {"num_members": 2},
    "four Gaussians": GAUSSIAN,
    "two Gaussians": {**GAUSSIAN, "num_members": 2},
    "one Gaussian": {**GAUSSIAN, "num_members": 1},
    "four Gaussians, S = 4": {**GAUSSIAN, "num_draws": 4},
    "four Walsh–Hadamard": {**GAUSSIAN, "member_kind": "walsh_hadamard"},
    "four Langevin": LANGEVIN,
}
COSTS: dict[str, dict[str, Any]] = {
    "points": {},
    "Gaussian, S = 1": GAUSSIAN,
    "Gaussian, S = 4": {**GAUSSIAN, "num_draws": 4},
    "Walsh–Hadamard, S = 1": {**GAUSSIAN, "member_kind": "walsh_hadamard"},
    "Walsh–Hadamard, S = 4": {**GAUSSIAN, "member_kind": "walsh_hadamard", "num_draws": 4},
    "Langevin": LANGEVIN,
}
ALPHA = 0.8


def study(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; rarity {args.rarity:g}; {args.draws} draws")
    print("                              epistemic (of which within members), nats")
    print("seed run                      contested      agreed         rare           never seen     "
          "NLL    accuracy AUROC  seconds  mean std")  # fmt: skip
    for seed in args.seeds:
        world = World(contested=0.4, rare=0.3, rarity=args.rarity, seed=seed)
        for name in args.runs:
            settings = {"num_members": 4, **RUNS[name], **args.set}
            with tempfile.TemporaryDirectory() as folder:
                trainer, seconds = train(world, settings.pop("num_members"), ALPHA, Path(folder), seed, **settings)
            print(f"{seed:4} {name:24} {line(trainer, world, args.draws, seconds)}", flush=True)


def line(trainer: Any, world: World, draws: int, seconds: float) -> str:
    members = trainer.model.eval()
    stds = [layer.members.std() for layer in members.stack.layers.values()]
    points = members.draw(draws, seed=1) if members.stack.is_random else members
    trainer.model = points
    known, others = world.probes(), YESTERDAY.probes()[NUM_FORMS * world.num_facts :]
    log_p_MKV, values_KS = answer_log_probs(points, trainer.processing_class, known)
    log_p_MPV = torch.cat([log_p_MKV, answer_log_probs(points, trainer.processing_class, others)[0]], dim=1)
    log_weights = points.weights.log()
    found = token_uncertainty(log_p_MPV, log_weights)
    within = draw_uncertainty(log_p_MPV, log_weights, points.num_draws).within_members
    rare_facts = set(world.rare_facts)
    unseen = torch.arange(len(known) + len(others)) >= len(known)
    contested, rare = unseen.clone(), unseen.clone()
    contested[: len(known)] = torch.tensor([probe.fact.contested for probe in known])
    rare[: len(known)] = torch.tensor([probe.fact in rare_facts for probe in known])
    contested, rare = contested & ~unseen, rare & ~unseen
    agreed = ~(contested | rare | unseen)
    columns = [
        f"{found.epistemic[part].mean():.3f} ({within[part].mean():.3f})" for part in (contested, agreed, rare, unseen)
    ]
    right = unseen.clone()
    right[: len(known)] = renyi_loss(log_p_MKV, 1.0, log_weights).argmin(dim=-1) == values_KS[:, 0]
    either = contested | rare
    nll = renyi_loss(held_out_log_likelihood(trainer), 1.0, log_weights).mean().item() / world.statements
    auroc = roc_auc_score(contested[either], found.epistemic[either])
    std = torch.stack([s for s in stds if s is not None]).mean().item() if stds[0] is not None else 0.0
    return (
        f"{'  '.join(columns)}  {nll:.3f}  {right[agreed].double().mean():.2f} {right[rare].double().mean():.2f} "
        f"{auroc:.3f}  {seconds:7.0f}  {std:.3f}"
    )


class Clock(TrainerCallback):
    """Seconds of each step but the first three."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 3:
            self.seconds.append(time.perf_counter() - self.began)


def cost(rounds: int) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; M = 4, 32 records a step, {rounds} rounds")
    print("kind                    seconds a step   ratio to points")
    seconds: dict[str, list[float]] = {name: [] for name in COSTS}
    ratios: dict[str, list[float]] = {name: [] for name in COSTS}
    for _ in range(rounds):
        medians = {}
        for name, settings in COSTS.items():
            clock = Clock()
            with tempfile.TemporaryDirectory() as folder:
                train(World(), 4, ALPHA, Path(folder), 0, clock, max_steps=12, alpha_hold_ratio=0.0, **settings)
            medians[name] = statistics.median(clock.seconds)
        for name, value in medians.items():
            seconds[name].append(value)
            ratios[name].append(value / medians["points"])
    for name in COSTS:
        print(f"{name:23} {statistics.median(seconds[name]):14.3f}   {statistics.median(ratios[name]):.2f}")


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--rarity", type=float, default=28.0)
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="key=value")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.set = dict(args.set)
    disable_progress_bars()
    if args.cost:
        cost(args.rounds)
    else:
        study(args)


if __name__ == "__main__":
    main()
