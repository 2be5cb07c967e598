"""Which alpha schedule? Holds and ramps on the zoo's contradictory world.

    python benchmarks/alpha_schedule.py [--seeds 0 1 2] [--steps 500]

Four members, two schools, α = 0.8, the demo's data and budget; only the schedule differs. Prints, for each schedule and
seed, what the demo's table prints: a good schedule has a low mixture NLL, agreed accuracy 1, mutual information near
ln 2 on contested facts and near 0 on agreed ones, and no starved member.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars

from renyi.zoo import World
from renyi.zoo.demo import train
from renyi.zoo.measure import measure

# (share of training at alpha 0, share of training in which it rises)
SCHEDULES = [(0.0, 0.0), (0.0, 0.4), (0.1, 0.1), (0.2, 0.0), (0.2, 0.2), (0.2, 0.4), (0.4, 0.2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.steps} steps")
    print("hold ramp seed   NLL/answer  agreed acc  MI contested  MI agreed  member loads            seconds")
    for hold, ramp in SCHEDULES:
        for seed in args.seeds:
            world = World(seed=seed)
            schedule = {"alpha_hold_ratio": hold, "alpha_ramp_ratio": ramp, "max_steps": args.steps}
            with tempfile.TemporaryDirectory() as folder:
                trainer, seconds = train(world, 4, 0.8, Path(folder), seed, **schedule)
            m = measure(trainer, world, seconds)
            loads = " ".join(f"{load:.2f}" for load in sorted(m.member_load, reverse=True))
            print(
                f"{hold:4.1f} {ramp:4.1f} {seed:4}   {m.mixture_nll:10.3f}  {m.agreed_accuracy:10.3f}  "
                f"{m.mi_contested:12.3f}  {m.mi_agreed:9.4f}  {loads:22} {seconds:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
