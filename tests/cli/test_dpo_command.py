"""`renyi dpo` from the plan it prints to the files it leaves, run again, started from an ensemble, and refused."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Ended,
    Settings,
    assert_refused,
    flat,
    renyi,
    save_base,
    steps_in,
    train,
    weights_in,
    write_rows,
)
from peft import PeftModel
from processes import kill_once_written
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

from renyi import LoraEnsemble, data
from renyi.ensemble import Reference, read_preference
from renyi.inference import score_pairs
from renyi.training import reference_cache

SHARED = Path(__file__).parents[3] / "shared"
DEMO, STORIES = SHARED / "data" / "dpo_en_demo.json", SHARED / "models" / "tinystories-656k"


def pair_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions of one word with a short and a long answer, of which either may be the chosen one."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        word = draw.randrange(8)
        short, long = f" w{10 + word} w1", f" w{30 + word} w2 w3"
        chosen, rejected = (short, long) if draw.random() < 0.5 else (long, short)
        rows.append({"prompt": f"w{word}", "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows(48))


@pytest.fixture(scope="module")
def tuned(base: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The folder of an ensemble that was tuned to the end on 36 of the pairs, and what the command said."""
    return train("dpo", base, pairs_file, tmp_path_factory.mktemp("runs") / "tuned", beta=0.5)


def dpo(config: Path, *flags: object) -> Ended:
    return renyi("dpo", "--config", config, *flags)


