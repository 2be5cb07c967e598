"""Contested, or merely rare? An ensemble's uncertainty separates the two; one adapter's entropy does not.

    python benchmarks/contested_or_rare.py [--seeds 0 1 2] [--rarity 28]

There are sixty facts. Two schools contradict each other on 24. 18 are agreed and rare, so a model is unsure of them
because it has few data. 18 are agreed and common. Every fact is asked in three ways. Printed: the AUROC of finding the
contested questions, among the rare ones and among all, and the area under the risk–coverage curve when the most
uncertain answers are withheld first. The risk of an answer is its probability to be wrong, over the schools.
Uncertainty is the total entropy, the
largest probability, or, for ensembles, the members' disagreement (epistemic).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars
from sklearn.metrics import roc_auc_score

from renyi.inference import token_uncertainty
from renyi.objectives import renyi_loss
from renyi.zoo import World
from renyi.zoo.demo import train
from renyi.zoo.measure import answer_log_probs

# name: members, alpha
RUNS = {"one adapter": (1, 0.0), "two, α = 0": (2, 0.0), "two, α = 0.8": (2, 0.8), "four, α = 0.8": (4, 0.8)}


def area_under_risk_coverage(uncertainty: np.ndarray, risk: np.ndarray) -> float:
    """Mean, over all coverages, of the risk of the answers that are given."""
    given = risk[np.argsort(uncertainty, kind="stable")]
    return float((given.cumsum() / np.arange(1, len(given) + 1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rarity", type=float, default=28.0)
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; rarity {args.rarity:g}")
    print("                    total            epistemic        AUROC: in rare  in all         AURC by")
    print("seed run            contested  rare  contested  rare  total  epi    total  epi    total  max p   epi")
    for seed in args.seeds:
        world = World(contested=0.4, rare=0.3, rarity=args.rarity, seed=seed)
        for name, (num_members, alpha) in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                trainer, _ = train(world, num_members, alpha, Path(folder), seed)
            ensemble, probes = trainer.model.eval(), world.probes()
            log_p_MPV, values_PS = answer_log_probs(ensemble, trainer.processing_class, probes)
            uncertainty = token_uncertainty(log_p_MPV, ensemble.weights.log())
            mixture_PV = (-renyi_loss(log_p_MPV, 1.0, ensemble.weights.log())).exp()
            risk = (mixture_PV.argmax(dim=-1)[:, None] != values_PS).double().mean(dim=1).numpy()
            total, epistemic = uncertainty.total.numpy(), uncertainty.epistemic.numpy()
            contested = np.array([probe.fact.contested for probe in probes])
            rare = np.array([probe.fact in world.rare_facts for probe in probes])
            either = contested | rare
            found = [
                *(x[part].mean() for x in (total, epistemic) for part in (contested, rare)),
                *(
                    roc_auc_score(contested[part], x[part])
                    for part in (either, either | True)
                    for x in (total, epistemic)
                ),
                *(area_under_risk_coverage(x, risk) for x in (total, -mixture_PV.amax(dim=-1).numpy(), epistemic)),
            ]
            means, aurocs, areas = found[:4], found[4:8], found[8:]
            print(
                f"{seed:4} {name:13} {means[0]:10.3f} {means[1]:5.3f} {means[2]:10.3f} {means[3]:5.3f}  "
                f"{'  '.join(f'{x:.3f}' for x in aurocs)}  {' '.join(f'{x:.4f}' for x in areas)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
