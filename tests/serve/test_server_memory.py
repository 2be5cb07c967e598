"""What a server's process keeps: code for few shapes, and no freed memory for long."""

import ctypes
import os
import subprocess
import sys

import psutil
import pytest

from renyi.serve.memory import FreedMemory, keep_few_shapes

has_trim = os.name == "posix" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not has_trim, reason="this C library has no malloc_trim")
def test_freed_memory_goes_back_to_the_system() -> None:
    resident = psutil.Process().memory_info
    blocks = [bytes(60_000) for _ in range(4000)]  # 240 MB, in blocks that malloc does not map by themselves
    kept = blocks[::20]
    blocks.clear()  # what is kept lies between what is free
    before = resident().rss
    FreedMemory(seconds=60).give_back()  # it is not time yet
    assert before - resident().rss < 20e6
    FreedMemory(seconds=0).give_back()
    assert before - resident().rss > 150e6
    assert len(kept) == 200


@pytest.mark.parametrize(("given", "then"), [(None, "64"), ("9", "9")])
def test_the_environment_says_how_many_shapes_are_kept(
    given: str | None, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    if given:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
    keep_few_shapes()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == then


def test_a_server_is_loaded_without_a_product_before_the_limit_is_set() -> None:
    """oneDNN reads the limit at its first product. Importing the server makes none, so the limit can still be set."""
    code = (
        "import os, renyi.serve.run; from renyi.serve.memory import keep_few_shapes; keep_few_shapes(); import torch;"
        "x = torch.ones(8, 64, dtype=torch.bfloat16); x @ x.T"
    )
    verbose = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=verbose)
    assert ended.stdout.count("create:cache") <= 2
