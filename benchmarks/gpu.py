"""All that a GPU has to show, in one command of about eight minutes: equality, speed, memory, and a short real run.

    python benchmarks/gpu.py [--minutes 8] [--parts equality "joint 8B"] [--model FOLDER] [--output FILE]    (make gpu)
    python benchmarks/gpu.py --rehearsal                                                           (make gpu-rehearsal)

Needs one GPU and no network. Every part is a process with a time limit. A part that fails or is late is reported in the
table and ends no other. Results are written after every part to one JSON file: rows of figures, their goals, and for
each part how it ended. Rates of matrix products and of copies are measured first, and speeds are given as shares of
them. A rehearsal runs every part on the CPU with tiny shapes: it shows that the parts work, and no figure of it means
anything but those of equality.

Exit status: 0 if every part ended and every equality holds, whatever the speeds are; else 1.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_parts import EQUAL, MEMBERS, PARTS, Machine, Row, real_run, shown

from renyi import __version__
from renyi.files import write_whole

RESULTS = Path(__file__).parent / "results/gpu.json"
REHEARSED = Path(__file__).parents[1] / "build/gpu-rehearsal.json"


def be_part(name: str, rows: Path, where: Machine, rehearsal: bool, model: str | None) -> None:
    """In the part's own process: its rows, one line each as they come."""
    part = PARTS[name]
    sizes = part.rehearsed if rehearsal else part.sizes
    if part.run is real_run:
        sizes = {"model": model, **sizes}
    with rows.open("w") as file:
        for row in part.run(where, **sizes):
            print(json.dumps(row._asdict()), file=file, flush=True)


def run_part(name: str, seconds: float, where: Machine, flags: Sequence[str]) -> tuple[dict[str, Any], list[Row]]:
    """How a part ended, and the rows that it left until then."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows", Path(folder) / "log"
        rows.touch()
        command = [
            sys.executable,
            __file__,
            "--part",
            name,
            "--rows",
            str(rows),
            "--machine",
            json.dumps(where),
            *flags,
        ]
        began = time.perf_counter()
        with log.open("w") as out:
            # A compiler that is killed leaves half a file behind: no other part may find it.
            caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), folder)
            process = subprocess.Popen(
                command, env=os.environ | caches, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(seconds)
                state = "failed" if code else "ended"
            except subprocess.TimeoutExpired:
                state = "late"
            finally:  # its children too, such as compilers
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        ended = {"state": state, "seconds": round(time.perf_counter() - began, 1)}
        if state != "ended":
            ended["log"] = log.read_text(errors="replace")[-4000:]
        return ended, [Row(**json.loads(line)) for line in rows.read_text().splitlines() if line.endswith("}")]


def show(row: Row) -> None:
    verdict = {None: "", True: "met", False: "MISSED"}[row.met]
    print(f"  {row.what:60} {shown(row.value):>8} {row.unit:22} {row.goal or '':>9} {verdict}".rstrip(), flush=True)


def described(device: str) -> dict[str, Any]:
    """The machine and the versions, for the head of the file."""
    versions = {"renyi": __version__}
    for name in ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    found = {"python": platform.python_version(), "versions": versions, "processor": platform.processor()}
    if device == "cuda":
        import torch

        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="after these no part is started or goes on (8)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--model", help="folder or hub id of a base for the real run; by default the zoo's")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} beside the other results")
    parser.add_argument("--rehearsal", action="store_true", help="every part on the CPU, with tiny shapes")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--machine", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        be_part(args.part, args.rows, Machine(*args.machine), args.rehearsal, args.model)
        return 0
    signal.signal(signal.SIGTERM, _end)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several GPUs the trainers would use all of them
    if not args.model:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    where = Machine("cpu" if args.rehearsal else "cuda")
    if not args.rehearsal:
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU here. --rehearsal runs every part on the CPU.")
    output = args.output or (REHEARSED if args.rehearsal else RESULTS)
    flags = [*(["--rehearsal"] if args.rehearsal else []), *(["--model", args.model] if args.model else [])]
    found: dict[str, Any] = {"benchmark": "gpu", "rehearsal": args.rehearsal, "members": MEMBERS}
    found |= {**described(where.device), "parts": {}, "rows": []}
    print(f"{found.get('gpu', 'CPU, a rehearsal')}, torch {found['versions'].get('torch')}, M = {MEMBERS}", flush=True)
    deadline = time.monotonic() + 60 * args.minutes
    holds = True
    for name in args.parts:
        left = deadline - time.monotonic()
        ended, rows = {"state": "not started", "seconds": 0.0}, []
        if left > 5:
            limit = PARTS[name].seconds * (10 if args.rehearsal else 1)  # a busy machine must not fail a rehearsal
            ended, rows = run_part(name, min(limit, left), where, flags)
        if args.rehearsal:  # of tiny shapes on a CPU no speed is good or bad
            rows = [row if row.unit == EQUAL else row._replace(met=None) for row in rows]
        print(f"{name}: {ended['state']}, {ended['seconds']:.0f} s", flush=True)
        for row in rows:
            show(row)
            if name == "machine":
                where = where._replace(**_rate(row))
        if "log" in ended:
            print("    " + ended["log"][-600:].strip().replace("\n", "\n    "), flush=True)
        holds = holds and ended["state"] == "ended" and all(row.met for row in rows if row.unit == EQUAL)
        found["parts"][name] = ended
        found["rows"] += [{"part": name, **row._asdict()} for row in rows]
        write_whole(output, (json.dumps(found, indent=1) + "\n").encode())
    goals = [row["met"] for row in found["rows"] if row["met"] is not None]
    print(f"{sum(goals)} of {len(goals)} goals met; all in {output}")
    return 0 if holds else 1


def _rate(row: Row) -> dict[str, float]:
    """What of `Machine` a row of the part of that name says."""
    if row.what == "products, bfloat16":
        return {"products": 1e12 * row.value}
    return {"copies": 1e9 * row.value} if row.unit == "GB/s" else {}


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # through `finally`, so that no part goes on alone


if __name__ == "__main__":
    sys.exit(main())