def metrics_in(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- A run -----------------------------------------------------------------------------------------------------------


def test_it_says_what_it_understood(tuned: tuple[Path, Ended], base: Path, pairs_file: Path) -> None:
    folder, ended = tuned
    assert (ended.code, ended.err) == (0, "")
    for part in [
        f"{base} · 17,568 parameters · float32 on cpu",
        "2 × LoRA rank 2, lora_alpha 32",
        "0 until step 1, then rising to 0.8 at step 2",
        "preference sigmoid, beta 0.5, against the base, once for all members",
        f"{pairs_file} · pairs with prompts, plain text",
        # A side is a word of prompt, two or three of answer, and the end of text.
        "train 36 pairs · 324 tokens, 252 of them trained",
        "held out 12 pairs · 108 tokens, 84 of them trained",
        "6, 4 pairs each",
        str(folder),
    ]:
        assert part in flat(ended.out), part


def test_a_line_for_every_log_without_a_terminal(tuned: tuple[Path, Ended]) -> None:
    lines = [line for line in tuned[1].out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "held out" not in line] == [f"{n}/6" for n in range(1, 7)]
    assert [line.split()[1] for line in lines if "held out" in line] == ["3/6", "6/6"]
    for name in ("loss", "nll_mixture", "rewards/accuracies", "jensen_gap", "effective_members", "alpha", "loads"):
        assert f"  {name} " in lines[0]
    assert "  nll_mixture 0.693  " in lines[0]  # ln 2 a pair: before the first step nothing is preferred


def test_it_leaves_an_ensemble_of_ordinary_adapters(tuned: tuple[Path, Ended]) -> None:
    folder, ended = tuned
    ensemble = LoraEnsemble.load(folder)
    assert (ensemble.num_members, ensemble.alpha) == (2, 0.8)
    for m in range(2):
        plain = PeftModel.from_pretrained(tiny_model(), str(folder / f"member_{m}"))
        key = "model.layers.0.mlp.up_proj"
        expected = plain.base_model.model.get_submodule(key).lora_B["default"].weight
        assert expected.any()
        assert ensemble.adapter(m)[key][1].equal(expected)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "| preference loss | sigmoid, beta 0.5, against the base |" in (folder / "README.md").read_text("utf-8")
    assert data.PairPreparation.read(folder) == data.PairPreparation()
    kept = read_preference(folder, ensemble)
    assert (kept.loss.beta, kept.loss.loss_type, kept.reference.start) == (0.5, ("sigmoid",), None)
    for part in (f"Saved in {folder}", f"renyi info {folder}", f"{folder} ", "--task preference", "preference.json"):
        assert part in ended.out


def test_metrics_are_those_of_trl_for_the_mixture_and_each_member(tuned: tuple[Path, Ended]) -> None:
    rows = metrics_in(tuned[0])
    assert steps_in(tuned[0]) == [1, 2, 3, 4, 5, 6]
    assert steps_in(tuned[0], "eval_nll_mixture") == [3, 6]
    assert rows[0]["nll_mixture"] == pytest.approx(math.log(2), abs=1e-6)
    for row, prefix in [(row, "eval_" if "eval_loss" in row else "") for row in rows if "train_runtime" not in row]:
        row = {name.removeprefix(prefix): value for name, value in row.items()}
        assert row["nll_members"] - row["nll_mixture"] == pytest.approx(row["jensen_gap"], abs=1e-5)
        assert 1 <= row["effective_members"] <= 2
        assert row["member_load/0"] + row["member_load/1"] == pytest.approx(1, abs=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert row[name] == pytest.approx((row[f"{name}/0"] + row[f"{name}/1"]) / 2, abs=1e-5)
        for member in ("", "/0", "/1"):
            assert row[f"rewards/margins{member}"] == pytest.approx(
                row[f"rewards/chosen{member}"] - row[f"rewards/rejected{member}"], abs=1e-5
            )
            assert 0 <= row[f"rewards/accuracies{member}"] <= 1


def test_what_members_learned_sums_up_the_held_out_pairs(tuned: tuple[Path, Ended], pairs_file: Path) -> None:
    """As scored again from the files that were left."""
    folder, ended = tuned
    ensemble = LoraEnsemble.load(folder)
    kept, preparation = read_preference(folder, ensemble), data.PairPreparation.read(folder)
    held_out = data.load_splits(str(pairs_file))["train"].train_test_split(test_size=12, seed=42)["test"]
    prepared = data.prepare_pairs(held_out, tiny_tokenizer(), preparation)
    scores = score_pairs(ensemble, prepared, kept.loss, kept.reference, preparation)
    right = sum(score.preference > 0.5 for score in scores) / 12

    _, title, table = ended.out.partition("What each member learned")
    assert title
    lines = table.splitlines()
    assert (
        lines[1].strip() == f"from 12 held-out pairs; the mixture prefers the chosen completion in {right:.1%} of them"
    )
    assert "clearest pair" in lines[2]
    assert "nats a pair" in table
    leaders = [max((0, 1), key=score.log_likelihood.__getitem__) for score in scores]
    for m, cells in enumerate(line.split() for line in lines[3:5]):
        led = [-score.log_likelihood[m] for score, leader in zip(scores, leaders, strict=True) if leader == m]
        assert cells[0] == str(m)
        assert cells[2] == f"{sum(score.responsibilities[m] for score in scores) / 12:.1%}"
        assert cells[3] == str(len(led))
        assert cells[4] == (f"{sum(led) / len(led):.3f}" if led else "–")
        assert ("≻" in cells) == bool(led)


# ---- The first pair --------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_shows_a_pair(settings: Settings, pairs_file: Path, tmp_path: Path) -> None:
    config = settings(dataset_name=pairs_file, output_dir=tmp_path / "runs" / "deep" / "out")
    before = sorted(tmp_path.rglob("*"))
    ended = dpo(config, "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    chosen, rejected = (" ".join(pair_rows(1)[0][side].split()) for side in ("chosen", "rejected"))
    assert f"│ {pair_rows(1)[0]['prompt']} " in ended.out
    assert f"│ chosen    «{chosen} <eos>»" in ended.out
    assert f"│ rejected  «{rejected} <eos>»" in ended.out
    numbers = [len(side.split()) + 1 for side in (chosen, rejected)]
    assert f"{numbers[0]} chosen and {numbers[1]} rejected tokens are trained, between « »" in ended.out
    assert "nothing was written" in ended.out
    assert "\nstep " not in ended.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_terminal_sees_both_sides_in_colour(
    settings: Settings, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ended = dpo(settings(dataset_name=pairs_file, max_steps=2))
    assert ended.code == 0
    chosen, rejected = (" ".join(pair_rows(1)[0][side].split()) for side in ("chosen", "rejected"))
    assert f"\x1b[32m{chosen} <eos>\x1b[0m" in ended.out
    assert f"\x1b[31m{rejected} <eos>\x1b[0m" in ended.out
    assert "rejected (red) tokens are trained" in ended.out
    assert "«" not in ended.out
    for part in ("training", "2/2", "effective_members", "loads"):
        assert part in ended.err
    assert "trained 2 steps in 0:00:0" in ended.out


def test_what_is_shown_is_what_is_trained(settings: Settings, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w6"}] * 4
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    out = dpo(settings(dataset_name=file, max_length=4), "--dry_run").out
    assert "2 chosen and 2 rejected tokens are trained" in out
    assert "│ w1 w2 " in out
    assert "│ chosen    «w3 w4» " in out
    assert "│ rejected  «w6 <eos>»" in out
    assert "4 pairs · 32 tokens, 16 of them trained" in out
    out = dpo(settings(dataset_name=file, max_length=4, truncation_mode="keep_end"), "--dry_run").out
    assert "│ w1 w2 " in out  # of the rejected side, which keeps it whole
    assert "│ chosen    «w3 w4 w5 <eos>»" in out
    assert "3 chosen and 2 rejected tokens are trained" in out  # nothing predicts a first token

    rows = [{"prompt": "w1", "chosen": " w2" * 500, "rejected": " w3"}] * 4
    out = dpo(settings(dataset_name=write_rows(tmp_path / "pairs.jsonl", rows)), "--dry_run").out
    assert "501 chosen and 2 rejected tokens" in out
    assert " … " in out
    assert flat(out).count("w2") < 250


def test_conversations_with_the_prompt_in_both_sides(settings: Settings, tmp_path: Path) -> None:
    def talk(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "w1"}, {"role": "assistant", "content": answer}]

    file = write_rows(tmp_path / "pairs.jsonl", [{"chosen": talk("w2 w3"), "rejected": talk("w4")}] * 4)
    out = dpo(settings(dataset_name=file), "--dry_run").out
    assert "pairs with implicit prompts, conversational" in flat(out)
    assert "│ <user> w1 <assistant> " in out
    assert "│ chosen    «w2 w3 <eos>»" in out
    assert "│ rejected  «w4 <eos>»" in out


@pytest.mark.skipif(not (DEMO.exists() and STORIES.exists()), reason="the real pairs or model are not in ../shared")
def test_share_gpt_pairs_as_they_are(settings: Settings, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "turns.jinja").write_text(template, encoding="utf-8")
    # Those that the base's 512 positions hold; a row that leaves no room for an answer is an error.
    rows = [
        row
        for row in json.loads(DEMO.read_text(encoding="utf-8"))
        if len(json.dumps(row)) < 900 and "(" not in row["chosen"]["value"]
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    given = {"model_name_or_path": STORIES, "chat_template_path": tmp_path / "turns.jinja", "max_length": None}
    ended = dpo(settings(dataset_name=tmp_path / "pairs.json", **given), "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    assert "pairs.json · ShareGPT pairs" in flat(ended.out)
    assert f"{len(rows)} pairs · " in ended.out
    assert f"user: {rows[0]['conversations'][-1]['value'][:30]}" in ended.out
    assert f"│ chosen    «{rows[0]['chosen']['value'][:20]}" in ended.out
    assert not (tmp_path / "out").exists()


# ---- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "flags", "shown"),
    [
        ({}, ["--loss_type", "ipo"], "ipo, beta 0.1, against"),
        ({}, ["--loss_type", "sigmoid", "bco_pair"], "sigmoid + bco_pair, beta 0.1, against"),
        ({"loss_type": "hinge"}, [], "hinge, beta 0.1, against"),
        (
            {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1, 0.5]},
            [],
            "sigmoid + bco_pair, weights 1 and 0.5, beta 0.1, against",
        ),
        (
            {"loss_type": ["robust"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence", "ld_alpha": 0.5},
            [],
            "robust, beta 0.1, label_smoothing 0.1, js_divergence, ld_alpha 0.5, against",
        ),
        ({"loss_type": ["sigmoid"]}, ["--loss_type", "apo_zero"], "apo_zero, beta 0.1, against"),
    ],
)
def test_one_loss_or_several(
    given: dict[str, Any], flags: list[str], shown: str, settings: Settings, pairs_file: Path
) -> None:
    ended = dpo(settings(dataset_name=pairs_file, **given), *flags, "--dry_run")
    assert ended.code == 0, ended.err
    assert f"preference {shown}" in flat(ended.out)


def test_a_weighted_loss_trains(settings: Settings, pairs_file: Path, tmp_path: Path) -> None:
    config = settings(dataset_name=pairs_file, loss_type=["sigmoid", "bco_pair"], loss_weights=[1, 0.5])
    ended = dpo(config)
    assert ended.code == 0, ended.err
    assert "NLL: the loss of a pair" in ended.out
    # Before the first step both log-ratios are 0: −log σ(0) of the margin, and half of one of each side.
    assert metrics_in(tmp_path / "out")[0]["nll_mixture"] == pytest.approx(2 * math.log(2), abs=1e-5)


# ---- From an ensemble ------------------------------------------------------------------------------------------------


def test_from_an_ensemble_against_its_members_as_they_were(
    trained: tuple[Path, Ended], settings: Settings, pairs_file: Path, base: Path, tmp_path: Path
) -> None:
    start = trained[0]
    given = {"model_name_or_path": start, "dataset_name": pairs_file, "num_members": ..., "lora_r": ...}
    ended = dpo(settings(**given))
    assert (ended.code, ended.err) == (0, "")
    out = flat(ended.out)
    assert f"base {base} · 17,568 parameters" in out
    assert f"2 × LoRA rank 2, lora_alpha 32, on {'down_proj, gate_proj'}" in out
    assert f"going on from {start}" in out
    assert f"against each member's start, from {start}" in out
    assert "reference the members as they were" in out
    assert metrics_in(tmp_path / "out")[0]["nll_mixture"] == pytest.approx(math.log(2), abs=1e-6)
    assert json.loads((tmp_path / "out" / "preference.json").read_text("utf-8"))["reference"] == "reference"
    before, reference, after = (weights_in(f) for f in (start, tmp_path / "out" / "reference", tmp_path / "out"))
    assert before.keys() == reference.keys() == after.keys()
    assert all(reference[name].equal(tensor) for name, tensor in before.items())
    assert not any(after[name].equal(tensor) for name, tensor in before.items())


def test_from_an_ensemble_against_the_base(
    trained: tuple[Path, Ended], settings: Settings, pairs_file: Path, tmp_path: Path
) -> None:
    given = {"model_name_or_path": trained[0], "dataset_name": pairs_file, "reference": "base"}
    ended = dpo(settings(**given))
    assert (ended.code, ended.err) == (0, "")
    assert "against the base, once for all members" in flat(ended.out)
    assert metrics_in(tmp_path / "out")[0]["nll_mixture"] != pytest.approx(math.log(2), abs=1e-3)
    assert json.loads((tmp_path / "out" / "preference.json").read_text("utf-8"))["reference"] == "base"
    assert not (tmp_path / "out" / "reference").exists()
    assert "the members as they were" not in ended.out


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"num_members": 3}, "num_members: 3 was given, and the ensemble to start from has 2"),
        ({"lora_r": 8}, "lora_r: 8 was given, and the ensemble to start from has 2"),
        ({"lora_alpha": 8}, "lora_alpha: 8 was given, and the ensemble to start from has 32"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: was given, and the ensemble to start from adapts"),
    ],
)
def test_an_ensemble_keeps_its_shape(
    given: dict[str, Any],
    part: str,
    trained: tuple[Path, Ended],
    settings: Settings,
    pairs_file: Path,
    tmp_path: Path,
) -> None:
    config = settings(model_name_or_path=trained[0], dataset_name=pairs_file, **given)
    assert_refused(dpo(config), part, "Leave it out")
    flags = [
        text for key, value in given.items() for text in (f"--{key}", *(value if isinstance(value, list) else [value]))
    ]
    config = settings(model_name_or_path=trained[0], dataset_name=pairs_file, **dict.fromkeys(given, ...))
    assert_refused(dpo(config, *flags), part)
    assert not (tmp_path / "out").exists()


# ---- The same command again ------------------------------------------------------------------------------------------


# A fresh process, and 120 steps. invariant/test_resume.py and training/test_full_disk.py have its truth in make test.
@pytest.mark.slow
def test_a_killed_run_goes_on_against_the_same_start(
    trained: tuple[Path, Ended], settings: Settings, pairs_file: Path, tmp_path: Path
) -> None:
    given = {"model_name_or_path": trained[0], "dataset_name": pairs_file}
    config = settings(max_steps=60, save_steps=10, logging_steps=5, **given)
    assert dpo(config, "--output_dir", tmp_path / "whole").code == 0
    kill_once_written(tmp_path / "out" / "checkpoint-20" / "complete.json", "dpo", "--config", config)
    killed_at = max(int(f.parent.name.split("-")[1]) for f in (tmp_path / "out").glob("checkpoint-*/complete.json"))
    assert killed_at < 60

    ended = dpo(config)
    assert (ended.code, ended.err) == (0, "")
    assert f"resuming from checkpoint-{killed_at} of 60" in ended.out
    assert steps_in(tmp_path / "out") == list(range(5, 61, 5))
    for folder in (".", "reference"):
        whole, resumed = weights_in(tmp_path / "whole" / folder), weights_in(tmp_path / "out" / folder)
        assert whole.keys() == resumed.keys() != set()
        assert all(whole[name].equal(resumed[name]) for name in whole)

    again = dpo(config)
    assert (again.code, again.err) == (0, "")
    assert "already finished: checkpoint-60 is the last" in again.out
    assert again.out.partition("What each")[2] == ended.out.partition("What each")[2]


@pytest.mark.parametrize("from_ensemble", [False, True])
def test_a_precomputed_reference_is_paid_for_once(
    from_ensemble: bool,
    trained: tuple[Path, Ended],
    settings: Settings,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwards: list[int] = []
    log_probs = Reference.log_probs

    def counted(self: Reference, pairs: Any, ld_alpha: float | None = None) -> Any:
        forwards.append(len(pairs["input_ids"]))
        return log_probs(self, pairs, ld_alpha)

    monkeypatch.setattr(Reference, "log_probs", counted)
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "cache")
    given = {"model_name_or_path": trained[0]} if from_ensemble else {}
    config = settings(dataset_name=pairs_file, precompute_ref_log_probs=True, **given)
    ended = dpo(config, "--dry_run")
    assert ended.code == 0, ended.err
    start = f"each member's start, from {trained[0]}" if from_ensemble else "the base"
    assert f"against {start}, precomputed" in flat(ended.out)
    assert not forwards
    assert not (tmp_path / "cache").exists()

    spent = []
    for name, precomputes in (("never", False), ("first", True), ("second", True)):
        ended = dpo(config, "--output_dir", tmp_path / name, "--precompute_ref_log_probs", str(precomputes))
        assert (ended.code, ended.err) == (0, "")
        spent.append(sum(forwards))
        forwards.clear()
    scored = 2 * 48  # rows of the pairs from which the command says in the end what members learned
    assert spent == [2 * 4 * 6 + scored, 2 * 48 + scored, scored]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    never, first, second = (metrics_in(tmp_path / name) for name in ("never", "first", "second"))
    for as_it_goes, ahead, cached in zip(never, first, second, strict=True):
        assert ahead["loss" if "loss" in ahead else "train_loss"] == pytest.approx(
            as_it_goes["loss" if "loss" in ahead else "train_loss"], abs=1e-5
        )
        timeless = {name for name in ahead if not name.startswith(("train_r", "train_s"))}
        assert {name: ahead[name] for name in timeless} == {name: cached[name] for name in timeless}


# ---- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"loss_type": "aot"}, ["loss_type (", "config.yaml, line", "'aot' couples pairs", "sorts the margins"]),
        ({"loss_type": ["sigmoid", "sft"]}, ["loss_type (", "'sft' couples pairs", "sigmoid, hinge"]),
        ({"loss_type": "sigmiod"}, ["loss_type (", "'sigmiod' is not allowed", "sigmoid, hinge"]),
        ({"loss_type": {"sigmoid": 1}}, ["loss_type (", "is not a list of names"]),
        (
            {"loss_weights": [1, 2]},
            ["loss_weights (", "config.yaml, line", "2 weights for 1 loss types", "leave loss_weights out"],
        ),
        ({"beta": 0}, ["beta (", "0.0 is not allowed", "a number above 0"]),
        ({"beta": float("inf")}, ["beta (", "inf is not allowed"]),
        ({"label_smoothing": 0.1}, ["label_smoothing (", "0.1 is not allowed", "robust and exo_pair"]),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, ["label_smoothing (", "0.5 is not allowed", "below 0.5"]),
        ({"loss_type": "exo_pair"}, ["label_smoothing: 0.0 is not allowed", "1e-3 for exo_pair"]),
        ({"use_weighting": True}, ["use_weighting (", "True is not allowed", "WPO"]),
        ({"sync_ref_model": True}, ["sync_ref_model (", "True is not allowed"]),
        ({"reference": "first"}, ["reference (", "'first' is none of start, base"]),
        ({"f_divergence_type": "kl"}, ["f_divergence_type (", "'kl' is not allowed", "forward_kl"]),
        (
            {"f_divergence_type": "js_divergence", "loss_type": "bco_pair"},
            ["f_divergence_type (", "config.yaml, line", "bco_p"],
        ),
        ({"ld_alpha": 2}, ["ld_alpha (", "2.0 is not allowed", "from 0 to 1"]),
        ({"betta": 1}, ["betta (", "there is no such key", "nearest known one is beta"]),
        ({"packing": True}, ["packing (", "there is no such key"]),  # of SFT only
        ({"chat_template_path": "no.jinja"}, ["chat_template_path no.jinja: there is no such file"]),
        ({"precompute_ref_log_probs": True, "dataset_streaming": True}, ["precompute_ref_log_probs: ", "streamed"]),
    ],
)
def test_refused_settings(
    given: dict[str, Any], parts: list[str], settings: Settings, pairs_file: Path, tmp_path: Path
) -> None:
    assert_refused(dpo(settings(dataset_name=pairs_file, **given)), *parts)
    assert not (tmp_path / "out").exists()


