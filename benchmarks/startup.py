"""How long each command takes until it shows something useful, and what loading an ensemble takes in memory.

    python benchmarks/startup.py --data alpaca.json [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--members 8]

Every command is a process of its own, on 64 Alpaca rows of at most 64 tokens. The model is on this machine already.
"first output" is when the line named in the table was there, "all" when the command had ended. Memory is the peak of
the process. The ensemble that is scored and asked is the one that "sft, one step" trained.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROWS, TOKENS = 64, 64
CODE_OF_LOADING = """
import sys, threading
import psutil
from renyi import LoraEnsemble
from transformers import LlamaForCausalLM  # so that what is imported does not count

def own():  # without pages of files, which the system can take back
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared

def watch():
    while not loaded.wait(0.003):
        seen.append(own())

seen, loaded = [own()], threading.Event()
threading.Thread(target=watch).start()
ensemble = LoraEnsemble.load(sys.argv[1])
seen.append(own())
loaded.set()
print((max(seen) - seen[0]) / sum(p.numel() * p.element_size() for p in ensemble.parameters()))
"""


def watched(command: list[str], awaited: str, folder: Path) -> tuple[float, float, float]:
    """Seconds until a line with the awaited text, seconds until the end, and the peak of memory in GB."""
    began, seen = time.perf_counter(), None
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        for line in process.stdout or ():
            if seen is None and awaited in line:
                seen = time.perf_counter() - began
        _, status, usage = os.wait4(process.pid, 0)
    if status or seen is None:
        raise SystemExit(f"{' '.join(command)}: {status}, {seen}\n{(folder / 'errors.txt').read_text()[-3000:]}")
    return seen, time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSON file of Alpaca records")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--members", type=int, default=8)
    args = parser.parse_args()
    records = json.loads(Path(args.data).read_text(encoding="utf-8"))[:ROWS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, few, config, ensemble = (folder / x for x in ("rows.jsonl", "few.jsonl", "sft.yaml", "ensemble"))
        lines = [json.dumps({"prompt": r["instruction"] + "\n", "completion": r["output"][:200]}) for r in records]
        rows.write_text("\n".join(lines), encoding="utf-8")
        few.write_text("\n".join(lines[:4]), encoding="utf-8")
        settings = {
            "model_name_or_path": args.model, "dataset_name": str(rows), "output_dir": str(ensemble),
            "num_members": args.members, "max_length": TOKENS, "max_steps": 1, "use_cpu": True,
        }  # fmt: skip
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        renyi = [sys.executable, "-m", "renyi"]
        print(f"{'command':34} {'first output, s':>16} {'all, s':>7} {'peak GB':>8}   awaited")
        for what, command, awaited in (
            ("--help", ["--help"], "renyi sft"),
            ("sft --help", ["sft", "--help"], "--config"),
            ("sft --dry_run: the plan", ["sft", "--config", str(config), "--dry_run"], "base "),
            ("sft --dry_run: the largest step", ["sft", "--config", str(config), "--dry_run"], "peaks at"),
            ("sft, one step: the plan", ["sft", "--config", str(config)], "base "),
            ("info", ["info", str(ensemble)], "base "),
            ("score, 4 rows", ["score", str(ensemble), str(few)], "log_likelihood"),
            ("generate, 8 tokens", ["generate", str(ensemble), "Hello", "--max_new_tokens", "8"], "Hello"),
        ):
            first, end, peak = watched([*renyi, *command], awaited, folder)
            print(f"{what:34} {first:16.1f} {end:7.1f} {peak:8.2f}   {awaited!r}", flush=True)
        loading = [sys.executable, "-c", CODE_OF_LOADING, str(ensemble)]
        done = subprocess.run(loading, capture_output=True, text=True, check=True)
        print(f"loading takes {float(done.stdout):.2f} times the bytes of the parameters, without pages of files")


if __name__ == "__main__":
    main()
