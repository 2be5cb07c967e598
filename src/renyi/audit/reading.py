"""Find contradictions in the rows of a dataset, without a model.

One pass over the rows keeps a hash of every prompt and answer, so a million rows need little memory. Then only rows
whose hashes are equal are compared. Read next: `near.py`, for prompts that are nearly the same.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from renyi.audit.findings import Group, Side, shortened
from renyi.audit.near import NearIndex, Rarity, near_groups, words_of_both
from renyi.audit.statements import (
    NEGATIONS,
    Statement,
    normalised,
    numbers_in,
    polarity,
    statements_of,
    words_of,
)

NO_PROMPT = np.uint64(0)
SHORT = 8  # an answer of at most this many words is taken as a fact, not as a text
LIKE = 0.8  # share of their words that two long answers must have in common to say the same
MOST_END = 0.9  # share of long answers that must end a sentence before one that does not counts as cut
LONG = 40  # words of an answer that should end a sentence
COMPARED = 12  # the most distinct answers of a group that are compared in pairs

Rows = Sequence[Mapping[str, Any]]


class Read(NamedTuple):
    """What the pass over the rows keeps: arrays [n] with one entry for each statement.

    Attributes:
        row: the row of the statement.
        place: which of the row's statements it is.
        prompt, answer, rejected: hashes of the normalised texts; 0 where there is none.
    """

    row: NDArray[np.int64]
    place: NDArray[np.int32]
    prompt: NDArray[np.uint64]
    answer: NDArray[np.uint64]
    rejected: NDArray[np.uint64]


def find_conflicts(
    rows: Rows, near: float = 0.85, text_field: str = "text", progress: Callable[[int], object] = lambda done: None
) -> tuple[list[Group], int]:
    """What contradicts what in a dataset, by reading alone.

    Args:
        rows: N rows. Each is read once in order; rows of a finding are read once more.
        near: the least Jaccard similarity of the words, without stop words, of prompts that ask nearly the same.
        text_field: the column of a row of text.
        progress: called with the number of rows read.

    Returns:
        Groups, in no order, and the number of statements.

    Raises:
        DataError: a row has no known form.
    """
    index, whole, rarity, shared, faults = NearIndex(), NearIndex(), Rarity(), _SharedAnswers(), _Faults()
    seen: set[int] = set()
    at, place_of, keys, firsts = array("q"), array("i"), array("Q"), array("q")  # numpy reads them without a copy
    for number, row in enumerate(rows):
        found = statements_of(row, number + 1, text_field)
        for place, stated in enumerate(found):
            key = _keys(stated)
            if stated.prompt is not None and key[0] not in seen:
                seen.add(key[0])
                words = words_of(stated.prompt)
                index.add(words)
                rarity.add(words)
                whole.add(words_of_both(words, stated.answer))
                firsts.append(len(at))
                shared.add(len(at), stated)
            faults.add(len(at), stated)
            at.append(number)
            place_of.append(place)
            keys.extend(key)
        if not found:
            faults.nothing_said.append(number)
        if (number + 1) % 1000 == 0:
            progress(number + 1)
    progress(len(rows))
    del seen
    of_key = np.array(keys, dtype=np.uint64).reshape(-1, 3).T
    read = Read(np.array(at, dtype=np.int64), np.array(place_of, dtype=np.int32), *of_key)

    def statement(i: int) -> Statement:
        return statements_of(rows[int(read.row[i])], int(read.row[i]) + 1, text_field)[int(read.place[i])]

    groups = _duplicates(read, statement)
    groups += _different_answers(read, statement)
    groups += _near_conflicts(read, statement, index, whole, rarity, firsts, near)
    groups += _preference_cycles(read, statement)
    groups += shared.groups(read, statement)
    groups += faults.groups(read, statement)
    return groups, len(at)


def _keys(statement: Statement) -> tuple[int, int, int]:
    prompt, answer, rejected = (0 if t is None else _hash(normalised(t)) for t in statement)
    return prompt, answer, rejected


def _hash(text: str) -> int:
    """A hash of 64 bits that is never 0. Two of a million texts collide by chance in one of 37 million datasets."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


