"""Two processes over gloo are one process with the batch of both."""

from pathlib import Path

import pytest
from float64 import SAME
from processes import distributed_run, free_port, read_log, run, train_one, unsettled
from tiny import member_distance, tiny_model

from renyi import LoraEnsemble
from renyi.training import reference_cache

pytestmark = pytest.mark.usefixtures("float64")

SETTINGS = {
    "num_members": 3,
    "alpha_hold_ratio": 0.2,
    "max_grad_norm": 0.3,
    "mixture_weights": "learned",
    "mixture_weights_rate": 0.2,
    "prior_std": 0.5,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
}


def assert_close_runs(folder: Path, expected: Path) -> None:
    ours, theirs = (LoraEnsemble.load(f / "final", base=tiny_model()) for f in (folder, expected))
    assert member_distance(ours, theirs) <= SAME
    assert ours.weights.tolist() == pytest.approx(theirs.weights.tolist(), rel=SAME)
    log, other = read_log(folder), read_log(expected)
    assert len(log) == len(other) > 3
    for row, other_row in zip(log, other, strict=True):
        assert row.keys() == other_row.keys()
        # Evaluation averages the losses of batches, whose sizes differ here; the sums beside it are exact.
        for name in row.keys() - {"eval_loss"} - unsettled(row):
            assert row[name] == pytest.approx(other_row[name], rel=SAME, abs=SAME), name


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_processes_are_one(tmp_path, accumulation):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {**SETTINGS, "gradient_accumulation_steps": accumulation}
    train_one(one, {**settings, "per_device_train_batch_size": 4})
    assert run(
        distributed_run, str(two), 2, free_port(), {**settings, "per_device_train_batch_size": 2}, processes=2
    ) == [0, 0]
    assert_close_runs(two, one)


@pytest.mark.parametrize("precompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_are_one_on_preferences(tmp_path, precompute, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(reference_cache, "HF_HOME", str(tmp_path))
    settings = {**SETTINGS, "precompute_ref_log_probs": precompute}
    train_one(one, {**settings, "per_device_train_batch_size": 4}, "dpo")
    second = {**settings, "per_device_train_batch_size": 2, "seed": 42}
    assert run(distributed_run, str(two), 2, free_port(), second, "dpo", processes=2) == [0, 0]
    assert_close_runs(two, one)
