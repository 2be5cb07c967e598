"""Two groups of annotators with opposite tastes: do members of a preference ensemble become the groups?

    python benchmarks/annotators.py [--seeds 0 1 2] [--named]

Per seed: one adapter, two members at α = 0, two at α = 0.8, on unlabelled pairs of which a quarter are contested. All
figures are measured on pairs about people who do not occur in training. The last two lines are the bounds of theory.

With --named each label has the name of its annotator, who gives ten labels, and the question is what names add. Per
seed and order: two members that are told the names (`routing_group: annotator`), and two that are not, of the same
labels in as many steps. "Annotators found" is the adjusted Rand index of a new annotator's group and the member that
explains the ten labels best, "labels found" the same for single contested labels. Half of the pairs are contested: of
a quarter, one annotator in eighteen gives ten labels that say nothing about the group.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars

from renyi.zoo.annotators import groups_of_annotators, measure_annotators, named_rows, train_annotators
from renyi.zoo.preferences import PreferenceWorld, critical_alpha, single_reward_nll, specialists_nll

NAMED_CONTESTED, NAMED_PAIRS, LABELS_EACH, NAMED_STEPS = 0.5, 8_000, 10, 250
RUNS = {"one adapter": (1, 0.0), "two, α = 0": (2, 0.0), "two, α = 0.8": (2, 0.8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--named", action="store_true", help="what the annotators' names add")
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.named:
        named(args.seeds)
        return
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


def named(seeds: list[int]) -> None:
    """What is found with the names of annotators, and without."""
    print(f"theory: without names members part above α = {critical_alpha(NAMED_CONTESTED):.2f}")
    print("seed order run                annotators found  labels found  NLL/pair")
    for seed in seeds:
        world = PreferenceWorld(NAMED_CONTESTED, seed)
        rows, _ = named_rows(world.pairs(NAMED_PAIRS, seed), LABELS_EACH)
        for alpha in (0.8, 0.4):
            for told in (True, False):
                settings = {"max_steps": NAMED_STEPS, "per_device_train_batch_size": 4 * LABELS_EACH}
                settings |= {"routing_group": "annotator"} if told else {}
                with tempfile.TemporaryDirectory() as folder:
                    given = rows if told else rows.remove_columns("annotator")
                    trainer, seconds = train_annotators(world, 2, alpha, Path(folder), seed, given, **settings)
                found, m = groups_of_annotators(trainer, world, LABELS_EACH), measure_annotators(trainer, world)
                print(
                    f"{seed:4} {alpha:5} {'names' if told else 'no names':18} {found:16.3f}  {m.groups_found:12.3f}  "
                    f"{m.mixture_nll:8.3f}   {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
