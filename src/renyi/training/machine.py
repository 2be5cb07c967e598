"""Which precision is fast on this CPU (measured), and a setting of its memory allocator for long training."""

import ctypes
import sys
import time

import torch

# A base with fewer parameters spends its time between matrix products, where half precision only adds casts.
LEAST_PARAMETERS = 50_000_000
_SECONDS = 0.2  # for each precision
_GAIN = 1.5
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def bf16_pays() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 clearly faster than in float32; takes less than a second."""

    def products_a_second(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        left @ right  # not timed: the first product also sets the library up
        began, number = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < _SECONDS:
            left @ right
            number += 1
        return number / elapsed

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return products_a_second(torch.bfloat16) > _GAIN * products_a_second(torch.float32)


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
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
