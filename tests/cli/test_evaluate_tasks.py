"""`renyi evaluate` on multiple choice and text: files, baselines, the report, and the threshold for abstention."""

import csv
import io
import json
import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import Ended, assert_refused, renyi, write_rows
from rich.console import Console
from tiny import lora, scatter_members, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.cli.reading import progress_bar
from renyi.data import Question, read_questions
from renyi.evaluation import Opinion, calibration_split, evaluate_choice
from renyi.inference import choice_log_probs, score_choices


class Files(NamedTuple):
    """An ensemble of three, a single adapter, and a folder of questions on two subjects."""

    ensemble: Path
    single: Path
    quiz: Path


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("choice")
    scatter_members(LoraEnsemble.from_base(base, 3, lora(), seed=7)).save(folder / "three")
    scatter_members(LoraEnsemble.from_base(base, 1, lora(), seed=9), seed=4).save(folder / "one")
    quiz = folder / "quiz"
    quiz.mkdir()
    for name, number in (("art_test", 22), ("law_test", 18), ("law_dev", 5)):
        write_quiz(quiz / f"{name}.csv", number, name)
    return Files(folder / "three", folder / "one", quiz)


def write_quiz(file: Path, number: int, seed: str) -> Path:
    draw = random.Random(seed)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["question", "choice0", "choice1", "choice2", "answer"])
        for _ in range(number):
            texts = [" ".join(f"w{draw.randrange(50)}" for _ in range(draw.randrange(1, 4))) for _ in range(4)]
            writer.writerow([*texts, draw.randrange(3)])
    return file


def choice(*argv: object) -> Ended:
    return renyi("evaluate", *argv, "--task", "choice", "--choice_by", "text", "--resamples", "30")


def test_json_is_the_evaluation(files: Files) -> None:
    ended = choice(files.ensemble, files.quiz, "--baseline", files.single, "--json")
    assert (ended.code, ended.err) == (0, "")
    told = json.loads(ended.out)
    questions: list[Question] = []
    for name in ("art", "law"):
        from datasets import load_dataset

        rows = load_dataset("csv", data_files=str(files.quiz / f"{name}_test.csv"), split="train")
        questions += read_questions(rows)

    def opinion(folder: Path) -> Opinion:
        ensemble = LoraEnsemble.load(folder).eval()
        scores = score_choices(ensemble, questions, tiny_tokenizer(), "text")
        return Opinion(choice_log_probs(scores, "text"), ensemble.weights, scores.log_likelihood, scores.tokens)

    aside, _ = calibration_split(40, 0.2)
    expected = evaluate_choice(
        opinion(files.ensemble),
        [q.answer for q in questions],
        baselines={"one": opinion(files.single)},
        groups=["art"] * 22 + ["law"] * 18,
        calibration=aside,
        resamples=30,
    )
    assert (told["questions"], told["calibration_questions"], told["abstention"]) == (32, 8, None)
    assert [s["name"] for s in told["systems"]] == [s.name for s in expected.systems]
    for system, own in zip(told["systems"], expected.systems, strict=True):
        assert list(system["nll"].values()) == pytest.approx(list(own.nll), rel=1e-5)
        assert list(system["accuracy"].values()) == pytest.approx(list(own.accuracy))
        assert set(system["detection"]) == set(own.detection)
    assert told["most_contested"] == expected.most_contested
    assert expected.specialisation is not None
    assert told["specialisation"]["adjusted_rand"] == pytest.approx(expected.specialisation.adjusted_rand)
    assert [g["group"] for g in told["groups"]] == ["art", "law"]


def test_files_one_by_one_are_the_folder(files: Files) -> None:
    told = [
        json.loads(choice(files.ensemble, *data, "--json").out)
        for data in ([files.quiz], [files.quiz / "art_test.csv", files.quiz / "law_test.csv"])
    ]
    assert told[0] == told[1]
    dev = json.loads(choice(files.ensemble, files.quiz, "--split", "dev", "--json").out)
    assert dev["questions"] + dev["calibration_questions"] == 5
    assert_refused(choice(files.ensemble, files.quiz, "--split", "train"), "--split", "no files of split 'train'")


def test_what_a_person_sees_and_the_lines(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    flags = ("--ood", files.quiz / "law_dev.csv", "--baseline", files.single, "--show", 1, "--output", output)
    ended = choice(files.ensemble, files.quiz, *flags)
    assert ended.code == 0, ended.err
    for part in (
        "32 questions by text, 8 more",
        "mixture",
        "member 2",
        "one, temperature",
        "By subject",
        "adjusted Rand",
    ):
        assert part in ended.out
    for part in ("Does it know where it is wrong?", "Telling 5 questions from elsewhere", "Most contested questions"):
        assert part in ended.out
    assert ended.out.count("\nrow ") == 1
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(40))
    assert sum(line["calibration"] for line in lines) == 8
    for line in lines:
        assert sum(line["probabilities"]) == pytest.approx(1)
        mixed = torch.tensor(line["members"]).mean(dim=0)
        assert line["probabilities"] == pytest.approx(mixed.tolist(), rel=1e-5)
        assert line["epistemic"] == pytest.approx(line["total"] - line["aleatoric"], abs=1e-9)
        assert line["max_probability"] == pytest.approx(1 - max(line["probabilities"]))


