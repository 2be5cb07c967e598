"""Votes of pairs: how they are read, and what is refused."""

import pytest
from datasets import Dataset
from tiny import pair_rows, tiny_tokenizer

from renyi.data import PairPreparation, check_pairs, prepare_pairs
from renyi.errors import ConfigError, DataError

COUNTS = ("votes_chosen", "votes_rejected", "votes_tie")


def rows_with(**columns) -> Dataset:
    number = len(next(iter(columns.values())))
    return Dataset.from_list(
        [{**row, **{c: columns[c][i] for c in columns}} for i, row in enumerate(pair_rows(number))]
    )


def ann(*labels: tuple[str, str]) -> list[dict[str, str]]:
    return [{"annotator": who, "label": label} for who, label in labels]


def prepared(rows: Dataset, **settings) -> Dataset:
    return prepare_pairs(rows, tiny_tokenizer(), PairPreparation(**settings))


def test_counts_and_annotations_say_the_same():
    counts = rows_with(votes_chosen=[2, 0], votes_rejected=[1, 3], votes_tie=[0, None])
    lists = rows_with(
        annotations=[
            ann(("a", "chosen"), ("b", "rejected"), ("c", "chosen")),
            ann(*zip("abc", ["rejected"] * 3, strict=True)),
        ]
    )
    for rows in (counts, lists):
        found = prepared(rows)
        assert [list(found[c]) for c in COUNTS] == [[2, 0], [1, 3], [0, 0]]
        assert "with" in str(check_pairs(rows))
    assert "votes_chosen" not in prepared(pair_rows(2)).column_names


def test_annotators_become_rows_of_their_groups():
    rows = rows_with(annotations=[ann(("a", "chosen"), ("b", "tie")), ann(("b", "rejected"))])
    found = prepared(rows, routing_group="annotator")
    assert list(found["routing_group"]) == ["a", "b", "b"]
    assert [list(found[c]) for c in COUNTS] == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert found[0]["prompt_ids"] == found[1]["prompt_ids"] == prepared(rows)[0]["prompt_ids"]


def test_a_column_of_groups_is_kept_as_text():
    rows = rows_with(author=[7, 3])
    assert list(prepared(rows, routing_group="author")["routing_group"]) == ["7", "3"]
    assert "routing_group" not in prepared(rows).column_names
    with pytest.raises(ConfigError, match="no column 'writer'"):
        PairPreparation(routing_group="writer").check(rows)
    with pytest.raises(DataError, match="empty") as caught:
        PairPreparation(routing_group="author").check(rows_with(author=[7, None]), "votes.jsonl")
    assert caught.value.where == "votes.jsonl, row 2, column author"


@pytest.mark.parametrize(
    ("columns", "match", "column"),
    [
        ({"votes_chosen": [1, -1], "votes_rejected": [0, 2]}, "-1", "votes_chosen"),
        ({"votes_chosen": [1, 1.5], "votes_rejected": [0.0, 2.0]}, "1.5", "votes_chosen"),
        ({"votes_chosen": [1, 0], "votes_rejected": [0, 0]}, "all counts are 0", "votes_chosen"),
        ({"annotations": [ann(("a", "chosen")), ann(("a", "better"))]}, "'better'", "annotations"),
        ({"annotations": [ann(("a", "chosen")), []]}, "empty", "annotations"),
        ({"annotations": [ann(("a", "chosen")), ann(("a", "chosen"), ("a", "rejected"))]}, "'a' gave", "annotations"),
    ],
)
def test_a_bad_vote_is_named_by_its_row(columns, match, column):
    with pytest.raises(DataError, match=match) as caught:
        check_pairs(rows_with(**columns), "votes.jsonl")
    assert caught.value.where == f"votes.jsonl, row 2, column {column}"
    assert caught.value.hint
    with pytest.raises(DataError, match=match):
        prepared(rows_with(**columns))


def test_opposite_labels_in_two_rows_are_found():
    first = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    turned = {"prompt": "w1", "chosen": " w3", "rejected": " w2"}
    same = [{**first, "annotations": ann(("a", "chosen"))}, {**turned, "annotations": ann(("a", "rejected"))}]
    check_pairs(Dataset.from_list(same))
    opposite = [same[0], {**turned, "annotations": ann(("b", "chosen"), ("a", "chosen"))}]
    with pytest.raises(DataError, match=r"labels the pair of votes\.jsonl, row 1 in another way") as caught:
        check_pairs(Dataset.from_list(opposite), "votes.jsonl")
    assert caught.value.where == "votes.jsonl, row 2, column annotations"


def test_columns_that_cannot_be_votes_are_refused():
    with pytest.raises(DataError, match="every label is a tie"):
        check_pairs(rows_with(votes_chosen=[0, 0], votes_tie=[1, 2]))
    with pytest.raises(DataError, match="say the same"):
        check_pairs(rows_with(votes_chosen=[1], annotations=[ann(("a", "chosen"))]))
    with pytest.raises(DataError, match="without votes_chosen"):
        check_pairs(rows_with(votes_rejected=[1]))
    nameless = rows_with(annotations=[[{"annotator": None, "label": "chosen"}]])
    check_pairs(nameless)
    with pytest.raises(DataError, match="without an annotator"):
        PairPreparation(routing_group="annotator").check(nameless)
