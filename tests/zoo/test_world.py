"""The synthetic world keeps its promises: what sources share, where they contradict, what a record shows of them."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from renyi.errors import ConfigError
from renyi.zoo import World
from renyi.zoo.world import ATTRIBUTES, FORMS, MAX_FACTS, NUM_FORMS, PEOPLE, VALUES, WORDS, YESTERDAY, Fact, Record


def spoken(record: Record) -> list[tuple[Fact, str, str]]:
    """Each fact of a record with its question and its answer."""
    texts = [message["content"] for message in record.messages]
    return list(zip(record.facts, texts[0::2], texts[1::2], strict=True))


def test_the_same_arguments_give_the_same_world_and_records():
    assert World(seed=3).facts == World(seed=3).facts
    assert World(seed=3).records(20, seed=5) == World(seed=3).records(20, seed=5)


def test_another_seed_gives_another_world_about_the_same_things():
    one, other = World(seed=1), World(seed=2)
    assert [fact[:2] for fact in one.facts] == [fact[:2] for fact in other.facts]
    assert sum(a.values == b.values for a, b in zip(one.facts, other.facts, strict=True)) < 20
    assert one.records(20, seed=1) != one.records(20, seed=2)
    assert one.records(20, seed=1) != other.records(20, seed=1)


def test_the_length_of_records_has_no_part_in_the_facts():
    assert World(statements=1, seed=4).facts == World(statements=8, seed=4).facts


@pytest.mark.parametrize("num_sources", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_exactly_the_contested_share_is_contested(share, num_sources):
    world = World(contested=share, num_sources=num_sources)
    assert len(world.facts) == 60
    assert len(world.contested_facts) == round(60 * share)
    assert len(world.agreed_facts) == 60 - round(60 * share)
    for fact in world.contested_facts:
        assert all(one != other for one, other in combinations(fact.values, 2))
    for fact in world.agreed_facts:
        assert fact.values == fact.values[:1] * num_sources
    for fact in world.facts:
        assert set(fact.values) <= set(VALUES[fact.attribute])


def test_a_fact_is_named_once():
    facts = World(num_facts=MAX_FACTS).facts
    assert len({fact[:2] for fact in facts}) == len(facts) == MAX_FACTS


@pytest.mark.parametrize("statements", [1, 2, 4, 8])
def test_a_record_is_distinct_facts_told_by_one_source(statements):
    for record in World(statements=statements).records(50):
        assert [message["role"] for message in record.messages] == ["user", "assistant"] * statements
        assert len(set(record.facts)) == statements
        for fact, question, answer in spoken(record):
            value = fact.values[record.source]
            turns = [(form.ask(fact.person), form.answer(fact.person, value)) for form in FORMS[fact.attribute]]
            assert (question, answer) in turns


def test_the_value_is_one_word_at_its_stated_position():
    for record in World().records(200):
        for fact, question, answer in spoken(record):
            form = next(form for form in FORMS[fact.attribute] if form.ask(fact.person) == question)
            assert answer.split()[form.value_position] == fact.values[record.source]


def test_a_question_gives_the_wording_of_its_answer_away():
    """No two forms of any attribute ask the same, so that only the value is uncertain."""
    questions = [form.question_words for attribute in ATTRIBUTES for form in attribute.forms]
    assert len(set(questions)) == len(questions) == NUM_FORMS * len(ATTRIBUTES)
    assert NUM_FORMS >= 3


def test_the_dataset_holds_messages_and_no_source():
    world = World(seed=6)
    dataset = world.dataset(30, seed=1)
    assert dataset.column_names == ["messages"]
    assert dataset["messages"][:] == [record.messages for record in world.records(30, seed=1)]
    assert {key for messages in dataset["messages"] for message in messages for key in message} == {"role", "content"}


def test_sources_are_equally_frequent_and_in_no_order():
    sources = [record.source for record in World(num_sources=3).records(301)]
    assert sorted(Counter(sources).values()) == [100, 100, 101]
    assert sources != sorted(sources)
    assert sources != [index % 3 for index in range(301)]


@pytest.mark.parametrize(("statements", "critical_alpha"), [(1, 1.0), (2, 0.67), (4, 0.40), (8, 0.225)])
def test_contested_facts_of_a_record_follow_the_closed_form(statements, critical_alpha):
    """E[k] / E[k²] over records with k contested facts, as drawn without replacement from 30 of 60."""
    counts = [sum(fact.contested for fact in record.facts) for record in World(statements=statements).records(4000)]
    assert sum(counts) / sum(count**2 for count in counts) == pytest.approx(critical_alpha, rel=0.02)


def test_probes_stop_right_before_the_value():
    world = World()
    assert len(world.probes()) == NUM_FORMS * len(world.probes(form=1)) == NUM_FORMS * 60
    answers = {
        (fact, record.source, question): answer
        for record in world.records(2000)
        for fact, question, answer in spoken(record)
    }
    for probe in world.probes():
        (prompt,) = probe.prompt
        for source, value in enumerate(probe.fact.values):
            answer = answers[probe.fact, source, prompt["content"]]
            assert answer.startswith(f"{probe.prefix} {value}".strip())
            assert value in probe.choices


def test_a_value_is_a_word_with_no_other_meaning():
    values = [value for attribute in ATTRIBUTES for value in attribute.values]
    assert len(set(values)) == len(values)
    assert not set(values) & set(PEOPLE)
    templates = " ".join(text for attribute in ATTRIBUTES for form in attribute.forms for text in form)
    assert not set(templates.split()) & {*values, *PEOPLE}


def test_the_article_does_not_give_the_value_away():
    for attribute in ATTRIBUTES:
        if any("a {value}" in form.answer_words for form in attribute.forms):
            assert not [value for value in attribute.values if value[0] in "aeiou"]


def test_words_are_all_the_words_of_any_world():
    for seed in range(3):
        world = World(num_facts=MAX_FACTS, num_sources=3, seed=seed)
        for record in world.records(300):
            assert {word for message in record.messages for word in message["content"].split()} <= set(WORDS)


def test_yesterday_uses_every_value():
    """A word that the base never met in its pretraining could not be told from the others it never met."""
    assert {fact.values[0] for fact in YESTERDAY.facts} == {value for values in VALUES.values() for value in values}
    assert not YESTERDAY.contested_facts
    today = World(num_facts=MAX_FACTS, contested=0, num_sources=1)
    assert [fact[:2] for fact in today.facts] == [fact[:2] for fact in YESTERDAY.facts]
    same = sum(a == b for a, b in zip(today.facts, YESTERDAY.facts, strict=True))
    assert same < MAX_FACTS / 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_facts": 0},
        {"num_facts": MAX_FACTS + 1},
        {"contested": -0.1},
        {"contested": 1.1},
        {"contested": float("nan")},
        {"num_sources": 0},
        {"num_sources": 11},
        {"num_sources": 1},
        {"statements": 0},
        {"num_facts": 3, "contested": 0, "statements": 4},
    ],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        World(**wrong)


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="form must be"):
        World().probes(form=NUM_FORMS)


def test_a_world_can_be_varied():
    assert replace(World(seed=5), statements=8) == World(seed=5, statements=8)


def test_rare_facts_are_agreed_and_seldom_spoken_of():
    world = World(contested=0.4, rare=0.3, rarity=20.0)
    assert len(world.rare_facts) == 18
    assert not any(fact.contested for fact in world.rare_facts)
    assert world.facts == World(contested=0.4).facts  # rarity is no part of the draw of the facts
    spoken = Counter(fact for record in world.records(4000) for fact in record.facts)
    common = [spoken[fact] for fact in world.facts if fact not in world.rare_facts]
    rare = [spoken[fact] for fact in world.rare_facts]
    assert np.mean(common) / np.mean(rare) == pytest.approx(20, rel=0.2)
    assert all(len(set(record.facts)) == 4 for record in world.records(100))


@pytest.mark.parametrize("given", [{"rare": -0.1}, {"rare": 0.7, "contested": 0.4}, {"rarity": 0.5}])
def test_bad_rarity_is_refused(given):
    with pytest.raises(ConfigError, match="rar"):
        World(**given)
