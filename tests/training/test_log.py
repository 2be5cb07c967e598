"""A member that starves is warned of, once, also where its low loads lie on both sides of a checkpoint."""

import json
import logging

import torch

from renyi.training.log import STARVED_LOGS, TrainingLog


def training_log() -> TrainingLog:
    return TrainingLog(torch.device("cpu"), 2, lambda x: x)


def test_low_loads_before_a_checkpoint_count_after_it(caplog):
    before, after = training_log(), training_log()
    caplog.set_level(logging.WARNING, logger="renyi.training.log")
    for _ in range(STARVED_LOGS - 1):
        before.starved.see([0.99, 0.01], is_settled=True)
    after.restore(json.loads(json.dumps(before.state())), holds_sums=True)
    assert not caplog.records
    after.starved.see([0.99, 0.01], is_settled=True)
    assert "Member 1 starves" in caplog.text
    caplog.clear()
    again = training_log()
    again.restore(json.loads(json.dumps(after.state())), holds_sums=True)
    for _ in range(STARVED_LOGS + 1):
        again.starved.see([0.01, 0.99], is_settled=True)
    assert not caplog.records  # one warning a run
