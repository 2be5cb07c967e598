"""What every test gets: silence from the libraries, a fixed number of threads, and fresh seeds."""

import gc
import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
import transformers

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("accelerate").setLevel(logging.ERROR)
logging.getLogger("trl").setLevel(logging.ERROR)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Take what lives already, the libraries above all, out of the garbage collector's sight.

    Every `train()` collects garbage. Each time Python would look through all objects of the imported libraries, which
    takes longer than most tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Tests see the same random state in any order, and leave the number of threads as it was.

    That number is `OMP_NUM_THREADS`, or 1: what a test asserts holds for any.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything that the test makes and trains is in double precision, see `float64.py`."""
    from float64 import in_float64

    with in_float64():
        yield


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """`routing: sparse` runs pairs by themselves even if most of them matter, where it would train as dense does."""
    monkeypatch.setattr("renyi.routing.statistics.MOST_ACTIVE", 1.0)
