"""`renyi evaluate --task preference`: its figures against the library's own, its forms, and its errors."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Ended, renyi, write_rows
from datasets import Dataset
from tiny import lora, scatter_members, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.data import PairPreparation
from renyi.ensemble import Reference, write_preference
from renyi.evaluation import evaluate_preference
from renyi.inference import PairScore, score_pairs
from renyi.objectives import PreferenceLoss

OF_SOME = ("votes", "group", "group_responsibilities", "within_members", "between_members")  # where rows have them
KEYS = [*(name for name in PairScore._fields if name not in OF_SOME), "epistemic_share"]
BETA = 0.4
N = 24
CUT = "warning: 19 rows cut at max_length 6\n"  # a prompt of two words, at least four of an answer, and an end


def pair_rows(number: int = N) -> list[dict[str, Any]]:
    """Pairs about one of eight words, with a group and a mark of what is contested."""
    draw = random.Random(0)
    rows = []
    for i in range(number):
        word, length = draw.randrange(8), draw.randrange(1, 5)
        chosen, rejected = (" " + " ".join(f"w{draw.randrange(50)}" for _ in range(n)) for n in (length, 6 - length))
        row = {"prompt": f"w{word} w9", "chosen": chosen, "rejected": rejected}
        rows.append({**row, "topic": "even" if word % 2 == 0 else "odd", "split": i % 3 == 0, "number": i})
    return rows


class Trained(NamedTuple):
    """An ensemble's folder, and a file of pairs."""

    folder: Path
    data: Path


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three members that went on from where they were, as `renyi dpo` leaves them."""
    folder = tmp_path_factory.mktemp("evaluate")
    ensemble = scatter_members(LoraEnsemble.from_base(base, 3, lora(), seed=7)).eval()
    start = ensemble.snapshot()
    scatter_members(ensemble, std=0.3, seed=2)
    ensemble.weights.copy_(torch.tensor([0.5, 0.3, 0.2]))
    ensemble.alpha = 0.8
    ensemble.save(folder / "tuned")
    PairPreparation(max_length=6).write(folder / "tuned")
    write_preference(folder / "tuned", PreferenceLoss(beta=BETA), Reference(ensemble, start))
    return Trained(folder / "tuned", write_rows(folder / "pairs.jsonl", pair_rows()))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def evaluate(*argv: object) -> Ended:
    return renyi("evaluate", *argv, "--task", "preference")


def own_scores(tuned: Trained, beta: float = BETA, to_base: bool = False) -> tuple[LoraEnsemble, list[PairScore]]:
    """Scores made in Python, of the reference in the ensemble's folder."""
    ensemble = LoraEnsemble.load(tuned.folder).eval()
    start = None if to_base else ensemble.read_snapshot(tuned.folder / "reference")
    preparation = PairPreparation(max_length=6)
    pairs = preparation.prepare(Dataset.from_list(pair_rows()), tiny_tokenizer())
    return ensemble, score_pairs(ensemble, pairs, PreferenceLoss(beta=beta), Reference(ensemble, start), preparation)


def assert_refused(ended: Ended, *parts: str) -> None:
    """One message, and in it every part; and no result."""
    assert (ended.code, ended.out) == (2, ""), ended
    assert ended.err.startswith("error: "), ended.err
    assert len(ended.err.splitlines()) <= 3, ended.err
    for part in parts:
        assert part in ended.err, ended.err


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_json_is_the_evaluation(tuned: Trained) -> None:
    ended = evaluate(tuned.folder, tuned.data, "--json")
    assert (ended.code, ended.err) == (0, CUT)
    told = json.loads(ended.out)
    ensemble, scores = own_scores(tuned)
    expected = evaluate_preference(scores, ensemble.weights)
    assert (told["task"], told["beta"], told["loss_type"], told["reference"]) == (
        "preference",
        BETA,
        ["sigmoid"],
        "start",
    )
    assert told["pairs"] == N
    assert told["mixture"] == pytest.approx(expected.mixture._asdict(), rel=1e-5)
    assert len(told["members"]) == 3
    for member, own in zip(told["members"], expected.members, strict=True):
        assert member == pytest.approx(own._asdict(), rel=1e-5)
    assert told["epistemic"] == pytest.approx(expected.epistemic, rel=1e-5)
    assert told["most_contested"] == expected.most_contested
    assert (told["groups"], told["contested"]) == (None, None)
    # The scores' own mixture, of the ensemble's weights, is the one that was evaluated.
    assert told["mixture"]["nll"] == pytest.approx(sum(s.mixture_nll for s in scores) / N, rel=1e-5)
    assert told["epistemic_share"] == pytest.approx(sum(s.epistemic_share for s in scores) / N, rel=1e-5)


