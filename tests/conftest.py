"""What every test gets: silence from the libraries, one thread, and fresh seeds."""

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


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Tests see the same random state in any order, and leave the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
