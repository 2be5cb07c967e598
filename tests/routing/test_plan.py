"""How a batch is cut into parts: which rows go together, what is cut off, and what each part counts."""

import pytest
import torch
from torch import Tensor

from renyi.routing import PLACES, SHARE, RoutingPlan, share_of, split, unpacked
from renyi.routing.plan import take_examples


def batch_of(lengths: list[int], width: int) -> dict[str, Tensor]:
    """Rows of those lengths, padded on the right; each number says its row and column."""
    rows = 100 * torch.arange(len(lengths))[:, None] + torch.arange(width)
    return {"input_ids": rows, "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long()}


def test_the_budget_is_the_greatest_number_of_tokens_that_is_allowed():
    assert RoutingPlan(token_budget=12).takes(3, 4)
    assert not RoutingPlan(token_budget=11).takes(3, 4)
    assert RoutingPlan().takes(10**6, 10**6)


@pytest.mark.parametrize(
    ("kind", "budget", "plain"), [("dense", 12, True), ("dense", 11, False), ("sparse", 12, False)]
)
def test_only_a_dense_pass_within_the_budget_is_plain(kind, budget, plain):
    assert RoutingPlan(kind, token_budget=budget).is_plain(3, 4) == plain


def test_examples_are_taken_with_all_that_belongs_to_them():
    """Three pairs, chosen rows first: examples 2 and 0 are rows 2, 0 and 5, 3. The longest of these has 3 tokens."""
    batch = batch_of([2, 5, 3, 1, 5, 3], 5) | {
        "labels": torch.arange(30).view(6, 5),
        "of_pairs": torch.tensor([10.0, 11.0, 12.0]),
        "features": torch.arange(18).view(6, 3),  # not as wide as the ids
        "states": torch.arange(60).view(6, 5, 2),  # not a number for each token
        "of_columns": torch.arange(5),  # neither rows nor pairs
        "number": torch.tensor(7.0),
        "name": "batch",
    }
    rows = [2, 0, 5, 3]
    found = take_examples(batch, torch.tensor([2, 0]), 2)
    assert found.keys() == batch.keys()
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(found[name], batch[name][rows, :3]), name
    for name in ("features", "states"):
        assert torch.equal(found[name], batch[name][rows]), name
    assert found["of_pairs"].tolist() == [12.0, 10.0]
    for name in ("of_columns", "number", "name"):
        assert found[name] is batch[name]


def test_without_a_mask_no_column_is_cut_off():
    ids = torch.arange(12).view(3, 4)
    assert torch.equal(take_examples({"input_ids": ids}, torch.tensor([1]))["input_ids"], ids[1:2])


def test_padding_on_the_left_stays():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    found = take_examples({"input_ids": torch.arange(12).view(3, 4), "attention_mask": mask}, torch.tensor([0]))
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("budget", "members", "expected"),
    [
        (100, 2, [[0, 1, 2, 3, 4]]),  # 2 · 5 · 10 tokens
        (99, 2, [[1, 3, 0, 4], [2]]),  # 4 examples are 80 tokens, 5 would be 100
        (40, 2, [[1, 3], [0, 4], [2]]),
        (39, 2, [[1], [3], [0], [4], [2]]),
        (1, 2, [[1], [3], [0], [4], [2]]),  # an example is never cut
        (100, 4, [[1, 3], [0, 4], [2]]),
    ],
)
def test_parts_hold_as_many_examples_as_the_budget_takes_and_the_longest_come_first(budget, members, expected):
    """Examples of one length stay in their order."""
    batch = batch_of([4, 10, 2, 10, 4], 10)
    parts = RoutingPlan(token_budget=budget).parts(batch, members)
    assert [(part["input_ids"][:, 0] // 100).tolist() for part in parts] == expected
    if len(parts) == 1:
        assert parts == [batch]
        assert share_of(batch) == 1.0
    else:
        assert [share_of(part) for part in parts] == [len(rows) / 5 for rows in expected]
        longest = [max([4, 10, 2, 10, 4][row] for row in rows) for rows in expected]
        assert [part["input_ids"].shape[1] for part in parts] == longest


def test_parts_of_pairs_keep_pairs_together_and_go_by_the_longer_completion():
    batch = batch_of([1, 2, 3, 1, 6, 2], 6)
    parts = RoutingPlan(token_budget=30, rows_per_example=2).parts(batch, 2)
    assert [(part["input_ids"][:, 0] // 100).tolist() for part in parts] == [[1, 4], [2, 5], [0, 3]]
    assert [part[SHARE] for part in parts] == [1 / 3] * 3
    one = batch_of([3, 6], 6)
    assert RoutingPlan(token_budget=1, rows_per_example=2).parts(one, 2) == [one]


def test_without_a_mask_parts_keep_the_order_of_the_batch():
    ids = 100 * torch.arange(3)[:, None] + torch.arange(4)
    parts = RoutingPlan(token_budget=8).parts({"input_ids": ids}, 1)
    assert [part["input_ids"].tolist() for part in parts] == [ids[:2].tolist(), ids[2:].tolist()]


def test_a_part_is_split_by_a_property_of_its_rows():
    batch = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.ones(4, 3), SHARE: 0.5}
    batch["attention_mask"][[0, 2], 2] = 0
    batch[PLACES] = torch.tensor([7, 5, 3, 1])
    assert split(batch, torch.zeros(4, dtype=torch.bool)) == [batch]
    assert split(batch, torch.ones(4, dtype=torch.bool)) == [batch]
    first, second = split(batch, torch.tensor([True, False, True, True]))
    assert first["input_ids"].tolist() == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
    assert (first[SHARE], second[SHARE]) == (0.375, 0.125)
    assert (first[PLACES].tolist(), second[PLACES].tolist()) == ([7, 3, 1], [5])


def test_packed_rows_are_taken_apart():
    """Two rows of 3 + 2 and of 1 + 4 tokens. Of the example with one token, nothing can be trained."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    ids = torch.arange(10, 20).view(2, 5)
    labels = ids.masked_fill(positions == 0, -100)
    labels[1, 2] = -100
    found = unpacked({"input_ids": ids, "labels": labels, "position_ids": positions, "max_length_q": 4})
    assert found.keys() == {"input_ids", "labels", "attention_mask", PLACES}
    assert found["input_ids"].tolist() == [[10, 11, 12, 0], [13, 14, 0, 0], [16, 17, 18, 19]]
    assert found["labels"].tolist() == [[-100, 11, 12, -100], [-100, 14, -100, -100], [-100, -100, 18, 19]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert found[PLACES].tolist() == [0, 0, 1]
    parts = RoutingPlan(token_budget=8).parts(found, 2)
    assert [part[PLACES].tolist() for part in parts] == [[1], [0], [0]]


def test_a_packed_row_without_a_trained_token_keeps_its_examples():
    positions = torch.tensor([[0, 1, 0, 1]])
    batch = {"input_ids": positions + 5, "labels": torch.full((1, 4), -100), "position_ids": positions}
    assert unpacked(batch)["attention_mask"].tolist() == [[1, 1], [1, 1]]
