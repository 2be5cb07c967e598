"""`renyi kto` from the plan it prints to the files it leaves, killed and run again, scored, and refused."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, Settings, assert_refused, flat, renyi, steps_in, train, weights_in, write_rows
from processes import kill_once_written

import renyi as library
from renyi import RenyiKTOTrainer
from renyi.training import reference_cache


def thumb_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of one word with a short answer, which people like, or a long one, which they do not."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        word, up = draw.randrange(8), draw.random() < 0.5
        rows.append({"prompt": f"w{word}", "completion": f" w{10 + word} w1" if up else f" w{30 + word} w2 w3"})
        rows[-1] |= {"label": up, "user": "w"}
    return rows


@pytest.fixture(scope="module")
def thumbs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "thumbs.jsonl", thumb_rows(48))


@pytest.fixture(scope="module")
def tuned(base: Path, thumbs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    return train("kto", base, thumbs_file, folder, beta=0.5, max_steps=30, desirable_weight=1.5)


def kto(config: Path, *flags: object) -> Ended:
    return renyi("kto", "--config", config, *flags)


def test_it_says_what_it_understood_and_what_it_left(tuned: tuple[Path, Ended], base: Path, thumbs_file: Path) -> None:
    folder, ended = tuned
    assert (ended.code, ended.err) == (0, "")
    for part in [
        "kto, beta 0.5, weights 1.5 up and 1 down, against the base",
        "thumbs · not read: user",
        "36 thumbs,",
        "of them up",
        "first row",
        "the mixture predicts",
        "thumbs.json the loss",
        f"renyi score {folder}",
    ]:
        assert part in flat(ended.out), (part, flat(ended.out))
    kept = json.loads((folder / "thumbs.json").read_text())
    assert kept["reference"] == "base"
    assert kept["desirable_weight"] == 1.5
    assert len(kept["reference_point"]) == 2
    card = (folder / "README.md").read_text()
    assert "share of thumbs that the mixture predicts" in card
    assert "weights 1.5 (up) and 1 (down)" in card
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_rewards/accuracies" in row and "eval_kl/1" in row for row in rows)
    assert (folder / "training.png").stat().st_size > 10_000


def test_scores_are_those_of_training_and_thumbs_are_learned(tuned: tuple[Path, Ended], tmp_path: Path) -> None:
    folder, _ = tuned
    rows = thumb_rows(40, seed=5)
    file, scores = write_rows(tmp_path / "new.jsonl", rows), tmp_path / "scores.jsonl"
    ended = renyi("score", folder, file, "--output", scores, "--json")
    assert ended.code == 0, ended
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert json.loads(ended.out)["accuracy"] >= 0.9
    loaded = library.load(folder)
    kept = loaded.thumbs
    assert kept is not None
    for line, row in list(zip(lines, rows, strict=True))[:6]:
        ids = loaded.tokenizer(row["prompt"] + row["completion"] + "<eos>", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[0, 0] = -100  # a prompt is one word
        with loaded.ensemble.using(()):
            base = loaded.ensemble.log_likelihood(ids, labels=labels)
        ratio = loaded.ensemble.log_likelihood(ids, labels=labels) - base
        assert line["reward"] == pytest.approx((0.5 * ratio[:, 0]).tolist(), abs=1e-5)
        assert line["reward_mean"] == pytest.approx(sum(line["reward"]) / 2)
        assert line["reward_std"] == pytest.approx(abs(line["reward"][0] - line["reward"][1]) / 2, abs=1e-9)
        up = torch.sigmoid(0.5 * (ratio[:, 0] - kept.reference_point))
        assert line["approval"] == pytest.approx(up.mean().item(), abs=1e-5)
        loss = 1.5 * (1 - up) if row["label"] else up
        assert line["log_likelihood"] == pytest.approx((-loss).tolist(), abs=1e-5)
        assert sum(line["responsibilities"]) == pytest.approx(1)
    assert loaded.score_thumbs(rows)[3].reward == pytest.approx(lines[3]["reward"])


def test_thumbs_are_evaluated_as_they_are_scored(tuned: tuple[Path, Ended], tmp_path: Path) -> None:
    folder, _ = tuned
    rows = thumb_rows(40, seed=5)
    file, lines = write_rows(tmp_path / "new.jsonl", rows), tmp_path / "lines.jsonl"
    flags = ("--task", "thumbs", "--resamples", 20, "--mc_dropout", 2, "--mc_dropout_rate", 0.1, "--output", lines)
    ended = renyi("evaluate", folder, file, *flags, "--json")
    assert ended.code == 0, ended
    told = json.loads(ended.out)
    scores = library.load(folder).score_thumbs(rows)
    up = [score.approval if row["label"] else 1 - score.approval for score, row in zip(scores, rows, strict=True)]
    systems = {system["name"]: system for system in told["systems"]}
    names = ["member 0, MC dropout", "member 0, temperature", "mixture, temperature"]
    assert list(systems) == ["mixture", "member 0", "member 1", *names]
    assert systems["mixture"]["accuracy"]["value"] == sum(p > 0.5 for p in up) / 40
    assert systems["mixture"]["nll"]["value"] == pytest.approx(-sum(map(math.log, up)) / 40, rel=1e-4)
    assert told["up"] == sum(row["label"] for row in rows) / 40
    assert told["auroc"]["mixture"]["value"] > 0.9
    kept = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["label"] for line in kept] == [row["label"] for row in rows]
    assert kept[2]["reward"] == pytest.approx(scores[2].reward)
    out = renyi("evaluate", folder, file, "--task", "thumbs", "--resamples", 0, "--group", "user").out
    for part in ("40 thumbs", "of them up · kto, beta 0.5", "How well are thumbs foretold?", "AUROC", "By user"):
        assert part in out, out


@pytest.mark.slow  # three runs in all, one of them in a process of its own
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(
    settings: Settings, thumbs_file: Path, tmp_path: Path
) -> None:
    given = {"dataset_name": thumbs_file, "routing": "sparse", "token_budget": 64}
    config = settings(max_steps=30, save_steps=5, logging_steps=5, **given)
    assert kto(config, "--output_dir", tmp_path / "whole").code == 0
    kill_once_written(tmp_path / "out" / "checkpoint-10" / "complete.json", "kto", "--config", config)
    assert not (tmp_path / "out" / "ensemble.json").exists()
    ended = kto(config)
    assert ended.code == 0
    assert "resuming from checkpoint-" in ended.out
    assert steps_in(tmp_path / "out") == list(range(5, 31, 5))
    whole, resumed = weights_in(tmp_path / "whole"), weights_in(tmp_path / "out")
    assert whole.keys() == resumed.keys() != set()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    kept = [json.loads((tmp_path / folder / "thumbs.json").read_text()) for folder in ("whole", "out")]
    assert kept[0] == kept[1]
    assert max(kept[0]["reference_point"]) > 0


def test_a_reference_is_computed_ahead_once(
    settings: Settings, thumbs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_cache, "HF_HOME", str(tmp_path / "home"))
    plain = settings(dataset_name=thumbs_file)
    assert kto(plain, "--output_dir", tmp_path / "plain").code == 0
    computed = []
    original = reference_cache._computed
    monkeypatch.setattr(reference_cache, "_computed", lambda *args: computed.append(1) or original(*args))
    for folder in ("one", "two"):
        assert kto(plain, "--output_dir", tmp_path / folder, "--precompute_ref_log_probs").code == 0
    assert len(computed) == 1
    one, two, never = (weights_in(tmp_path / f) for f in ("one", "two", "plain"))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.allclose(one[n], never[n], atol=1e-4) for n in one)


def test_parts_of_a_batch_share_its_reference_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import kto_trainer_of, logged, scatter_members, tiny_ensemble

    # Without the bound at 0 every batch has reference points of its own.
    monkeypatch.setattr("renyi.training.kto.reference_point", lambda ratio: ratio.detach().mean(dim=1))
    runs = []
    for budget in (None, 40):
        model = scatter_members(tiny_ensemble(2), std=0.3)
        trainer: RenyiKTOTrainer = kto_trainer_of(
            tmp_path / str(budget), model=model, num_members=2, alpha=0.8, max_steps=4, learning_rate=3e-2,
            alpha_hold_ratio=0.0, alpha_ramp_ratio=0.0, token_budget=budget, reference="base",
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    whole, parted = runs
    assert min(map(abs, logged(whole, "kl/0"))) > 0.01
    for name in ("loss", "kl/0", "kl/1", "grad_norm"):
        assert logged(parted, name) == pytest.approx(logged(whole, name), rel=5e-3, abs=1e-4), name


ROW = {"prompt": "w1", "completion": " w2 w3", "label": True}
OTHER = {**ROW, "label": False}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([ROW, OTHER, {**ROW, "label": "yes"}], ["row 3, column label: is 'yes', not true or false"]),
        ([ROW, {**ROW, "label": 3}, OTHER], ["row 2, column label: is 3, not true or false"]),
        ([ROW, {**ROW, "label": None}, OTHER], ["row 2, column label: is missing"]),
        ([ROW, {"prompt": "w1", "completion": " w2"}, OTHER], ["row 2, column label: is missing"]),
        ([ROW, ROW, ROW], ["column label: all 3 labels are true", "renyi sft"]),
        ([OTHER, OTHER], ["column label: all 2 labels are false"]),
        ([ROW, {**OTHER, "completion": " "}], ["row 2, column completion: is empty"]),
        ([ROW, {**OTHER, "prompt": None}], ["row 2, column prompt"]),
        ([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}], ["there is no column completion", "renyi dpo"]),
        ([{"prompt": "w1", "completion": " w2"}], ["there is no column label", "true (thumbs up)"]),
        ([ROW, {**OTHER, "prompt": " ".join(["w1"] * 60)}], ["row 2", "no trained token is left", "max_length 32"]),
    ],
    ids=["text", "number", "null", "no label", "all up", "all down", "blank", "no prompt", "pairs", "sft", "long"],
)
def test_bad_rows_are_named(settings: Settings, tmp_path: Path, rows: list[dict[str, Any]], parts: list[str]) -> None:
    file = write_rows(tmp_path / "bad.jsonl", rows)
    config = settings(dataset_name=file, max_length=32, per_device_train_batch_size=2)
    assert_refused(kto(config), "bad.jsonl", *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"alpha": "auto"}, ["alpha", "auto"]),
        ({"per_device_train_batch_size": 1}, ["per_device_train_batch_size", "at least 2"]),
        ({"train_sampling_strategy": "random"}, ["train_sampling_strategy", "sequential"]),
        ({"routing": "raced"}, ["routing", "raced"]),
        ({"beta": 0}, ["beta", "above 0"]),
        ({"desirable_weight": -1}, ["desirable_weight"]),
        ({"loss_type": "bco"}, ["loss_type", "kto"]),
        ({"undesirable_wieght": 2}, ["undesirable_wieght", "undesirable_weight"]),
        ({"sync_ref_model": True}, ["sync_ref_model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused_by_key(
    settings: Settings, thumbs_file: Path, tmp_path: Path, given: dict[str, Any], parts: list[str]
) -> None:
    assert_refused(kto(settings(dataset_name=thumbs_file, **given)), *parts)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_csv_labels_are_read(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "thumbs.csv"
    file.write_text("prompt,completion,label\nw1, w2,true\nw1, w3,False\nw2, w4,1\nw2, w5,0\n", encoding="utf-8")
    ended = kto(settings(dataset_name=file), "--dry_run")
    assert ended.code == 0, ended
    assert "4 thumbs, 2 of them up" in flat(ended.out)
    assert "A step on the longest examples" in ended.out
    assert not (tmp_path / "out").exists()


def test_the_thumbs_of_a_user_share_one_responsibility(settings: Settings, tmp_path: Path) -> None:
    """User a likes short answers, user b long ones; each gave 24 thumbs."""
    rows = [{**row, "user": user} for user in "ab" for row in thumb_rows(24, seed=ord(user))]
    rows = [{**row, "label": row["label"] == (row["user"] == "a")} for row in rows]
    file, scores = write_rows(tmp_path / "users.jsonl", rows), tmp_path / "scores.jsonl"
    given = {"dataset_name": file, "routing_group": "user", "max_steps": 40, "alpha_hold_ratio": 0.0, "beta": 0.5}
    ended = kto(settings(**given, learning_rate=2e-2, per_device_train_batch_size=24, save_strategy="no"))
    assert ended.code == 0, ended
    assert renyi("score", tmp_path / "out", file, "--output", scores).code == 0
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    for user in "ab":
        of_user = [line for line, row in zip(lines, rows, strict=True) if row["user"] == user]
        sums = torch.tensor([line["log_likelihood"] for line in of_user]).sum(dim=0)
        for line in of_user:
            assert line["group"] == user
            assert line["group_responsibilities"] == pytest.approx((0.8 * sums).softmax(0).tolist(), abs=1e-4)
    assert lines[0]["group_responsibilities"][0] + lines[-1]["group_responsibilities"][0] == pytest.approx(1, abs=0.1)
    assert abs(lines[0]["group_responsibilities"][0] - lines[-1]["group_responsibilities"][0]) > 0.9
    bad = write_rows(tmp_path / "bad.jsonl", [rows[0], {**rows[1], "user": None}, rows[2]])
    given["output_dir"] = tmp_path / "refused"
    assert_refused(kto(settings(**{**given, "dataset_name": bad})), "bad.jsonl", "row 2, column user: is empty")
    assert_refused(kto(settings(**{**given, "routing_group": "who"})), "routing_group", "who")
