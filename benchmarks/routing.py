"""What does routing save over a whole run, and what does it cost in likelihood?

    python benchmarks/routing.py [--seeds 0] [--members 8] [--routings dense sparse sampled raced auto] [--steps 500]

The four real domains of `four_domains.py` on TinyStories-656K, members of rank 4 at alpha 0.8, held and ramped for a
tenth of training each, and where members are drawn ramped alone. Every run sees the same examples in the same order.
Printed: test NLL per token of the mixture, its distance from dense routing, seconds of training and their ratio to one
adapter's run of the same number of examples, and what was trained and scored on average. Needs the models and data
beside the project.
"""

import argparse
import json
from pathlib import Path

import torch
from four_domains import run

# Hold and ramp. A member that is drawn sees one example in M, so it learns little during the hold.
ALL, DRAWN = (0.1, 0.1), (0.0, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--routings", nargs="+", default=["dense", "sparse", "sampled", "raced", "auto"])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.01])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    args = parser.parse_args()
    if not args.shared.is_dir():
        raise SystemExit(f"The real model and data are not at {args.shared}; say where they are with --shared.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; M = {args.members}, {args.steps} steps")
    print("routing          seed  NLL/token  from dense  seconds  one adapter's  trained  scored  domains recovered")
    rows = []
    for seed in args.seeds:
        single = run(args.shared, 1, 4, {"max_steps": args.steps}, seed)
        print(
            f"{'one adapter':16} {seed:4}  {single['nll_per_token']:9.3f} {'':11} {single['seconds']:8.1f}", flush=True
        )
        dense = None
        for routing in args.routings:
            for threshold in args.thresholds if routing in ("sparse", "raced", "auto") else [None]:
                hold, ramp = DRAWN if routing in ("sampled", "raced") else ALL
                given = {"routing": routing, "max_steps": args.steps}
                given |= {"alpha_hold_ratio": hold, "alpha_ramp_ratio": ramp}
                given |= {} if threshold is None else {"routing_threshold": threshold}
                found = run(args.shared, args.members, 4, given, seed)
                dense = dense or found["nll_per_token"]
                logs = found.pop("logs")
                trained, scored = (
                    sum(row[name] for row in logs if name in row) / max(1, sum(name in row for row in logs))
                    for name in ("routing/active", "routing/scored")
                )
                row = {"routing": routing, "threshold": threshold, "seed": seed, "trained": trained, "scored": scored}
                row |= {"ratio": found["seconds"] / single["seconds"], **found}
                rows.append(row)
                name = routing if threshold is None else f"{routing} {threshold:g}"
                print(
                    f"{name:16} {seed:4}  {row['nll_per_token']:9.3f}  {row['nll_per_token'] / dense - 1:+10.2%} "
                    f"{row['seconds']:8.1f}  {row['ratio']:13.2f}  {trained:7.1%}  {scored:6.1%}  {row['recovered']}",
                    flush=True,
                )
    print(json.dumps({"benchmark": "routing", "members": args.members, "rows": rows}))


if __name__ == "__main__":
    main()
