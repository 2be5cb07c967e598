"""The mixture in a batch of vLLM: equal to our own decoding however rows move, and never of a part of a group."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from renyi.ensemble.choosing import step
from renyi.errors import ConfigError
from renyi.objectives import mixture_log_probs
from renyi.vllm.groups import GROUP, MEMBER, WEIGHTS, Membership, membership_of
from renyi.vllm.mixing import Mixing, Record

V = 11
WEIGHTS_3 = (0.5, 0.3, 0.2)


def membership(group="a", member=0, weights=WEIGHTS_3, **more):
    return Membership(group, member, weights, **more)


class Batch:
    """A batch as vLLM keeps it: rows at indices, with the lists of their tokens."""

    def __init__(self):
        self.told: list[Record] = []
        self.mixing = Mixing(self.told.extend)
        self.rows: dict[int, tuple[Membership | None, list[int]]] = {}

    def add(self, *rows, removed=()):
        free = [i for i in range(64) if i not in self.rows or i in removed]
        added = [(index, row, []) for index, row in zip(free, rows, strict=False)]
        for index in removed:
            self.rows.pop(index)
        self.rows |= {index: (row, output) for index, row, output in added}
        gone = [index for index in removed if index not in self.rows]  # vLLM tells of no index that it fills again
        self.mixing.update(gone, added, [])

    def move(self, start, end, is_swap):
        first, second = self.rows.pop(start, None), self.rows.pop(end, None)
        self.rows[end] = first
        if is_swap:
            self.rows[start] = second
        self.mixing.update([], [], [(start, end, is_swap)])

    def logits(self, seed):
        """Random logits that depend on the member and on the step, and not on the row's place."""
        out = torch.randn(max(self.rows) + 1, V)
        for index, (row, _) in self.rows.items():
            if row is not None:
                generator = torch.Generator().manual_seed(seed * 100 + row.member)
                out[index] = torch.randn(V, generator=generator) * 3
        return out

    def choose(self, tokens):
        """Give every row of a group its next token."""
        for row, output in self.rows.values():
            if row is not None:
                output.append(tokens[row.group])


@pytest.mark.parametrize("mixture", ["sequence", "token"])
def test_it_is_our_own_decoding(mixture):
    """Scores and running weights are those of the step that `LoraEnsemble.generate` runs, on random logits."""
    batch, scores = Batch(), []
    batch.add(None, *(membership(member=m, mixture=mixture, alternatives=2, members=True) for m in (2, 0, 1)))
    log_w_K1 = torch.tensor(WEIGHTS_3, dtype=torch.float64).log()[:, None]
    for turn, token in enumerate([3, 3, 7, 0, 10]):
        logits = batch.logits(turn)
        before = logits.clone()
        logits_K1V = before[[2, 3, 1]][:, None]  # members 0, 1, 2
        seen = batch.mixing.apply(logits)

        def choice(ids, mixed, token=token):
            scores.append(mixed)
            return torch.tensor([token])

        now = step(logits_K1V, log_w_K1, torch.zeros(1, 1), choice, by_token=mixture == "token")
        torch.testing.assert_close(seen[1:], scores[-1].expand(3, V), rtol=0, atol=1e-6)
        assert (seen[1] == seen[2]).all()  # to the last bit, so that equal seeds draw equal tokens
        assert (seen[2] == seen[3]).all()
        assert (seen[0] == before[0]).all()  # the row that belongs to no group
        record = batch.told[-1]
        assert record.position == turn
        assert record.broken is None
        assert record.weights == pytest.approx(log_w_K1.exp()[:, 0].tolist(), abs=1e-12)
        for name in ("total", "aleatoric", "epistemic", "variation_ratio"):
            assert getattr(record, name) == pytest.approx(float(getattr(now.uncertainty, name)), abs=1e-6)
        top = mixture_log_probs(now.log_p, log_w_K1)[0].topk(2)
        assert [t for t, _ in record.alternatives] == top.indices.tolist()
        assert [t for t, _ in record.member_alternatives[1]] == now.log_p[1, 0].topk(2).indices.tolist()
        log_w_K1 = now.log_weights
        batch.choose({"a": token})
    if mixture == "sequence":
        assert record.weights != pytest.approx(WEIGHTS_3, abs=0.01)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=4), st.randoms())
