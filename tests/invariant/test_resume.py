"""A run that is killed at any point and started again gives, bit for bit, what it would have given."""

from functools import partial
from pathlib import Path

import pytest
from processes import KILLED, interrupted_run, read_log, run

from renyi.training.checkpoints import find_checkpoints, is_complete

slow = partial(pytest.param, marks=pytest.mark.slow)

KILLS = [
    slow(("after the step", 1)),  # before the first checkpoint
    ("between micro-batches", 2),
    slow(("after the step", 3)),
    slow(("after saving", 4)),
    ("after evaluating", 4),  # evaluated, but not yet saved
    ("writing a member", 4),
    ("before the seal", 6),  # everything is there but the seal
    slow(("after the step", 7)),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(interrupted_run, str(folder), None) == [0]
    return folder


def final_files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in (folder / "final").rglob("*") if f.is_file()}


def assert_equal_runs(folder: Path, expected: Path) -> None:
    assert final_files(folder) == final_files(expected)  # adapters, weights and alpha
    assert read_log(folder) == read_log(expected)
    checkpoint, other = (find_checkpoints(f).newest for f in (folder, expected))
    assert checkpoint.name == other.name == "checkpoint-8"


def test_the_run_to_compare_with_exercises_everything(uninterrupted):
    log = read_log(uninterrupted)
    assert [row["step"] for row in log] == [3, 4, 6, 8, 8]
    assert 0 < log[0]["alpha"] < 0.8
    assert abs(log[2]["mixture_weight/0"] - 0.5) > 0.001
    assert {"eval_loss", "eval_nll_mixture"} <= log[1].keys()
    assert log[-1]["train_loss"] > 0
    assert (uninterrupted / "checkpoint-8").is_dir()
    assert len(list(uninterrupted.glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]} {kill[1]}")
def test_resuming_after_a_kill_changes_nothing(tmp_path, uninterrupted, kill):
    assert run(interrupted_run, str(tmp_path), kill) == [KILLED]
    found = find_checkpoints(tmp_path)
    if kill[0] in ("writing a member", "before the seal"):
        assert [folder.name for folder in found.half_written] == [f"checkpoint-{kill[1]}"]
        assert not is_complete(tmp_path / f"checkpoint-{kill[1]}")
        assert found.newest.name == f"checkpoint-{kill[1] - 2}"
    assert run(interrupted_run, str(tmp_path), None) == [0]
    assert_equal_runs(tmp_path, uninterrupted)


@pytest.mark.slow
def test_resuming_after_several_kills_changes_nothing(tmp_path, uninterrupted):
    for kill in (("after the step", 3), ("before the seal", 4), ("after the step", 5)):
        assert run(interrupted_run, str(tmp_path), kill) == [KILLED]
    assert run(interrupted_run, str(tmp_path), None) == [0]
    assert_equal_runs(tmp_path, uninterrupted)


def test_a_checkpoint_that_lost_a_file_is_passed_over(tmp_path, uninterrupted):
    assert run(interrupted_run, str(tmp_path), ("after the step", 5)) == [KILLED]
    assert find_checkpoints(tmp_path).newest.name == "checkpoint-4"
    weights = tmp_path / "checkpoint-4" / "member_0" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert find_checkpoints(tmp_path).newest.name == "checkpoint-2"
    assert run(interrupted_run, str(tmp_path), None) == [0]
    assert_equal_runs(tmp_path, uninterrupted)


def test_resuming_a_finished_run_trains_no_more(tmp_path, uninterrupted):
    assert run(interrupted_run, str(tmp_path), None) == [0]
    assert run(interrupted_run, str(tmp_path), None) == [0]
    assert final_files(tmp_path) == final_files(uninterrupted)


@pytest.mark.parametrize(
    "kill", [slow(("between micro-batches", 3)), slow(("after evaluating", 4)), ("before the seal", 6)], ids=str
)
def test_resuming_a_preference_run_changes_nothing(tmp_path, kill):
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    assert run(interrupted_run, str(expected), None, "dpo") == [0]
    assert run(interrupted_run, str(killed), kill, "dpo") == [KILLED]
    assert run(interrupted_run, str(killed), None, "dpo") == [0]
    assert_equal_runs(killed, expected)
