"""What does a whole run of eight members cost on a real chat model, by routing, beside one TRL run on the same rows?

    OMP_NUM_THREADS=1 python benchmarks/real_routing.py --data FOLDER [--model FOLDER] [--seeds 0 1 2] [--rows 160]

Half of the rows are verses in one of three translations (`translations/`), the others Alpaca records with short
answers (`alpaca_en_demo.json`); rows of at most 64 tokens, three passes, 16 a step, LoRA r = 16 on all linear layers,
learning rate 1e-3, alpha 0.8. Where members are drawn alpha is ramped without a hold, because a member that is drawn
sees one example in M. Printed: NLL a token of the mixture on held-out verses and records, its distance from dense
routing, seconds of processor time of the whole of `train()`, and their ratios to TRL's one adapter as it comes and to
our one member; shares of pairs trained and of tokens scored. Runs of earlier calls with the same --json are compared
with, too. Processor time is read because other work may share the machine; with one thread it is the time on a quiet
one.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import real_model
import torch
import translations
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from renyi.inference import score
from renyi.machine import bf16_pays
from renyi.objectives import renyi_loss

DRAWN = {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.2}
SHARED = {"routing": "sampled", "alpha_hold_shared": True, "alpha_hold_ratio": 1 / 3, "alpha_ramp_ratio": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "one": {"num_members": 1, "alpha": 0.0},
    "dense": {},
    "sparse": {"routing": "sparse"},
    "sampled": {"routing": "sampled", **DRAWN},
    "auto": {"routing": "auto"},
    "raced": {"routing": "raced", **DRAWN},
    "kept": {"routing": "sampled", "routing_refresh": 2, **DRAWN},
    "shared": SHARED,
    "shared, kept": {**SHARED, "routing_refresh": 2},
    "shared longer": {**SHARED, "alpha_hold_ratio": 2 / 3},
}
LONGEST, BATCH, HELD_OUT = 64, 16, 96


def read(args: argparse.Namespace, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train on, in random order, and held-out rows: half verses, half records."""
    draw = random.Random(seed)
    trained, held_out = translations.split(translations.read_verses(args.data / "translations", "reference"), seed)
    verses = [
        [translations.Row(v, draw.randrange(3)).example() for chapter in chapters for v in chapter]
        for chapters in (trained, held_out)
    ]
    records = json.loads((args.data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    short = [r for r in records if not r["input"] and 3 <= len(r["output"].split()) <= 30]
    told = [{"prompt": f"{r['instruction']}\n", "completion": r["output"]} for r in short]
    draw.shuffle(told)
    rows = verses[0][: args.rows // 2] + told[HELD_OUT // 2 :][: args.rows // 2]
    draw.shuffle(rows)
    plain = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    kept = [*verses[1][: HELD_OUT // 2], *told[: HELD_OUT // 2]]
    return plain, [{name: row[name] for name in ("prompt", "completion")} for row in kept]


def trl_seconds(args: argparse.Namespace, rows: list[dict[str, str]], seed: int) -> float:
    """Processor seconds of TRL's run of one adapter, with its own defaults and bf16 as we choose it here."""
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, max_length=LONGEST, per_device_train_batch_size=BATCH, num_train_epochs=args.epochs, seed=seed,
            learning_rate=args.learning_rate, bf16=bf16_pays(), use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, logging_steps=10,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        trainer = SFTTrainer(
            model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
        )
        real_model.quieten(trainer)
        began = time.process_time()
        trainer.train()
        return time.process_time() - began


class Clock(TrainerCallback):
    """Processor seconds from the beginning of training to its end."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.process_time() - self.began


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        rows, held_out = read(args, seed)
        for name in args.systems:
            if name == "TRL":
                yield {"system": name, "seed": seed, "seconds": trl_seconds(args, rows, seed)}
                continue
            clock = Clock()
            given = {"num_members": args.members, "alpha": args.alpha, **RUNS[name]}
            trainer = real_model.train(
                args.model, rows, seed, rank=args.rank, callbacks=[clock], max_length=LONGEST,
                num_train_epochs=args.epochs, per_device_train_batch_size=BATCH, learning_rate=args.learning_rate,
                **given,
            )  # fmt: skip
            with trainer.accelerator.autocast():
                data = Dataset.from_list(held_out)
                scores = score(trainer.model, data, trainer.processing_class, trainer.preparation)
            ell_MN = torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T
            log = [entry for entry in trainer.state.log_history if "loss" in entry]

            def mean(key: str, log: list[dict[str, float]] = log) -> float | None:
                return sum(entry[key] for entry in log) / len(log) if key in log[0] else None

            yield {
                "system": name,
                "seed": seed,
                "nll": float(renyi_loss(ell_MN, 1.0).sum() / sum(s.tokens for s in scores)),
                "seconds": clock.seconds,
                "active": mean("routing/active"),
                "scored": mean("routing/scored"),
                "gap": log[-1]["jensen_gap"],
                "log": log,
            }


def told_by(seen: dict[tuple[str, int], dict[str, Any]]) -> Any:
    """A line of the table, beside the lines before it."""

    def told(line: dict[str, Any]) -> str:
        seen[line["system"], line["seed"]] = line

        def beside(name: str, key: str) -> float:
            other = seen.get((name, line["seed"]))
            return line[key] / other[key] if other else float("nan")

        text = f"{line['system']:8} {line['seed']:4} {line['seconds']:8.1f} {beside('TRL', 'seconds'):7.2f} "
        text += f"{beside('one', 'seconds'):7.2f}"
        if "nll" not in line:
            return text
        text += f" {line['nll']:8.4f} {beside('dense', 'nll') - 1:+8.2%} {line['gap']:7.3f}"
        shares = (line["active"], line["scored"])
        return text + "".join("       –" if x is None else f" {x:7.2f}" for x in shares)

    return told


def main() -> None:
    data = "the folder with translations/ and alpaca_en_demo.json"
    parser = real_model.study_parser(__doc__, data, RUNS, members=8, learning_rate=1e-3, epochs=3.0)
    parser.add_argument("--rows", type=int, default=160, help="trained rows")
    args = parser.parse_args()
    disable_progress_bars()
    trained = f"{args.members} members, {args.rows} rows, {args.epochs:g} passes"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {trained}")
    print("system   seed  seconds  of TRL  of one     NLL  of dense     gap trained  scored")
    earlier = args.json.read_text(encoding="utf-8").splitlines() if args.json and args.json.exists() else []
    kept = {(line["system"], line["seed"]): line for line in map(json.loads, earlier)}
    real_model.keep(lines(args), told_by(kept), args.json)


if __name__ == "__main__":
    main()