def test_a_line_for_every_pair_in_order(tuned: Trained, tmp_path: Path) -> None:
    ended = evaluate(tuned.folder, tuned.data, "--output", tmp_path / "pairs.jsonl", "--json")
    assert (ended.code, ended.err) == (0, CUT)
    json.loads(ended.out)
    written = lines(tmp_path / "pairs.jsonl")
    assert [list(row) for row in written] == [KEYS] * N
    assert [row["index"] for row in written] == list(range(N))
    assert [f.name for f in tmp_path.iterdir()] == ["pairs.jsonl"]
    for row, score in zip(written, own_scores(tuned)[1], strict=True):
        assert row["margin"] == pytest.approx(score.margin, rel=1e-4, abs=1e-6)
        assert row["tokens"] == score.tokens
        assert row["preference"] == pytest.approx(math.exp(-row["mixture_nll"]))
        assert sum(row["responsibilities"]) == pytest.approx(1)
        assert row["epistemic_share"] == pytest.approx(row["epistemic"] / row["total"])


def test_another_beta_and_reference(tuned: Trained, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"

    def margins(*flags: object) -> list[list[float]]:
        assert evaluate(tuned.folder, tuned.data, "--output", output, *flags).code == 0
        return [row["margin"] for row in lines(output)]

    kept = torch.tensor(margins())
    torch.testing.assert_close(torch.tensor(margins("--beta", "0.8")), 2 * kept)
    to_base = torch.tensor(margins("--reference", "base"))
    expected = torch.tensor([s.margin for s in own_scores(tuned, to_base=True)[1]])
    torch.testing.assert_close(to_base, expected, rtol=1e-4, atol=1e-6)
    assert (to_base - kept).abs().max() > 0.1


def test_the_folder_decides_how_pairs_are_cut(tuned: Trained, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tuned.folder, tmp_path / "copy"))
    PairPreparation(max_length=None).write(copy)
    evaluate(copy, tuned.data, "--output", tmp_path / "whole.jsonl")
    evaluate(tuned.folder, tuned.data, "--output", tmp_path / "cut.jsonl")
    whole, cut = ([row["tokens"] for row in lines(tmp_path / f"{name}.jsonl")] for name in ("whole", "cut"))
    assert set(whole) == {8}  # six words and two ends of text
    sides = [[len(row[side].split()) + 1 for side in ("chosen", "rejected")] for row in pair_rows()]
    assert cut == [sum(min(tokens, 6 - 2) for tokens in pair) for pair in sides]  # after two words of the prompt


def test_an_ensemble_that_was_not_tuned_on_preferences(trained: tuple[Path, Ended], tuned: Trained) -> None:
    told = json.loads(evaluate(trained[0], tuned.data, "--json").out)
    assert (told["beta"], told["reference"], told["pairs"]) == (0.1, "base", N)


# ---- What a person sees ----------------------------------------------------------------------------------------------


def test_the_report(tuned: Trained, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    ended = evaluate(tuned.folder, tuned.data, "--output", output, "--show", 2)
    assert ended.code == 0
    assert ended.err == f"{CUT}\n24 lines in {output}\n"
    told = json.loads(evaluate(tuned.folder, tuned.data, "--json").out)
    for part in ("24 pairs · sigmoid, beta 0.4 · margins against each member as its training began", "Most contested"):
        assert part in ended.out
    table = {row.split("  ")[0].strip(): row.split() for row in ended.out.splitlines()}
    mixture = told["mixture"]
    assert table["mixture"][1:] == [
        f"{mixture['accuracy']:.1%}",
        *(f"{mixture[name]:.4f}" for name in ("nll", "brier", "ece")),
    ]
    assert [table[f"member {m}"][2] for m in range(3)] == ["0.500", "0.300", "0.200"]
    assert f"epistemic uncertainty {told['epistemic']:.4f} nats a pair" in ended.out

    # The most contested come first, with their words and every member's view.
    rows, scores = pair_rows(), lines(output)
    worst = sorted(scores, key=lambda s: -s["epistemic"])[:2]
    shown = ended.out.partition("Most contested pairs")[2]
    heads = [line for line in shown.splitlines() if line.startswith("row ")]
    assert len(heads) == 2
    for head, score in zip(heads, worst, strict=True):
        views = " ".join(f"{1 / (1 + math.exp(-x)):.2f}" for x in score["margin"])
        assert head.startswith(f"row {score['index'] + 1}   P {score['preference']:.2f}   members {views} ")
        for column in ("prompt", "chosen", "rejected"):
            assert f"{column:8}  {rows[score['index']][column].strip()}" in shown
    assert "Most contested" not in evaluate(tuned.folder, tuned.data, "--show", 0).out


def test_long_texts_are_shown_where_they_differ(tuned: Trained, tmp_path: Path) -> None:
    alike = " ".join(["w1"] * 100)
    row = {"prompt": f"{' '.join(['w2'] * 100)} w40", "chosen": f" {alike} w41", "rejected": f" {alike} w42"}
    copy = Path(shutil.copytree(tuned.folder, tmp_path / "copy"))
    PairPreparation(max_length=None).write(copy)
    out = evaluate(copy, write_rows(tmp_path / "long.jsonl", [row])).out
    prompt, chosen, rejected = (
        line.strip() for line in out.splitlines() if line.lstrip().startswith(("prompt", "ch", "rej"))
    )
    assert "…" in prompt
    assert chosen.split()[1].startswith("…")
    assert chosen.endswith("w1 w41")
    assert rejected.endswith("w1 w42")
    assert len(out) < 2000


def test_one_member_contests_nothing(base: Path, tuned: Trained, tmp_path: Path) -> None:
    scatter_members(LoraEnsemble.from_base(base, 1, lora())).save(tmp_path / "one")
    ended = evaluate(tmp_path / "one", tuned.data)
    assert ended.code == 0
    assert "member 0" in ended.out
    assert "Most contested" not in ended.out


# ---- Columns ---------------------------------------------------------------------------------------------------------


def test_groups_and_contested_pairs(tuned: Trained) -> None:
    rows = pair_rows()
    ensemble, scores = own_scores(tuned)
    expected = evaluate_preference(scores, ensemble.weights, [r["topic"] for r in rows], [r["split"] for r in rows])
    flags = ("--group", "topic", "--contested", "split")
    told = json.loads(evaluate(tuned.folder, tuned.data, *flags, "--json").out)
    assert expected.groups is not None
    assert expected.contested is not None
    assert [g["group"] for g in told["groups"]] == ["even", "odd"]
    for group, own in zip(told["groups"], expected.groups, strict=True):
        assert list(group.values())[1:] == pytest.approx(own[1:], rel=1e-5)
    assert told["contested"] == pytest.approx(expected.contested._asdict())
    assert told["contested"]["pairs"] == 8

    out = evaluate(tuned.folder, tuned.data, *flags).out
    assert "By topic" in out
    assert "Finding split" in out
    assert "true of 8 of 24 pairs" in out


def test_many_groups_are_shown_in_part(tuned: Trained) -> None:
    out = evaluate(tuned.folder, tuned.data, "--group", "number").out
    assert "and 4 smaller ones; all with --json" in out
    assert len(json.loads(evaluate(tuned.folder, tuned.data, "--group", "number", "--json").out)["groups"]) == N


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--group", "topics"], ["--group: there is no column 'topics'", "Did you mean topic?"]),
        (["--contested", "zzz"], ["--contested: there is no column 'zzz'", "prompt, chosen, rejected, topic"]),
        (["--contested", "topic"], ["pairs.jsonl, row 1, column topic: is '", "Give true or false in every row"]),
        (["--contested", "number"], ["pairs.jsonl, row 3, column number: is 2"]),
    ],
)
def test_columns_that_do_not_fit(flags: list[str], parts: list[str], tuned: Trained) -> None:
    assert_refused(evaluate(tuned.folder, tuned.data, *flags), *parts)


