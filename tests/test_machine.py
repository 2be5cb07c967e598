"""What the machine can do. Half precision is chosen where it pays, and never against what the user said."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import trainer_of

from renyi import machine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, TRL decides")


def test_the_faster_precision_is_found(monkeypatch):
    """By a clock on which a product in one precision takes three times as long as in the other."""
    for slow, pays in ((torch.float32, True), (torch.bfloat16, False)):
        now, product = [0.0], torch.Tensor.__matmul__

        def timed(left, right, slow=slow, now=now, product=product):
            now[0] += 0.03 if left.dtype == slow else 0.01
            return product(left[:1], right)

        monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
        monkeypatch.setattr(machine.time, "perf_counter", lambda now=now: now[0])
        machine.half_gain.cache_clear()
        assert machine.bf16_pays() is pays
        monkeypatch.setattr(torch.Tensor, "__matmul__", product)


@pytest.fixture(autouse=True)
def _measured_afresh():
    yield
    machine.half_gain.cache_clear()


@pytest.mark.parametrize("use_cpu", [False, True])
@pytest.mark.parametrize(
    ("given", "pays", "least", "expected"),
    [
        (None, True, 0, True),
        (None, False, 0, False),
        (None, True, 10**9, False),
        (False, True, 0, False),
    ],
)
def test_bf16_is_on_where_nobody_said_otherwise_and_it_pays(
    tmp_path, monkeypatch, given, pays, least, expected, use_cpu
):
    monkeypatch.setattr("renyi.training.start.bf16_pays", lambda: pays)
    monkeypatch.setattr("renyi.training.start.LEAST_PARAMETERS", least)
    trainer = trainer_of(tmp_path, bf16=given, use_cpu=use_cpu, max_steps=1)
    seen = []
    trainer.model.base.model.norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert trainer.args.bf16 is expected
    assert set(seen) == {expected}


@pytest.mark.parametrize("most", [1 << 31, 1 << 25])
def test_malloc_is_told_to_keep_large_blocks(monkeypatch, most):
    """By glibc's numbers of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD; elsewhere nothing is asked for.

    Its older versions refuse an M_MMAP_THRESHOLD above 32 MiB.
    """
    asked = {}

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > most:
            return 0
        asked[option] = value
        return 1

    libc = SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    machine.keep_freed_memory()
    assert asked.keys() == {-1, -3}
    assert asked[-1] == -1  # never
    assert asked[-3] == min(most, 1 << 30)
    asked.clear()
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    machine.keep_freed_memory()
    assert not asked


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_more_than_two_gib_are_kept():
    """The end of the heap (`sbrk`) stays where it was when 2.7 GB, never touched, are freed.

    Blocks are smaller than the M_MMAP_THRESHOLD of every version, so that they lie in the heap.
    """
    code = """
import ctypes
from renyi.machine import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
keep_freed_memory()
blocks = [libc.malloc(30_000_000) for _ in range(90)]
assert all(blocks)
end = libc.sbrk(0)
for block in blocks:
    libc.free(block)
assert libc.sbrk(0) == end, "given back"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("platform", "cxx", "headers", "expected"),
    [
        ("linux", "sh", True, True),
        ("linux", "no-such-compiler", True, False),
        ("linux", "sh", False, False),
        ("darwin", "sh", True, False),
    ],
)
def test_compiling_needs_a_compiler_and_the_headers_of_python(monkeypatch, tmp_path, platform, cxx, headers, expected):
    monkeypatch.setattr(machine.sys, "platform", platform)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    if headers:
        (tmp_path / "Python.h").touch()
    assert machine.can_compile() is expected


def test_a_container_has_the_memory_that_it_is_given(monkeypatch, tmp_path):
    whole = machine.main_memory()
    monkeypatch.setattr(machine, "_LIMIT", tmp_path / "memory.max")
    for text, expected in (("max\n", whole), ("1000000\n", 1_000_000), (f"{2 * whole}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert machine.main_memory() <= expected
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine.main_memory() == 1_000_000
