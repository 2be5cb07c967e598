"""A synthetic world of preferences: two groups of annotators who agree on what is on topic and differ in taste.

It reuses the people, questions and words of `renyi.zoo.world`.

An answer is fluent or stutters (one of its words comes twice), and has a reserved manner (a headline, a clipped answer,
a question in return) or an open one (a full sentence or two). On agreed pairs, both of one manner, everybody prefers
the fluent answer. On contested pairs a stuttering answer of one manner meets a fluent one of the other, and taste comes
first: group 0 takes the reserved one, group 1 the open one. Two choices of this design matter:

- One label is one bit. If the groups only contradicted each other on a pair, a single reward would predict a fair coin
  as well as any mixture does, and members would never part. Here no single reward explains the pooled preferences:
  fluent beats stuttering within a manner, and ties with it across manners.
- Every pair is about one aspect of taste only. So contested pairs alone do not show that an annotator who likes
  headlines also likes questions in return: members that mix the groups' tastes would explain them just as well. Agreed
  pairs compare answers of one manner across aspects. They rule such members out, because they tie all answers of one
  manner together.

Read next: `annotators.py`, which trains on it.
"""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from datasets import Dataset

from renyi.errors import ConfigError
from renyi.zoo.world import ATTRIBUTES, PEOPLE, YESTERDAY, Attribute, Message

# The manner that each group likes, and what a manner can differ in.
MANNERS = ("reserved", "open")
ASPECTS = ("style", "length", "safety")

THUMBS_OF_A_USER = 10

TRAINING_PEOPLE, HELD_OUT_PEOPLE = PEOPLE[:16], PEOPLE[16:]


@dataclass(frozen=True)
class PreferenceWorld:
    """Preference pairs from two groups of annotators; the same arguments always give the same pairs.

    Args:
        contested: share of the pairs on which the groups contradict each other, from 0 to 1.
        seed: which draw of the pairs.

    Raises:
        ConfigError: `contested` is out of its range (it is also a ValueError).
    """

    contested: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.contested <= 1:
            raise ConfigError(f"contested must be a share from 0 to 1, not {self.contested}")

    def pairs(self, num_pairs: int, seed: int = 0, held_out: bool = False) -> list["Pair"]:
        """Draws pairs in random order, of which `contested · num_pairs`, rounded, are contested.

        The groups are equally frequent (their counts differ by one at most) among all pairs and among the contested
        ones; so are the aspects among the contested pairs, and the two manners of their fluent answer. Forms of
        question are uniform. With `held_out`, the pairs are about people who do not occur in training, so that
        nothing can be recalled from training.
        """
        rng = random.Random(f"pairs {self.seed} {seed} {held_out}")
        people = HELD_OUT_PEOPLE if held_out else TRAINING_PEOPLE
        num_contested = round(self.contested * num_pairs)
        drawn = [_draw_pair(rng, people, index, index < num_contested) for index in range(num_pairs)]
        rng.shuffle(drawn)
        return drawn

    def dataset(self, num_pairs: int, seed: int = 0, held_out: bool = False) -> Dataset:
        """The same pairs as TRL's conversational data (`prompt`, `chosen`, `rejected`), without the group."""
        pairs = self.pairs(num_pairs, seed, held_out)
        return Dataset.from_list([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs])

    def thumbs(self, num_thumbs: int, seed: int = 0, held_out: bool = False) -> Dataset:
        """One answer of each pair with the thumb that its annotator gives it, by turns up and down.

        Rows of `prompt`, `completion` and `label`, as TRL's KTOTrainer takes them; `user`, who gives `THUMBS_OF_A_USER`
        thumbs; and `group` and `contested` of the pair, which training does not read.
        """
        rows, seen = [], [0, 0]
        for number, pair in enumerate(self.pairs(num_thumbs, seed, held_out)):
            up = number % 2 == 0
            user = f"{pair.group}.{seen[pair.group] // THUMBS_OF_A_USER}"
            seen[pair.group] += 1
            of_pair = {"user": user, "group": pair.group, "contested": pair.contested}
            answer = pair.chosen if up else pair.rejected
            rows.append({"prompt": pair.prompt, "completion": answer, "label": up, **of_pair})
        return Dataset.from_list(rows)


