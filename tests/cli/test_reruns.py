"""The same folder again: the same settings go on, harmless ones may differ, and all others are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Ended,
    assert_refused,
    contradicting_rows,
    flags_of,
    renyi,
    settings_of,
    steps_in,
    weights_in,
    write_rows,
)

from renyi.runs import Settings
from renyi.runs.record import HARMLESS, LENGTH, RUN_FILE, Record, defaults
from renyi.runs.settings import METHODS
from renyi.training.schedule import scheduled_alpha


@pytest.fixture
def again(trained: tuple[Path, Ended], base: Path, rows_file: Path, tmp_path: Path) -> Any:
    """Gives the folder of a finished run of six steps, and the same command with other values for some keys."""
    folder = tmp_path / "again"
    shutil.copytree(trained[0], folder)

    def command(**given: object) -> Ended:
        values = {**settings_of(base, rows_file), "test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 3}
        values = {**values, "output_dir": folder, **given}
        return renyi("sft", *flags_of(values))

    command.folder = folder  # type: ignore[attr-defined]
    return command


def unfinish(folder: Path) -> None:
    """As if the run had been killed after its fourth step."""
    shutil.rmtree(folder / "checkpoint-6")
    for file in ("ensemble.json", "README.md", "training.png"):
        (folder / file).unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("learning_rate", 0.5, "learning_rate 0.01, and this one has 0.5"),
        ("alpha", 0.3, "alpha 0.8, and this one has 0.3"),
        ("max_length", 8, "max_length 1024, and this one has 8"),
        ("per_device_train_batch_size", 2, "examples_per_step 4, and this one has 2"),
        ("test_split_size", 0.5, "test_split_size 0.25, and this one has 0.5"),
    ],
)
def test_what_decides_is_refused_by_name(again: Any, key: str, value: object, said: str, is_finished: bool) -> None:
    if not is_finished:
        unfinish(again.folder)
    before = contents(again.folder)
    assert_refused(again(**{key: value}), "output_dir", said, "Choose another output_dir")
    assert contents(again.folder) == before


def test_other_rows_are_refused_and_the_same_rows_elsewhere_are_not(
    again: Any, rows_file: Path, tmp_path: Path
) -> None:
    rows = contradicting_rows(48)
    rows[3]["completion"] = " w9 w9"
    other = write_rows(tmp_path / "other.jsonl", rows)
    before = contents(again.folder)
    assert_refused(again(dataset_name=other), "36 rows, and this one has 36 of other content (dataset_name)")
    assert_refused(again(dataset_name=write_rows(other, contradicting_rows(44))), "36 rows, and this one has 33")
    assert contents(again.folder) == before
    moved = tmp_path / "moved.jsonl"
    shutil.copy(rows_file, moved)
    assert again(dataset_name=moved).code == 0


def test_what_is_harmless_goes_on(again: Any) -> None:
    whole = weights_in(again.folder)
    unfinish(again.folder)
    harmless = {"logging_steps": 2, "save_steps": 3, "dataloader_num_workers": 0, "gradient_checkpointing": True}
    # Two parts of two examples are one step on four.
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ended = again(**harmless, **parts)
    assert ended.code == 0, ended
    assert "resuming from checkpoint-4 of 6" in ended.out
    for name, value in weights_in(again.folder).items():
        assert value.allclose(whole[name], rtol=1e-3, atol=1e-5), name


def test_a_longer_run_follows_the_longer_schedule_from_there_on(again: Any) -> None:
    ended = again(max_steps=12)
    assert ended.code == 0, ended
    assert "resuming from checkpoint-6 of 12" in ended.out
    assert "the run had 6 steps: from here alpha and the learning rate follow the schedules of 12" in ended.out
    assert steps_in(again.folder) == list(range(1, 13))
    lines = [json.loads(line) for line in (again.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    alpha = {line["step"]: line["alpha"] for line in lines if "loss" in line}
    rate = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
    for step in range(7, 13):
        # A line is logged after its step: the schedule is where the next step stands.
        assert alpha[step] == pytest.approx(scheduled_alpha(step / 12, 0.8, 0.2, 0.2)), step
        assert rate[step] == pytest.approx(1e-2 * (13 - step) / 12), step
    assert_refused(again(max_steps=8), "max_steps", "this run has 8 steps", "checkpoint-12 has taken 12")


def test_a_folder_of_before_there_was_a_record_goes_on(again: Any) -> None:
    whole = weights_in(again.folder)
    unfinish(again.folder)
    (again.folder / RUN_FILE).unlink()
    assert again().code == 0
    assert all(value.equal(whole[name]) for name, value in weights_in(again.folder).items())
    assert_refused(again(learning_rate=0.5), "learning_rate 0.01, and this one has 0.5")


def test_nothing_was_trained_yet(again: Any) -> None:
    """A run that was killed before its first checkpoint left settings, and nothing that they were used for."""
    for path in list(again.folder.iterdir()):
        if path.name != RUN_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    ended = again(learning_rate=0.5)
    assert (ended.code, "resuming" in ended.out) == (0, False), ended
    assert json.loads((again.folder / RUN_FILE).read_text(encoding="utf-8"))["settings"]["learning_rate"] == 0.5


def test_a_record_that_cannot_be_read_is_named(again: Any) -> None:
    (again.folder / RUN_FILE).write_text("{", encoding="utf-8")
    assert_refused(again(), str(again.folder / RUN_FILE), "cannot be read")


@pytest.mark.parametrize(
    ("method", "key", "one", "other"),
    [("dpo", "beta", 0.1, 0.5), ("dpo", "loss_type", "sigmoid", "ipo"), ("powerflow", "power", 4.0, 2.0)],
)
def test_every_method_keeps_what_decides(
    method: str, key: str, one: object, other: object, base: Path, rows_file: Path, tmp_path: Path
) -> None:
    keys = {"model_name_or_path": base, "dataset_name": rows_file, "output_dir": tmp_path, "use_cpu": True}
    records = [Record.of(Settings.of(method, **keys, **{key: value})) for value in (one, other)]
    records[0].write(tmp_path)
    kept = Record.read(tmp_path)
    assert kept is not None
    assert kept.differences(records[0]) == []
    (said,) = records[1].differences(kept)
    assert said.startswith(key)


def test_harmless_keys_are_keys() -> None:
    """A misspelt or removed one would make its setting decide."""
    known = {key for method in METHODS for key in defaults(method)}
    assert (HARMLESS | LENGTH) - known == set()
