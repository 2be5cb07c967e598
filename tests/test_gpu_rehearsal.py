"""`make gpu-rehearsal`: every part of `benchmarks/gpu.py` on the CPU, so that it works the day there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PARTS = [
    "machine",
    "equality",
    "joint 8B",
    "decoding 8B",
    "joint 1B",
    "joint 0.5B",
    "memory 8B",
    "real run",
    "head",
    "scoring 1B",
    "compile",
    "decoding 8B, compiled",
]


def rehearse(file: Path, *flags: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what it printed, and what it wrote."""
    command = [sys.executable, "benchmarks/gpu.py", "--rehearsal", "--output", str(file), *flags]
    where = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(where / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text(encoding="utf-8"))


def test_every_part_ends_and_every_equality_holds(tmp_path: Path) -> None:
    code, printed, found = rehearse(tmp_path / "gpu.json", "--minutes", "60")
    assert {name: part["state"] for name, part in found["parts"].items()} == dict.fromkeys(PARTS, "ended"), printed
    assert {row["part"] for row in found["rows"]} == set(PARTS)
    compared = [row for row in found["rows"] if row["unit"] == "of the peer's error"]
    assert [row["what"] for row in compared if not row["met"]] == []
    assert len(compared) == 22
    assert all(row["more"]["ours"] > 0 for row in compared)  # nothing was compared with itself
    assert code == 0


def test_a_part_that_fails_ends_no_other(tmp_path: Path) -> None:
    flags = ["--parts", "real run", "machine", "--model", str(tmp_path / "nowhere")]
    code, printed, found = rehearse(tmp_path / "gpu.json", *flags)
    assert code == 1
    assert {name: part["state"] for name, part in found["parts"].items()} == {"real run": "failed", "machine": "ended"}
    assert "nowhere" in found["parts"]["real run"]["log"]
    assert "nowhere" in printed
    assert [row["part"] for row in found["rows"]] == ["machine"] * 3


def test_a_late_part_is_stopped(tmp_path: Path) -> None:
    code, _, found = rehearse(tmp_path / "gpu.json", "--parts", "equality", "head", "--minutes", "0.09")
    assert code == 1
    assert {name: part["state"] for name, part in found["parts"].items()} == {"equality": "late", "head": "not started"}
