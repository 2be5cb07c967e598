"""What a training run takes in memory on a real chat model, and whether the dry run says so beforehand.

    python benchmarks/real_memory.py --data alpaca.json [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--members 8]
        [--tokens 128] [--steps 4] [--systems NAME …]

Every figure is the peak of a process of its own, on rows of at most `--tokens` tokens, 16 a step, LoRA r = 16 on all
linear layers. TRL trains one adapter as it comes (gradient checkpointing). Ours are dense as they come, with
checkpointing, and routed. "foretold" is what a dry run says (`rehearse`); "off" is how far the run came out above it.
"""

import argparse
import json
import sys
import tempfile
from typing import Any

import torch
from real_step import measured, trainer_of

from renyi.training.steps import peak_memory

SYSTEMS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, activations kept": {"gradient_checkpointing": False},
    "members": {},
    "members, checkpointing": {"gradient_checkpointing": True},
    "members, sparse": {"routing": "sparse"},
    "members, sampled": {"routing": "sampled"},
    "members, raced": {"routing": "raced"},
}
FORETOLD = " (foretold)"


def run(args: argparse.Namespace) -> None:
    """Train or rehearse the system `args.run`, and print the peak of memory."""
    name = args.run.removesuffix(FORETOLD)
    rehearses, of_trl = name != args.run, name.startswith("TRL")
    args.run = "TRL" if of_trl else str(args.members)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(args, folder, max_steps=args.steps, **SYSTEMS[name])
        if rehearses:
            print(json.dumps({"peak": trainer.rehearse()}))
            return
        trainer.train()
    print(json.dumps({"peak": peak_memory(torch.device("cpu"))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSON file of Alpaca records")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args)
        return
    print(f"{args.members} members, rows of at most {args.tokens} tokens, {args.steps} steps")
    print(f"{'':24} {'peak GB':>8} {'of TRL':>7} {'foretold':>9} {'off':>6}")
    of_trl = None
    for name in args.systems:
        peak = measured(__file__, sys.argv[1:], name)["peak"]
        of_trl = peak if name == "TRL" else of_trl
        relative = "" if of_trl is None else f"{peak / of_trl:.2f}"
        line = f"{name:24} {peak / 1e9:8.2f} {relative:>7}"
        if not name.startswith("TRL"):
            foretold = measured(__file__, sys.argv[1:], name + FORETOLD)["peak"]
            line += f" {foretold / 1e9:9.2f} {peak / foretold - 1:6.0%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