# ---- Rows that say the same, and prompts with several answers --------------------------------------------------------


def _runs(keys: NDArray[Any]) -> list[NDArray[np.int64]]:
    """Places of equal keys, for keys that occur more than once; each ascending."""
    order = np.lexsort(keys.T[::-1]) if keys.ndim == 2 else np.argsort(keys, kind="stable")
    ordered = keys[order]
    changes = (ordered[1:] != ordered[:-1]).any(axis=1) if keys.ndim == 2 else ordered[1:] != ordered[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(order)]])
    long = np.flatnonzero(np.diff(starts) > 1)
    return [np.sort(order[starts[i] : starts[i + 1]]) for i in long]


def _duplicates(read: Read, statement: Callable[[int], Statement]) -> list[Group]:
    """Rows all of whose statements are also in an earlier row."""
    order = np.lexsort((read.place, read.row))
    keys = np.stack([read.prompt, read.answer, read.rejected], axis=1)[order]
    starts = np.flatnonzero(np.diff(read.row[order], prepend=-1))
    by_content: dict[bytes, list[int]] = defaultdict(list)  # for each content: the first statement of each such row
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        by_content[keys[start:end].tobytes()].append(int(order[start]))
    groups = []
    for same in by_content.values():
        if len(same) > 1:
            first, again = statement(same[0]), len(same) - 1
            sentence = f"{again} {'row says' if again == 1 else 'rows say'} the same as an earlier one."
            side = Side(shortened(first.answer), [int(read.row[i]) for i in same])
            groups.append(Group("duplicate", 0.7, [shortened(first.prompt)] if first.prompt else [], [side], sentence))
    return groups


def _different_answers(read: Read, statement: Callable[[int], Statement]) -> list[Group]:
    """Groups of one prompt with several answers. Preference pairs do not count as answers."""
    asked = np.flatnonzero((read.prompt != NO_PROMPT) & (read.rejected == 0))
    groups = []
    for run in _runs(read.prompt[asked]):
        places = asked[run]
        if len(np.unique(read.answer[places])) > 1:
            groups.append(_conflict(read, statement, places, "duplicate_conflict"))
    return groups


def _near_conflicts(
    read: Read,
    statement: Callable[[int], Statement],
    index: NearIndex,
    whole: NearIndex,
    rarity: Rarity,
    firsts: Sequence[int],
    near: float,
) -> list[Group]:
    """Groups of prompts that ask nearly the same and were answered in different ways."""

    def text(i: int) -> tuple[str, str]:
        stated = statement(firsts[i])
        return stated.prompt or "", stated.answer

    linked = near_groups(index, whole, text, len(firsts), near, rarity)
    if not linked:
        return []
    of_prompt: dict[int, list[int]] = defaultdict(list)
    wanted = {int(read.prompt[firsts[i]]) for group in linked for i in group}
    for i in np.flatnonzero((read.rejected == 0) & np.isin(read.prompt, np.array(sorted(wanted), dtype=np.uint64))):
        of_prompt[int(read.prompt[i])].append(int(i))
    groups = []
    for group in linked:
        prompts = [int(read.prompt[firsts[i]]) for i in group]
        places = np.array(sorted(i for p in prompts for i in of_prompt[p]), dtype=np.int64)
        answers_of = [set(read.answer[of_prompt[p]].tolist()) for p in prompts]
        if len(places) and any(a != answers_of[0] for a in answers_of[1:]):
            groups.append(_conflict(read, statement, places, "near_duplicate_conflict"))
    return groups


def _conflict(read: Read, statement: Callable[[int], Statement], places: NDArray[np.int64], kind: str) -> Group:
    """The group of statements that answer one question in several ways; sides in the order of their first rows."""
    sides: dict[int, list[int]] = defaultdict(list)
    for i in places.tolist():
        sides[int(read.answer[i])].append(i)
    texts = [statement(i[0]).answer for i in sides.values()]
    score, why = how_compatible(texts)
    prompts = list(dict.fromkeys(shortened(statement(int(i)).prompt or "") for i in places[: 4 * COMPARED]))
    asked = (
        "One prompt has" if kind == "duplicate_conflict" else f"{len(prompts)} prompts that ask nearly the same have"
    )
    count = [f"{len(i)} {'row' if len(i) == 1 else 'rows'}" for i in sides.values()]
    how = f" ({', '.join(count)})" if len(count) <= 4 else ""
    sentence = f"{asked} {len(sides)} different answers{how}: {why}."
    return Group(kind, score, prompts, _sides(read, texts, sides.values()), sentence)


