"""What a server's process keeps: code for few shapes, and no freed memory for long."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from renyi.cli.serve import run
from renyi.errors import ConfigError
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
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is as before after the test
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    if given:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
    keep_few_shapes()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == then


def test_the_limit_is_set_before_an_ensemble_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading tries the head, and oneDNN reads the limit at its first product."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is as before after the test
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    seen = []

    def load(args: object) -> None:
        seen.append(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
        raise ConfigError("that is enough")

    monkeypatch.setattr("renyi.cli.serve.load_ensemble", load)
    with pytest.raises(ConfigError, match="enough"):
        run([str(tmp_path)])
    assert seen == ["64"]


@pytest.mark.slow
def test_no_product_is_made_before_the_limit_is_set() -> None:
    code = "from renyi.cli.serve import run; import renyi.serve.run"
    verbose = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=verbose)
    assert "create:cache" not in ended.stdout
