"""The preference world keeps its promises, and its closed forms are what a brute-force fit of its pairs finds."""

import math
from collections import Counter
from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from renyi.errors import ConfigError
from renyi.zoo import load_base
from renyi.zoo.preferences import (
    HELD_OUT_PEOPLE,
    Pair,
    PreferenceWorld,
    critical_alpha,
    single_reward_nll,
    specialists_nll,
)
from renyi.zoo.world import ATTRIBUTES, FORMS, PEOPLE, WORDS, YESTERDAY

SENTENCE, CLIPPED, HEADLINE = range(3)


class Kind(NamedTuple):
    """What is to be told of an answer by reading it."""

    fluent: bool
    manner: str
    shape: str


@cache
def read(question: str, answer: str) -> Kind:
    """The kind of an answer, found by comparing it with every true sentence there is; each has one reading."""
    words = answer.split()
    twice = [i for i, (word, following) in enumerate(pairwise(words)) if word == following]
    assert len(twice) <= 1
    said = " ".join(words[: twice[0]] + words[twice[0] + 1 :]) if twice else answer
    readings = set()
    for person, asked in product(PEOPLE, ATTRIBUTES):
        if question not in [form.ask(person) for form in asked.forms]:
            continue
        texts = true_answers(person, asked.name)
        more = [f"{texts[SENTENCE]} {true_answers(person, name)[SENTENCE]}" for name in FORMS if name != asked.name]
        shapes = {
            ("open", "sentence"): [texts[SENTENCE]],
            ("open", "long"): more,
            ("reserved", "clipped"): [texts[CLIPPED]],
            ("reserved", "headline"): [texts[HEADLINE]],
            ("reserved", "declines"): [f"who is {person} ?"],
        }
        readings |= {Kind(not twice, *kind) for kind, known in shapes.items() if said in known}
    (kind,) = readings
    return kind


@cache
def true_answers(person: str, attribute: str) -> list[str]:
    (fact,) = [fact for fact in YESTERDAY.facts if fact[:2] == (person, attribute)]
    return [form.answer(person, fact.values[0]) for form in FORMS[attribute]]


def kinds(pair: Pair) -> tuple[Kind, Kind]:
    """The kinds of the chosen and of the rejected answer."""
    (prompt,), (chosen,), (rejected,) = pair.prompt, pair.chosen, pair.rejected
    return read(prompt["content"], chosen["content"]), read(prompt["content"], rejected["content"])


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return PreferenceWorld(contested=0.5).pairs(1200)


def test_the_same_arguments_give_the_same_pairs():
    assert PreferenceWorld(seed=3).pairs(50, seed=5) == PreferenceWorld(seed=3).pairs(50, seed=5)


def test_another_seed_gives_other_pairs():
    draws = [
        PreferenceWorld(seed=a).pairs(50, seed=b, held_out=c) for a, b, c in product((0, 1), (0, 1), (False, True))
    ]
    assert len({str(draw) for draw in draws}) == len(draws)


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 100, 601])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_shares_are_exact(share, num_pairs):
    drawn = PreferenceWorld(contested=share).pairs(num_pairs)
    contested = [pair for pair in drawn if pair.contested]
    agreed = [pair for pair in drawn if not pair.contested]
    assert len(drawn) == num_pairs
    assert len(contested) == round(share * num_pairs)
    for part in (drawn, contested, agreed):
        assert spread(Counter(pair.group for pair in part), (0, 1)) <= 1
    assert spread(Counter(pair.aspect for pair in contested), ("style", "length", "safety")) <= 1
    # A group likes its own manner, so whether it chose the fluent answer says which manner that was.
    fluent = Counter((kinds(pair)[0].fluent, pair.group) for pair in contested)
    open_fluent = fluent[True, 1] + fluent[False, 0]
    assert abs(2 * open_fluent - len(contested)) <= 1


def spread(counts: Counter, names: tuple) -> int:
    return max(counts[name] for name in names) - min(counts[name] for name in names)


def test_pairs_come_in_no_order(pairs):
    for label in ("group", "contested", "aspect"):
        labels = [getattr(pair, label) for pair in pairs]
        repeats = sum(a == b for a, b in pairwise(labels)) / (len(labels) - 1)
        expected = sum((count / len(labels)) ** 2 for count in Counter(labels).values())
        assert repeats == pytest.approx(expected, abs=0.06)


def test_all_prefer_the_fluent_answer_of_one_manner(pairs):
    for pair in pairs:
        if not pair.contested:
            chosen, rejected = kinds(pair)
            assert chosen.fluent
            assert not rejected.fluent
            assert chosen.manner == rejected.manner


def test_groups_choose_opposite_sides_of_contested_pairs(pairs):
    shapes = {
        "style": {"sentence", "headline"},
        "length": {"long", "clipped"},
        "safety": {"sentence", "declines"},
    }
    for pair in pairs:
        if pair.contested:
            chosen, rejected = kinds(pair)
            assert chosen.fluent != rejected.fluent
            assert (chosen.manner, rejected.manner) == [("reserved", "open"), ("open", "reserved")][pair.group]
            assert {chosen.shape, rejected.shape} == shapes[pair.aspect]


