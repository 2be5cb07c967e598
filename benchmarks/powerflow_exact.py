"""Does PowerFlow reach its stated target distribution? And what do other losses do to the length of answers?

    python benchmarks/powerflow_exact.py [--seeds 0 1 2] [--steps 400] [--figure FILE]

A random Llama of four tokens whose answers have at most four: all 121 sequences can be written down, and so can the
target. The trainer only sees rollouts. Printed for each run: the total variation (TV) between target and policy before
and after, the divergence in both directions, log Z' against λ, the slopes of log π on (log p_base, |y|), which must
approach (power, −λ), mean lengths, and CPU time. Then the same with a learned log Z', with two policies, and with the
power of three members pooled.

The ablation has a base without memory, an end of probability 0.15 and five words, cut at 24 tokens, so that the mean
length under the target of each loss is known, too.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import logging

from renyi import LoraEnsemble
from renyi.objectives import BALANCES

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for `powered.py`, languages that can be enumerated
from powered import language, lora, memoryless_llama, train_and_compare, trainer_in, wide_llama
from tiny import scatter_members

POWERS = (0.5, 1.0, 2.0, 4.0)
VOCABULARY, LONGEST = 4, 4
ROLLOUTS = 512
# With its default of 1e-8 Adam takes steps of full size even when the gradient is very small. Then a policy that has
# converged sometimes moves away again (TV up to 0.03).
ADAM_EPSILON = 1e-6
# name: what is set, and of how many members the reference is
VARIANTS = {
    "learned log Z'": ({"partition": "learned"}, 0),
    "two policies": ({"num_members": 2}, 0),
    "arithmetic pool": ({"reference_pool": "arithmetic"}, 3),
    "geometric pool": ({"reference_pool": "geometric"}, 3),
}
LENGTH = "completions/mean_length"
ABLATION_PROBS, ABLATION_LONGEST = (0.15, 0.20, 0.18, 0.17, 0.16, 0.14), 24


def exactness(power: float, seed: int, steps: int, variant: str = "") -> None:
    known = language(VOCABULARY, LONGEST)
    settings, pooled = VARIANTS.get(variant, ({}, 0))
    given = {"num_generations": ROLLOUTS, "max_steps": steps, "adam_epsilon": ADAM_EPSILON, **settings}
    with tempfile.TemporaryDirectory() as folder:
        if pooled:
            members = LoraEnsemble.from_base(wide_llama(VOCABULARY, seed), pooled, lora(), seed=seed)
            scatter_members(members, 0.15, seed).save(folder)
            given["reference"] = folder
        trainer = trainer_in(folder, wide_llama(VOCABULARY, seed), LONGEST, power=power, seed=seed, **given)
        began = time.process_time()
        for c in train_and_compare(trainer, known):
            figures = (
                f"{c.distance:.3f} {c.total_variation:.4f}",
                f"{c.forward_kl:.4f} {c.reverse_kl:.4f}",
                f"{c.log_partition:+.4f} {c.expected:+.4f} {abs(c.log_partition - c.expected):.4f}",
                f"{c.slopes[0]:.3f} {c.slopes[1]:+.3f} {c.r2:.4f}",
                f"{c.length:.2f} {c.length_expected:.2f}",
            )
            seconds = time.process_time() - began
            print(f"{power:5g} {seed:4} {variant:15} {'  '.join(figures)} {seconds:3.0f}", flush=True)


def length_expected(balance: str, power: float) -> float:
    """Mean length under a balance's target for a base without memory, by sums over lengths: words enter by Σ_v p_v^a.

    A sequence of n tokens ends, unless it is cut. Under the length-aware target, next tokens are those of the base at
    temperature 1/power.
    """
    end, *words = ABLATION_PROBS

    def log_mass(n: int) -> float:
        """log Σ over sequences of n tokens of exp(power · log p), or exp(power · log p / n) for "token_mean"."""
        exponent = power / n if balance == "token_mean" else power
        log_words = math.log(sum(p**exponent for p in words))
        ended = exponent * math.log(end) + (n - 1) * log_words
        return ended if n < ABLATION_LONGEST else math.log(math.exp(ended) + math.exp(n * log_words))

    lengths = torch.arange(1, ABLATION_LONGEST + 1)
    logs = torch.tensor([log_mass(n) for n in lengths.tolist()], dtype=torch.float64)
    if balance == "length_aware":
        logs = logs - lengths * math.log(sum(p**power for p in ABLATION_PROBS))
    return (logs.softmax(0) * lengths).sum().item()


def ablation(power: float, seed: int, steps: int) -> dict[str, list[float]]:
    """Mean length of rollouts at every step, by balance; printed at a few."""
    curves = {}
    for balance in BALANCES:
        with tempfile.TemporaryDirectory() as folder:
            model = memoryless_llama(ABLATION_PROBS)
            given = {"num_generations": 64, "learning_rate": 1e-3, "seed": seed, "max_steps": steps}
            trainer = trainer_in(folder, model, ABLATION_LONGEST, power=power, balance=balance, **given)
            trainer.train()
        lengths = [row[LENGTH] for row in trainer.state.log_history if LENGTH in row]
        curves[balance] = lengths
        at = [sum(five) / 5 for five in (lengths[:5], lengths[20:25], lengths[50:55], lengths[-5:])]
        figures = "  ".join(f"{x:5.2f}" for x in at)
        print(f"{power:5g} {seed:4} {balance:13} {figures}   {length_expected(balance, power):5.2f}", flush=True)
    return curves


def draw(curves: dict[float, list[dict[str, list[float]]]], file: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    names = {"length_aware": "length-aware", "trajectory": "whole trajectory", "token_mean": "target by token mean"}
    for axes, (power, runs) in zip(panels, curves.items(), strict=True):
        for balance, colour in zip(BALANCES, ("tab:blue", "tab:red", "tab:orange"), strict=True):
            for i, run in enumerate(runs):
                axes.plot(run[balance], color=colour, alpha=0.8, linewidth=1, label=None if i else names[balance])
            axes.axhline(length_expected(balance, power), color=colour, linestyle=":")
        axes.axhline(length_expected("length_aware", 1.0), color="black", linewidth=0.8, label="the base")
        axes.set_title(f"power {power:g}")
        axes.set_xlabel("step")
        axes.set_yscale("log", base=2)
        axes.set_yticks([1, 2, 4, 8, 16, 24], labels=["1", "2", "4", "8", "16", "24"])
    panels[0].set_ylabel("mean tokens of a rollout")
    panels[-1].legend(
        loc=(0.58, 0.2), frameon=False, fontsize="small", title="dotted: each target's", title_fontsize="small"
    )
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ablation_steps", type=int, default=80)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    disable_progress_bars()
    logging.set_verbosity_error()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{args.steps} steps of {ROLLOUTS} rollouts")
    above = ("", "TV", "KL", "log Z'", "regression", "length")
    below = ("power seed", "start end", "π*‖π   π‖π*", "found   λ       apart", "log p length R²", "π    π*    s")
    for names in (above, below):
        print("".join(f"{name:{width}}" for name, width in zip(names, (27, 14, 15, 24, 21, 0), strict=True)))
    for power in POWERS:
        for seed in args.seeds:
            exactness(power, seed, args.steps)
    for variant in VARIANTS:
        for seed in args.seeds:
            exactness(2.0, seed, args.steps, variant)

    print(f"\nMean length of rollouts; the base's is {length_expected('length_aware', 1.0):.2f}")
    print("                     around step                  the target's")
    print("power seed loss           2     22     52    last")
    curves = {power: [ablation(power, seed, args.ablation_steps) for seed in args.seeds] for power in (2.0, 4.0)}
    if args.figure:
        draw(curves, args.figure)


if __name__ == "__main__":
    main()
