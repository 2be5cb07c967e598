"""Two groups of annotators with opposite tastes: do members of a preference ensemble become the groups?

    python benchmarks/annotators.py [--seeds 0 1 2]

Per seed: one adapter, two members at α = 0, two at α = 0.8, on unlabelled pairs of which a quarter are contested. All
figures are measured on pairs about people who do not occur in training. The last two lines are the bounds of theory.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars

from renyi.zoo.annotators import measure_annotators, train_annotators
from renyi.zoo.preferences import PreferenceWorld, critical_alpha, single_reward_nll, specialists_nll

RUNS = {"one adapter": (1, 0.0), "two, α = 0": (2, 0.0), "two, α = 0.8": (2, 0.8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("                                                         epistemic                   AUROC of")
    print("seed run            NLL/pair  agreed acc  groups found  contested  agreed  share   nats  total")
    for seed in args.seeds:
        world = PreferenceWorld(seed=seed)
        for name, (num_members, alpha) in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                trainer, seconds = train_annotators(world, num_members, alpha, Path(folder), seed)
            m = measure_annotators(trainer, world, seconds)
            print(
                f"{seed:4} {name:13} {m.mixture_nll:9.3f}  {m.agreed_accuracy:10.4f}  {m.groups_found:12.3f}  "
                f"{m.epistemic_contested:9.3f}  {m.epistemic_agreed:6.4f}  {m.auroc_epistemic_share:.3f}  "
                f"{m.auroc_epistemic:.3f}  {m.auroc_total:.3f}   {m.seconds:.0f} s",
                flush=True,
            )
    share = PreferenceWorld().contested
    print(
        f"theory: one reward {single_reward_nll(share):.3f}, two specialists {specialists_nll(share):.3f} nats a pair"
    )
    print(f"theory: members part above α = {critical_alpha(share):.2f}")


if __name__ == "__main__":
    main()
