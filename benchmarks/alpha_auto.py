"""What does `alpha: auto` choose on real text, is it as good as a sweep's best, and what does it cost?

    python benchmarks/alpha_auto.py [--domains 1 2 4] [--steps 300] [--members 4] [--alphas 0 0.25 0.5 0.8 1]

64-token chunks of one, two or four real domains (Shakespeare, children's stories, grade-school mathematics,
encyclopedia) on TinyStories-656K, through the commands that a user types: `renyi sweep` over alphas, `renyi sft` at
0.8 and `renyi sft --alpha auto`, all with the same budget. It prints the test NLL of the mixture in nats per token, by
`renyi score` on chunks that no run has seen, and the seconds of whole commands. It needs the models and data beside the
project.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from four_domains import CHUNK, domain_text
from transformers import AutoTokenizer

MIXES = {1: ("tinystories",), 2: ("tinystories", "gsm8k"), 4: ("tinystories", "gsm8k", "shakespeare", "wiki")}
TRAIN, TEST = 4000, 600  # total numbers of chunks, for any number of domains


def write_rows(shared: Path, domains: tuple[str, ...], folder: Path) -> None:
    """`train.jsonl` and `test.jsonl` of tokenised chunks, the domains one after another."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tinystories-656k")
    train, test = TRAIN // len(domains), TEST // len(domains)
    with (folder / "train.jsonl").open("w") as for_training, (folder / "test.jsonl").open("w") as for_testing:
        for domain in domains:
            text = domain_text(shared / "data", domain)[: 12 * (train + test) * CHUNK]
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            rows = ids[: len(ids) // CHUNK * CHUNK].view(-1, CHUNK)[: train + test].tolist()
            for at, row in enumerate(rows):
                print(json.dumps({"input_ids": row}), file=for_training if at < train else for_testing)


def renyi(*argv: object) -> str:
    """The output of a command, which must succeed."""
    command = [sys.executable, "-m", "renyi", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def test_nll(ensemble: Path, folder: Path) -> float:
    """Mixture NLL, nats per token."""
    scores = folder / "scores.jsonl"
    renyi("score", ensemble, folder / "test.jsonl", "--output", scores)
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    return sum(row["mixture_nll"] for row in rows) / sum(row["tokens"] for row in rows)


def one_mix(number: int, args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(args.shared, MIXES[number], folder)
        base = args.shared / "models" / "tinystories-656k"
        settings = [
            "--model_name_or_path", base, "--dataset_name", folder / "train.jsonl",
            "--max_steps", args.steps, "--per_device_train_batch_size", 16, "--learning_rate", 2e-3,
            "--lr_scheduler_type", "linear", "--lora_r", 4, "--lora_alpha", 8, "--lora_dropout", 0, "--seed", args.seed,
            "--gradient_checkpointing", "false", "--bf16", "false", "--dtype", "float32", "--max_length", CHUNK,
            "--save_strategy", "steps", "--save_steps", args.steps, "--logging_steps", 50,
        ]  # fmt: skip
        cells = ["--alphas", *args.alphas, "--members", args.members]
        renyi("sweep", *settings, *cells, "--test_split_size", 0.05, "--output_dir", folder / "sweep")
        chosen = json.loads((folder / "sweep" / "sweep.json").read_text())["chosen"]
        nll = {a: test_nll(folder / "sweep" / f"alpha_{a:g}_members_{args.members}", folder) for a in args.alphas}
        seconds = {}
        for run, alpha in (("plain", 0.8), ("auto", "auto")):
            started = time.perf_counter()
            members = ["--num_members", args.members, "--alpha", alpha, "--output_dir", folder / run]
            renyi("sft", *settings, *members)
            seconds[run] = time.perf_counter() - started
        found = json.loads((folder / "auto" / "auto" / "chosen.json").read_text())
        return {
            "domains": number,
            "sweep": nll,
            "sweep_chose": chosen,
            "auto": found,
            "auto_nll": test_nll(folder / "auto", folder),
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.8, 1.0])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    args = parser.parse_args()
    if not args.shared.is_dir():
        raise SystemExit(f"The real model and data are not at {args.shared}; say where they are with --shared.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.members} members, {args.steps} steps")
    print("domains  critical alpha [95 %]    auto's alpha   NLL  best of sweep       gap  seconds auto / plain")
    rows = []
    for number in args.domains:
        row = one_mix(number, args)
        rows.append(row)
        found, best = row["auto"], min(row["sweep"], key=row["sweep"].get)
        seconds = row["seconds"]
        print(
            f"{number:7}  {found['critical_alpha']:6.3f} [{found['low']:.3f}, {found['high']:.3f}]  "
            f"{found['alpha']:12.2f} {row['auto_nll']:7.3f}  {row['sweep'][best]:.3f} at {best:<4g}  "
            f"{row['auto_nll'] - row['sweep'][best]:+7.3f}  {seconds['auto']:.0f} / {seconds['plain']:.0f} "
            f"= {seconds['auto'] / seconds['plain']:.2f}",
        )
        print("         sweep: " + "  ".join(f"{a:g}: {v:.3f}" for a, v in row["sweep"].items()), flush=True)
    print(json.dumps({"benchmark": "alpha_auto", "rows": rows}))


if __name__ == "__main__":
    main()