def _sides(read: Read, answers: Iterable[str], statements: Iterable[Sequence[int]]) -> list[Side]:
    return [
        Side(shortened(answer), sorted({int(read.row[i]) for i in of_side}))
        for answer, of_side in zip(answers, statements, strict=True)
    ]


def how_compatible(answers: Sequence[str]) -> tuple[float, str]:
    """How compatible the two least compatible answers are, in [0, 1], and the same in words."""
    return min(_compatible(a, b) for a, b in combinations(answers[:COMPARED], 2))


def _compatible(one: str, other: str) -> tuple[float, str]:
    yes, no = polarity(one), polarity(other)
    if yes is not None and no is not None and yes != no:
        return 0.05, "one says yes and the other no"
    first, second = normalised(one).split(), normalised(other).split()
    numbers = numbers_in(one), numbers_in(other)
    if not first or not second:
        return 0.0, "one of them is empty"
    if max(len(first), len(second)) <= SHORT:
        if numbers[0] and numbers[1] and set(numbers[0]) != set(numbers[1]):
            return 0.05, "the numbers differ"
        if _bare(first) == _bare(second):
            return 0.9, "they differ in punctuation only"
        return 0.15, "both are short, and they differ"
    shorter, longer = sorted((_bare(first), _bare(second)), key=len)
    if len(shorter) <= SHORT:
        if set(shorter) <= set(longer):
            return 0.8, "the longer one contains the shorter"
        return 0.4, "the short answer does not occur in the long one"
    common = len(set(shorter) & set(longer)) / len(set(shorter) | set(longer))
    if common >= LIKE:
        if numbers[0] and numbers[1] and set(numbers[0]) != set(numbers[1]):
            return 0.3, "they say the same with other numbers"
        return 0.85, "they say nearly the same"
    if numbers[0] and numbers[1] and numbers[0][-1] != numbers[1][-1]:
        return 0.45, "both are long, and end with different numbers"
    return 0.6, "both are long texts, and reading cannot tell whether they contradict each other"


def _bare(words: Sequence[str]) -> list[str]:
    return [bare for word in words if (bare := word.strip(".,;:!?\"'“”‘’()[]*`"))]


# ---- Preferences -----------------------------------------------------------------------------------------------------


def _preference_cycles(read: Read, statement: Callable[[int], Statement]) -> list[Group]:
    """Answers to one prompt that are preferred in a circle. The shortest circle is A over B and B over A."""
    pairs = np.flatnonzero(read.rejected != 0)
    if not len(pairs):
        return []
    # The same answer to two prompts is two nodes.
    ends = np.concatenate([np.stack([read.prompt[pairs], k[pairs]], axis=1) for k in (read.answer, read.rejected)])
    _, node = np.unique(ends, axis=0, return_inverse=True)
    over, under = node.reshape(2, -1)
    size = int(node.max()) + 1
    graph = coo_array((np.ones(len(pairs), dtype=bool), (over, under)), shape=(size, size))
    _, circle = connected_components(graph, directed=True, connection="strong")
    inside = np.flatnonzero((circle[over] == circle[under]) & (over != under))
    by_circle: dict[int, list[int]] = defaultdict(list)
    for i in inside.tolist():
        by_circle[int(circle[over[i]])].append(int(pairs[i]))
    groups = []
    for places in by_circle.values():
        sides: dict[int, list[int]] = defaultdict(list)
        for i in places:
            sides[int(read.answer[i])].append(i)
        texts = [statement(i[0]).answer for i in sides.values()]
        prompt = shortened(statement(places[0]).prompt or "")
        if len(sides) == 2:
            sentence = "Of two answers to one prompt, some rows prefer the first and others the second."
        else:
            sentence = f"{len(sides)} answers to one prompt are preferred in a circle: no order of them fits all rows."
        groups.append(Group("preference_cycle", 0.05, [prompt], _sides(read, texts, sides.values()), sentence))
    same = pairs[over == under]
    if len(same):
        sides_of = [Side("", sorted(set(read.row[same].tolist())))]
        groups.append(Group("preference_cycle", 0.0, [], sides_of, "The chosen and the rejected answer are the same."))
    return groups