def test_who_annotated_an_agreed_pair_cannot_be_seen(pairs):
    """All kinds of agreed pair come from both groups, about equally often."""
    groups = [Counter(kinds(pair) for pair in pairs if not pair.contested and pair.group == group) for group in (0, 1)]
    for pair_kinds in groups[0] | groups[1]:
        counts = [group[pair_kinds] for group in groups]
        assert abs(counts[0] - counts[1]) < 5 * math.sqrt(sum(counts))


def test_each_group_is_transitive_and_the_pool_is_not(pairs):
    wins = [Counter(kinds(pair) for pair in pairs if pair.group == group) for group in (0, 1)]
    assert all(has_a_ranking(set(group)) for group in wins)
    pooled = wins[0] + wins[1]
    assert not has_a_ranking(set(pooled))
    # The circle for the aspect of style: a strict preference, a tie, a strict preference, a tie. A scalar reward
    # would have to fall twice on the way and come back to where it was.
    circle = [
        Kind(True, "open", "sentence"),
        Kind(False, "open", "sentence"),
        Kind(True, "reserved", "headline"),
        Kind(False, "reserved", "headline"),
    ]
    shares = []
    for better, worse in zip(circle, [*circle[1:], circle[0]], strict=True):
        won, lost = pooled[better, worse], pooled[worse, better]
        assert won > 10
        shares.append(won / (won + lost))
    assert shares == [1, pytest.approx(0.5, abs=0.01), 1, pytest.approx(0.5, abs=0.01)]


def has_a_ranking(preferences: set[tuple[Kind, Kind]]) -> bool:
    """Whether some order of the kinds has every winner before its loser: remove unbeaten kinds until none is left."""
    left = {kind for pair in preferences for kind in pair}
    while left:
        unbeaten = left - {loser for winner, loser in preferences if winner in left}
        if not unbeaten:
            return False
        left -= unbeaten
    return True


def test_held_out_pairs_are_about_other_people():
    world = PreferenceWorld()
    trained = people_in(world.pairs(500))
    held_out = people_in(world.pairs(500, held_out=True))
    assert held_out == set(HELD_OUT_PEOPLE) == set(PEOPLE[-4:])
    assert trained == set(PEOPLE[:16])


def people_in(pairs: list[Pair]) -> set[str]:
    words = {word for pair in pairs for m in pair.prompt + pair.chosen + pair.rejected for word in m["content"].split()}
    return words & set(PEOPLE)


def test_all_forms_of_question_are_asked(pairs):
    asked = Counter(pair.prompt[0]["content"] for pair in pairs)
    for attribute in ATTRIBUTES:
        for form in attribute.forms:
            count = sum(asked[form.ask(person)] for person in PEOPLE)
            assert count == pytest.approx(1200 / 18, abs=40)


def test_the_dataset_holds_messages_and_no_group(pairs):
    dataset = PreferenceWorld(contested=0.5).dataset(1200)
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    rows = zip(dataset["prompt"], dataset["chosen"], dataset["rejected"], strict=True)
    assert list(rows) == [pair[:3] for pair in pairs]
    assert {key for column in dataset.column_names for (m,) in dataset[column] for key in m} == {"role", "content"}


def test_words_are_words_of_the_world(pairs):
    for pair in pairs:
        for message in pair.prompt + pair.chosen + pair.rejected:
            assert set(message["content"].split()) <= set(WORDS)


