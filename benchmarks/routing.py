"""What does routing save over a whole run, and what does it cost in likelihood?

    OMP_NUM_THREADS=1 python benchmarks/routing.py [--seeds 0 1 2] [--members 8] [--runs NAME …] [--steps 500]

The four real domains of `four_domains.py` on TinyStories-656K, members of rank 4 at alpha 0.8, held and ramped for a
tenth of training each, and where members are drawn ramped alone, or after a shared hold. Every run sees the same
examples in the same order. Printed: test NLL per token of the mixture, its distance from dense routing, seconds of
processor time of training and their ratio to one adapter's run of the same number of examples, and what was trained and
scored on average. Needs the models and data beside the project.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from four_domains import run

# Hold and ramp. A member that is drawn sees one example in M, so it learns little during a hold of its own.
ALL = {"alpha_hold_ratio": 0.1, "alpha_ramp_ratio": 0.1}
DRAWN = {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.1}
SHARED = {"alpha_hold_ratio": 0.3, "alpha_ramp_ratio": 0.1, "alpha_hold_shared": True}
RUNS: dict[str, dict[str, Any]] = {
    "dense": ALL,
    "sparse": {"routing": "sparse", **ALL},
    "sampled": {"routing": "sampled", **DRAWN},
    "raced": {"routing": "raced", **DRAWN},
    "sampled, shared": {"routing": "sampled", **SHARED},
    "raced, shared": {"routing": "raced", **SHARED},
    "auto": {"routing": "auto", **ALL},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    args = parser.parse_args()
    if not args.shared.is_dir():
        raise SystemExit(f"The real model and data are not at {args.shared}; say where they are with --shared.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; M = {args.members}, {args.steps} steps")
    print("run              seed  NLL/token  from dense  seconds  one adapter's  trained  scored  domains recovered")
    rows = []
    for seed in args.seeds:
        single = run(args.shared, 1, 4, {"max_steps": args.steps}, seed)
        print(
            f"{'one adapter':16} {seed:4}  {single['nll_per_token']:9.3f} {'':11} {single['seconds']:8.1f}", flush=True
        )
        dense = None
        for name in args.runs:
            found = run(args.shared, args.members, 4, {"max_steps": args.steps, **RUNS[name]}, seed)
            dense = dense or found["nll_per_token"]
            logs = found.pop("logs")
            trained, scored = (
                sum(row[key] for row in logs if key in row) / max(1, sum(key in row for row in logs))
                for key in ("routing/active", "routing/scored")
            )
            row = {"run": name, "seed": seed, "trained": trained, "scored": scored}
            row |= {"ratio": found["seconds"] / single["seconds"], **found}
            rows.append(row)
            print(
                f"{name:16} {seed:4}  {row['nll_per_token']:9.3f}  {row['nll_per_token'] / dense - 1:+10.2%} "
                f"{row['seconds']:8.1f}  {row['ratio']:13.2f}  {trained:7.1%}  {scored:6.1%}  {row['recovered']}",
                flush=True,
            )
    print(json.dumps({"benchmark": "routing", "members": args.members, "rows": rows}))


if __name__ == "__main__":
    main()
