"""What this machine can do: its memory, its precisions (measured), whether it compiles, and its memory allocator."""

import ctypes
import os
import shutil
import sys
import sysconfig
import time
from functools import cache
from pathlib import Path

import torch

# A base with fewer parameters spends its time between matrix products, where half precision only adds casts.
LEAST_PARAMETERS = 50_000_000
_SECONDS = 0.2  # for each precision
_GAIN = 1.5
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def bf16_pays() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 clearly faster than in float32."""
    return half_gain(torch.bfloat16) > _GAIN


@cache
def half_gain(half: torch.dtype) -> float:
    """How many times as fast this CPU multiplies matrices in half precision as in float32; a trial of half a second."""

    def products_a_second(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        left @ right  # not timed: the first product also sets the library up
        began, number = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < _SECONDS:
            left @ right
            number += 1
        return number / elapsed

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return products_a_second(half) / products_a_second(torch.float32)


def can_compile() -> bool:
    """Whether PyTorch can compile for this CPU: it needs Linux, a C++ compiler and the headers of Python."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return sys.platform == "linux" and headers.is_file() and shutil.which(os.environ.get("CXX", "g++")) is not None


def keep_freed_memory() -> None:
    """Have glibc's malloc keep large blocks that were freed, so that the next step uses them. Else do nothing.

    By default malloc returns large blocks to the system at once, and the next step gets them back page by page.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
            mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions allow
        mallopt(_M_TRIM_THRESHOLD, -1)  # never; the largest number would be 2 GiB, and a step may free more at once


def main_memory() -> int:
    """Bytes of main memory of this machine, or of the container that the process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.read_text(encoding="ascii").strip() if _LIMIT.is_file() else "max"
    return min(machine, int(limit)) if limit.isdigit() else machine
