"""The recipes of docs/votes.md, run on small made-up rows of the published forms."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

from renyi.data import PairPreparation, check_pairs

PAGE = Path(__file__).parents[2] / "docs" / "votes.md"


@pytest.fixture(scope="module")
def recipes() -> dict:
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    return names


def test_helpsteer_preferences(recipes):
    row = recipes["from_helpsteer"](
        {
            "context": [{"role": "user", "content": "hello"}],
            "response1": "hi",
            "response2": "go away",
            "individual_preference": [{"score": s, "reasoning": "…"} for s in (-3, -1, 0, 2)],
        }
    )
    assert [row[c] for c in ("votes_chosen", "votes_rejected", "votes_tie")] == [2, 1, 1]
    check_pairs(Dataset.from_list([row]))


def test_attribute_scores(recipes):
    first, second = {"response": "hi", "helpfulness": [4, 3, 2]}, {"response": "no", "helpfulness": [1, 3, 3]}
    row = recipes["from_attribute_scores"]("hello", first, second)
    assert [row[c] for c in ("votes_chosen", "votes_rejected", "votes_tie")] == [1, 1, 1]
    check_pairs(Dataset.from_list([row]))


def test_prism(recipes):
    turn = [{"content": text, "score": score} for text, score in (("a", 90), ("b", 20), ("c", 88))]
    rows = list(recipes["from_prism"](turn, "user7", "hello"))
    chosen = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert chosen == [("a", "b"), ("c", "b")]
    PairPreparation(routing_group="user_id").check(Dataset.from_list(rows))


def test_ultrafeedback(recipes):
    def rated(text: str, **ratings: str) -> dict:
        return {"response": text, "annotations": {aspect: {"Rating": r} for aspect, r in ratings.items()}}

    completions = [
        rated("a", helpfulness="5", honesty="2", truthfulness="N/A"),
        rated("b", helpfulness="3", honesty="4", truthfulness="1"),
    ]
    (row,) = recipes["from_ultrafeedback"]({"instruction": "hello", "completions": completions})
    assert [(a["annotator"], a["label"]) for a in row["annotations"]] == [
        ("helpfulness", "chosen"),
        ("honesty", "rejected"),
    ]
    PairPreparation(routing_group="annotator").check(Dataset.from_list([row]))