def test_the_report_is_one_page(files: Files, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report"
    ended = choice(files.ensemble, files.quiz, "--baseline", files.single, "--report", report)
    assert ended.code == 0, ended.err
    assert f"the report is {report / 'report.html'}" in ended.err
    pictures = ["epistemic.png", "members_by_groups.png", "reliability.png", "risk_coverage.png"]
    assert sorted(f.name for f in report.iterdir()) == sorted(
        [*pictures, "evaluation.json", "report.html", "sections.json"]
    )
    for name in pictures:
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    page = (report / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)  # it needs nothing else
    for part in ("How good are the answers?", "Most contested questions", "member 2", "one, temperature"):
        assert part in page
    kept = json.loads((report / "evaluation.json").read_text(encoding="utf-8"))
    assert kept == json.loads(choice(files.ensemble, files.quiz, "--baseline", files.single, "--json").out)


def test_a_threshold_is_kept_with_the_ensemble(files: Files, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(files.ensemble, tmp_path / "three"))
    ended = choice(copy, files.quiz, "--target_risk", "0.95", "--abstain_by", "epistemic")
    assert ended.code == 0, ended.err
    kept = json.loads((copy / "abstention.json").read_text(encoding="utf-8"))
    assert (kept["score"], kept["target_risk"], kept["delta"]) == ("epistemic", 0.95, 0.1)
    assert kept["calibration_examples"] == 20
    assert f"epistemic ≤ {kept['threshold']:.4f}" in " ".join(ended.out.split())
    assert not [f for f in copy.iterdir() if f.name.endswith(".partial")]
    LoraEnsemble.load(copy)  # the folder is still an ensemble

    other = Path(shutil.copytree(files.ensemble, tmp_path / "other"))
    ended = choice(other, files.quiz, "--target_risk", "0.01")
    assert "No threshold on total" in ended.out
    assert "removed" not in ended.out
    assert not (other / "abstention.json").exists()


def test_a_search_that_finds_nothing_leaves_no_threshold_in_force(files: Files, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(files.ensemble, tmp_path / "three"))
    choice(copy, files.quiz, "--target_risk", "0.95")
    assert (copy / "abstention.json").exists()
    assert choice(copy, files.quiz).code == 0  # no search: what is in force stays
    assert (copy / "abstention.json").exists()
    ended = choice(copy, files.quiz, "--target_risk", "0.01")
    assert "The threshold of an earlier search" in ended.out
    assert "is removed" in " ".join(ended.out.split())
    assert not (copy / "abstention.json").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--choice_by", "words"], ["--choice_by: 'words' is none of letter, text"]),
        (["--target_risk", "5"], ["--target_risk: is 5", "between 0 and 1"]),
        (["--calibration", "1"], ["--calibration: is 1"]),
        (["--resamples", "-1"], ["--resamples: is -1"]),
        (["--abstain_by", "entropy"], ["--abstain_by: 'entropy' is none of total"]),
        (["--group", "topic"], ["--group: there is no column 'topic'"]),
        (["--baseline", "nowhere/at/all"], ["nowhere/at/all: there is no such folder"]),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], parts: list[str], files: Files) -> None:
    assert_refused(renyi("evaluate", files.ensemble, files.quiz, "--task", "choice", *flags), *parts)


def test_one_member_has_no_disagreement_to_abstain_by(files: Files) -> None:
    assert_refused(choice(files.single, files.quiz, "--abstain_by", "epistemic"), "a single member does not disagree")
    assert choice(files.single, files.quiz).code == 0


def test_tasks_that_read_one_file(files: Files, rows_file: Path) -> None:
    ended = renyi("evaluate", files.ensemble, rows_file, rows_file, "--task", "preference")
    assert_refused(ended, "DATA: ", "is a second file, and --task preference reads one")


# ---- Text ------------------------------------------------------------------------------------------------------------


