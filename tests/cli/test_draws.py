"""A run with Gaussian members through the command line, and `--draws` in the commands that read it."""

import json
from pathlib import Path

import pytest
from conftest import Ended, assert_refused, renyi, write_rows
from peft import PeftModel
from tiny import tiny_model

from renyi import LoraEnsemble, load


@pytest.fixture(scope="module")
def gaussian(base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gaussian") / "run"
    config = folder.with_name("run.yaml")
    config.write_text("member_kind: gaussian\nnum_draws: 2\ninitial_std: 0.3\nprior_std: 0.5\n", encoding="utf-8")
    ended = renyi(
        *("sft", "--config", config, "--model_name_or_path", base, "--dataset_name", rows_file),
        *("--output_dir", folder, "--num_members", 2, "--max_steps", 4, "--per_device_train_batch_size", 4),
        *("--lora_r", 4, "--learning_rate", 0.05, "--use_cpu", "--report_to", "none"),
    )
    assert ended.code == 0, ended.err
    return folder


def test_a_yaml_file_trains_gaussian_members(gaussian: Path) -> None:
    manifest = json.loads((gaussian / "ensemble.json").read_text(encoding="utf-8"))
    assert manifest["member_kind"] == "gaussian"
    assert all(nats > 0 for nats in manifest["divergence"])
    assert "member_load/1" in (gaussian / "metrics.jsonl").read_text(encoding="utf-8")
    PeftModel.from_pretrained(tiny_model(), str(gaussian / "member_0"))


def test_info_says_what_members_are_and_how_wide(gaussian: Path) -> None:
    shown = renyi("info", gaussian).out
    for part in ("gaussian", "std of A", "q_proj 0.3", "KL from prior", "nats a member"):
        assert part in shown
    found = json.loads(renyi("info", gaussian, "--json").out)
    ensemble = LoraEnsemble.load(gaussian)
    assert found["std"].keys() == ensemble.stack.layers.keys()
    name, layer = next(iter(ensemble.stack.layers.items()))
    assert found["std"][name] == pytest.approx(layer.members.std().tolist(), rel=1e-5)


def test_scores_of_draws_are_those_of_the_drawn_ensemble(gaussian: Path, rows_file: Path) -> None:
    of_draws, again, other, mean = (
        [json.loads(line) for line in renyi("score", gaussian, rows_file, *flags).out.splitlines()]
        for flags in (("--draws", 3), ("--draws", 3, "--seed", 0), ("--draws", 3, "--seed", 1), ())
    )
    assert [len(rows[0]["log_likelihood"]) for rows in (of_draws, mean)] == [6, 2]
    assert of_draws == again != other
    loaded = load(gaussian, device="cpu").draw(3)
    exact = [row.log_likelihood for row in loaded.score(str(rows_file))]
    assert [row["log_likelihood"] for row in of_draws] == [pytest.approx(ell, rel=1e-5) for ell in exact]


def test_answers_say_where_their_uncertainty_lies(gaussian: Path) -> None:
    prompt = ("generate", gaussian, "w3", "--max_new_tokens", 3, "--json")
    answer = json.loads(renyi(*prompt, "--draws", 4, "--seed", 2).out)
    parts = zip(*(answer[name] for name in ("aleatoric", "within_members", "between_members", "total")), strict=True)
    for aleatoric, within, between, total in parts:
        assert aleatoric + within + between == pytest.approx(total, abs=1e-9)
    assert answer["mean_within_members"] > 0
    assert len(answer["member_log_likelihood"]) == 8
    assert "within_members" not in json.loads(renyi(*prompt).out)


def test_evaluations_and_exports_use_draws(gaussian: Path, tmp_path: Path) -> None:
    questions = [{"question": f"w{i}", "choices": ["w1", "w2"], "answer": i % 2} for i in range(8)]
    file = write_rows(tmp_path / "questions.jsonl", questions)
    told = renyi("evaluate", gaussian, file, "--task", "choice", "--draws", 3, "--choice_by", "text", "--json")
    assert told.code == 0, told.err
    assert "within_members" in told.out
    ended = renyi("export", gaussian, "--format", "adapters", "--draws", 2, "--output", tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    facts = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert facts["weights"] == pytest.approx([0.25] * 4)
    assert facts["ensemble"] == str(gaussian)
    PeftModel.from_pretrained(tiny_model(), str(tmp_path / "out" / "member_3"))


def test_draws_that_cannot_be_had_are_refused_by_flag(
    gaussian: Path, trained: tuple[Path, Ended], base: Path, rows_file: Path, tmp_path: Path
) -> None:
    assert_refused(renyi("score", trained[0], rows_file, "--draws", 2), "--draws", "nothing to draw")
    assert_refused(renyi("score", gaussian, rows_file, "--draws", "x"), "--draws")
    assert_refused(renyi("generate", gaussian, "w1", "--draws", 0), "--draws", "at least 1")
    assert_refused(renyi("export", gaussian, "--format", "vllm", "--draws", 2), "--draws", "--output")
    config = ("--model_name_or_path", base, "--dataset_name", rows_file, "--output_dir", tmp_path / "run")
    assert_refused(renyi("sft", *config, "--member_kind", "gausian"), "member_kind", "gaussian")
    assert_refused(renyi("sft", *config, "--num_draws", 2), "num_draws")
