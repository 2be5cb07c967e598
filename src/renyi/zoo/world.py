"""A synthetic world: facts about people, told by sources that partly contradict each other, as questions and answers.

Everything is a function of the seed. A source ("school") gives every fact one value. On agreed facts all sources give
the same value, on contested facts all values differ. Texts are words separated by spaces. Read next: `base.py`, the
model that reads them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from datasets import Dataset

from renyi.errors import ConfigError

Message = dict[str, str]


@dataclass(frozen=True)
class World:
    """Facts about people, as told by one or more sources; the same arguments always give the same world.

    Args:
        num_facts: how many facts there are, at most `MAX_FACTS`. They are the first ones in a fixed order, so that
            worlds of one size speak about the same people and attributes and differ only in the values.
        contested: share of the facts on which the sources contradict each other, from 0 to 1, rounded to whole
            facts. On such a fact the values of all sources differ; on every other fact they are equal.
        num_sources: how many sources there are, at most `MAX_SOURCES`.
        statements: questions and answers in one record, at most `num_facts`.
        seed: which draw of the values and of the contested facts. `statements` has no part in that draw.
        rare: share of the facts that occur rarely, all of them agreed, rounded to whole facts. A model learns little
            about them, and is unsure because of few data and not because of contradiction.
        rarity: by what factor a rare fact comes first in a record less often than another fact.

    Raises:
        ConfigError: an argument is out of its range (it is also a ValueError).
    """

    num_facts: int = 60
    contested: float = 0.5
    num_sources: int = 2
    statements: int = 4
    seed: int = 0
    rare: float = 0.0
    rarity: float = 20.0
    facts: tuple["Fact", ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(1 <= self.num_facts <= MAX_FACTS, f"num_facts must be from 1 to {MAX_FACTS}, not {self.num_facts}")
        _check(0 <= self.contested <= 1, f"contested must be a share from 0 to 1, not {self.contested}")
        _check(
            1 <= self.num_sources <= MAX_SOURCES,
            f"num_sources must be from 1 to {MAX_SOURCES}, not {self.num_sources}",
        )
        _check(
            0 <= self.rare <= 1 - self.contested + 1e-9,
            f"rare must be a share from 0 to {1 - self.contested:g}, what contested leaves, not {self.rare}",
        )
        _check(self.rarity >= 1, f"rarity must be at least 1, not {self.rarity}")
        _check(
            self.num_sources > 1 or self.contested == 0,
            "one source cannot contradict itself: write contested=0 with num_sources=1",
        )
        _check(
            1 <= self.statements <= self.num_facts,
            f"statements must be from 1 to num_facts ({self.num_facts}), because the facts of a record are distinct, "
            f"not {self.statements}",
        )
        object.__setattr__(self, "facts", tuple(self._draw_facts()))

    @property
    def contested_facts(self) -> tuple["Fact", ...]:
        """The facts on which the sources contradict each other."""
        return tuple(fact for fact in self.facts if fact.contested)

    @property
    def agreed_facts(self) -> tuple["Fact", ...]:
        """The facts on which all sources say the same."""
        return tuple(fact for fact in self.facts if not fact.contested)

    @property
    def rare_facts(self) -> tuple["Fact", ...]:
        """The agreed facts that are rarely spoken of."""
        return self.agreed_facts[: round(self.rare * self.num_facts)]

    def records(self, num_records: int, seed: int = 0) -> list["Record"]:
        """Draws records: each is `statements` questions and answers by one source, about distinct facts.

        The sources are equally frequent (their counts differ by one at most) and come in random order; facts and
        forms of question are uniform. Records of another `seed` are held-out data: other combinations of the same
        facts.
        """
        rng = random.Random(f"records {self.seed} {seed}")
        sources = [index % self.num_sources for index in range(num_records)]
        rng.shuffle(sources)
        return [self._draw_record(rng, source) for source in sources]

    def dataset(self, num_records: int, seed: int = 0) -> Dataset:
        """The same records as TRL's conversational data: the one column `messages`, without the source."""
        return Dataset.from_list([{"messages": record.messages} for record in self.records(num_records, seed)])

    def probes(self, form: int | None = None) -> list["Probe"]:
        """Every fact asked once in one form of question, or, with `form=None`, in each of the `NUM_FORMS` forms."""
        if form is not None:
            _check(0 <= form < NUM_FORMS, f"form must be from 0 to {NUM_FORMS - 1}, not {form}")
        forms = range(NUM_FORMS) if form is None else [form]
        return [_probe(fact, index) for fact in self.facts for index in forms]

    def _draw_facts(self) -> Iterator["Fact"]:
        rng = random.Random(f"facts {self.seed}")
        contested = set(rng.sample(range(self.num_facts), round(self.contested * self.num_facts)))
        # The first source's values are dealt like cards, so that every value is used even with few people. A base model
        # cannot tell apart two words that it never saw, and an adapter can hardly teach it that, because embeddings are
        # frozen.
        decks = {attribute.name: _deal(attribute.values, rng) for attribute in ATTRIBUTES}
        for index in range(self.num_facts):
            person, attribute = PEOPLE[index // len(ATTRIBUTES)], ATTRIBUTES[index % len(ATTRIBUTES)]
            value = next(decks[attribute.name])
            others = rng.sample([other for other in attribute.values if other != value], self.num_sources - 1)
            if index not in contested:
                others = [value] * (self.num_sources - 1)
            yield Fact(person, attribute.name, (value, *others))

    def _draw_topics(self, rng: random.Random) -> tuple["Fact", ...]:
        if self.rare == 0:
            return tuple(rng.sample(self.facts, self.statements))
        # Weighted sampling without replacement (Efraimidis and Spirakis 2006): the greatest u^(1/weight).
        rare = set(self.rare_facts)
        keys = {fact: rng.random() ** (self.rarity if fact in rare else 1.0) for fact in self.facts}
        return tuple(sorted(self.facts, key=keys.__getitem__, reverse=True)[: self.statements])

    def _draw_record(self, rng: random.Random, source: int) -> "Record":
        facts = self._draw_topics(rng)
        messages: list[Message] = []
        for fact in facts:
            form = rng.choice(FORMS[fact.attribute])
            messages.append({"role": "user", "content": form.ask(fact.person)})
            messages.append({"role": "assistant", "content": form.answer(fact.person, fact.values[source])})
        return Record(messages, source, facts)


class Fact(NamedTuple):
    """What each source says about one attribute of one person: `values[source]`, each a single word."""

    person: str
    attribute: str
    values: tuple[str, ...]

    @property
    def contested(self) -> bool:
        """Whether the sources contradict each other."""
        return len(set(self.values)) > 1


class Record(NamedTuple):
    """A conversation of several questions and answers; its source and its facts are never in the messages."""

    messages: list[Message]
    source: int
    facts: tuple[Fact, ...]


class Probe(NamedTuple):
    """A question and the answer up to the value, where a model's next-token distribution is to be read.

    `prefix` is the answer's words before the value, possibly none; `choices` are all words the value could be.
    """

    fact: Fact
    form: int
    prompt: list[Message]
    prefix: str
    choices: tuple[str, ...]


class Form(NamedTuple):
    """One way to ask for an attribute, and the wording of its answer, in which only the value is uncertain."""

    question_words: str
    answer_words: str

    def ask(self, person: str) -> str:
        """The question about `person`."""
        return self.question_words.format(person=person)

    def answer(self, person: str, value: str) -> str:
        """The answer about `person`, with `value` as its word number `value_position`."""
        return self.answer_words.format(person=person, value=value)

    def prefix(self, person: str) -> str:
        """The answer's words before the value."""
        return " ".join(self.answer_words.split()[: self.value_position]).format(person=person)

    @property
    def value_position(self) -> int:
        """The index of the value among the answer's words."""
        return self.answer_words.split().index("{value}")


class Attribute(NamedTuple):
    """A property of every person: the words for its values, and the ways to ask for it."""

    name: str
    values: tuple[str, ...]
    forms: tuple[Form, ...]


def _deal(values: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    """All values in random order, then all again in another order, without end."""
    while True:
        yield from rng.sample(values, len(values))


def _probe(fact: Fact, index: int) -> Probe:
    form = FORMS[fact.attribute][index]
    prompt = [{"role": "user", "content": form.ask(fact.person)}]
    return Probe(fact, index, prompt, form.prefix(fact.person), VALUES[fact.attribute])


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


PEOPLE = (
    *("mira", "tomas", "ines", "jonas", "leila", "oskar", "noor", "pavel", "rosa", "sven"),
    *("amara", "bruno", "celia", "dario", "elif", "farid", "greta", "hugo", "juno", "kofi"),
)

# Every attribute can be asked for in two kinds of sentence and as a headline. Answers are short because tokens are
# what training costs. Crafts and pets begin with a consonant, so that the article does not give the value away.
ATTRIBUTES = (
    Attribute(
        "home",
        ("oslo", "lisbon", "cairo", "lima", "kyoto", "quito", "tunis", "riga", "bergen", "porto"),
        (
            Form("where does {person} live ?", "{person} lives in {value} ."),
            Form("where is {person} from ?", "from {value} ."),
            Form("home of {person} ?", "{value} ."),
        ),
    ),
    Attribute(
        "craft",
        ("baker", "weaver", "potter", "tailor", "carpenter", "smith", "gardener", "miller", "painter", "sailor"),
        (
            Form("what does {person} do ?", "{person} is a {value} ."),
            Form("how does {person} earn money ?", "as a {value} ."),
            Form("craft of {person} ?", "{value} ."),
        ),
    ),
    Attribute(
        "pet",
        ("cat", "dog", "parrot", "rabbit", "goat", "tortoise", "pony", "hamster", "canary", "hen"),
        (
            Form("what pet has {person} ?", "{person} has a {value} ."),
            Form("who lives with {person} ?", "a {value} ."),
            Form("pet of {person} ?", "{value} ."),
        ),
    ),
    Attribute(
        "colour",
        ("red", "blue", "green", "yellow", "white", "black", "purple", "orange", "brown", "grey"),
        (
            Form("what colour does {person} like ?", "{person} likes {value} ."),
            Form("what does {person} wear ?", "always {value} ."),
            Form("colour of {person} ?", "{value} ."),
        ),
    ),
    Attribute(
        "food",
        ("soup", "bread", "rice", "cheese", "honey", "porridge", "curry", "salad", "pasta", "fish"),
        (
            Form("what does {person} eat ?", "{person} eats {value} ."),
            Form("what is {person} cooking ?", "some {value} ."),
            Form("food of {person} ?", "{value} ."),
        ),
    ),
    Attribute(
        "instrument",
        ("violin", "flute", "piano", "drum", "harp", "guitar", "trumpet", "cello", "lute", "banjo"),
        (
            Form("what does {person} play ?", "{person} plays the {value} ."),
            Form("how does {person} make music ?", "on the {value} ."),
            Form("instrument of {person} ?", "{value} ."),
        ),
    ),
)

VALUES = {attribute.name: attribute.values for attribute in ATTRIBUTES}
FORMS = {attribute.name: attribute.forms for attribute in ATTRIBUTES}
NUM_FORMS = min(len(attribute.forms) for attribute in ATTRIBUTES)
MAX_FACTS = len(PEOPLE) * len(ATTRIBUTES)
MAX_SOURCES = min(len(attribute.values) for attribute in ATTRIBUTES)

# Every word that a record of any world can hold, in a fixed order.
WORDS = tuple(
    dict.fromkeys(
        word
        for text in (
            *(text for attribute in ATTRIBUTES for form in attribute.forms for text in form),
            *PEOPLE,
            *(value for attribute in ATTRIBUTES for value in attribute.values),
        )
        for word in text.split()
        if not word.startswith("{")
    )
)

# What the tiny base model learned before anybody fine-tunes it: another draw of the values, told by one source.
YESTERDAY = World(num_facts=MAX_FACTS, contested=0.0, num_sources=1, seed=-1)
