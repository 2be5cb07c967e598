"""Truths about samples: pass@k and majorities by enumeration, n-grams by hand, BLEU by another library."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import bleu_score

from renyi.evaluation import Sample, distinct_n, evaluate_sampling, majority_accuracy, pass_at_k, self_bleu
from renyi.evaluation.sample_quality import contains_answer, normalised, words

properties = settings(max_examples=60, deadline=None)
some_words = st.lists(st.sampled_from("abc"), max_size=7)

# ---- Right answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([i < right for i in range(samples)], k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of 5 samples of a model that is right with probability p, its mean is 1 − (1 − p)^k."""
    for p, k in itertools.product((0.1, 0.5, 0.9), range(1, 6)):
        mean = sum(math.comb(5, c) * p**c * (1 - p) ** (5 - c) * pass_at_k(5, c, k) for c in range(6))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_what_cannot_be(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="give no pass"):
        pass_at_k(samples, right, k)


@pytest.mark.parametrize(
    ("answers", "accuracy"),
    [
        (["y", "y", "n"], 1.0),
        (["n", "y", "n"], 0.0),
        (["y", "n"], 1 / 2),
        (["n", "y", "m", "n", "y", "m", "l"], 1 / 3),
        (["y"], 1.0),
        ([None, None, "y"], 1.0),
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_majority(answers: list[str | None], accuracy: float) -> None:
    assert majority_accuracy(answers, [a == "y" for a in answers]) == pytest.approx(accuracy)


@properties
@given(st.lists(st.sampled_from(["y", "z", "n", "m", None]), min_size=1, max_size=9), st.randoms())
def test_majority_is_the_mean_over_fair_draws_and_no_matter_of_order(
    answers: list[str | None], draw: random.Random
) -> None:
    counts = {a: answers.count(a) for a in answers if a is not None}
    tied = [a for a, n in counts.items() if n == max(counts.values())]
    expected = sum(a in ("y", "z") for a in tied) / len(tied) if tied else 0.0
    shuffled = draw.sample(answers, len(answers))
    for order in (answers, shuffled):
        assert majority_accuracy(order, [a in ("y", "z") for a in order]) == pytest.approx(expected)


def test_an_answer_that_is_partly_right() -> None:
    """A user's check may call one text right in one sample and wrong in another."""
    assert majority_accuracy(["a", "a", "b"], [True, False, True]) == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Forty-Two.\n", "forty-two"),
        ("“Rome”!", "rome"),
        ("the   red\tone ?", "the red one"),
        ("−3", "-3"),
        ("0.5", "0.5"),
        ("٣", "٣"),
        ("ﬁve", "five"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ('he said "no".', 'he said "no'),
        ("...", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


@properties
@given(st.text(max_size=20))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It is 3.", "3", True),
        ("It is 13.", "3", False),
        ("In New  York, I think", "new york", True),
        ("f(x) = 2", "F(x)", True),
        ("", "3", False),
        ("Romeo", "Rome", False),
        # A number is compared by value, and is no part of another number.
        *((text, "3", True) for text in ("3", "(3)", "x=3", "$3.", "3.0", "5-3", "a 3, b", "answer:3", "3 %", "+3")),
        *((text, "3", False) for text in ("3.5", "-3", "−3", "3,000", "1,3", "0.3", ".3", "3/4", "13", "3rd", "3:30")),
        *((text, "3,000", True) for text in ("3000", "3,000 men", "3,000.0")),
        *((text, "-3", found) for text, found in (("it is −3.", True), ("5-3", False), ("3", False))),
        ("0.50 or so", "1/2", False),
        ("one 1/2 of it", "1/2", True),
        ("June 3.", "june 3", True),
        ("June 3.5", "june 3", False),
        ("1.3 apples", "3 apples", False),
    ],
)
def test_contains(text: str, answer: str, found: bool) -> None:
    assert contains_answer(text, answer) is found


# ---- Variety ---------------------------------------------------------------------------------------------------------


def test_distinct_by_hand() -> None:
    samples = [["a", "b", "a"], ["a", "b"], []]
    assert distinct_n(samples, 1) == 2 / 5
    assert distinct_n(samples, 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(samples, 3) == 1
    assert math.isnan(distinct_n(samples, 4))


@properties
@given(st.lists(some_words, max_size=6), st.integers(1, 3), st.integers(2, 5))
def test_copies_divide_distinct_n(samples: list[list[str]], n: int, copies: int) -> None:
    once, often = distinct_n(samples, n), distinct_n(samples * copies, n)
    assert often == pytest.approx(once / copies, nan_ok=True)
    assert math.isnan(once) or 0 < once <= 1


def test_words() -> None:
    assert words("Don't  stop,\nÉva_1!") == ["Don", "'", "t", "stop", ",", "Éva_1", "!"]
    assert words(" \n") == []


def test_self_bleu_by_hand() -> None:
    """Two samples that differ in the last of five words: precisions 4/5, 3/4, 2/3, 1/2, and no brevity penalty."""
    assert self_bleu([list("abcde"), list("abcdf")]) == pytest.approx(0.2**0.25)
    assert self_bleu([list("ab"), list("ac")]) == 0  # no bigram in common, and no smoothing
    # As much and no more: of "a b" against "a b a b" all n-grams are found, but it is half as long.
    short, long = math.exp(1 - 4 / 2), 0.0
    assert self_bleu([list("ab"), list("abab")]) == pytest.approx((short + long) / 2)


def test_self_bleu_is_torchmetrics_bleu_against_the_others() -> None:
    texts = ["one day a girl named lily found a needle", "one day a boy named tim found a needle in his room"]
    texts += ["one day a girl named mia lost a needle in her room", "there was a boy"]
    expected = [float(bleu_score([t], [[o for o in texts if o != t]])) for t in texts]
    assert self_bleu([t.split() for t in texts]) == pytest.approx(np.mean(expected))
    assert 0.2 < np.mean(expected) < 0.9


def test_self_bleu_by_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    draw = random.Random(0)
    for longest in (1, 2, 3, 4, 6, 9) * 5:
        texts = [" ".join(draw.choice("ab") for _ in range(draw.randint(1, longest))) for _ in range(5)]
        none = {"smooth_method": "none", "use_effective_order": True, "tokenize": "none"}
        expected = [
            sacrebleu.sentence_bleu(t, texts[:i] + texts[i + 1 :], **none).score / 100 for i, t in enumerate(texts)
        ]
        assert self_bleu([t.split() for t in texts]) == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("text", ["w1", "w1 w2", "w1 w2 w3 w4 w5 w6", "w1 w1 w1"])
def test_equal_samples_have_self_bleu_1(text: str) -> None:
    assert self_bleu([text.split()] * 4) == pytest.approx(1)


def test_self_bleu_where_there_is_none() -> None:
    assert math.isnan(self_bleu([["a", "b"]]))
    assert math.isnan(self_bleu([[], []]))
    assert math.isnan(self_bleu([]))
    assert self_bleu([["a"], ["a"], []]) == pytest.approx(1)  # without words there is no BLEU
    assert self_bleu([["a"], []]) == 0


@properties
@given(st.lists(some_words, min_size=2, max_size=5), st.randoms())
def test_self_bleu_lies_between_0_and_1_in_any_order(samples: list[list[str]], draw: random.Random) -> None:
    found = self_bleu(samples)
    assert math.isnan(found) == (not any(samples))
    if any(samples):
        assert -1e-6 <= found <= 1 + 1e-6
        assert self_bleu(draw.sample(samples, len(samples))) == pytest.approx(found, abs=1e-6)


# ---- The figures -----------------------------------------------------------------------------------------------------


def sample(text: str, tokens: int, base: float, own: float | None = None, right: bool | None = None) -> Sample:
    entropy = None if own is None else -2 * own
    return Sample(text, tokens, base, own, entropy, None if own is None else tokens == 6, normalised(text), right)


PROMPTS = [
    [sample("a b", 3, -3.0, -1.0, True), sample("a c", 3, -5.0, -2.0, False)],
    [sample("d", 2, -2.0, -0.5, True), sample("d", 6, -1.0, -0.5, True)],
]


def test_the_figures_by_hand() -> None:
    found = evaluate_sampling({"policy": PROMPTS}, resamples=50)
    (s,) = found.systems
    assert (found.prompts, s.name, s.samples, found.most_varied) == (2, "policy", 2, [0, 1])
    assert s.accuracy is not None
    assert s.majority is not None
    assert s.pass_at is not None
    assert (s.accuracy.value, s.majority.value) == (3 / 4, (1 / 2 + 1) / 2)
    assert {k: e.value for k, e in s.pass_at.items()} == {1: 3 / 4, 2: 1}
    assert s.distinct[1].value == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert s.distinct[2].value == 1  # of the one prompt that has pairs of words
    assert math.isnan(s.distinct[3].value)
    assert s.distinct_all[1] == 4 / 6
    assert (s.unique.value, s.self_bleu.value) == (3 / 4, pytest.approx((0 + 1) / 2))
    assert (s.lengths.mean, s.lengths.quantiles[50], s.lengths.truncated) == (3.5, 3, 1 / 4)
    assert s.lengths.sd == pytest.approx(1.5)
    assert s.base_log_prob_per_token.value == pytest.approx(-11 / 14)
    assert s.log_prob_per_token.value == pytest.approx(-4 / 14)
    assert s.entropy_per_token.value == pytest.approx(8 / 14)
    assert (s.base_log_prob.value, s.log_prob.value) == (-11 / 4, -1)


def test_intervals_are_over_prompts() -> None:
    """Prompts with all samples right or all wrong: an interval over samples would be narrower."""
    prompts = [[sample("a", 2, -1.0, -1.0, p % 4 != 0)] * 25 for p in range(40)]
    (s,) = evaluate_sampling({"policy": prompts}, resamples=2000).systems
    assert s.accuracy is not None
    assert s.accuracy.value == 0.75
    half = 1.96 * math.sqrt(0.75 * 0.25 / 40)
    assert s.accuracy.high - s.accuracy.low == pytest.approx(2 * half, rel=0.1)
    assert (s.self_bleu.low, s.self_bleu.high) == (pytest.approx(1), pytest.approx(1))


def test_what_is_not_known_is_not_reported() -> None:
    one = [[sample("a b c", 4, -3.0)], [sample("", 0, 0.0)]]
    (s,) = evaluate_sampling({"given": one}, resamples=20).systems
    assert (s.accuracy, s.majority, s.pass_at, s.lengths.truncated) == (None, None, None, None)
    for figure in (s.self_bleu, s.log_prob, s.log_prob_per_token, s.entropy_per_token):
        assert all(map(math.isnan, figure))
    assert s.base_log_prob_per_token.value == -3 / 4
    (empty,) = evaluate_sampling({"mute": [[sample("", 0, 0.0)] * 2]}, resamples=20).systems
    assert math.isnan(empty.base_log_prob_per_token.value)
    assert (empty.lengths.mean, empty.unique.value, empty.base_log_prob.value) == (0, 1 / 2, 0)


def test_models_side_by_side_and_the_most_varied_prompts_of_the_first() -> None:
    def of(*texts: str) -> list[Sample]:
        return [sample(text, 3, -1.0) for text in texts]

    first = [of("a b", "a b", "a b"), of("a b", "c d", "e f"), of("a b", "a b c", "a b d"), of("g", "g", "h")]
    found = evaluate_sampling({"policy": first, "base": first[::-1]}, resamples=0)
    assert [s.name for s in found.systems] == ["policy", "base"]
    assert found.most_varied == [1, 2, 3, 0]
    assert found.systems[0].unique == pytest.approx(found.systems[1].unique, nan_ok=True)


@pytest.mark.parametrize(
    "systems",
    [{}, {"a": []}, {"a": [[]]}, {"a": PROMPTS, "b": PROMPTS[:1]}, {"a": [PROMPTS[0], PROMPTS[1][:1]]}],
)
def test_ragged_or_nothing(systems: dict[str, list[list[Sample]]]) -> None:
    with pytest.raises(ValueError, match="samples of"):
        evaluate_sampling(systems)