def test_rows_move(moves, random):
    """However vLLM orders the rows, groups of different sizes get the same mixtures as in a batch of their own."""
    weights_2 = (0.25, 0.75)
    rows = [*(membership("a", m) for m in range(3)), *(membership("b", m, weights_2) for m in range(2)), None]
    random.shuffle(rows)
    batch, alone = Batch(), {"a": Batch(), "b": Batch()}
    batch.add(*rows)
    alone["a"].add(*(membership("a", m) for m in range(3)))
    alone["b"].add(*(membership("b", m, weights_2) for m in range(2)))
    for turn in range(3):
        mixed = batch.mixing.apply(batch.logits(turn))
        for other in alone.values():
            expected = other.mixing.apply(other.logits(turn))
            for row, _ in other.rows.values():
                index = next(i for i, (each, _) in batch.rows.items() if each == row)
                torch.testing.assert_close(mixed[index], expected[0], rtol=0, atol=1e-6)
        tokens = {"a": turn, "b": 5 - turn}
        for each in (batch, *alone.values()):
            each.choose(tokens)
        for start, end, is_swap in moves:
            # vLLM swaps rows that are there, and moves a row to a place that is free.
            if start in batch.rows and start != end and (is_swap and end in batch.rows):
                batch.move(start, end, True)
            elif start in batch.rows:
                batch.move(start, max(batch.rows) + 1, False)


def test_a_place_is_taken_by_another_group():
    batch = Batch()
    batch.add(*(membership("a", m) for m in range(3)))
    batch.mixing.apply(batch.logits(0))
    batch.choose({"a": 1})
    batch.add(*(membership("b", m, mixture="token") for m in (1, 2, 0)), removed=[0, 1, 2])
    batch.mixing.apply(batch.logits(1))
    assert batch.told[-1].group == "b"
    assert batch.told[-1].broken is None
    assert batch.told[-1].weights == pytest.approx(WEIGHTS_3)


def test_a_row_is_moved_onto_another():
    """The row that was there is gone; vLLM need not say so."""
    batch = Batch()
    batch.add(membership("old", 0, (1.0,)), *(membership("a", m) for m in range(3)))
    batch.move(3, 0, False)
    assert (batch.mixing.apply(batch.logits(0))[0] == batch.mixing.apply(batch.logits(0))[1]).all()
    assert {record.group for record in batch.told} == {"a"}


def assert_untouched(batch, seed, reason):
    logits = batch.logits(seed)
    before = logits.clone()
    assert (batch.mixing.apply(logits) == before).all()
    assert reason in batch.told[-1].broken


