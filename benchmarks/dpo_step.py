"""The time of a preference step: M members against one TRL DPO step, with the reference computed and precomputed.

    python benchmarks/dpo_step.py [--shared ../shared] [--members 1 8] [--rounds 5] [--steps 8] [--gpu]
        [--model HuggingFaceTB/SmolLM2-135M-Instruct --data dpo.json] [--compile]

The same pairs (4 a step) and LoRA (r = 16, all linear layers) for all, and no gradient checkpointing. Without --model
the real small model learns pairs of random words, 96 tokens a side. With it, real pairs of at most 96 tokens a side: a
JSON file of records with `conversations`, `chosen` and `rejected`. With --compile ours compile their blocks, and TRL's
do not. Every run is a process of its own, and runs take turns. A figure is the median over all steps but each run's
first two, which have a column of their own. A step ends with the optimizer's.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from joint_step import LORA
from peft import LoraConfig
from real_step import WARM_UP, measured
from step_clock import StepClock
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from renyi import RenyiDPOConfig, RenyiDPOTrainer
from renyi.machine import bf16_pays

PAIRS, PROMPT, COMPLETION = 4, 48, 48


def real_pairs(file: Path, tokenizer, many: int) -> Dataset:
    """The first pairs whose prompt leaves room for a completion."""
    records = json.loads(file.read_text(encoding="utf-8"))
    texts = [[r["conversations"][-1]["value"] + "\n", r["chosen"]["value"], r["rejected"]["value"]] for r in records]
    return pairs_of([text for text in texts if len(tokenizer(text[0])["input_ids"]) <= PROMPT][:many])


def random_pairs(tokenizer) -> Dataset:
    """Pairs of random words of the model's, all of one length."""
    generator = torch.Generator().manual_seed(0)
    words = [token.lstrip("▁") for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:].isalpha()]

    def text(length: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())

    return pairs_of([[text(PROMPT), f" {text(COMPLETION)}", f" {text(COMPLETION)}"] for _ in range(4 * PAIRS)])


def pairs_of(texts: list[list[str]]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in texts])


def run(args: argparse.Namespace) -> None:
    """Train as `args.run` says, and print the seconds of each step."""
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)  # tokens of random words merge otherwise beside others
    path = args.model or args.shared / "models" / "tinystories-656k"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if args.gpu else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = real_pairs(args.data, tokenizer, PAIRS * (args.steps + WARM_UP)) if args.data else random_pairs(tokenizer)
    name, reference = args.run.split(", ")
    clock = StepClock()
    settings: dict[str, Any] = {
        "max_steps": args.steps + WARM_UP, "per_device_train_batch_size": PAIRS, "max_length": PROMPT + COMPLETION,
        "precompute_ref_log_probs": reference == "precomputed", "use_cpu": not args.gpu,
        "bf16": args.gpu or (args.model is not None and bf16_pays()), "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": args.steps,
    }  # fmt: skip
    given: dict[str, Any] = {"train_dataset": rows, "peft_config": LoraConfig(**LORA)}
    given |= {"processing_class": tokenizer, "callbacks": [clock]}
    with tempfile.TemporaryDirectory() as folder:
        trainer: DPOTrainer
        if name == "TRL":
            trainer = DPOTrainer(model, args=DPOConfig(folder, **settings), **given)
        else:
            settings |= {"num_members": int(name.split()[0]), "alpha": 0.8, "alpha_hold_ratio": 0.0}
            trainer = RenyiDPOTrainer(model, RenyiDPOConfig(folder, torch_compile=args.compile, **settings), **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    print(json.dumps({"seconds": clock.seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--model", help="a folder, or a name on the hub")
    parser.add_argument("--data", type=Path, help="a JSON file of pairs")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    if args.run:
        run(args)
        return
    where = torch.cuda.get_device_name() if args.gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    names = ["TRL", *(f"{members} member{'s' * (members > 1)}" for members in args.members)]
    runs = [f"{name}, {reference}" for reference in ("computed", "precomputed") for name in names]
    found: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name in runs:
            found[name].append(measured(__file__, sys.argv[1:], name)["seconds"])
    print(f"{'reference':24} {'ms a step':>10} {'of TRL':>7} {'a member':>9} {'first two s':>12}")
    line = {}
    for name, seconds in found.items():
        step = statistics.median(s for one in seconds for s in one[WARM_UP:])
        if name.startswith("TRL"):
            of_trl, members = step, 1
        else:
            members = int(name.split()[0])
        ratio, first = step / of_trl, max(sum(one[:WARM_UP]) for one in seconds)
        print(f"{name:24} {1e3 * step:>10.1f} {ratio:>7.2f} {ratio / members:>9.2f} {first:>12.1f}", flush=True)
        line[name] = {"ms": 1e3 * step, "of_trl": ratio}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
