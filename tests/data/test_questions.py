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
        ({"question": "?", "choices": ["a"], "answer": 0}, ["row 1: has no 2 to 26 options"]),
        (
            {"question": "?", "choice0": None, "choice1": "a", "choice2": "b", "answer": 1},
            ["row 1: an option is empty"],
        ),
        ({"question": "?", "choices": ["a", ""], "answer": 0}, ["row 1: an option is empty"]),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, ["column answer: is 2", "0 to 1, A to B"]),
        ({"question": "?", "choices": ["a", "a"], "answer": "a a"}, ["column answer: is 'a a'"]),
        ({"question": "?", "choices": ["a", "b"], "answer": None}, ["column answer: is None"]),
    ],
)
def test_bad_rows(row: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as error:
        read_questions(Dataset.from_list([row]), "quiz.csv")
    for part in ("quiz.csv", *parts):
        assert part in str(error.value)
