"""The rows of a dataset that a model reads: which, in what form, and with whose prompts.

An example has one answer: the last one of its row. Everything before it is the prompt. Read next: `measuring.py`.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from renyi.audit.findings import Group
from renyi.audit.statements import Statement, normalised, statements_of
from renyi.data.messages import is_messages, role_of, standard_role
from renyi.errors import ConfigError, DataError

Rows = Sequence[Mapping[str, Any]]

# The most of the drawn rows that are taken because reading alone found them in a conflict.
SHARE_OF_CONFLICTS = 0.5
CONFLICTS = frozenset(("duplicate_conflict", "near_duplicate_conflict", "preference_cycle", "shared_answer"))


class Examples(NamedTuple):
    """N examples of a dataset.

    Attributes:
        rows: their numbers in the dataset, counted from 0, ascending, [N].
        texts: prompt and answer (and the rejected answer) as text, [N].
        content: what `renyi sft` or `renyi dpo` reads, [N].
        method: "sft", or "dpo" for preference pairs.
    """

    rows: list[int]
    texts: list[Statement]
    content: list[dict[str, Any]]
    method: str

    def with_prompts_of(self, others: Sequence[int], answers: Sequence[int]) -> list[dict[str, Any]]:
        """Examples that join the prompt of one example and the answer of another.

        Args:
            others, answers: places of the examples, [n] each.
        """
        return [
            {"prompt": self.content[i]["prompt"], "completion": self.content[j]["completion"]}
            for i, j in zip(others, answers, strict=True)
        ]

    def rivals(self, number: int, seed: int) -> list[list[int]]:
        """For each of `number` turns: another example for every example, at random, whose prompt is another one.

        Where all prompts are equal, an example is its own rival.
        """
        keys = [normalised(text.prompt or "") for text in self.texts]
        rng, turns = random.Random(seed), []
        for _ in range(number):
            drawn = []
            for i, key in enumerate(keys):
                tries = (rng.randrange(len(keys)) for _ in range(20))
                drawn.append(next((j for j in tries if keys[j] != key), i))
            turns.append(drawn)
        return turns


def draw(rows: Rows, groups: Iterable[Group], most: int, seed: int = 0) -> list[int]:
    """The rows that a model reads, ascending: all of them, or `most`.

    If there are more rows, those that reading alone found in a conflict come first, up to half of `most`, drawn at
    random if they are more. The others are drawn at random.
    """
    if len(rows) <= most:
        return list(range(len(rows)))
    rng = random.Random(seed)
    conflicts = sorted({row for group in groups if group.kind in CONFLICTS for row in group.rows})
    first = sorted(rng.sample(conflicts, min(len(conflicts), round(SHARE_OF_CONFLICTS * most))))
    taken = set(first)
    others = (i for i in rng.sample(range(len(rows)), min(len(rows), most + len(first))) if i not in taken)
    return sorted([*first, *(i for i, _ in zip(others, range(most - len(first)), strict=False))])


def examples_of(rows: Rows, numbers: Sequence[int], text_field: str = "text", is_chat: bool = True) -> Examples:
    """Rows as examples. Rows without an answer are left out.

    Args:
        rows: of the dataset.
        numbers: of the rows to take.
        text_field: the column of a row of text.
        is_chat: whether the model has a chat template. An Alpaca record is then a chat of two messages.

    Raises:
        DataError: pairs and other rows are mixed, or nothing is left.
    """
    kept, texts, content = [], [], []
    for number in numbers:
        row = rows[number]
        stated = statements_of(row, number + 1, text_field)
        if not stated or not stated[-1].answer.strip() or stated[-1].rejected == stated[-1].answer:
            continue
        kept.append(number)
        texts.append(stated[-1])
        content.append(_content(row, stated[-1], is_chat))
    forms = {tuple(sorted(made)) for made in content}
    if not forms:
        raise DataError("no row has an answer, so a model has nothing to read", where="rows")
    if len(forms) > 1:
        raise DataError(
            f"have several forms ({'; '.join(' + '.join(form) for form in sorted(forms))})",
            where="rows",
            hint="A model reads rows of one form. Audit each form by itself.",
        )
    is_pair = "chosen" in forms.pop()
    if not is_pair and "prompt" in content[0] and len({isinstance(c["prompt"], str) for c in content}) > 1:
        content = [{name: _as_messages(name, value) for name, value in made.items()} for made in content]
    return Examples(kept, texts, content, "dpo" if is_pair else "sft")


def _content(row: Mapping[str, Any], stated: Statement, is_chat: bool) -> dict[str, Any]:
    """What a trainer reads of a row."""
    has = {name for name, value in row.items() if value is not None}
    if stated.rejected is not None:
        return {name: _messages(row[name]) for name in ("prompt", "conversations", "chosen", "rejected") if name in has}
    if {"prompt", "completion"} <= has:
        return {name: _messages(row[name]) for name in ("prompt", "completion")}
    for name in ("messages", "conversations"):
        if name in has:
            turns = _messages(row[name])
            last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
            if last == 0:
                return {"messages": turns[:1]}
            return {"prompt": turns[:last], "completion": [turns[last]]}
    if stated.prompt is None:
        return {"text": stated.answer}
    if is_chat:
        return {"prompt": _as_messages("prompt", stated.prompt), "completion": _as_messages("", stated.answer)}
    return {"prompt": stated.prompt + "\n", "completion": stated.answer}


def _messages(value: Any) -> Any:
    """Messages with standard roles; text as it is."""
    if not is_messages(value):
        return value
    turns = json.loads(value) if isinstance(value, str) else value
    kept = []
    for turn in [turns] if isinstance(turns, Mapping) else turns:
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if content is None:
            raise ConfigError(
                "messages without a text, such as calls of tools, cannot be read by a model's part of an audit",
                where="rows",
                hint="Audit without a model, or leave such rows out.",
            )
        text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
        kept.append({"role": standard_role(str(role_of(turn))), "content": text})
    return kept


def _as_messages(name: str, value: Any) -> Any:
    return (
        [{"role": "user" if name == "prompt" else "assistant", "content": value}] if isinstance(value, str) else value
    )