# ---- One answer to prompts that cannot share it ----------------------------------------------------------------------


class _SharedAnswers:
    """Prompts that have the same short answer although they differ in exactly one number, or in a negation."""

    def __init__(self) -> None:
        self._places: dict[int, list[int]] = defaultdict(list)

    def add(self, number: int, statement: Statement) -> None:
        """Remember statement `number`, if it is of that kind."""
        if statement.rejected is not None or statement.prompt is None or len(statement.answer) > 80:
            return
        says = polarity(statement.answer)
        if says is None and not (numbers_in(statement.answer) and len(statement.answer.split()) <= SHORT):
            return
        words = normalised(statement.prompt)
        numbers = numbers_in(words)
        if says is None and len(numbers) == 1:
            key = "number", words.replace(numbers[0], "#")
        elif says is not None:
            key = "negation", " ".join(w for w in words.replace("n't", " not").split() if w not in NEGATIONS)
        else:
            return
        self._places[_hash("\0".join((*key, normalised(statement.answer))))].append(number)

    def groups(self, read: Read, statement: Callable[[int], Statement]) -> list[Group]:
        groups = []
        for places in self._places.values():
            if len(places) < 2:
                continue
            said = [statement(i) for i in places]
            prompts = list(dict.fromkeys(shortened(s.prompt or "") for s in said))
            negated = polarity(said[0].answer) is not None
            score, differ = (0.2, "a negation") if negated else (0.45, "a number")
            sentence = f"{len(prompts)} prompts that differ only in {differ} have the same answer."
            if len(prompts) > 1:
                sides = [Side(shortened(said[0].answer), sorted({int(read.row[i]) for i in places}))]
                groups.append(Group("shared_answer", score, prompts, sides, sentence))
        return groups


# ---- Rows with a fault of their own ----------------------------------------------------------------------------------


class _Faults:
    """Rows that say nothing, and answers that stop in the middle."""

    def __init__(self) -> None:
        self.nothing_said: list[int] = []  # rows without a statement
        self._empty: list[int] = []
        self._open: list[int] = []
        self._long = 0

    def add(self, number: int, statement: Statement) -> None:
        """Look at statement `number`."""
        if not statement.answer.strip() or (statement.prompt is not None and not statement.prompt.strip()):
            self._empty.append(number)
        elif statement.prompt is not None and len(statement.answer) > 4 * LONG:
            answer = statement.answer.rstrip()
            if answer.count(" ") >= LONG:
                self._long += 1
                # Lists, code, and scripts without full stops may end in many ways. Only a bare word looks cut.
                if answer[-1].isalpha() and answer.split()[-1][0] not in "#@" and "\n" not in answer[-80:]:
                    self._open.append(number)

    def groups(self, read: Read, statement: Callable[[int], Statement]) -> list[Group]:
        groups = [Group("empty", 0.0, [], [Side("", [row])], "The row has no answer.") for row in self.nothing_said]
        for i in self._empty:
            prompt, answer, _ = statement(i)
            what = "prompt" if answer.strip() else "answer"
            side = Side(shortened(answer), [int(read.row[i])])
            groups.append(Group("empty", 0.0, [shortened(prompt or "")], [side], f"The {what} is empty."))
        if self._long and 1 - len(self._open) / self._long >= MOST_END:
            sentence = "The answer stops in the middle of a sentence, where others end with a full stop."
            for i in self._open:
                prompt, answer, _ = statement(i)
                side = Side("…" + shortened(answer[-120:]), [int(read.row[i])])
                groups.append(Group("cut", 0.4, [shortened(prompt or "")], [side], sentence))
        return groups
