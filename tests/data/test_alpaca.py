"""Alpaca records train as the conversations that they mean, and a bad one is named."""

from typing import Any

import pytest
from bytewise import byte_tokenizer

from renyi.data import Preparation
from renyi.data.files import exact_dataset
from renyi.errors import DataError

TOKENIZER = byte_tokenizer()


def conversation(question: str, *before: tuple[str, str]) -> dict[str, Any]:
    turns = [*before, ("user", question)]
    return {
        "prompt": [{"role": role, "content": text} for role, text in turns],
        "completion": [{"role": "assistant", "content": "Paris"}],
    }


RECORDS = {
    "an instruction": ({"instruction": "Capital?", "output": "Paris"}, conversation("Capital?")),
    "an empty input": ({"instruction": "Capital?", "input": "", "output": "Paris"}, conversation("Capital?")),
    "an input": (
        {"instruction": "Capital?", "input": "Of France.", "output": "Paris"},
        conversation("Capital?\nOf France."),
    ),
    "a system prompt and earlier turns": (
        {"instruction": "Capital?", "output": "Paris", "system": "Be short.", "history": [["Hello", "Hi"]]},
        conversation("Capital?", ("system", "Be short."), ("user", "Hello"), ("assistant", "Hi")),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_a_record_is_the_conversation_that_it_means(name: str, assistant_only: bool) -> None:
    settings = Preparation(assistant_only_loss=assistant_only)
    record, meant = (settings.prepare(exact_dataset([row]), TOKENIZER)[0] for row in RECORDS[name])
    assert record == meant


def test_only_the_output_is_trained_and_the_plan_says_what_is_read() -> None:
    rows = exact_dataset([{"instruction": "Capital?", "input": "", "output": "Paris", "topic": "x"}])
    assert str(Preparation(completion_only_loss=True).check(rows)) == "Alpaca · not read: topic"
    made = Preparation().prepare(rows, TOKENIZER)[0]
    assert TOKENIZER.decode([label for label in made["labels"] if label != -100]) == "Paris<end>"


def test_a_column_of_whole_texts_is_read_in_place_of_the_record() -> None:
    rows = exact_dataset([{"instruction": "Capital?", "output": "Paris", "text": "Capital? Paris"}])
    assert Preparation().check(rows).name == "text"


@pytest.mark.parametrize(
    ("row", "where", "what"),
    [
        ({"output": ""}, "row 2, column output", "is empty"),
        ({"output": 3}, "row 2, column output", "is 3"),
        ({"output": None}, "row 2, column output", "is missing"),
        ({"instruction": " "}, "row 2, column instruction", "is empty"),
        ({"input": ["a"]}, "row 2, column input", "is ['a']"),
        ({"history": [["a"]]}, "row 2, column history", "has ['a']"),
        ({"history": [["a", ""]]}, "row 2, column history", "has ['a', '']"),
    ],
)
def test_a_bad_record_is_named(row: dict[str, Any], where: str, what: str) -> None:
    good = {"instruction": "Capital?", "output": "Paris"}
    with pytest.raises(DataError) as error:
        Preparation().check(exact_dataset([good, {**good, **row}]), "facts.json")
    for part in ("facts.json", where, what):
        assert part in str(error.value)
