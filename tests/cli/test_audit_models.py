"""`renyi audit` with a model: one adapter for each half, an ensemble that is trained, and one that is there already."""

import json
from pathlib import Path

import pytest
from conftest import assert_refused, renyi, write_rows

from renyi.runs import audited

FAST = ("--num_train_epochs", "1", "--lora_r", "2", "--learning_rate", "1e-2")


@pytest.fixture(scope="module")
def schools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of two words, each answered by one of two schools."""
    rows = [{"prompt": f"w{i % 9} w{i // 9}", "completion": f" w{10 + i % 2 * 20 + i % 9} w{i % 2}"} for i in range(96)]
    return write_rows(tmp_path_factory.mktemp("audited") / "schools.jsonl", rows)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_adapters_read_what_they_were_not_fitted_to_and_a_second_call_goes_on(
    base: Path, schools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("audit", schools, "--model", base, "--output", tmp_path / "out", "--max_examples", "88", "--json", *FAST)
    ended = renyi(*command)
    assert ended.code == 0, ended.err
    summary = json.loads(ended.out)
    assert 0 < summary["stability"]["low"] <= summary["stability"]["critical_alpha"]
    assert summary["settings"]["read_by_model"] == 88
    assert f"--model_name_or_path {base}" in summary["next"]
    read = [line for line in lines_of(tmp_path / "out") if "fit" in line]
    assert len(read) == 88
    assert all(len(line["loadings"]) == 4 for line in read)
    assert sum(line["held_out"] for line in read) == 44
    assert "critical alpha" in (tmp_path / "out" / "audit.md").read_text(encoding="utf-8")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was measured already")

    for name in ("diagnose",):
        monkeypatch.setattr(audited, name, never)
    monkeypatch.setattr("renyi.audit.measuring.score", never)
    monkeypatch.setattr("renyi.audit.measuring.loadings_along", never)
    again = renyi(*command)
    assert again.code == 0, again.err
    assert json.loads(again.out) == summary


def test_members_are_trained_and_own_sides(base: Path, schools: Path, tmp_path: Path) -> None:
    ended = renyi(
        "audit", schools, "--model", base, "--members", 2, "--alpha", 0.8, "--output", tmp_path / "out", *FAST
    )
    assert ended.code == 0, ended.err
    line = lines_of(tmp_path / "out")[0]
    assert sum(line["responsibilities"]) == pytest.approx(1)
    assert line["epistemic"] >= 0
    assert "to train on these rows" in ended.err


def test_an_ensemble_that_is_there_reads_the_rows(trained: tuple[Path, object], schools: Path, tmp_path: Path) -> None:
    folder, _ = trained
    ended = renyi("audit", schools, "--ensemble", folder, "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert len(lines_of(tmp_path / "out")[5]["responsibilities"]) == 2


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--members", "2"), ("--members", "--model")),
        (("--model", "x", "--members", "1"), ("--members", "from 2 on")),
        (("--learning_rate", "1e-3"), ("--learning_rate", "--model")),
        (("--model", "x", "--alpha", "0.5"), ("--alpha", "--members")),
        (("--model", "x", "--max_examples", "1"), ("--max_examples",)),
        (("--ensemble", "nowhere/at/all"), ("nowhere/at/all",)),
    ],
)
def test_flags_that_do_not_fit_are_refused(schools: Path, flags: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_refused(renyi("audit", schools, *flags), *parts)
