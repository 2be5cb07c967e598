"""What a training step costs on a real chat model: ours with M members beside TRL with one adapter.

    python benchmarks/real_step.py --data alpaca.json [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--members 1 4 8]
        [--tokens 48] [--steps 6] [--rounds 2] [--compile]

Every run is a process of its own that trains on rows of at most `--tokens` tokens, 16 a step, LoRA r = 16 on all linear
layers; its figure is the median seconds of a step without the first two. Runs take turns, `--rounds` times.

    TRL                as it comes: its defaults, and bf16 as we choose it on this machine
    TRL, tuned         the same with eager attention and no gradient checkpointing
    M members          ours as it comes, dense, with alpha at work from the first step

With `--compile`, "TRL, tuned" and ours compile their blocks, as ours do by themselves in a run of minutes
(torch_compile). The first two steps, which compile, are not counted; the last column has their seconds.
The rates of matrix products are measured in the same run, so that a step's arithmetic can be set beside them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from joint_step import LORA, product_rate
from peft import LoraConfig
from step_clock import StepClock
from trl import SFTConfig, SFTTrainer

from renyi import RenyiSFTConfig, RenyiSFTTrainer
from renyi.machine import bf16_pays
from renyi.training.steps import peak_memory

BATCH, WARM_UP = 16, 2


def trainer_of(args: argparse.Namespace, folder: str, callbacks: Sequence[Any] = (), **settings: Any) -> Any:
    """The trainer of `args.run` on the study's rows. `settings` go before the study's own."""
    disable_progress_bars()
    records = json.loads(Path(args.data).read_text(encoding="utf-8"))
    rows = Dataset.from_list([{"prompt": r["instruction"] + "\n", "completion": r["output"]} for r in records[:400]])
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": args.steps + WARM_UP, "per_device_train_batch_size": BATCH,
        "max_length": args.tokens, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-4, "logging_steps": 1000, "dataloader_pin_memory": False, "use_cpu": True,
    }  # fmt: skip
    given: dict[str, Any] = {"train_dataset": rows, "peft_config": LoraConfig(**LORA), "callbacks": list(callbacks)}
    if args.run.startswith("TRL"):
        common["bf16"] = bf16_pays()
        if args.run == "TRL, tuned":
            common |= {"gradient_checkpointing": False, "model_init_kwargs": {"attn_implementation": "eager"}}
        return SFTTrainer(args.model, SFTConfig(**common | settings), **given)
    common |= {"num_members": int(args.run.split()[0]), "alpha_hold_ratio": 0.0}
    return RenyiSFTTrainer(args.model, RenyiSFTConfig(**common | settings), **given)


def run(args: argparse.Namespace) -> None:
    """Train as `args.run` says, and print the seconds of each step and the peak of memory."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        if args.run.startswith("TRL"):
            trainer = trainer_of(args, folder, [clock])
            if args.run == "TRL, tuned" and args.compile:  # torch_compile of transformers takes the whole model
                for module in trainer.model.modules():
                    if type(module).__name__ in trainer.model.base_model.model._no_split_modules:
                        module.compile(dynamic=True)
        else:
            trainer = trainer_of(args, folder, [clock], torch_compile=args.compile)
        trainer.train()
    peak = peak_memory(torch.device("cpu"))
    print(json.dumps({"first": sum(clock.seconds[:WARM_UP]), "seconds": clock.seconds[WARM_UP:], "peak": peak}))


def measured(file: str, arguments: Sequence[str], name: str) -> dict[str, Any]:
    """What a benchmark's file prints last if it is run for one system in a process of its own."""
    done = subprocess.run(
        [sys.executable, file, *arguments, "--run", name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSON file of Alpaca records")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args)
        return
    rates = {x: product_rate(576, 1536, 2048, getattr(torch, x), "cpu") for x in ("bfloat16", "float32")}
    print(", ".join(f"matrix products in {name}: {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.items()))
    names = ["TRL", "TRL, tuned", *(f"{m} member{'s' if m > 1 else ''}" for m in args.members)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            found[name].append(measured(__file__, sys.argv[1:], name))
    seconds = {name: statistics.median(s for one in runs for s in one["seconds"]) for name, runs in found.items()}
    print(f"rows of at most {args.tokens} tokens, {BATCH} a step{', blocks compiled' if args.compile else ''}")
    print(f"{'':12} {'s a step':>9} {'of TRL':>8} {'of tuned':>9} {'peak GB':>8} {'first two s':>12}")
    for name, value in seconds.items():
        peak = max(one["peak"] for one in found[name]) / 1e9
        relative = f"{value / seconds['TRL']:>8.2f} {value / seconds['TRL, tuned']:>9.2f}"
        first = max(one["first"] for one in found[name])
        print(f"{name:12} {value:>9.3f} {relative} {peak:>8.2f} {first:>12.1f}", flush=True)


if __name__ == "__main__":
    main()
