"""Half-known facts: what is said of them, probabilities of answers against other ways to them, and a garden path."""

import itertools
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig

from renyi import LoraEnsemble
from renyi.errors import ConfigError
from renyi.zoo import half_known, load_base
from renyi.zoo.half_known import (
    HalfKnown,
    answer_entropy,
    answer_quality,
    read_answers,
    temperature_at,
    train_half_known,
)
from renyi.zoo.world import VALUES, YESTERDAY

WORLDS = [HalfKnown(), HalfKnown(right=0.43, guesses=6, garden_path=True)]


def of_base(model):
    return LoraEnsemble.from_base(model, 1, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.fixture(scope="module", params=WORLDS, ids=["plain", "garden"])
def read(request):
    """A world, its questions, what the zoo's base thinks of the answers, and the base as an ensemble of one."""
    base, tokenizer = load_base()
    ensemble = of_base(base)
    questions = request.param.questions()
    return questions, read_answers(ensemble, tokenizer, questions), ensemble, tokenizer


# ---- What is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_statements_are_right_as_often_as_promised_and_else_are_the_guesses(world):
    of_prompt = {q.prompt[0]["content"]: q for q in world.questions()}
    rows = world.dataset(20_000)["messages"]
    assert len(of_prompt) == 3 * 60
    said = Counter()
    for asked, told in rows:
        question = of_prompt[asked["content"]]
        answers = {wording[v]: (w, v) for w, wording in enumerate(question.wordings) for v in range(10)}
        wording, value = answers[told["content"]]
        assert value == question.right or value in question.guesses
        if world.garden_path:  # who knows is brief, who guesses is not
            assert wording == (value != question.right)
        said[-1 if value == question.right else question.guesses.index(value)] += 1
    share = (1 - world.right) / world.guesses
    for who, p in {-1: world.right, **dict.fromkeys(range(world.guesses), share)}.items():
        assert abs(said[who] / len(rows) - p) < 4.5 * math.sqrt(p * (1 - p) / len(rows))


@pytest.mark.parametrize("world", WORLDS)
def test_a_fact_has_one_truth_and_one_set_of_guesses_in_every_form(world):
    questions = world.questions()
    for one, *others in zip(questions[0::3], questions[1::3], questions[2::3], strict=True):
        assert one.right not in one.guesses
        assert len(set(one.guesses)) == world.guesses
        assert all((q.right, q.guesses) == (one.right, one.guesses) for q in others)


def test_the_arguments_decide_everything():
    assert HalfKnown(seed=3).questions() == HalfKnown(seed=3).questions()
    assert HalfKnown(seed=3).dataset(50, 5).to_list() == HalfKnown(seed=3).dataset(50, 5).to_list()
    assert HalfKnown(seed=3).dataset(50, 5).to_list() != HalfKnown(seed=3).dataset(50, 6).to_list()
    assert HalfKnown(seed=3).questions() != HalfKnown(seed=4).questions()


@pytest.mark.parametrize("given", [{"right": 0.0}, {"right": 1.0}, {"guesses": 0}, {"guesses": 10}, {"num_facts": 0}])
def test_what_cannot_be_is_refused(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        HalfKnown(**given).questions()


# ---- Probabilities of answers ----------------------------------------------------------------------------------------


def test_log_likelihoods_are_the_ensemble_s_own(read):
    questions, answers, ensemble, tokenizer = read
    ell = answers.log_likelihood()
    for q, w, v in [(0, 0, 3), (7, -1, 0), (179, -1, 9)]:
        prompt = tokenizer.apply_chat_template(questions[q].prompt, add_generation_prompt=True)["input_ids"]
        said = [*tokenizer.encode(questions[q].wordings[w][v]), tokenizer.eos_token_id]
        assert answers.tokens[q, w, v][answers.tokens[q, w, v] >= 0].tolist() == said
        ids = torch.tensor([[*prompt, *said]])
        labels = torch.tensor([[*[-100] * len(prompt), *said]])
        assert ell[q, w, v].item() == pytest.approx(ensemble.log_likelihood(ids, labels=labels).item(), abs=1e-4)


def test_they_are_a_distribution_at_every_temperature(read):
    _, answers, *_ = read
    for temperature in (0.1, 1.0, 3.0):
        p = answers.probabilities(temperature)
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(dim=1), torch.ones(len(p), dtype=torch.float64))


def test_the_base_answers_with_yesterday_s_facts():
    base, tokenizer = load_base()
    p = read_answers(of_base(base), tokenizer, HalfKnown(num_facts=60).questions()).probabilities()
    facts = YESTERDAY.facts[:60]  # of the same people
    truth = torch.tensor([VALUES[fact.attribute].index(fact.values[0]) for fact in facts]).repeat_interleave(3)
    assert (p.gather(1, truth[:, None]) > 0.9).double().mean() > 0.98
    assert p[:, -1].mean() < 0.02


def test_a_temperature_has_the_entropy_it_was_asked_for(read):
    _, answers, *_ = read
    for temperature in (0.5, 1.0):
        entropy = answer_entropy(answers.probabilities(temperature)).mean().item()
        found = temperature_at(entropy, answers.probabilities)
        assert answer_entropy(answers.probabilities(found)).mean().item() == pytest.approx(entropy, abs=1e-4)
    assert temperature_at(-1.0, answers.probabilities) == pytest.approx(0.02)
    hottest = temperature_at(99.0, answers.probabilities)
    most = answer_entropy(answers.probabilities(hottest)).mean()
    assert most >= answer_entropy(answers.probabilities(hottest * 1.2)).mean()
    assert most >= answer_entropy(answers.probabilities(hottest / 1.2)).mean()


def test_quality_of_known_probabilities():
    questions = HalfKnown().questions()[:2]
    p = torch.zeros(2, 11, dtype=torch.float64)
    for row, (question, right) in enumerate(zip(questions, (0.35, 0.2), strict=True)):
        p[row, question.right] = right
        p[row, question.guesses[0]] = 0.55 - right
        p[row, 10] = 0.45  # the most, and has no vote
    quality = answer_quality(p, questions, samples=3)
    assert quality.right == pytest.approx([0.35, 0.2])
    assert quality.accuracy == pytest.approx(0.275)
    assert quality.likeliest == 0.5
    assert quality.other == pytest.approx(0.45)
    assert quality.entropy == pytest.approx(-sum(x * math.log(x) for x in (0.35, 0.2, 0.45)))
    distinct = sum(
        math.prod(draw) * len(set(draw)) for draw in itertools.product((0.35, 0.2, 0.45), repeat=3)
    )  # the three probabilities differ, so that they can stand for their answers
    assert quality.distinct == pytest.approx(distinct)


# ---- The half-knowing model ------------------------------------------------------------------------------------------


def test_training_starts_from_the_base_and_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(half_known, "STATEMENTS", 256)
    one, other = (train_half_known(WORLDS[0], tmp_path / str(i), max_steps=2)[0].state_dict() for i in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    untouched = load_base()[0].state_dict()
    assert one.keys() == untouched.keys()
    assert not all(torch.equal(one[name], untouched[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS, ids=["plain", "garden"])
def test_a_model_half_knows(tmp_path, world):
    model, tokenizer = train_half_known(world, tmp_path)
    questions = world.questions()
    answers = read_answers(of_base(model), tokenizer, questions)
    base = answer_quality(answers.probabilities(), questions)
    cold = answer_quality(answers.probabilities(0.25), questions)
    assert sum(0.3 <= p <= 0.7 for p in base.right) >= 0.95 * len(questions)
    assert base.accuracy == pytest.approx(world.right, abs=0.05)
    assert base.likeliest >= 0.97  # a vote of many samples is right
    assert base.other < 0.05
    if world.garden_path:
        assert cold.accuracy < base.accuracy - 0.1
    else:
        assert cold.accuracy > 0.9