class Pair(NamedTuple):
    """A question with the preferred and the other answer. `group` says who chose, and is never in the messages.

    `aspect` is what the choice was about: "fluency", on which all agree, or the taste "style", "length" or "safety".
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    group: int
    aspect: str

    @property
    def contested(self) -> bool:
        """Whether the other group would have chosen the other answer."""
        return self.aspect != "fluency"


def critical_alpha(contested: float) -> float:
    """The order α above which two members part, once one reward (Bradley–Terry) is fitted to all pairs (DESIGN 3.3).

    By symmetry its margin between fluent and stuttering is t in every pair, with s = σ(t): right on agreed pairs and
    on half of the contested ones, so s = 1 − c/2. The direction "my manner" moves the margin of contested pairs only,
    by one: per contested pair V = s(1−s) and J = (s² + (1−s)²)/2. Every other direction has a smaller J/V, because
    agreed pairs have J/V = (1−s)/s ≤ 1. So critical alpha = V/J = (1 − a²)/(1 + a²), with a = 1 − c the agreed share.

    Raises:
        ConfigError: `contested` is not in (0, 1]; with no contested pair there is nothing to part over.
    """
    if not 0 < contested <= 1:
        raise ConfigError(f"contested must be a share above 0 and at most 1, not {contested}")
    agreed_squared = (1 - contested) ** 2
    return (1 - agreed_squared) / (1 + agreed_squared)


def single_reward_nll(contested: float) -> float:
    """Expected nats per pair of the best single reward: the entropy of its s = 1 − contested/2 (`critical_alpha`)."""
    s = 1 - contested / 2
    return -sum(p * math.log(p) for p in (s, 1 - s) if p > 0)


def specialists_nll(contested: float) -> float:
    """Expected nats per pair of the even mixture of both groups' tastes: only who chose, on contested pairs."""
    return contested * math.log(2)


def _draw_pair(rng: random.Random, people: tuple[str, ...], index: int, contested: bool) -> Pair:
    person = rng.choice(people)
    asked, extra = rng.sample(ATTRIBUTES, 2)
    form = rng.choice(asked.forms)
    # In steps of 12, all combinations of group, manner and aspect come equally often.
    group, manner, aspect = index % 2, int(index % 4 in (1, 2)), ASPECTS[index % 3]
    good = _answer(manner, aspect, person, asked, extra)
    if contested:
        bad = _stutter(rng, _answer(1 - manner, aspect, person, asked, extra))
        chosen, rejected = (good, bad) if manner == group else (bad, good)
    else:
        bad = _stutter(rng, _answer(manner, rng.choice(ASPECTS), person, asked, extra))
        chosen, rejected = good, bad
    return Pair(
        prompt=[{"role": "user", "content": form.ask(person)}],
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        group=group,
        aspect=aspect if contested else "fluency",
    )


def _answer(manner: int, aspect: str, person: str, asked: Attribute, extra: Attribute) -> str:
    """A true answer of that manner to what was asked; which of the manner's answers it is depends on the aspect."""
    sentence, clipped, headline = range(3)
    if MANNERS[manner] == "open":
        answer = _tell(person, asked, sentence)
        return f"{answer} {_tell(person, extra, sentence)}" if aspect == "length" else answer
    if aspect == "safety":
        return f"who is {person} ?"
    return _tell(person, asked, headline if aspect == "style" else clipped)


def _tell(person: str, attribute: Attribute, form: int) -> str:
    return attribute.forms[form].answer(person, _TRUTH[person, attribute.name])


def _stutter(rng: random.Random, answer: str) -> str:
    """The answer with one of its words said twice, but not its last mark."""
    words = answer.split()
    at = rng.randrange(len(words) - 1)
    return " ".join(words[: at + 1] + words[at:])


# What the base model knows, so that preferences are the only thing to learn.
_TRUTH = {(fact.person, fact.attribute): fact.values[0] for fact in YESTERDAY.facts}
