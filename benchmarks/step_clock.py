"""Times the steps of a trainer."""

import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """A callback that keeps the seconds of each step, the optimizer's included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._wait()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self.began)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
