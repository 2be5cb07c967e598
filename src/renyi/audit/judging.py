"""From what a model says of examples to groups: probable errors, prompts that ask the same, systematic variation.

An error is alone: no model explains the answer by its prompt. A variation is shared: many rows load on one side of a
direction, or belong to one member. Read next: `measuring.py`, where the figures come from.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from renyi.audit.examples import Examples
from renyi.audit.findings import CONTESTED, Group, Side, shortened
from renyi.audit.measuring import Alike, Reading
from renyi.audit.mismatch import gains_of
from renyi.audit.near import groups_of
from renyi.audit.reading import how_compatible
from renyi.text import plural

ASK_THE_SAME = 0.6  # exchange from which two prompts ask the same
FEWEST = 5  # rows of a side that make a variation, and at least this share of the examples:
FEWEST_SHARE = 0.02
# Ashman's D of two clusters of loadings from which they are two sides. Halves of 120 normal draws reach 3.0 (99 %).
SEPARATED = 3.5
DECIDED = 0.8  # responsibility from which a member owns a row

Floats = NDArray[np.float64]


class Variation(NamedTuple):
    """Two or more sides of examples that answer in consistent and different ways.

    Attributes:
        sides: places of the examples of each side.
        strength: of each example of all N, how far it is on the second side; the sign tells the sides apart, [N].
        direction: number of the direction along which the sides differ; None if members tell them apart.
    """

    sides: list[list[int]]
    strength: Floats
    direction: int | None


def probable_errors(examples: Examples, reading: Reading) -> list[Group]:
    """Examples whose answer does not belong to its prompt, and pairs whose label models do not foresee."""
    is_pairs, gains = examples.method == "dpo", gains_of(-reading.nll, reading.rivals)
    groups = []
    for place in np.flatnonzero(reading.fit < CONTESTED if is_pairs else gains.is_mismatched):
        text = examples.texts[place]
        if is_pairs:
            score = float(reading.fit[place])
            sentence = f"Models that have not seen this pair prefer the rejected answer ({1 - score:.0%})."
        else:
            score, nats = float(gains.rank[place]) / 2, float(gains.nats[place])
            own, others = "its own prompt", "prompts of other rows"
            likelier = f"{-nats:.1f} nats likelier after {others} than after {own}"
            if nats > 0:
                likelier = f"only {nats:.1f} nats likelier after {own} than after {others}"
            sentence = f"The answer is {likelier}."
        side = Side(shortened(text.answer), [examples.rows[place]])
        groups.append(Group("probable_error", round(score, 3), [shortened(text.prompt or "")], [side], sentence))
    return groups


def same_questions(examples: Examples, alike: Sequence[Alike], known: Sequence[Group]) -> list[Group]:
    """Groups of prompts in different words whose answers can be exchanged, and differ.

    Args:
        examples: all N.
        alike: pairs of examples with the exchange of their answers.
        known: groups of reading alone; pairs that are in one of them already are left out.
    """
    together = {pair for group in known if "conflict" in group.kind for pair in _pairs(group.rows)}
    links = [
        (a.one, a.other)
        for a in alike
        if a.exchange >= ASK_THE_SAME and (examples.rows[a.one], examples.rows[a.other]) not in together
    ]
    groups = []
    for places in groups_of(links, len(examples.rows)):
        by_answer: dict[str, list[int]] = defaultdict(list)
        for place in places:
            by_answer[" ".join(examples.texts[place].answer.casefold().split())].append(place)
        if len(by_answer) < 2:
            continue
        texts = [examples.texts[of_side[0]].answer for of_side in by_answer.values()]
        score, why = how_compatible(texts)
        prompts = list(dict.fromkeys(shortened(examples.texts[place].prompt or "") for place in places))
        sides = [
            Side(shortened(text), sorted(examples.rows[place] for place in of_side))
            for text, of_side in zip(texts, by_answer.values(), strict=True)
        ]
        sentence = (
            f"{len(prompts)} prompts ask the same in other words, as each answer fits the others' prompts, and have "
            f"{len(sides)} different answers: {why}."
        )
        groups.append(Group("near_duplicate_conflict", score, prompts, sides, sentence))
    return groups


def _pairs(rows: Sequence[int]) -> list[tuple[int, int]]:
    return [(a, b) for i, a in enumerate(rows[:50]) for b in rows[i + 1 : 50]]


def variations_along(loadings: Floats) -> list[Variation]:
    """Directions along which examples fall into two separate sides, each with enough examples.

    Args:
        loadings: [N, k], the leading direction first.
    """
    found = []
    fewest = max(FEWEST, round(FEWEST_SHARE * len(loadings)))
    for number, column in enumerate(loadings.T):
        scale = np.sqrt(np.mean(column**2))
        if len(column) < 4 * FEWEST or not scale > 0:
            continue
        z = column / scale
        side = KMeans(2, n_init=4, random_state=0).fit_predict(z[:, None])
        sides = [np.flatnonzero(side == s) for s in (0, 1)]
        if min(map(len, sides)) < fewest or _separation(z, side) < SEPARATED:
            continue
        sides.sort(key=len, reverse=True)  # the smaller side is the second
        sign = 1.0 if z[sides[1]].mean() > z[sides[0]].mean() else -1.0
        found.append(Variation([s.tolist() for s in sides], sign * z, number))
    return found


def _separation(z: Floats, side: NDArray[np.int32]) -> float:
    """Ashman's D of two clusters on a line: the distance of their means in units of their spread."""
    first, second = z[side == 0], z[side == 1]
    return float(np.sqrt(2) * abs(first.mean() - second.mean()) / np.sqrt(first.var() + second.var() + 1e-30))


