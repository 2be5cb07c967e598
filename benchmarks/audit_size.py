"""Seconds and memory of an audit by reading, at several sizes.

    python benchmarks/audit_size.py [--rows 1000 10000 1000000]

Rows are questions of 15 words with answers of 40, drawn at random; 5 % more repeat a question with another answer.
Each size runs in a process of its own, through a jsonl file, as `renyi audit` does. Prints wall and processor seconds
of the audit, with and without reading the file, and the most memory that the process held.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SYLLABLES = ("ka", "lo", "mi", "tra", "ben", "so"), ("ri", "na", "pol", "ter", "vi"), ("n", "st", "l", "m", "do", "ge")
WORDS = [a + b + c for a in SYLLABLES[0] for b in SYLLABLES[1] for c in SYLLABLES[2]]


def write(file: Path, number: int) -> None:
    rng = random.Random(0)
    prompts = []
    with file.open("w", encoding="utf-8") as out:
        for _ in range(number):
            prompts.append(f"Please explain how {' '.join(rng.choices(WORDS, k=12))}?")
            row = {"prompt": prompts[-1], "completion": " ".join(rng.choices(WORDS, k=40)) + "."}
            out.write(json.dumps(row) + "\n")
        for prompt in rng.sample(prompts, number // 20):
            out.write(json.dumps({"prompt": prompt, "completion": "No, " + " ".join(rng.choices(WORDS, k=40))}) + "\n")


def measure(file: Path) -> None:
    from renyi.audit import audit, read_rows

    begun, cpu_begun = time.perf_counter(), time.process_time()
    rows, places = read_rows([str(file)])
    started, cpu_started = time.perf_counter(), time.process_time()
    found = audit(rows, places=places)
    wall, cpu = time.perf_counter(), time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(rows):9,} rows: {wall - started:6.1f} s ({cpu - cpu_started:.1f} s of a processor), with the file "
        f"{wall - begun:.1f} s ({cpu - cpu_begun:.1f}); {memory:.2f} GiB; {found.counts()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 1_000_000])
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file:
        measure(args.file)
        return
    for number in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write(file, number)
            subprocess.run([sys.executable, __file__, "--file", str(file)], check=True)


if __name__ == "__main__":
    main()
