"""`renyi diagnose`: its figures against the library's, an adapter by itself, pairs, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Ended,
    assert_refused,
    contradicting_rows,
    flags_of,
    flat,
    renyi,
    save_base,
    settings_of,
    write_rows,
)
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from tiny import pair_rows, tiny_model, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.cli.diagnosis import doubts_of
from renyi.data import Preparation
from renyi.inference import Diagnosis, diagnose, score

FEW = ["--num_directions", "4"]
KEYS = {
    *("adapter", "member", "base_model", "kind", "curvature", "num_directions", "parameters", "examples"),
    *(
        "critical_alpha",
        "low",
        "high",
        "plug_in",
        "contradicted",
        "undecided",
        "eigenvalues",
        "mean_share",
        "calibration",
    ),
    *("alpha", "members", "warnings", "positive", "negative", "groups", "memory_bytes", "seconds"),
}


def told(ended: Ended) -> dict[str, Any]:
    assert (ended.code, ended.err) == (0, ""), ended
    return json.loads(ended.out)


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An ensemble of two that was tuned on pairs for a few steps, and the pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    file = write_rows(folder / "pairs.jsonl", pair_rows(60).to_list())
    values = {**settings_of(base, file), "output_dir": folder / "out", "beta": 0.5}
    assert renyi("dpo", *flags_of(values)).code == 0
    return folder / "out", file


# ---- What it says ----------------------------------------------------------------------------------------------------


def test_it_says_what_it_measures_and_what_that_means(trained: tuple[Path, Ended], rows_file: Path) -> None:
    ended = renyi("diagnose", trained[0], rows_file, *FEW, "--show", "2")
    assert ended.code == 0, ended.err
    parameters = json.loads(renyi("info", trained[0], "--json").out)["parameters_per_member"]
    before = flat(ended.err)
    for part in [
        f"{trained[0]}, member 0 of 2",
        "float32 on cpu",
        "48 rows: 24 to find directions, 24 to measure",
        f"fisher, along 4 directions of {parameters:,} parameters",
        "beside the model and a batch of 4,096 tokens",
        "are free",
    ]:
        assert part in before, part
    text = " ".join(ended.out.split())
    for part in [
        "24 sequences along 4 directions that others chose",
        "critical alpha",
        "recommended alpha",
        "recommended members",
        "unfinished fitting",
        "calibration",
        "loadings on the leading direction",
    ]:
        assert part in text, part
    assert text.count("row ") >= 4  # two of either side


def test_json_holds_what_the_library_says(trained: tuple[Path, Ended], rows_file: Path) -> None:
    flags = [*FEW, "--member", "1", "--seed", "5", "--show", "3"]
    found = told(renyi("diagnose", trained[0], rows_file, *flags, "--json"))
    assert found.keys() == KEYS
    rows = load_dataset("json", data_files=str(rows_file))["train"]
    prepared = Preparation.read(trained[0]).prepare(rows, tiny_tokenizer())
    expected = diagnose(LoraEnsemble.load(trained[0]), prepared, member=1, num_directions=4, seed=5)
    for name in ("critical_alpha", "low", "high", "plug_in", "mean_share", "calibration", "alpha", "members"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert found["eigenvalues"] == pytest.approx(expected.eigenvalues, rel=1e-4)
    loadings = dict(zip(expected.examples, expected.loadings, strict=True))
    assert [e["loading"] for e in found["positive"]] == pytest.approx(sorted(loadings.values())[::-1][:3], rel=1e-4)
    assert [e["loading"] for e in found["negative"]] == pytest.approx(sorted(loadings.values())[:3], rel=1e-4)
    for example in found["positive"] + found["negative"]:
        assert loadings[example["index"]] == pytest.approx(example["loading"], rel=1e-4)
        row = rows[example["index"]]
        assert example["text"].split() == f"{row['prompt']}{row['completion']}".split()
    assert (found["adapter"], found["member"], found["kind"]) == (str(trained[0]), 1, "sequences")


def test_a_line_for_every_measured_example(trained: tuple[Path, Ended], rows_file: Path, tmp_path: Path) -> None:
    """Of rows drawn at random, named by their place in the file."""
    lines, figure = tmp_path / "lines.jsonl", tmp_path / "figure.png"
    flags = [*FEW, "--max_examples", "44", "--output", lines, "--figure", figure, "--show", "0"]
    ended = renyi("diagnose", trained[0], rows_file, *flags)
    assert ended.code == 0, ended.err
    assert "48 rows, 44 of them drawn: 22 to find directions, 22 to measure" in flat(ended.err)
    assert "loadings" not in ended.out
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in rows] == [["index", "loading", "log_likelihood"]] * 22
    indices = [row["index"] for row in rows]
    assert indices == sorted(set(indices))
    prepared = Preparation.read(trained[0]).prepare(
        load_dataset("json", data_files=str(rows_file))["train"], tiny_tokenizer()
    )
    scores = score(LoraEnsemble.load(trained[0]), prepared)
    assert [row["log_likelihood"] for row in rows] == pytest.approx(
        [scores[i].log_likelihood[0] for i in indices], rel=1e-4
    )
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["figure.png", "lines.jsonl"]


# ---- An adapter by itself --------------------------------------------------------------------------------------------


def test_an_ordinary_adapter_is_a_member_by_itself(trained: tuple[Path, Ended], base: Path, rows_file: Path) -> None:
    of_member = told(renyi("diagnose", trained[0], rows_file, *FEW, "--member", "1", "--json"))
    adapter = trained[0] / "member_1"
    named = ["--model", base, "--adapter", adapter, "--dataset_name", rows_file]
    for asked in (named, [adapter, rows_file], ["--adapter", adapter, rows_file]):
        alone = told(renyi("diagnose", *asked, *FEW, "--json"))
        assert alone["critical_alpha"] == of_member["critical_alpha"]
        assert alone["positive"] == of_member["positive"]
        assert (alone["adapter"], alone["member"]) == (str(adapter), 0)


def test_rows_are_prepared_as_flags_say(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    rows = []
    for row in contradicting_rows(48):
        turns = zip(("user", "assistant"), (row["prompt"], row["completion"].strip()), strict=True)
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    file = write_rows(tmp_path / "talk.jsonl", rows)
    adapter = trained[0] / "member_0"
    whole = told(renyi("diagnose", adapter, file, *FEW, "--json"))
    answers = told(renyi("diagnose", adapter, file, *FEW, "--json", "--assistant_only_loss", "yes"))
    assert whole["critical_alpha"] != answers["critical_alpha"]


def test_an_untrained_adapter_is_warned_of(base: Path, rows_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(str(tmp_path / "fresh"))
    asked = ["--adapter", tmp_path / "fresh", "--model", base, "--dataset_name", rows_file, *FEW]
    (warning,) = told(renyi("diagnose", *asked, "--json"))["warnings"]
    assert "untrained" in warning
    ended = renyi("diagnose", *asked)
    assert ended.code == 0
    assert "warning: the adapter is untrained" in ended.err


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"calibration": 0.79}, "less sure than it is right (calibration 0.79"),
        ({"calibration": 1.31}, "surer than it is right (calibration 1.31"),
        ({"mean_share": 0.11}, "11% of the leading direction"),
        ({"low": 0.6, "high": 1.2}, "from 0.6 to 1.2"),
    ],
)
def test_what_else_it_may_be_is_said(changed: dict[str, float], part: str) -> None:
    sound = Diagnosis(0.4, 0.3, 0.5, 0.4, [2.5], 0.0, 0.8, 0.7, 2, [], [], [], torch.zeros(1))
    assert doubts_of(sound, is_trained=True) == []
    (doubt,) = doubts_of(sound._replace(**changed), is_trained=True)  # type: ignore[arg-type]
    assert part in doubt.what
    (doubt,) = doubts_of(sound, is_trained=True, is_fitted_to=True)
    assert "fitted to" in doubt.what


def test_rows_of_the_training_are_warned_of(trained: tuple[Path, Ended], rows_file: Path, tmp_path: Path) -> None:
    """By what they hold, wherever they lie and whether a run or one of its adapters is named."""
    copied = Path(shutil.copy(rows_file, tmp_path / "copied.jsonl"))
    others = write_rows(tmp_path / "others.jsonl", contradicting_rows(48, seed=1))
    for adapter in (trained[0], trained[0] / "member_0"):
        for data, is_fitted_to in ((rows_file, True), (copied, True), (others, False)):
            warnings = told(renyi("diagnose", adapter, data, *FEW, "--json"))["warnings"]
            assert any("fitted to" in warning for warning in warnings) == is_fitted_to, (adapter, data, warnings)


def test_the_routed_quantity_is_the_ensembles_unless_it_is_given(trained: tuple[Path, Ended], rows_file: Path) -> None:
    """All answers of the rows have as many tokens, so the figures differ by that factor."""
    whole, normalised = (
        told(renyi("diagnose", trained[0], rows_file, *FEW, "--json", "--routing_quantity", quantity))
        for quantity in ("sequence", "length_normalised")
    )
    assert told(renyi("diagnose", trained[0], rows_file, *FEW, "--json"))["critical_alpha"] == whole["critical_alpha"]
    assert normalised["critical_alpha"] == pytest.approx(3 * whole["critical_alpha"], rel=1e-4)
    refused = renyi("diagnose", trained[0], rows_file, "--json", "--routing_quantity", "token")
    assert_refused(refused, "--routing_quantity: 'token' is none of sequence, length_normalised")


# ---- Pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_diagnosed_as_they_were_tuned(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    found = told(renyi("diagnose", *tuned, *FEW, "--json", "--output", lines))
    assert (found["kind"], found["calibration"], found["examples"]) == ("pairs", None, 30)
    assert found["positive"][0]["text"].count("rejected") == 1
    scored = renyi("evaluate", *tuned, "--task", "preference", "--output", tmp_path / "scores.jsonl", "--json")
    assert scored.code == 0
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines()):
        assert line["log_likelihood"] == pytest.approx(scores[line["index"]]["log_likelihood"][0], rel=1e-4)
    ended = renyi("diagnose", *tuned, *FEW)
    assert "30 pairs along 4 directions" in ended.out
    assert "chosen" in ended.out

    # The adapter by itself has no settings of its own: beta is TRL's default unless it is given.
    adapter = tuned[0] / "member_0"
    with_beta = told(renyi("diagnose", adapter, tuned[1], *FEW, "--json", "--beta", "0.5"))
    assert with_beta["critical_alpha"] == pytest.approx(found["critical_alpha"], rel=1e-4)
    assert told(renyi("diagnose", adapter, tuned[1], *FEW, "--json"))["critical_alpha"] != with_beta["critical_alpha"]


def test_a_loss_that_is_no_likelihood(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned[0], tmp_path / "copy"))
    kept = json.loads((folder / "preference.json").read_text(encoding="utf-8"))
    (folder / "preference.json").write_text(json.dumps({**kept, "loss_type": ["ipo"]}), encoding="utf-8")
    assert_refused(renyi("diagnose", folder, tuned[1], *FEW, "--json"), "loss_type", "ipo is no likelihood", "sigmoid")


# ---- What it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--member", "2"], ["--member: there is no member 2 of 2", "from 0"]),
        (["--member", "-1"], ["--member: is -1"]),
        (["--num_directions", "25"], ["--num_directions: 25 directions", "there are 24", "fewer directions."]),
        (["--num_directions", "0"], ["--num_directions: is 0", "from 1 on"]),
        (["--num_directions", "9", "--max_examples", "16"], ["or raise --max_examples"]),
        (["--num_directions", "4", "--max_examples", "30"], ["30 rows are too few", "at least 40 rows"]),
        (["--curvature", "fischer"], ["--curvature: 'fischer' is none of fisher, hessian", "Did you mean fisher?"]),
        (["--beta", "0.1"], ["--beta", "rows of preference pairs"]),
        (["--figure", "/nowhere/figure.png"], ["--figure: there is no folder /nowhere"]),
        (["--members", "2"], ["--members: there is no such key", "member"]),
        (["--dataset_name", "other.jsonl"], ["belongs to no flag"]),
    ],
)
def test_bad_flags(flags: list[str], parts: list[str], trained: tuple[Path, Ended], rows_file: Path) -> None:
    assert_refused(renyi("diagnose", trained[0], rows_file, "--json", *flags), *parts)


def test_pairs_take_no_flags_of_sequences(tuned: tuple[Path, Path]) -> None:
    ended = renyi("diagnose", *tuned, *FEW, "--json", "--assistant_only_loss", "yes")
    assert_refused(ended, "--assistant_only_loss", "other rows than preference pairs")


def test_too_few_rows(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "few.jsonl", contradicting_rows(20))
    assert_refused(renyi("diagnose", trained[0], file, *FEW, "--json"), "20 rows are too few", "at least 40 rows")


def test_a_bad_row_is_named_as_in_the_file(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    rows = contradicting_rows(60)
    rows[41]["completion"] = " "
    file = write_rows(tmp_path / "bad.jsonl", rows)
    for share in ("60", "512"):
        ended = renyi("diagnose", trained[0], file, *FEW, "--json", "--max_examples", share)
        assert_refused(ended, "bad.jsonl, row 42, column completion: is empty")


def test_what_is_no_adapter_or_fits_another_base(
    trained: tuple[Path, Ended], base: Path, rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    asked = ["--dataset_name", rows_file, "--json", *FEW]
    assert_refused(renyi("diagnose", "--adapter", tmp_path / "empty", *asked), "there is no adapter_config.json")
    assert_refused(renyi("diagnose", tmp_path / "empty", rows_file), "there is no ensemble.json")
    assert_refused(renyi("diagnose", "--adapter", tmp_path / "gone", *asked), "gone", "no such folder")
    assert_refused(renyi("diagnose", "--adapter", trained[0] / "member_0", "--json"), "DATA")
    adapter = trained[0] / "member_0"
    other = tmp_path / "other"
    tiny_model(num_hidden_layers=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    assert_refused(renyi("diagnose", "--adapter", adapter, "--model", other, *asked), "adapts other layers")
    wide = tmp_path / "wide"
    tiny_model(hidden_size=64).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    assert_refused(renyi("diagnose", "--adapter", adapter, "--model", wide, *asked), "has shape")
    assert_refused(renyi("diagnose", "--adapter", adapter, "--model", tmp_path / "gone", *asked), "could not be loaded")


def test_more_memory_than_there_is(
    trained: tuple[Path, Ended], rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("renyi.cli.diagnose._available", lambda case: 6_000_000)
    refused = renyi("diagnose", trained[0], rows_file, "--json", "--num_directions", "16")
    assert_refused(refused, "--num_directions: 16 directions take about", "and 6 MB are free", "Ask for at most 5.")
    monkeypatch.setattr("renyi.cli.diagnose._available", lambda case: 1000)
    assert_refused(renyi("diagnose", trained[0], rows_file, "--json"), "1 KB are free", "more memory")


def test_a_base_in_half_precision(trained: tuple[Path, Ended], rows_file: Path, tmp_path: Path) -> None:
    """It is said, and refused by nobody; that figures hold is a test of the library."""
    half = save_base(tmp_path / "half")
    tiny_model().bfloat16().save_pretrained(half)
    ended = renyi("diagnose", trained[0], rows_file, *FEW, "--base", half)
    assert ended.code == 0, ended.err
    assert "bfloat16 on cpu" in " ".join(ended.err.replace("│", " ").split())  # a long path wraps