def variation_of_members(reading: Reading) -> Variation | None:
    """The sides that members took for themselves; None if fewer than two members took enough examples."""
    owner, share = reading.responsibilities.argmax(axis=0), reading.responsibilities.max(axis=0)
    fewest = max(FEWEST, round(FEWEST_SHARE * len(owner)))
    sides = [np.flatnonzero((owner == m) & (share >= DECIDED)) for m in range(len(reading.responsibilities))]
    large = sorted((s for s in sides if len(s) >= fewest), key=len, reverse=True)
    if len(large) < 2:
        return None
    second = int(owner[large[1][0]])
    return Variation([s.tolist() for s in large], reading.responsibilities[second], None)


def variation_group(examples: Examples, variation: Variation, reading: Reading) -> Group:
    """A variation as a group, each side with its clearest answer first."""
    sides = []
    for places in variation.sides:
        strongest = max(places, key=lambda place: abs(variation.strength[place]))
        sides.append(
            Side(shortened(examples.texts[strongest].answer), sorted(examples.rows[place] for place in places))
        )
    counts = " and ".join(plural(len(side.rows), "row") for side in sides)
    small = min(len(side.rows) for side in sides) / len(examples.rows)
    how = (
        "members took them apart"
        if variation.direction is None
        else f"they load on two sides of direction {variation.direction + 1} of the adapter"
    )
    sentence = f"{counts} answer in consistent and different ways: {how}. The smallest side is {small:.0%} of the rows."
    clearest = [max(places, key=lambda place: abs(variation.strength[place])) for places in variation.sides]
    prompts = [shortened(examples.texts[place].prompt or "") for place in clearest]
    return Group("systematic_variation", 0.6, prompts, sides, sentence, owners=owners_of(sides, examples, reading))


def owners_of(sides: Sequence[Side], examples: Examples, reading: Reading) -> list[list[int]] | None:
    """The members that own the rows of each side, the one with most rows first; None if there is one member."""
    if len(reading.responsibilities) < 2:
        return None
    place_of = {row: place for place, row in enumerate(examples.rows)}
    owner = reading.responsibilities.argmax(axis=0)
    counted = [Counter(int(owner[place_of[row]]) for row in side.rows if row in place_of) for side in sides]
    return [[member for member, _ in count.most_common()] for count in counted]


def with_owners(groups: Sequence[Group], examples: Examples, reading: Reading) -> None:
    """Say in groups of reading which members own each side. Answers that reading could not compare, and that different
    members own, are contested."""
    for group in groups:
        if "conflict" not in group.kind:
            continue
        group.owners = owners_of(group.sides, examples, reading)
        if group.owners is None or not all(group.owners):
            continue
        first = [owners[0] for owners in group.owners]
        if len(set(first)) > 1:
            group.sentence += " Different members explain them: " + ", ".join(f"member {m}" for m in first) + "."
            if 0.5 <= group.score < 0.7:
                group.score = 0.4
