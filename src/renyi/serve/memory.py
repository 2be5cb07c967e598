"""A server runs for weeks. What libraries keep for later must not grow with the variety of its requests.

Two things would. oneDNN, which multiplies matrices on a CPU, keeps code for each shape (`keep_few_shapes`). And malloc
keeps freed memory that lies between blocks in use (`FreedMemory`).
"""

import ctypes
import os
import time

# A step needs about 10 shapes at once, and code for a new one is soon made. oneDNN would keep that of 1,024 shapes.
KEPT_SHAPES = 64


def keep_few_shapes() -> None:
    """Limit oneDNN's cache of code, unless the environment says how large it is.

    Call it before the first matrix product of the process, at which oneDNN reads the limit. Loading an ensemble makes
    some.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_SHAPES))


class FreedMemory:
    """Gives freed memory back to the system, from time to time. Only glibc's malloc is asked to.

    Args:
        seconds: the least time between two times.
    """

    def __init__(self, seconds: float = 20.0):
        self._seconds, self._last = seconds, time.monotonic()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

    def give_back(self) -> None:
        """Do it if it is time. It takes some milliseconds."""
        if self._trim is not None and time.monotonic() - self._last >= self._seconds:
            self._trim(0)
            self._last = time.monotonic()
