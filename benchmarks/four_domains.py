"""Do four members find four real domains that nobody labelled?

    python benchmarks/four_domains.py [--seeds 0 1 2] [--runs NAME …] [--shared ../shared]

64-token chunks of Shakespeare, grade-school mathematics, encyclopedia and children's stories (1,200 training and 300
test chunks each) on TinyStories-656K, a real pretrained Llama. One adapter of rank 4, one of rank 16 (the parameters of
the whole ensemble), and four members of rank 4: at α = 0; at α = 0.8, held and ramped for a tenth of training each;
from the first step; and with the default hold and ramp. The same data and steps for all. Prints the test NLL per token
of each mixture, seconds of processor time, and where each domain's test chunks go. Needs the models and data beside
the project.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback

from renyi import RenyiSFTConfig, RenyiSFTTrainer
from renyi.objectives import renyi_loss

DOMAINS = ("shakespeare", "gsm8k", "wiki", "tinystories")
CHUNK, TRAIN, TEST = 64, 1200, 300
# name: members, rank, and what else differs from `RenyiSFTConfig`'s defaults
RUNS = {
    "one adapter, r = 4": (1, 4, {}),
    "one adapter, r = 16": (1, 16, {}),
    "four, α = 0": (4, 4, {"alpha": 0.0}),
    "four, α = 0.8": (4, 4, {"alpha_hold_ratio": 0.1, "alpha_ramp_ratio": 0.1}),
    "four, α = 0.8 at once": (4, 4, {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}),
    "four, α = 0.8, default": (4, 4, {}),
}


def domain_text(data: Path, domain: str) -> str:
    if domain != "gsm8k":
        return (data / f"{domain}.txt").read_text(encoding="utf-8")
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return "\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def chunks(data: Path, tokenizer: object) -> torch.Tensor:
    """Token ids [domains, TRAIN + TEST, CHUNK]."""
    needed = (TRAIN + TEST) * CHUNK
    ids = [tokenizer(domain_text(data, d)[: 12 * needed], add_special_tokens=False)["input_ids"] for d in DOMAINS]
    return torch.tensor([i[:needed] for i in ids]).view(len(DOMAINS), TRAIN + TEST, CHUNK)


def run(shared: Path, members: int, rank: int, overrides: dict[str, object], seed: int) -> dict[str, object]:
    """Train one of the runs; NLL per token of the mixture, the best member's test chunks, and what was logged."""
    model_folder = shared / "models" / "tinystories-656k"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = chunks(shared / "data", tokenizer)
    train, test = ids[:, :TRAIN].flatten(0, 1), ids[:, TRAIN:].flatten(0, 1)
    settings = {
        "max_steps": 500,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": CHUNK,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        **overrides,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = RenyiSFTTrainer(
            AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
            RenyiSFTConfig(folder, num_members=members, seed=seed, **settings),
            train_dataset=Dataset.from_dict({"input_ids": train.tolist()}),
            peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
            processing_class=tokenizer,
        )
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    ensemble = trainer.model.eval()
    with torch.no_grad():
        ell = torch.cat([ensemble.log_likelihood(batch) for batch in test.split(100)], dim=1)  # [M, test chunks]
    best = ell.argmax(dim=0).view(len(DOMAINS), TEST)
    counts = np.stack([np.bincount(row, minlength=members) for row in best.numpy()])  # [domains, M]
    domain, member = linear_sum_assignment(-counts)
    return {
        "nll_per_token": renyi_loss(ell, 1.0).mean().item() / (CHUNK - 1),
        "recovered": counts[domain, member].tolist(),
        "seconds": seconds,
        "logs": trainer.state.log_history,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    if not args.shared.is_dir():
        raise SystemExit(f"The real model and data are not at {args.shared}; say where they are with --shared.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'run':22} {'seed':>4} {'NLL/token':>10} {'seconds':>8}  test chunks of each domain at its own member")
    for seed in args.seeds:
        for name in args.runs:
            members, rank, overrides = RUNS[name]
            r = run(args.shared, members, rank, overrides, seed)
            where = ", ".join(f"{n}/{TEST}" for n in r["recovered"]) if members > 1 else ""
            print(f"{name:22} {seed:4} {r['nll_per_token']:10.3f} {r['seconds']:8.1f}  {where}", flush=True)


if __name__ == "__main__":
    main()