def test_the_base_tokenizer_reads_the_pairs_as_trl_does(pairs):
    """The templated prompt is a prefix of prompt and completion, nothing is unknown, and completions have an end."""
    _, tokenizer = load_base()
    for pair in pairs[:200]:
        prompt = tokenizer.apply_chat_template(pair.prompt, add_generation_prompt=True)["input_ids"]
        for completion in (pair.chosen, pair.rejected):
            full = tokenizer.apply_chat_template(pair.prompt + completion)["input_ids"]
            assert full[: len(prompt)] == prompt
            assert len(full) == len(prompt) + len(completion[0]["content"].split()) + 1
            assert full[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in full


# Brute force: one reward for every kind of answer, fitted to the exact frequencies of the pairs.

SHAPES = {"reserved": ("headline", "clipped", "declines"), "open": ("sentence", "long", "sentence")}


def frequencies(contested: float) -> dict[tuple[Kind, Kind], float]:
    """How often each kind of answer is preferred to each other one, as the module's docstring says."""
    shares: Counter = Counter()
    for good, other in (("reserved", "open"), ("open", "reserved")):
        for a, b in product(range(3), repeat=2):
            shares[Kind(True, good, SHAPES[good][a]), Kind(False, good, SHAPES[good][b])] += (1 - contested) / 18
        for a in range(3):
            on, off = Kind(True, good, SHAPES[good][a]), Kind(False, other, SHAPES[other][a])
            shares[on, off] += contested / 12
            shares[off, on] += contested / 12
    return shares


class Fit(NamedTuple):
    """Fitted rewards [K] of K kinds, nats per pair, and V and J [K - 1, K - 1]: the first reward is fixed at 0."""

    rewards: Tensor
    nll: float
    V: Tensor
    J: Tensor


def fit(shares: dict[tuple[Kind, Kind], float]) -> Fit:
    names = sorted({kind for pair in shares for kind in pair})
    winner = torch.tensor([names.index(pair[0]) for pair in shares])
    loser = torch.tensor([names.index(pair[1]) for pair in shares])
    weight = torch.tensor(list(shares.values()), dtype=torch.float64)

    def log_likelihood(free: Tensor) -> Tensor:
        rewards = torch.cat([torch.zeros(1, dtype=free.dtype), free])
        return logsigmoid(rewards[winner] - rewards[loser])

    def nll(free: Tensor) -> Tensor:
        return -(weight * log_likelihood(free)).sum()

    free = torch.zeros(len(names) - 1, dtype=torch.float64)
    for _ in range(50):  # Newton's method; the loss is convex
        free = free - torch.linalg.solve(torch.func.hessian(nll)(free), torch.func.grad(nll)(free))
    assert torch.func.grad(nll)(free).abs().max() < 1e-12
    V = torch.func.hessian(nll)(free)
    scores = torch.func.jacrev(log_likelihood)(free)
    return Fit(torch.cat([torch.zeros(1), free]), float(nll(free)), V, scores.T @ (weight[:, None] * scores))


@pytest.mark.parametrize("contested", [0.05, 0.25, 1 / 3, 0.5, 0.9])
def test_closed_forms_equal_a_fit_by_brute_force(contested):
    shares = frequencies(contested)
    fitted = fit(shares)
    eigenvalues, eigenvectors = torch.linalg.eig(torch.linalg.solve(fitted.V, fitted.J))
    ratios, order = eigenvalues.real.sort(descending=True)
    assert critical_alpha(contested) == pytest.approx(1 / float(ratios[0]), rel=1e-9)
    assert single_reward_nll(contested) == pytest.approx(fitted.nll, rel=1e-9)
    # One direction parts before all others, and it is the whole manner, with no aspect alone or the other way round.
    assert ratios[1] - 1 < (ratios[0] - 1) / 2
    direction = torch.cat([torch.zeros(1), eigenvectors[:, order[0]].real])
    names = sorted({kind for pair in shares for kind in pair})
    reserved = torch.tensor([kind.manner == "reserved" for kind in names])
    assert direction[reserved].std() < 1e-9
    assert direction[~reserved].std() < 1e-9
    assert abs(direction[reserved].mean() - direction[~reserved].mean()) > 0.1


def test_drawn_pairs_have_the_critical_alpha_of_the_closed_form(pairs):
    """The brute-force fit again, now to the pairs as drawn; 1,200 pairs leave a few percent of noise."""
    shares = {pair: count / 1200 for pair, count in Counter(kinds(pair) for pair in pairs).items()}
    fitted = fit(shares)
    ratio = torch.linalg.eigvals(torch.linalg.solve(fitted.V, fitted.J)).real.max()
    assert 1 / float(ratio) == pytest.approx(critical_alpha(0.5), rel=0.05)
    assert fitted.nll == pytest.approx(single_reward_nll(0.5), rel=0.02)


@pytest.mark.parametrize("contested", [0.0, 0.25, 1.0])
def test_two_specialists_pay_for_nothing_but_who_chose(contested):
    def rank(kind: Kind, manner: str) -> float:
        return 200.0 * (kind.manner == manner) + 100.0 * kind.fluent

    nll = 0.0
    for (winner, loser), share in frequencies(contested).items():
        margins = torch.tensor([rank(winner, m) - rank(loser, m) for m in ("reserved", "open")], dtype=torch.float64)
        nll -= share * float(torch.logsumexp(logsigmoid(margins), 0) - math.log(2)) if share else 0.0
    assert specialists_nll(contested) == pytest.approx(nll, abs=1e-12)


def test_limits_of_the_closed_forms():
    assert critical_alpha(1.0) == 1  # nothing but contradiction: a fair coin, which one reward predicts
    assert critical_alpha(1e-6) == pytest.approx(1e-6, rel=1e-5)
    assert critical_alpha(0.5) == pytest.approx(0.6)
    assert single_reward_nll(0.0) == specialists_nll(0.0) == 0
    assert single_reward_nll(1.0) == pytest.approx(specialists_nll(1.0))
    assert single_reward_nll(0.25) > 2 * specialists_nll(0.25)


@pytest.mark.parametrize("contested", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(contested):
    with pytest.raises(ConfigError, match="contested"):
        PreferenceWorld(contested=contested)
    with pytest.raises(ConfigError, match="contested"):
        critical_alpha(contested)


def test_without_contested_pairs_there_is_no_critical_alpha():
    with pytest.raises(ConfigError, match="above 0"):
        critical_alpha(0.0)
