"""`renyi sweep`: cells that equal runs of their own, what it finds in them, run again, killed, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Ended,
    Settings,
    assert_refused,
    contradicting_rows,
    flags_of,
    renyi,
    settings_of,
    steps_in,
    weights_in,
    write_rows,
)
from processes import kill_once_written

from renyi import LoraEnsemble
from renyi.errors import TrainingDivergedError
from renyi.training import RenyiSFTTrainer

CELLS = ["members_1", "alpha_0_members_2", "alpha_0.5_members_2"]
GRID = ["--alphas", "0.5", "0", "--members", "2", "1"]


def result_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def last_evaluation(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "eval_loss" in row][-1]


def trained_at(folder: Path) -> dict[str, int]:
    """When each cell's checkpoints were sealed and its steps logged."""
    files = [*folder.glob("*/checkpoint-*/complete.json"), *folder.glob("*/metrics.jsonl")]
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in files}


@pytest.fixture(scope="module")
def config(base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of cells of six steps; the members' learning differs enough for cells to differ."""
    folder = tmp_path_factory.mktemp("sweep")
    values = {**settings_of(base, rows_file), "test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 6}
    values |= {"output_dir": folder / "out", "num_members": ..., "learning_rate": 3e-2}
    file = folder / "config.yaml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in values.items() if v is not ...), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def swept(config: Path) -> tuple[Path, Ended]:
    """The folder of a sweep of three cells, and what the command said."""
    return config.parent / "out", renyi("sweep", "--config", config, *GRID)


# ---- A sweep ---------------------------------------------------------------------------------------------------------


def test_it_says_what_it_does_and_what_came_of_it(swept: tuple[Path, Ended], base: Path) -> None:
    folder, ended = swept
    assert (ended.code, ended.err) == (0, "")
    text = " ".join(ended.out.replace("│", " ").split())
    for part in [
        f"base {base} · float32 on cpu",
        "cells 3: one adapter; 2 members at alpha 0, 0.5",
        "train 36 examples · 144 tokens, 108 of them trained",
        "held out 12 examples · 48 tokens, 36 of them trained",
        "6 in every cell, seed 42",
        "1/3 one adapter step 1/6 ",
        "2/3 2 members at alpha 0 step 1/6 ",
        "3/3 2 members at alpha 0.5 step 1/6 ",
        "12 held-out examples, 36 trained tokens",
        "1 member any ",
        f"renyi generate {folder / result_in(folder)['chosen']}",
    ]:
        assert part in text, part
    marked = [line for line in ended.out.splitlines() if line.startswith("→ ")]
    assert len(marked) == 1
    assert " ".join(result_in(folder)["why"].split()) in text
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_holds_every_cell_and_the_choice(swept: tuple[Path, Ended], config: Path) -> None:
    folder, _ = swept
    result = result_in(folder)
    assert (result["examples"], result["unit"], result["units"]) == (12, "trained token", 36)
    assert result["settings"]["method"] == "sft"
    assert [c["folder"] for c in result["cells"]] == CELLS
    assert [(c["members"], c["alpha"]) for c in result["cells"]] == [(1, None), (2, 0), (2, 0.5)]
    nll = {c["folder"]: c["mixture_nll"]["value"] for c in result["cells"]}
    assert result["best"] == min(nll, key=nll.__getitem__)
    assert result["runner_up"] == min(nll.keys() - {result["chosen"]}, key=nll.__getitem__)
    for cell in result["cells"]:
        assert cell["failed"] is None
        assert cell["seconds"] > 0
        assert cell["behind"]["value"] == pytest.approx(nll[cell["folder"]] - nll[result["best"]], abs=1e-9)
        assert cell["mixture_nll"]["low"] < nll[cell["folder"]] < cell["mixture_nll"]["high"]
        assert sum(cell["member_load"]) == pytest.approx(1)
        assert 0 <= cell["ece"] <= 1
    chosen = next(c for c in result["cells"] if c["folder"] == result["chosen"])
    assert chosen["behind"]["value"] <= chosen["standard_error"]
    assert LoraEnsemble.load(folder / result["chosen"]).num_members == chosen["members"]


def test_figures_are_those_of_the_trainers_last_evaluation(swept: tuple[Path, Ended]) -> None:
    folder, _ = swept
    for cell in result_in(folder)["cells"]:
        theirs = last_evaluation(folder / cell["folder"])
        assert cell["mixture_nll"]["value"] == pytest.approx(theirs["eval_nll_mixture"], rel=1e-5)
        assert cell["member_nll"] == pytest.approx(theirs["eval_nll_members"], rel=1e-5)
        assert cell["jensen_gap"] == pytest.approx(theirs["eval_jensen_gap"], abs=1e-5)


def test_a_cell_is_what_a_run_of_its_own_would_be(swept: tuple[Path, Ended], config: Path, tmp_path: Path) -> None:
    """Wherever in the sweep it was trained."""
    flags = ["--alpha", "0.5", "--num_members", "2", "--output_dir", tmp_path / "alone"]
    assert renyi("sft", "--config", config, *flags).code == 0
    alone, cell = weights_in(tmp_path / "alone"), weights_in(swept[0] / "alpha_0.5_members_2")
    assert alone.keys() == cell.keys()
    assert all(alone[name].equal(cell[name]) for name in alone)


def test_alpha_0_is_independent_adapters_of_which_the_single_one_is_the_first(swept: tuple[Path, Ended]) -> None:
    one, two = (weights_in(swept[0] / cell) for cell in CELLS[:2])
    for name, weight in one.items():
        assert (two[name] - weight).norm() <= 1e-4 * weight.norm(), name
    assert not weights_in(swept[0] / CELLS[2]).keys() - two.keys()


def test_a_dry_run_writes_nothing(config: Path, tmp_path: Path) -> None:
    ended = renyi("sweep", "--config", config, *GRID, "--dry_run", "--output_dir", tmp_path / "deep" / "out")
    assert (ended.code, ended.err) == (0, "")
    assert "3: one adapter; 2 members at alpha 0, 0.5" in ended.out
    assert "nothing was written" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_preference_pairs(base: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"w{i % 8}", "chosen": f" w{10 + i % 3} w1", "rejected": f" w{20 + i % 5}"} for i in range(40)]
    values = {**settings_of(base, write_rows(tmp_path / "pairs.jsonl", pairs)), "output_dir": tmp_path / "out"}
    values |= {"test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 6, "beta": 0.5, "num_members": ...}
    flags = flags_of(values)
    ended = renyi("sweep", *flags, "--method", "dpo", "--alphas", "0.5", "--members", "1", "2", "--json")
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(ended.out)
    assert (result["examples"], result["unit"], result["units"]) == (10, "pair", 10)
    assert result == result_in(tmp_path / "out")
    for cell in result["cells"]:
        theirs = last_evaluation(tmp_path / "out" / cell["folder"])
        assert cell["mixture_nll"]["value"] == pytest.approx(theirs["eval_nll_mixture"], rel=1e-4)
        assert cell["member_nll"] == pytest.approx(theirs["eval_nll_members"], rel=1e-4)
    assert (tmp_path / "out" / "members_1" / "preference.json").exists()


# ---- The same command again ------------------------------------------------------------------------------------------


def test_only_what_is_new_is_trained(swept: tuple[Path, Ended], config: Path) -> None:
    folder, _ = swept
    before, result = trained_at(folder), result_in(folder)
    weights = weights_in(folder / CELLS[2])
    ended = renyi("sweep", "--config", config, "--alphas", "0", "0.5", "1", "--members", "1", "2")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count(": finished already\n") == 3
    assert {name: at for name, at in trained_at(folder).items() if name in before} == before
    assert all(weights[name].equal(tensor) for name, tensor in weights_in(folder / CELLS[2]).items())
    again = result_in(folder)
    assert [c["folder"] for c in again["cells"]] == [*CELLS, "alpha_1_members_2"]
    for old, new in zip(result["cells"], again["cells"], strict=False):
        assert new["mixture_nll"] == old["mixture_nll"]
        assert new["seconds"] == old["seconds"]


@pytest.mark.slow  # a fresh process, and three cells of 60 steps; the test below has the same truth in this process
def test_a_killed_sweep_goes_on_within_its_cell(config: Path, swept: tuple[Path, Ended], tmp_path: Path) -> None:
    flags = [*GRID, "--max_steps", "60", "--save_steps", "10", "--logging_steps", "5", "--eval_steps", "30"]
    flags += ["--output_dir", str(tmp_path / "out")]
    half_way = tmp_path / "out" / CELLS[1] / "checkpoint-20" / "complete.json"
    kill_once_written(half_way, "sweep", "--config", config, *flags)
    assert not (tmp_path / "out" / CELLS[2]).exists()
    before = trained_at(tmp_path / "out")
    assert result_in(tmp_path / "out")["chosen"] is None
    half_done = max(int(f.parent.name.split("-")[1]) for f in tmp_path.glob(f"out/{CELLS[1]}/*/complete.json"))
    assert half_done < 60

    ended = renyi("sweep", "--config", config, *flags)
    assert (ended.code, ended.err) == (0, "")
    assert "one adapter: finished already" in ended.out
    assert f"2 members at alpha 0: resuming from checkpoint-{half_done} of 60" in ended.out
    after = trained_at(tmp_path / "out")
    assert all(after[name] == at for name, at in before.items() if name.startswith(CELLS[0]))
    for cell in CELLS:
        assert steps_in(tmp_path / "out" / cell) == list(range(5, 61, 5))
    assert result_in(tmp_path / "out")["chosen"] in CELLS

    alone = ["--alpha", "0", "--num_members", "2", *flags[len(GRID) : -1], tmp_path / "alone"]
    assert renyi("sft", "--config", config, *alone).code == 0
    whole, resumed = weights_in(tmp_path / "alone"), weights_in(tmp_path / "out" / CELLS[1])
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_a_cell_that_fails_is_said_to_and_the_others_go_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = RenyiSFTTrainer.compute_loss
    tried: list[int] = []

    def diverging(self: RenyiSFTTrainer, *args: Any, **kwargs: Any) -> Any:
        tried.append(self.model.num_members)
        if self.model.num_members == 2 and self.state.global_step == 3:
            raise TrainingDivergedError("the loss is not a finite number", where="step 4")
        return loss_of(self, *args, **kwargs)

    flags = ["--alphas", "0.5", "--members", "1", "2", "3", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(RenyiSFTTrainer, "compute_loss", diverging)
    ended = renyi("sweep", "--config", config, *flags)
    assert ended.code == 0
    assert ended.err == "failed: 2 members at alpha 0.5: step 4: the loss is not a finite number\n"
    assert [line.split() for line in ended.out.splitlines() if line.split()[-1:] == ["failed"]] == [
        ["2", "members", "0.5", "failed"]
    ]
    failed = result_in(tmp_path / "out")["cells"][1]
    assert failed.keys() == {"folder", "members", "alpha", "failed", "seconds"}
    assert failed["failed"] == "step 4: the loss is not a finite number"
    assert "alpha_0.5_members_2" not in (result_in(tmp_path / "out")[key] for key in ("best", "chosen", "runner_up"))

    tried.clear()
    ended = renyi("sweep", "--config", config, "--alphas", "0.5", "--members", "2", "--output_dir", tmp_path / "out")
    assert_refused(ended._replace(err=ended.err.partition("\n")[2]), "every cell failed", "step 4")
    assert "failed before; remove" in ended.out
    assert tried == []


def test_an_interrupted_sweep_goes_on_within_its_cell_as_it_says(
    config: Path, swept: tuple[Path, Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = RenyiSFTTrainer.compute_loss

    def interrupted(self: RenyiSFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.model.num_members == 2 and self.state.global_step == 3:
            raise KeyboardInterrupt
        return loss_of(self, *args, **kwargs)

    out, flags = tmp_path / "out", ["--alphas", "0", "--members", "2", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(RenyiSFTTrainer, "compute_loss", interrupted)
        ended = renyi("sweep", "--config", config, *flags, "--output_dir", out)
    assert ended.code == 130
    assert ended.err.strip() == "interrupted: the same command goes on from where it is"
    before = trained_at(out)
    assert result_in(out)["chosen"] is None

    ended = renyi("sweep", "--config", config, *flags, "--output_dir", out)
    assert (ended.code, ended.err) == (0, "")
    assert "one adapter: finished already" in ended.out
    assert "2 members at alpha 0: resuming from checkpoint-2 of 6" in ended.out
    assert all(trained_at(out)[name] == at for name, at in before.items() if name.startswith(CELLS[0]))
    for cell in CELLS[:2]:
        assert steps_in(out / cell) == steps_in(swept[0] / cell) == list(range(1, 7))
        whole, resumed = weights_in(swept[0] / cell), weights_in(out / cell)
        assert all(whole[name].equal(resumed[name]) for name in whole)


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--alphas", "0", "1.5"], ["--alphas", "1.5 is not allowed", "between 0 and 1"]),
        (["--alphas", "0.3", "0.30"], ["--alphas", "0.3 is given twice"]),
        (["--alphas", "some"], ["--alphas", "a list of numbers"]),
        (["--members", "0"], ["--members", "0 is not allowed", "at least 1"]),
        (["--members", "2", "2"], ["--members", "2 is given twice"]),
        (["--num_members", "2"], ["--num_members", "give members", "--members 2"]),
        (["--alpha", "0.5"], ["--alpha", "give alphas", "--alphas 0.5"]),
        (["--method", "sgt"], ["--method", "none of sft, dpo", "Did you mean sft?"]),
        (["--method", "dpo", "--packing", "true"], ["--packing", "there is no such key"]),
        (["--save_strategy", "no"], ["save_strategy", "'no' is not allowed"]),
        (["--resume_from_checkpoint", "x"], ["resume_from_checkpoint", "its own newest"]),
        (["--push_to_hub"], ["push_to_hub", "afterwards"]),
        (["--output_dir", "trainer_output"], ["output_dir", "is not set"]),
        (["--seed", "7"], ["holds a sweep with seed its default, and this one has '7'", "Choose another output_dir"]),
        (["--learning_rate", "1"], ["holds a sweep with learning_rate '0.03', and this one has '1.0'"]),
    ],
)
def test_refused_settings(
    flags: list[str], parts: list[str], swept: tuple[Path, Ended], config: Path, tmp_path: Path
) -> None:
    before = trained_at(swept[0])
    assert_refused(renyi("sweep", "--config", config, *flags), *parts)
    assert trained_at(swept[0]) == before


def test_the_line_of_the_file_is_named(settings: Settings, tmp_path: Path) -> None:
    ended = renyi("sweep", "--config", settings(test_split_size=0.25, alphas=[0.3, 0.5]))
    assert_refused(ended, "num_members (", "config.yaml, line ", "Remove num_members and write members: [2, …]")
    ended = renyi("sweep", "--config", settings(num_members=..., alphas=[0.3, 2.0]))
    assert_refused(ended, "alphas (", "2.0 is not allowed")
    assert not (tmp_path / "out").exists()


def test_the_file_of_one_run_serves_a_sweep(settings: Settings) -> None:
    """A flag overrides the file, under either name."""
    config = settings(test_split_size=0.25, num_members=3, alpha=0.8)
    ended = renyi("sweep", "--config", config, *GRID, "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    assert "3: one adapter; 2 members at alpha 0, 0.5" in ended.out
    assert_refused(renyi("sweep", "--config", config, "--members", "2"), "alpha (", "give alphas")
    assert_refused(renyi("sweep", "--config", config, *GRID, "--num-members", "2"), "--num_members", "give members")


def test_something_must_be_held_out(settings: Settings, tmp_path: Path) -> None:
    ended = renyi("sweep", "--config", settings(num_members=...))
    assert_refused(ended, "nothing is held out", "--test_split_size 0.1", "eval_strategy")
    assert not (tmp_path / "out").exists()
    (tmp_path / "schools").mkdir()
    write_rows(tmp_path / "schools" / "train.jsonl", contradicting_rows(24))
    write_rows(tmp_path / "schools" / "test.jsonl", contradicting_rows(8, seed=1))
    given = {"dataset_name": tmp_path / "schools", "eval_strategy": "epoch", "num_members": ...}
    assert "8 examples" in renyi("sweep", "--config", settings(**given), "--dry_run").out


def test_a_file_of_another_kind_is_not_overwritten(config: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[1, 2]", encoding="utf-8")
    ended = renyi("sweep", "--config", config, *GRID, "--output_dir", tmp_path)
    assert_refused(ended, "sweep.json: is not the result of a sweep", "Choose another output_dir")
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.json"]
