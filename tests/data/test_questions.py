"""The forms that multiple-choice rows may have, and which row is refused and why."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from renyi.data import Question, load_splits, read_questions
from renyi.errors import DataError

EXPECTED = Question("2 + 2?", ["3", "4", "5"], 1)


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["3", "4", "5"], "answer": 1},
        {"choices": ["3", "4", "5"], "answer": "B"},
        {"choices": ["3", "4 ", "5"], "answer": "b"},
        {"choice0": "3", "choice1": "4", "choice2": "5", "choice3": None, "answer": "1"},
        {"A": 3, "B": 4, "C": 5, "answer": "B"},
        {"choices": {"text": ["3", "4", "5"], "label": ["A", "B", "C"]}, "answer": "B"},
    ],
)
def test_forms(row: dict[str, Any]) -> None:
    assert read_questions(Dataset.from_list([{"question": "2 + 2?", **row}])) == [EXPECTED]


def test_an_answer_by_its_text() -> None:
    rows = Dataset.from_list([{"question": "Who?", "choices": ["she", "he"], "answer": "he"}])
    assert read_questions(rows)[0].answer == 1


def test_an_option_of_a_csv_file_may_be_none(tmp_path: Path) -> None:
    """Text that pandas would take for a missing value, and with it every later option for the one before."""
    file = tmp_path / "quiz.csv"
    file.write_text("question,choice0,choice1,choice2,answer\nHow many?,None,NA,null,1\nWhich?,a,b,,1\n")
    rows = load_splits(str(file))["train"]
    assert read_questions(rows) == [
        Question("How many?", ["None", "NA", "null"], 1),
        Question("Which?", ["a", "b"], 1),
    ]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"question": "?", "answer": 0}, ["the columns are question, answer", "choice0"]),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, ["row 1, column question: is empty"]),
        ({"question": "?", "choices": ["a"], "answer": 0}, ["row 1: does not have 2 to 26 options"]),
        (
            {"question": "?", "choice0": None, "choice1": "a", "choice2": "b", "answer": 1},
            ["row 1: an option is empty"],
        ),
        ({"question": "?", "choices": ["a", ""], "answer": 0}, ["row 1: an option is empty"]),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, ["column answer: is 2", "0 to 1, A to B"]),
        ({"question": "?", "choices": ["a", "a"], "answer": "a a"}, ["column answer: is 'a a'"]),
        ({"question": "?", "choices": ["a", "b"], "answer": None}, ["row 1, column answer: is missing (None)"]),
    ],
)
def test_bad_rows(row: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as error:
        read_questions(Dataset.from_list([row]), "quiz.csv")
    for part in ("quiz.csv", *parts):
        assert part in str(error.value)


# ---- One reading a column --------------------------------------------------------------------------------------------

CASES = Path(__file__).parents[3] / "shared/cases/questions"


def quiz(*rows: tuple[Any, Any]) -> Dataset:
    return Dataset.from_list([{"question": "?", "choices": choices, "answer": answer} for choices, answer in rows])


@pytest.mark.skipif(not CASES.exists(), reason="no cases in ../shared")
@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("answer_is_a_number.jsonl", ["4", "3", "5"]),
        ("numbers.csv", ["4", "2"]),
        ("labels_in_a_list.jsonl", ["a thermometer", "a hen", "an ice cube"]),
    ],
)
def test_cases(file: str, answers: list[str]) -> None:
    questions = read_questions(load_splits(str(CASES / file))["train"], file)
    assert [q.choices[q.answer] for q in questions] == answers


@pytest.mark.skipif(not CASES.exists(), reason="no cases in ../shared")
def test_a_missing_answer_is_named() -> None:
    with pytest.raises(DataError, match=r"one_answer_missing\.csv, row 3, column answer: is missing"):
        read_questions(load_splits(str(CASES / "one_answer_missing.csv"))["train"], "one_answer_missing.csv")


@pytest.mark.parametrize(
    ("rows", "answers"),
    [
        # A text in one row that is a number elsewhere: numbers fit every row, texts do not.
        ([(["1", "2", "3"], 2), (["a", "b", "c"], 0)], [2, 0]),
        ([(["3", "4"], "4"), (["4", "7"], "4"), (["0", "1"], "1")], [1, 0, 1]),  # as texts; as numbers 4 is none
        ([(["0", "1", "2"], 1), (["0", "1", "2"], "2")], [1, 2]),  # both readings say the same
        ([(["B", "C"], "C"), (["C", "A"], "C")], [1, 0]),  # a letter that no third option has: texts
        ([({"text": ["2", "1"], "label": ["1", "2"]}, "1")], [0]),  # a label, although it is a text as well
        ([({"text": ["x", "y"], "label": [1, 2]}, 2), ({"text": ["x", "y"], "label": [5, 6]}, 5)], [1, 0]),
        ([({"text": ["x", "y"], "label": ["1", "2"]}, 0), ({"text": ["x", "y"], "label": ["1", "2"]}, 1)], [0, 1]),
    ],
)
def test_a_column_is_read_in_one_way(rows: list[tuple[Any, Any]], answers: list[int]) -> None:
    # Rows one by one: a Dataset's columns have one type each, and these answers are of several.
    texts = [(choices, str(answer)) for choices, answer in rows]
    assert [q.answer for q in read_questions(quiz(*texts))] == answers


def test_columns_that_count_from_one() -> None:
    rows = [{"question": "?", "option1": "x", "option2": "y", "answer": str(i)} for i in (1, 2, 1)]
    assert [q.answer for q in read_questions(Dataset.from_list(rows))] == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([(["a", "b"], "0"), (["2", "1"], "1")], None),
        (
            [(["1", "0"], "1"), (["a", "0"], "0")],
            ["row 1, column answer: is '1'", "text of option A ('1')", "number of option B ('0')"],
        ),
        ([(["x", "A"], "A")], ["row 1", "text of option B ('A')", "letter of option A ('x')", "label"]),
        ([(["x", "y"], "A"), (["x", "y"], "1")], ["row 2", "is '1', read by number", "read by letter", "in one way"]),
        ([(["x", "y"], "A"), (["x", "y"], "z")], ["row 2", "is 'z', and there are 2 options"]),
        ([({"text": ["x", "y"], "label": ["1"]}, "1")], ["row 1: has 1 labels for 2 options"]),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(rows: list[tuple[Any, Any]], parts: list[str] | None) -> None:
    if parts is None:
        assert [q.answer for q in read_questions(quiz(*rows))] == [0, 1]
        return
    with pytest.raises(DataError) as error:
        read_questions(quiz(*rows), "quiz.jsonl")
    for part in ("quiz.jsonl", *parts):
        assert part in str(error.value)
