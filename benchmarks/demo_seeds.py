"""The demo over several seeds: every figure it claims, and whether members find the schools.

    python benchmarks/demo_seeds.py [--seeds 0 1 2]

Per seed: the demo's three runs, then two members at α = 0 and at α = 0.8, whose agreement with the schools is given as
the adjusted Rand index over held-out records that contain a contested fact.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars
from sklearn.metrics import adjusted_rand_score

from renyi.zoo import World
from renyi.zoo.demo import HELD_OUT_RECORDS, RUNS, held_out_seed, train
from renyi.zoo.measure import held_out_log_likelihood, measure


def rand_index(trainer, world: World, seed: int) -> float:
    """Adjusted Rand index between the member that explains a record best and the school that wrote it."""
    best = held_out_log_likelihood(trainer).argmax(dim=0).tolist()
    records = world.records(HELD_OUT_RECORDS, held_out_seed(seed))
    pairs = [(r.source, m) for r, m in zip(records, best, strict=True) if any(f.contested for f in r.facts)]
    return adjusted_rand_score(*zip(*pairs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("seed run           M  NLL/answer  agreed acc  MI contested  MI agreed  loads; follows a school; seconds")
    for seed in args.seeds:
        world = World(seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            for name, (num_members, alpha) in {**RUNS, "two, α = 0": (2, 0.0), "two, α = 0.8": (2, 0.8)}.items():
                trainer, seconds = train(world, num_members, alpha, Path(folder) / "run", seed)
                m = measure(trainer, world, seconds)
                loads = " ".join(f"{load:.2f}" for load in m.member_load)
                source = " ".join(f"{share:.3f}" for share in m.member_source)
                ari = f"; adjusted Rand index {rand_index(trainer, world, seed):.3f}" if num_members == 2 else ""
                print(
                    f"{seed:4} {name:12} {num_members:2}  {m.mixture_nll:10.3f}  {m.agreed_accuracy:10.4f}  "
                    f"{m.mi_contested:12.3f}  {m.mi_agreed:9.4f}  {loads}; {source}; {seconds:.0f} s{ari}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