GOOD = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
USER, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([GOOD, {**GOOD, "rejected": " w2"}], ["row 2, column rejected: equals chosen"]),
        ([GOOD, {**GOOD, "chosen": " "}], ["row 2, column chosen: is empty"]),
        ([GOOD, {**GOOD, "rejected": ""}], ["row 2, column rejected: is empty"]),
        ([GOOD, {**GOOD, "prompt": None}], ["row 2, column prompt: is missing"]),
        ([GOOD, {**GOOD, "prompt": ""}], ["row 2, column prompt: is empty"]),
        ([{"chosen": "w1 w2", "rejected": "a b"}], ["row 1, column chosen: shares no beginning with rejected"]),
        (
            [{"question": "w1", "good": "w2", "bad": "w3"}],
            ["the columns are bad, good, question", "rename the columns"],
        ),
        ([{"prompt": "w1", "completion": "w2", "label": True}], ["unpaired feedback is not supported", "label"]),
        ([{"prompt": [USER], "chosen": "w2", "rejected": "w3"}], ["row 1, column prompt: mixes text and messages"]),
        ([{"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}], ["row 1, column rejected: ends with a message"]),
        ([GOOD, {**GOOD, "prompt": " ".join(["w1"] * 8)}], ["row 2: no trained token is left", "max_length 8"]),
        (
            [GOOD, {"prompt": "w1", "chosen": " w2" * 9, "rejected": " w2" * 8}],
            ["row 2: chosen and rejected are the same tokens within max_length 8"],
        ),
    ],
)
def test_refused_pairs(rows: list[dict[str, Any]], parts: list[str], settings: Settings, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    assert_refused(dpo(settings(dataset_name=file, max_length=8)), f"{file}", *parts)
    assert not (tmp_path / "out").exists()


def test_no_pairs_at_all(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    config = settings(dataset_name=tmp_path / "pairs.jsonl")
    assert_refused(dpo(config), "pairs.jsonl: the dataset is empty", "at least one row")
    assert not (tmp_path / "out").exists()


def test_a_row_is_named_as_in_its_file_though_rows_are_held_out(settings: Settings, tmp_path: Path) -> None:
    rows = pair_rows(20)
    rows[11]["prompt"] = " ".join(["w1"] * 30)
    config = settings(dataset_name=write_rows(tmp_path / "pairs.jsonl", rows), max_length=16, test_split_size=0.5)
    assert_refused(dpo(config, "--eval_strategy", "epoch"), "pairs.jsonl", "row 12: no trained token is left")


def test_a_prompt_that_is_no_prefix_once_rendered(settings: Settings, tmp_path: Path) -> None:
    thinking = "{% if add_generation_prompt %}<assistant> w9 {% endif %}"
    base = save_base(tmp_path / "base", template=CHAT_TEMPLATE.rpartition("{% if add")[0] + thinking)
    other = {"role": "assistant", "content": "w3"}
    file = write_rows(tmp_path / "pairs.jsonl", [{"prompt": [USER], "chosen": [ANSWER], "rejected": [other]}] * 4)
    ended = dpo(settings(dataset_name=file, model_name_or_path=base))
    assert_refused(ended, f"{file}", "row 1: the rendered conversation does not begin with", "'w9", "chat_template")
    assert not (tmp_path / "out").exists()
    (base / "chat_template.jinja").unlink()
    ended = dpo(settings(dataset_name=file, model_name_or_path=base))
    assert_refused(ended, "has no chat template", "--chat_template_path")
    assert not (tmp_path / "out").exists()


def test_the_help_page_names_the_keys_of_preferences() -> None:
    ended = renyi("dpo", "--help")
    assert ended.code == 0
    shown = {
        line.split()[0]: line.split()[1:] for line in ended.out.splitlines() if line.startswith("  ") and line.strip()
    }
    assert shown["loss_type"][0] == "sigmoid"
    assert shown["beta"][0] == "0.1"
    assert shown["reference"][0] == "start"
    for key in ("loss_weights", "label_smoothing", "f_divergence_type", "ld_alpha", "precompute_ref_log_probs"):
        assert key in shown
    assert "TRL's DPOConfig, ModelConfig" in ended.out