def test_perplexity_is_what_score_says(
    trained: tuple[Path, Ended], files: Files, rows_file: Path, tmp_path: Path
) -> None:
    def evaluate(*argv: object) -> Ended:
        return renyi("evaluate", trained[0], *argv, "--task", "perplexity", "--resamples", "30")

    other = write_rows(tmp_path / "other.jsonl", [{"prompt": f"w{i}", "completion": " w3 w4"} for i in range(4)])
    report = tmp_path / "report"
    ended = evaluate(rows_file, other, "--baseline", files.single, "--json", "--report", report)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert [s["name"] for s in told["systems"]] == ["mixture", "member 0", "member 1", "one"]
    groups = {g["group"]: g for g in told["groups"]}
    assert (groups["schools"]["examples"], groups["other"]["examples"]) == (48, 4)
    summary = json.loads(renyi("score", trained[0], rows_file, "--json", "--output", tmp_path / "x.jsonl").out)
    assert groups["schools"]["nll"] == pytest.approx(summary["mixture_nll_per_token"])
    assert groups["schools"]["tokens"] == summary["tokens"]
    page = (report / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    out = evaluate(rows_file).out
    assert "Perplexity" in out
    assert "member 1" in out
    assert "Who knows what" not in out  # one file is one group


def test_the_report_of_preferences(files: Files, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w7", "rejected": f" w{i + 2}", "who": i % 2} for i in range(12)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    report = tmp_path / "report"
    ended = renyi(
        "evaluate", files.ensemble, data, "--task", "preference", "--report", report, "--group", "who", "--json"
    )
    assert ended.code == 0, ended.err
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "<h1>Preferences</h1>" in page
    assert page.count("data:image/png;base64,") == 4
    assert "question" not in page
    told = json.loads(ended.out)
    assert json.loads((report / "evaluation.json").read_text(encoding="utf-8")) == told
    # The page's Brier score is the terminal's and the JSON's: one table of one number.
    shown = renyi("evaluate", files.ensemble, data, "--task", "preference").out
    row = next(line for line in shown.splitlines() if line.startswith("mixture")).split()
    figures = re.sub(r"<[^>]+>", " ", re.search(r"<tr><td>mixture</td>.*?</tr>", page)[0]).split()  # type: ignore[index]
    assert row == figures
    assert row[3] == f"{told['mixture']['brier']:.4f}"


def test_one_question_has_no_interval(files: Files, tmp_path: Path) -> None:
    quiz = write_quiz(tmp_path / "one.csv", 1, "one")
    ended = choice(files.ensemble, quiz, "--report", tmp_path / "report")
    assert ended.code == 0, ended.err
    assert "±0.0" not in ended.out
    row = next(line for line in ended.out.splitlines() if line.startswith("mixture"))
    assert "±–" in row
    told = json.loads(choice(files.ensemble, quiz, "--json").out)
    assert told["systems"][0]["nll"]["low"] is None
    assert "[–]" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    without = renyi("evaluate", files.ensemble, quiz, "--task", "choice", "--choice_by", "text", "--resamples", 0).out
    assert "±" not in without.partition("Does it know")[0]


NAMES = ["$x^$", "\\frac{$", "a$b", "\x1b[31mred", "\u202eabc", "<b>bold</b>", "[bold]"]


def test_names_from_data_are_shown_as_they_are(files: Files, tmp_path: Path) -> None:
    """Neither a formula, a colour, markup nor a change of direction; and none of them loses the evaluation."""
    draw = random.Random(0)
    rows = [
        {"question": f"w{i} {NAMES[i % len(NAMES)]}", "choices": ["w1", "w2 w3"], "answer": draw.randrange(2)}
        | {"who": NAMES[i % len(NAMES)]}
        for i in range(14)
    ]
    data, report = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "report"
    named = Path(shutil.copytree(files.single, tmp_path / "$\\frac$"))
    ended = choice(files.ensemble, data, "--group", "who", "--report", report, "--baseline", named)
    assert ended.code == 0, ended.err
    assert "members_by_groups.png" in {f.name for f in report.iterdir()}
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "could not be drawn" not in page
    for text in (ended.out, page):
        assert not set(text) & {"\x1b", "\u202e"}
        assert "\\x1b[31mred" in text
        assert "\\u202eabc" in text
    assert "<b>bold" not in page
    assert "[bold]" in ended.out
    told = json.loads((report / "evaluation.json").read_text(encoding="utf-8"))
    assert {group["group"] for group in told["groups"]} == set(NAMES)


def test_a_chart_that_fails_loses_nothing(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from renyi.evaluation import plots

    def fails(*_: object) -> bytes:
        raise ValueError("no such font")

    monkeypatch.setattr(plots, "draw_risk_coverage", fails)
    ended = choice(files.ensemble, files.quiz, "--report", tmp_path / "report", "--json")
    assert ended.code == 0, ended.err
    kept = json.loads((tmp_path / "report" / "evaluation.json").read_text(encoding="utf-8"))
    assert kept == json.loads(ended.out)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "This chart could not be drawn (ValueError: no such font)." in page
    assert page.count("data:image/png;base64,") == 3


def test_a_bar_of_progress_names_a_folder_as_it_is() -> None:
    """On a terminal, where it is drawn: braces and brackets are no format and no markup, and nothing is coloured."""
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, color_system=None, width=100)
    with progress_bar(terminal, "scoring {x} [bold]y[/] \x1b[31mz", 2) as progress:
        progress(1)
    assert "scoring {x} [bold]y[/] \\x1b[31mz" in drawn.getvalue()
