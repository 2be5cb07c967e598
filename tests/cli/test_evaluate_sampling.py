"""`renyi evaluate --task sampling`: samples of the ensemble, its base and files; checks, tables, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, assert_refused, renyi, write_rows
from tiny import lora, scatter_members, tiny_model, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.inference import score_continuations
from renyi.zoo import base_path
from renyi.zoo.world import YESTERDAY

ROWS: list[dict[str, Any]] = [
    {"prompt": "w1 w2", "answer": "w5"},
    {"prompt": "w3", "answer": ["W8.", "w9"]},
    {"prompt": "w4 w4 w4", "answer": 7},
]
GIVEN = [["w5", " W5 ", "w6", ""], ["w8", "w9", "w8", "it is w8"], ["7.", "w7", "70", "so: 7"]]
QUICK = ("--samples", 4, "--max_new_tokens", 5, "--resamples", 20)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampling") / "ensemble"
    scatter_members(LoraEnsemble.from_base(base, 2, lora(), seed=7), std=0.3).save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("sampling") / "prompts.jsonl", ROWS)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [{"index": i, "sample": text} for i, texts in enumerate(GIVEN) for text in texts]
    return write_rows(tmp_path_factory.mktemp("sampling") / "written.jsonl", lines)


def evaluate(*argv: object) -> Ended:
    return renyi("evaluate", *argv, "--task", "sampling")


def told(ended: Ended) -> dict[str, Any]:
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- Samples that are drawn ------------------------------------------------------------------------------------------


def test_the_ensemble_beside_its_base(folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples.jsonl"
    flags = ("--baseline", "base", "--baseline_temperature", 0.2, "--baseline_temperature", 3)
    found = told(evaluate(folder, data, *QUICK, *flags, "--json", "--output", output))
    assert list(found) == ["task", "check", "samples_from", "sampling", "prompts", "systems", "most_varied"]
    assert (found["task"], found["check"], found["samples_from"], found["prompts"]) == ("sampling", "exact", None, 3)
    assert found["sampling"] == {
        "samples": 4,
        "max_new_tokens": 5,
        "temperature": 1,
        "top_p": 1,
        "seed": 0,
        "member": None,
        "batch_size": 8,
        "baseline_temperature": [0.2, 3],
    }
    mixture, base, cold, hot = found["systems"]
    assert [s["name"] for s in found["systems"]] == ["mixture", "base", "base, T=0.2", "base, T=3"]
    assert list(mixture["pass_at"]) == ["1", "2", "4"]
    assert list(mixture["distinct"]) == list(mixture["distinct_all"]) == ["1", "2", "3"]
    assert mixture["accuracy"] == mixture["pass_at"]["1"]
    assert cold["entropy_per_token"]["value"] < base["entropy_per_token"]["value"] < hot["entropy_per_token"]["value"]
    assert cold["self_bleu"]["value"] > hot["self_bleu"]["value"]
    assert sorted(found["most_varied"]) == [0, 1, 2]
    # The base's samples are the base's own, at temperature 1 and there only.
    assert base["log_prob_per_token"]["value"] == pytest.approx(base["base_log_prob_per_token"]["value"], rel=1e-4)
    for tempered in (cold, hot):
        assert abs(tempered["log_prob_per_token"]["value"] - tempered["base_log_prob_per_token"]["value"]) > 0.1

    lines = lines_of(output)
    assert list(lines[0]) == [
        *("index", "model", "prompt", "sample", "tokens", "base_log_prob", "log_prob", "entropy", "truncated"),
        *("answer", "right", "token_ids"),
    ]
    assert [(line["model"], line["index"]) for line in lines] == [
        (s["name"], i) for s in found["systems"] for i in range(3) for _ in range(4)
    ]
    of_mixture = [line for line in lines if line["model"] == "mixture"]
    tokens = sum(line["tokens"] for line in of_mixture)
    for name in ("base_log_prob", "log_prob"):
        expected = sum(line[name] for line in of_mixture) / tokens
        assert mixture[f"{name}_per_token"]["value"] == pytest.approx(expected)


def test_the_log_probabilities_are_those_of_mixture_and_base(folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples.jsonl"
    told(evaluate(folder, data, *QUICK, "--json", "--output", output))
    lines, tokenizer = lines_of(output), tiny_tokenizer()
    contexts = [tokenizer(line["prompt"])["input_ids"] for line in lines]  # text is continued as it is
    tokens = [line["token_ids"] for line in lines]
    assert [line["tokens"] for line in lines] == list(map(len, tokens))
    assert [line["sample"] for line in lines] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    ensemble = LoraEnsemble.load(folder).eval()
    alone = LoraEnsemble.from_base(tiny_model(), 1, lora()).eval()  # B is zero: the base
    for name, model in (("log_prob", ensemble), ("base_log_prob", alone)):
        scores = score_continuations(model, contexts, tokens)
        assert [line[name] for line in lines] == pytest.approx([s.log_likelihood for s in scores], rel=1e-4)


def test_a_member_and_another_ensemble(folder: Path, base: Path, data: Path, tmp_path: Path) -> None:
    scatter_members(LoraEnsemble.from_base(base, 1, lora(), seed=9), std=0.3, seed=4).save(tmp_path / "one")
    found = told(evaluate(folder, data, *QUICK, "--member", 1, "--baseline", tmp_path / "one", "--json"))
    assert [s["name"] for s in found["systems"]] == ["member 1", "one"]
    assert found["sampling"]["member"] == 1
    assert found["systems"][0]["log_prob"]["value"] != pytest.approx(found["systems"][1]["log_prob"]["value"])


def test_an_adapter_as_the_baseline_is_an_ensemble_of_one(folder: Path, base: Path, data: Path, tmp_path: Path) -> None:
    scatter_members(LoraEnsemble.from_base(base, 1, lora(), seed=9), std=0.3, seed=4).save(tmp_path / "one")
    (tmp_path / "one" / "member_0").rename(tmp_path / "bare")
    LoraEnsemble.load(tmp_path / "bare").save(tmp_path / "one")
    bare, one = (told(evaluate(folder, data, *QUICK, "--baseline", tmp_path / n, "--json")) for n in ("bare", "one"))
    assert [found["systems"][1].pop("name") for found in (bare, one)] == ["bare", "one"]
    assert bare["systems"][1] == one["systems"][1]
    assert bare["systems"][1] != bare["systems"][0]


def test_one_seed_one_result(folder: Path, data: Path) -> None:
    first, again, other = (told(evaluate(folder, data, *QUICK, "--json", "--seed", seed)) for seed in (3, 3, 4))
    assert first == again
    assert first["systems"] != other["systems"]


def test_one_sample(folder: Path, data: Path) -> None:
    """There is nothing to compare it with: null, and a dash."""
    quick = ("--samples", 1, *QUICK[2:])
    (system,) = told(evaluate(folder, data, *quick, "--json"))["systems"]
    assert system["self_bleu"] == {"value": None, "low": None, "high": None}
    assert (system["unique"]["value"], list(system["pass_at"])) == (1, ["1"])
    shown = evaluate(folder, data, *quick).out
    variety = shown.partition("variety")[2].splitlines()[1].split()
    assert variety[-2:] == ["–", "1.000"]
    assert "most varied" not in shown


def test_the_zoos_base_knows_its_facts(tmp_path: Path) -> None:
    """The real thing: conversational prompts, answers in sentences, and a temperature that costs accuracy."""
    LoraEnsemble.from_base(str(base_path()), 1, lora()).save(tmp_path / "ensemble")
    probes = YESTERDAY.probes(0)[:12]
    rows = [{"prompt": probe.prompt, "answer": probe.fact.values[0]} for probe in probes]
    file = write_rows(tmp_path / "facts.jsonl", rows)
    flags = ("--check", "contains", "--baseline_temperature", 4, "--samples", 4, "--max_new_tokens", 12, "--json")
    mixture, hot = told(evaluate(tmp_path / "ensemble", file, *flags))["systems"]
    assert mixture["accuracy"]["value"] > 0.9 > 0.6 > hot["accuracy"]["value"]
    assert mixture["lengths"]["truncated"] == 0
    assert mixture["self_bleu"]["value"] > hot["self_bleu"]["value"]
    assert mixture["base_log_prob"]["value"] == pytest.approx(mixture["log_prob"]["value"], abs=1e-3)


# ---- Samples that are there ------------------------------------------------------------------------------------------


def test_samples_of_a_file(folder: Path, data: Path, given: Path) -> None:
    found = told(evaluate(folder, data, "--samples_from", given, "--json", "--resamples", 20))
    (system,) = found["systems"]
    assert (system["name"], system["samples"], found["samples_from"]) == ("written", 4, str(given))
    # w5 and W5 are right; then w8, w9, w8; then 7.
    assert system["accuracy"]["value"] == pytest.approx((2 / 4 + 3 / 4 + 1 / 4) / 3)
    assert system["majority"]["value"] == pytest.approx((1 + 1 + 1 / 4) / 3)
    assert system["pass_at"]["4"]["value"] == 1
    assert system["log_prob"]["value"] is system["entropy_per_token"]["value"] is system["lengths"]["truncated"] is None
    assert system["base_log_prob"]["value"] < 0
    assert system["lengths"]["quantiles"]["5"] < 1  # one of them is empty
    assert found["most_varied"] == [2, 0, 1]


def test_output_is_evaluated_again_with_another_check(folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples.jsonl"
    flags = (*QUICK, "--baseline", "base", "--json")
    before = told(evaluate(folder, data, *flags, "--output", output))
    same = told(evaluate(folder, data, "--samples_from", output, "--resamples", 20, "--json"))
    for one, other in zip(before["systems"], same["systems"], strict=True):
        for name, value in one.items():
            close = pytest.approx(value["value"], rel=1e-4) if isinstance(value, dict) and "value" in value else value
            assert (other[name]["value"] if close is not value else other[name]) == close, name
    lenient = told(evaluate(folder, data, "--samples_from", output, "--check", "regex:(?s)(w?)", "--json"))
    assert [s["name"] for s in lenient["systems"]] == ["mixture", "base"]
    assert lenient["check"] == "regex:(?s)(w?)"
    beside = ("--baseline_temperature", 2, "--samples", 3)
    more = told(evaluate(folder, data, "--samples_from", output, *beside, *QUICK[2:], "--json"))
    assert [(s["name"], s["samples"]) for s in more["systems"]] == [("mixture", 4), ("base", 4), ("base, T=2", 3)]


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([{"index": 0, "text": "w1"}], ["samples.jsonl: the columns are index, text", "`sample`"]),
        ([{"index": 3, "sample": "w1"}], ["samples.jsonl, line 1, column index: is 3, of 3 prompts"]),
        ([{"index": 0, "sample": "w1"}, {"index": 1, "sample": None}], ["line 2, column sample: is None"]),
        ([{"index": i % 3, "sample": "w1"} for i in range(4)], ["row 2 has 1 sample of samples, and row 1 2"]),
        ([{"index": 1, "sample": "w1"}], ["row 1 has 0 samples of samples"]),
    ],
)
def test_files_of_samples_that_do_not_fit(
    lines: list[dict[str, Any]], parts: list[str], folder: Path, data: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "samples.jsonl", lines)
    assert_refused(evaluate(folder, data, "--samples_from", file), *parts)


# ---- Checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "right"),
    [
        ("exact", [2, 3, 1]),
        ("contains", [2, 4, 2]),
        ("regex:([a-z]?[0-9])", [1, 4, 3]),
        ("own_checks:is_short", [4, 3, 3]),
    ],
)
def test_checks(
    check: str,
    right: list[int],
    folder: Path,
    data: Path,
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "def is_short(prompt, sample, row):\n    assert row['prompt'] == prompt\n    return len(sample) < 5\n"
    (tmp_path / "own_checks.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "judged.jsonl"
    told(evaluate(folder, data, "--samples_from", given, "--check", check, "--output", output, "--json"))
    lines = lines_of(output)
    assert [sum(line["right"] for line in lines if line["index"] == i) for i in range(3)] == right
    groups = ["w5", "5", "w6", None, "w8", "w9", "w8", "w8", "7", "w7", "7", "7"]
    whole = ["w5", "w5", "w6", "", "w8", "w9", "w8", "it is w8", "7", "w7", "70", "so: 7"]
    assert [line["answer"] for line in lines] == (groups if check.startswith("regex") else whole)


def test_a_users_check_at_fault(
    folder: Path, data: Path, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def words(prompt, sample, row):\n    return sample\ndef one(prompt, sample, row):\n    return 1\n"
    code += "def fails(prompt, sample, row):\n    return row['gone']\nnothing = 3\n"
    (tmp_path / "bad_checks.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, parts in (
        ("bad_checks:words", ["on row 1: bad_checks:words gave 'w5'", "true"]),
        ("bad_checks:one", ["on row 1: bad_checks:one gave 1"]),
        ("bad_checks:fails", ["on row 1: bad_checks:fails raised KeyError", "a prompt, a sample and the row"]),
        ("bad_checks:nothing", ["is not a function"]),
        ("bad_checks:gone", ["bad_checks has no gone"]),
        ("no_checks:gone", ["no_checks cannot be imported"]),
        ("nearly", ["'nearly' is no check", "regex:PATTERN"]),
        ("regex:(", ["'(' is no regular expression"]),
        ("regex:w5", ["'w5' has no group", "parentheses"]),
    ):
        assert_refused(evaluate(folder, data, "--samples_from", given, "--check", name), "--check", *parts)


def test_without_answers(folder: Path, given: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": row["prompt"], "solution": "w8"} for row in ROWS])
    found = told(evaluate(folder, file, "--samples_from", given, "--json"))
    assert found["check"] is None
    assert found["systems"][0]["accuracy"] is found["systems"][0]["pass_at"] is found["systems"][0]["majority"] is None
    assert "pass@" not in evaluate(folder, file, "--samples_from", given).out
    named = told(evaluate(folder, file, "--samples_from", given, "--answer", "solution", "--json"))
    assert named["systems"][0]["accuracy"]["value"] == pytest.approx(2 / 12)
    refused = evaluate(folder, file, "--samples_from", given, "--check", "contains")
    assert_refused(refused, "--check: there is no column 'answer'", "--answer", "prompt, solution")


# ---- What is printed -------------------------------------------------------------------------------------------------


def test_the_tables(folder: Path, data: Path, given: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    flags = ("--samples_from", given, "--show", 1, "--output", output)
    ended = evaluate(folder, data, *flags, "--baseline", "base", *QUICK)
    assert (ended.code, ended.err) == (0, f"\n24 lines in {output}\n")
    assert "3 prompts · 4 samples of each, given" in ended.out
    figures = ended.out.partition("given\n")[2].partition("\nPrompts with")[0].strip()
    right, variety, length, nats = ([row.split() for row in part.splitlines()] for part in figures.split("\n\n"))
    assert [part[1][0] for part in (right, variety, length, nats)] == ["written"] * 4
    assert [part[2][0] for part in (right, variety, length, nats)] == ["base"] * 4
    assert right[0] == ["right", "one", "sample", "majority", "pass@2", "pass@4"]
    accuracy = told(evaluate(folder, data, "--samples_from", given, "--json", "--resamples", 20))["systems"][0][
        "accuracy"
    ]
    half = (accuracy["high"] - accuracy["low"]) / 2
    assert right[1][1:3] == ["50.0%", f"±{half:.1%}"]
    assert right[1][-1] == "100.0%"
    assert variety[0] == ["variety", *(f"{kind}-{n}" for kind in ("dist", "all") for n in "123"), "self-BLEU", "unique"]
    assert length[1][-1] == "–"  # it is not known which of them were cut
    assert length[2][-1].endswith("%")
    assert [nats[1][3:5], nats[1][-1]] == [["–", "–"], "–"]  # nor under what they were sampled
    assert "–" not in nats[2]
    assert max(len(line.rstrip()) for line in ended.out.splitlines()) <= 100
    shown = ended.out.partition("Prompts with the most varied samples")[2]
    assert "row 3   4 different of 4" in shown
    assert "row 1" not in shown
    assert ["1", "×", "so:", "7"] in [line.split() for line in shown.splitlines()]


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "flags", "parts"),
    [
        ({"prompt": ""}, [], ["rows.jsonl, row 2, column prompt: is empty"]),
        ({"prompt": None}, [], ["rows.jsonl, row 2, column prompt: is empty"]),
        ({"answer": None}, [], ["rows.jsonl, row 2, column answer: is None"]),
        ({"answer": "..."}, [], ["row 2, column answer: is '...'", "more than punctuation"]),
        ({}, ["--answer", "answr"], ["--answer: there is no column 'answr'", "Did you mean answer?"]),
        ({}, ["--samples", "0"], ["--samples: is 0"]),
        ({}, ["--samples", "many"], ["--samples: 'many' is not an integer"]),
        ({}, ["--temperature", "0"], ["--temperature: is 0"]),
        ({}, ["--temperature", "inf"], ["--temperature: is inf"]),
        ({}, ["--baseline_temperature", "-1"], ["--baseline_temperature: is -1"]),
        ({}, ["--top_p", "1.5"], ["--top_p: is 1.5"]),
        ({}, ["--max_new_tokens", "0"], ["--max_new_tokens: is 0"]),
        ({}, ["--batch_size", "0"], ["--batch_size: is 0"]),
        ({}, ["--resamples", "-1"], ["--resamples: is -1"]),
        ({}, ["--member", "2"], ["--member: there is no member 2 of 2", "0 to 1"]),
        ({}, ["--member", "0", "--samples_from", "x.jsonl"], ["--samples_from: cannot be combined with --member"]),
        ({}, ["--group", "answer"], ["--group: --task sampling has no such flag", "--task choice, perplexity"]),
        ({}, ["--baseline", "base", "--baseline", "base", *map(str, QUICK)], ["--baseline: base is there already"]),
    ],
)
def test_rows_and_flags_that_do_not_fit(
    changed: dict[str, Any], flags: list[str], parts: list[str], folder: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [ROWS[0], {**ROWS[0], **changed}])
    assert_refused(evaluate(folder, file, *flags), *parts)


def test_a_baseline_on_another_base(folder: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    LoraEnsemble.from_base(str(base_path()), 1, lora()).save(other)
    assert_refused(evaluate(folder, data, *QUICK, "--baseline", other), f"--baseline {other}", "64", "same one")