def test_columns_of_the_wrong_kind(tuned: Trained, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", [{**row, "who": ["a"], "split": True} for row in pair_rows(3)])
    assert_refused(evaluate(tuned.folder, file, "--group", "who"), "--group: column who holds a list in row 1")
    assert_refused(evaluate(tuned.folder, file, "--contested", "split"), "column split: is true in every row")


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_not_an_ensemble(tuned: Trained, base: Path, tmp_path: Path) -> None:
    assert_refused(evaluate(base, tuned.data), "is a whole model (LlamaForCausalLM)")
    assert_refused(evaluate(tmp_path / "a" / "b", tuned.data), "there is no such folder")
    copy = Path(shutil.copytree(tuned.folder, tmp_path / "copy"))
    (copy / "preference.json").write_text("{", encoding="utf-8")
    assert_refused(evaluate(copy, tuned.data), "preference.json: cannot be read")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--task", "preferences"], ["--task: 'preferences' is none of ", "Did you mean preference?"]),
        ([], ["required: --task"]),
        (["--task", "preference", "--show", "-1"], ["--show: is -1"]),
        (["--task", "preference", "--show", "x"], ["--show: 'x' is not an integer"]),
        (["--task", "preference", "--beta", "0"], ["--beta: is 0", "above 0"]),
        (["--task", "preference", "--beta", "nan"], ["--beta: is nan"]),
        (["--task", "preference", "--reference", "start"], ["--reference: 'start' is none of kept, base"]),
        (["--task", "preference", "--split", "dev"], ["--split", "has no split 'dev'"]),
        (["--task", "preference", "--groups", "x"], ["--groups: there is no such key", "nearest known one is group"]),
        (["--task", "preference", "--output", "nowhere/x.jsonl"], ["--output: there is no folder nowhere"]),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], parts: list[str], tuned: Trained) -> None:
    assert_refused(renyi("evaluate", tuned.folder, tuned.data, *flags), *parts)


def test_data_without_pairs(tuned: Trained, rows_file: Path, tmp_path: Path) -> None:
    ended = evaluate(tuned.folder, rows_file, "--output", tmp_path / "out.jsonl")
    assert_refused(ended, "schools.jsonl: the columns are completion, prompt", "`prompt` + `chosen` + `rejected`")
    assert not list(tmp_path.iterdir())
    assert_refused(evaluate(tuned.folder, tmp_path / "no.jsonl"), "no.jsonl: there is no such file")
    rows = pair_rows(4)
    rows[2]["rejected"] = rows[2]["chosen"]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    assert_refused(evaluate(tuned.folder, file), "pairs.jsonl, row 3, column rejected: equals chosen")
