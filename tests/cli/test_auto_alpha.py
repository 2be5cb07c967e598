"""`alpha: auto`: one adapter, its diagnosis, members that start apart, and going on wherever it was killed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Ended, Settings, assert_refused, contradicting_rows, renyi, steps_in, weights_in, write_rows
from tiny import tiny_ensemble, trainer_of

from renyi import LoraEnsemble
from renyi.ensemble import read_preference
from renyi.errors import ConfigError
from renyi.runs import auto as auto_module

AUTO = {"alpha": "auto", "max_steps": 10, "save_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", contradicting_rows(96))


@pytest.fixture
def auto(settings: Settings, many_rows: Path) -> Path:
    return settings(dataset_name=many_rows, num_members=3, **AUTO)


def test_one_adapter_decides_and_members_start_round_it(auto: Path, tmp_path: Path) -> None:
    ended = renyi("sft", "--config", auto)
    assert ended.code == 0, ended
    out = tmp_path / "out"
    chosen = json.loads((out / "auto" / "chosen.json").read_text())
    # Held and ramped for a fifth each: one adapter for two fifths of the steps, the members for four.
    assert (chosen["fit_steps"], chosen["steps"]) == (4, 8)
    assert steps_in(out / "auto" / "fit") == [1, 2, 3, 4]
    assert steps_in(out) == list(range(1, 9))
    assert 0 < chosen["low"] <= chosen["critical_alpha"] <= chosen["high"]
    assert LoraEnsemble.load(out).alpha == pytest.approx(chosen["alpha"])
    for part in ("alpha: auto", "fitted for 4 steps", f"{chosen['alpha']:g} · 3 members start apart"):
        assert part in ended.out

    fit, start = weights_in(out / "auto" / "fit"), weights_in(out / "auto" / "start")
    for name, origin in fit.items():
        moved = torch.stack([start[name.replace("member_0", f"member_{m}")] for m in range(3)])
        torch.testing.assert_close(moved.mean(dim=0), origin, rtol=1e-4, atol=1e-6)
    for m in range(2):
        pairs = [(start[n], start[n.replace(f"member_{m}", f"member_{m + 1}")]) for n in start if f"member_{m}" in n]
        assert sum(float((a - b).norm()) for a, b in pairs) > 1e-3


def test_rows_that_are_diagnosed_were_not_fitted_to(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distinct = write_rows(
        tmp_path / "distinct.jsonl", [{"prompt": f"w{i % 8}", "completion": f" w{10 + i // 8}"} for i in range(96)]
    )
    runs, diagnosed = [], []
    build, diagnose = auto_module.build, auto_module.diagnose
    monkeypatch.setattr(auto_module, "build", lambda *a, **k: runs.append(build(*a, **k)) or runs[-1])
    monkeypatch.setattr(
        auto_module, "diagnose", lambda e, rows, *a, **k: diagnosed.append(rows) or diagnose(e, rows, *a, **k)
    )
    ended = renyi("sft", "--config", settings(dataset_name=distinct, num_members=2, **AUTO))
    assert ended.code == 0, ended
    fitted, asked = (
        {tuple(ids) for ids in rows["input_ids"]} for rows in (runs[0].trainer.train_dataset, diagnosed[0])
    )
    assert (len(fitted), len(asked)) == (56, 40)
    assert not fitted & asked
    # The members are trained on all rows.
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train"]["rows"] == 96


@pytest.mark.parametrize("half", [False, True])
def test_the_diagnosis_has_the_precision_of_training(
    settings: Settings, many_rows: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    seen, diagnose = [], auto_module.diagnose
    monkeypatch.setattr(
        auto_module, "diagnose", lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or diagnose(*a, **k)
    )
    ended = renyi("sft", "--config", settings(dataset_name=many_rows, num_members=2, bf16=half, **AUTO))
    assert (ended.code, seen) == (0, [half]), ended


def test_an_epoch_of_the_members_is_one_of_all_rows(settings: Settings, many_rows: Path, tmp_path: Path) -> None:
    given = {**AUTO, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    assert renyi("sft", "--config", settings(dataset_name=many_rows, num_members=2, **given)).code == 0
    chosen = json.loads((tmp_path / "out" / "auto" / "chosen.json").read_text())
    # 12 steps: two fifths of them for the adapter, four fifths for the members.
    assert (chosen["fit_steps"], chosen["steps"]) == (5, 10)


def test_it_goes_on_wherever_it_was_killed(auto: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert renyi("sft", "--config", auto).code == 0
    whole, chosen = weights_in(out), (out / "auto" / "chosen.json").read_text()

    def again() -> Ended:
        ended = renyi("sft", "--config", auto)
        assert ended.code == 0, ended
        assert (out / "auto" / "chosen.json").read_text() == chosen
        assert all(weights_in(out)[name].equal(value) for name, value in whole.items())
        return ended

    # Killed while members train: what was chosen stays chosen, and nothing is fitted again.
    fitted = (out / "auto" / "fit" / "ensemble.json").stat().st_mtime_ns
    for step in (6, 8):
        shutil.rmtree(out / f"checkpoint-{step}")
    assert "resuming from checkpoint-4 of 8" in again().out
    assert (out / "auto" / "fit" / "ensemble.json").stat().st_mtime_ns == fitted

    # Killed while it diagnoses: before the choice was written.
    for path in out.iterdir():
        if path.name != "auto":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "auto" / "chosen.json").unlink()
    shutil.rmtree(out / "auto" / "start")
    again()

    # Killed while the one adapter trains.
    for path in [*out.glob("checkpoint-*"), *out.glob("member_*"), out / "auto" / "start"]:
        shutil.rmtree(path)
    for path in (out / "ensemble.json", out / "auto" / "chosen.json", out / "auto" / "fit" / "ensemble.json"):
        path.unlink()
    shutil.rmtree(out / "auto" / "fit" / "checkpoint-4")
    again()


def test_a_dry_run_decides_nothing(auto: Path, tmp_path: Path) -> None:
    ended = renyi("sft", "--config", auto, "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    assert "auto: decided by one adapter" in ended.out
    assert not (tmp_path / "out").exists()


def test_preferences_are_measured_against_the_base(settings: Settings, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"w{i % 8}", "chosen": f" w{10 + i // 8 % 2}", "rejected": f" w{11 - i // 8 % 2}"} for i in range(96)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    ended = renyi("dpo", "--config", settings(dataset_name=data, num_members=2, **AUTO))
    assert ended.code == 0, ended
    kept = read_preference(tmp_path / "out", LoraEnsemble.load(tmp_path / "out"))
    assert kept.reference.start is None
    assert (tmp_path / "out" / "auto" / "chosen.json").is_file()


def test_it_is_refused_where_it_cannot_be(auto: Path, settings: Settings, many_rows: Path, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", contradicting_rows(30))
    assert_refused(
        renyi("sft", "--config", auto, "--dataset_name", few),
        "30 rows are too few for alpha: auto",
        "keeps 40",
        "at least 80",
    )
    assert_refused(renyi("sft", "--config", auto, "--alpha", "aut"), "alpha", "'aut'", "between 0 and 1, or auto")
    with pytest.raises(ConfigError, match="ahead of training"):
        trainer_of(tmp_path / "run", alpha="auto")


def test_an_ensemble_cannot_be_the_start(auto: Path, tmp_path: Path) -> None:
    tiny_ensemble(3).save(tmp_path / "ensemble")
    ended = renyi("sft", "--config", auto, "--model_name_or_path", tmp_path / "ensemble")
    assert_refused(ended, "alpha", "one fresh adapter", "renyi diagnose")