class TestBroken:
    def test_a_part_at_the_start(self):
        batch = Batch()
        batch.add(membership(member=0), membership(member=2))
        assert_untouched(batch, 0, "members [0, 2] of 3")
        batch.add(membership(member=1))  # too late: members 0 and 2 went on alone
        assert_untouched(batch, 1, "members [0, 2] of 3")

    def test_a_member_twice(self):
        batch = Batch()
        batch.add(membership(member=0), membership(member=1), membership(member=1))
        assert_untouched(batch, 0, "members [0, 1, 1] of 3")

    def test_a_row_leaves(self):
        batch = Batch()
        batch.add(*(membership(member=m) for m in range(3)))
        batch.mixing.apply(batch.logits(0))
        batch.choose({"a": 1})
        batch.rows.pop(1)
        batch.mixing.update([1], [], [])
        assert_untouched(batch, 1, "members [0, 2] of 3")

    def test_other_groups_go_on(self):
        batch = Batch()
        batch.add(membership("a", 0), *(membership("b", m) for m in range(3)))
        logits = batch.logits(0)
        before = logits.clone()
        batch.mixing.apply(logits)
        assert (logits[0] == before[0]).all()
        assert (logits[1] != before[1]).any()
        assert {record.group: record.broken is None for record in batch.told} == {"a": False, "b": True}

    def test_different_tokens(self):
        batch = Batch()
        batch.add(*(membership(member=m) for m in range(3)))
        batch.mixing.apply(batch.logits(0))
        for index, token in enumerate([4, 4, 5]):
            batch.rows[index][1].append(token)
        assert_untouched(batch, 1, "different tokens")

    def test_a_row_lags(self):
        batch = Batch()
        batch.add(*(membership(member=m) for m in range(3)))
        batch.mixing.apply(batch.logits(0))
        for index in (0, 1):
            batch.rows[index][1].append(4)
        assert_untouched(batch, 1, "different tokens")

    def test_tokens_out_of_sight(self):
        batch = Batch()
        batch.add(*(membership(member=m) for m in range(3)))
        batch.mixing.apply(batch.logits(0))
        batch.choose({"a": 1})
        batch.choose({"a": 2})
        assert_untouched(batch, 1, "out of sight")

    def test_rows_that_come_back_with_an_answer_begun(self):
        """After a preemption the running weights are lost with the rows."""
        batch = Batch()
        rows = [membership(member=m) for m in range(3)]
        batch.add(*rows)
        batch.mixing.apply(batch.logits(0))
        batch.mixing.update([0, 1, 2], [], [])
        batch.mixing.update([], [(index, row, [4]) for index, row in enumerate(rows)], [])
        assert_untouched(batch, 1, "begun")

    def test_a_token_that_vllm_hides(self):
        batch = Batch()
        batch.add(*(membership(member=m) for m in range(3)))
        batch.mixing.apply(batch.logits(0))
        batch.choose({"a": -1})
        assert_untouched(batch, 1, "--no-async-scheduling")

    def test_different_weights(self):
        batch = Batch()
        batch.add(membership(member=0), membership(member=1), membership(member=2, weights=(0.2, 0.3, 0.5)))
        assert_untouched(batch, 0, "different weights")

    def test_logits_that_are_not_numbers(self):
        batch = Batch()
        batch.add(*(membership(member=m) for m in range(3)), membership("b", 0, (1.0,)))
        logits = batch.logits(0)
        logits[1, 0] = math.nan
        before = logits.clone()
        batch.mixing.apply(logits)
        assert (logits[[0, 2]] == before[[0, 2]]).all()
        assert {record.group: record.broken is None for record in batch.told} == {"a": False, "b": True}


def test_a_step_without_a_new_token_is_repeated():
    """vLLM drops what it sampled while a prompt was not read to its end."""
    batch = Batch()
    batch.add(*(membership(member=m) for m in range(3)))
    batch.mixing.apply(batch.logits(0))
    first = batch.mixing.apply(batch.logits(1))
    other = Batch()
    other.add(*(membership(member=m) for m in range(3)))
    assert (first == other.mixing.apply(other.logits(1))).all()


class TestMembership:
    def test_it_travels(self):
        there = membership("g", 1, (0.5, 0.5), mixture="token", alternatives=5, members=True)
        assert membership_of(there.extra_args()) == there
        assert membership_of({"other": 1}) is None
        assert membership_of(None) is None

    @pytest.mark.parametrize(
        ("change", "where"),
        [
            ({MEMBER: 3}, MEMBER),
            ({MEMBER: 1.0}, MEMBER),
            ({GROUP: ""}, GROUP),
            ({WEIGHTS: [0.5, 0.2]}, WEIGHTS),
            ({WEIGHTS: [1.5, -0.5]}, WEIGHTS),
            ({WEIGHTS: []}, WEIGHTS),
            ({"renyi_mixture": "mean"}, "renyi_mixture"),
            ({"renyi_alternatives": 21}, "renyi_alternatives"),
            ({"renyi_size": 3}, "renyi_size"),
        ],
    )
    def test_what_is_wrong_is_named(self, change, where):
        with pytest.raises(ConfigError) as error:
            membership_of({**membership().extra_args(), **change})
        assert error.value.where == where

    def test_what_is_missing_is_named(self):
        with pytest.raises(ConfigError, match=GROUP):
            membership_of({MEMBER: 0, WEIGHTS: [1.0]})
