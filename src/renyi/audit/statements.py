"""What a row of training data states: a prompt has an answer, or one answer is better than another.

Read next: `reading.py`, which compares statements.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from renyi.data.rows import alpaca_question
from renyi.errors import DataError

# fmt: off
NEGATIONS = frozenset((
    "no", "not", "never", "neither", "nor", "none", "nothing", "without", "cannot", "false", "incorrect", "wrong",
    "isn", "aren", "don", "doesn",
))
_POLITE = frozenset(("please", "kindly", "could", "would", "tell", "explain", "me", "us"))
# fmt: on
_STOP_WORDS = (ENGLISH_STOP_WORDS - NEGATIONS) | _POLITE
_YES, _NO = frozenset(("yes", "true", "correct", "yeah")), frozenset(("no", "false", "incorrect", "nope"))
# A word, a number with its sign and separators, or one character of a script that writes no spaces.
_TOKEN = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[-−]?\d+(?:[.,]\d+)*|\w+")
_BREAK = re.compile(r"[.!?:\n\"“'(]")  # after these a capital letter does not show a name
_NUMBER = re.compile(r"[-−]?\d+(?:[.,]\d+)*")


class Statement(NamedTuple):
    """One answer of a row.

    Attributes:
        prompt: everything before the answer; None for plain text, which has no prompt.
        answer: the answer, or the chosen one of a pair.
        rejected: of a preference pair, the answer that was not chosen; None elsewhere.
    """

    prompt: str | None
    answer: str
    rejected: str | None = None


def statements_of(row: Mapping[str, Any], number: int, text_field: str = "text") -> list[Statement]:
    """What one row states.

    A chat gives one statement for each turn of the assistant: the turns before are the prompt, the turn is the answer.

    Args:
        row: in any form that `renyi sft` and `renyi dpo` read, or an Alpaca record (`instruction`, `input`, `output`).
        number: of the row, counted from 1, for the message.
        text_field: the column of a row of text.

    Raises:
        DataError: the row has none of these forms.
    """
    has = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        return [_pair(row)]
    if {"prompt", "completion"} <= has:
        return [Statement(_text(row["prompt"]), _text(row["completion"]))]
    for name in ("messages", "conversations"):
        if name in has:
            turns = [_turn(turn) for turn in _parsed(row[name])]
            return list(_of_chat(turns))
    if {"instruction", "output"} <= has:
        return [Statement(alpaca_question(row), _text(row["output"]))]
    if text_field in has:
        return [Statement(None, _text(row[text_field]))]
    if has & {"prompt", "completion", "chosen", "rejected", "instruction", "output"}:
        return [Statement(_text(row.get("prompt") or row.get("instruction") or ""), "")]  # its answer is missing
    raise DataError(
        f"has the columns {', '.join(sorted(row)) or '(none)'}, which make no known form",
        where=f"row {number}",
        hint="Give messages, prompt + completion, prompt + chosen + rejected, or text.",
    )


def _pair(row: Mapping[str, Any]) -> Statement:
    chosen, rejected = row["chosen"], row["rejected"]
    before = row.get("prompt") or row.get("conversations")
    if before is None and isinstance(chosen, list) and isinstance(rejected, list):  # the prompt is their common part
        alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        before, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    return Statement(None if before is None else _text(before), _text(chosen), _text(rejected))


def _of_chat(turns: Sequence[tuple[str, str]]) -> Iterator[Statement]:
    for i, (role, content) in enumerate(turns):
        if role in ("assistant", "gpt"):
            before = turns[:i]
            only = len(before) == 1 and before[0][0] in ("user", "human")
            yield Statement(before[0][1] if only else "\n".join(f"{r}: {c}" for r, c in before), content)


def _parsed(value: Any) -> Any:
    """Messages that a csv file holds as JSON text."""
    return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def _turn(turn: Mapping[str, Any]) -> tuple[str, str]:
    role = turn.get("role") or turn.get("from") or ""
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls")
    return str(role), _text(content) + (json.dumps(calls, sort_keys=True, default=str) if calls else "")


def _text(value: Any) -> str:
    """Text as it is; messages as one text; content parts joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        if {"role", "from"} & value.keys():
            return _turn(value)[1]
        return str(value.get("text") or "")
    if isinstance(value, Sequence):
        if len(value) > 1 and all(isinstance(v, Mapping) and {"role", "from"} & v.keys() for v in value):
            return "\n".join(f"{role}: {content}" for role, content in map(_turn, value))
        return "".join(map(_text, value))
    return str(value)


def normalised(text: str) -> str:
    """Text in one Unicode form, in lower case and with single spaces, so that these make no difference."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def words_of(prompt: str) -> frozenset[str]:
    """The words of a prompt in the singular, without stop words. The set is never empty."""
    words = frozenset(map(_kept, _TOKEN.findall(prompt.casefold()))) - {""}
    return words or frozenset((normalised(prompt),))


@lru_cache(maxsize=100_000)
def _kept(word: str) -> str:
    """A word in its singular; "" for one that does not matter."""
    if word in _STOP_WORDS or (len(word) == 1 and word.isascii() and word.isalpha()):
        return ""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


class Deciding(NamedTuple):
    """The parts of a prompt that decide what is asked, even if all other words are equal.

    Attributes:
        values: numbers and negations.
        names: words with a capital letter that does not begin a sentence.
        words: all words.
    """

    values: frozenset[str]
    names: frozenset[str]
    words: frozenset[str]

    def is_same(self, other: "Deciding") -> bool:
        """Whether two prompts have the same numbers and negations, and each all names of the other."""
        return self.values == other.values and self.names <= other.words and other.names <= self.words


def deciding(prompt: str) -> Deciding:
    """The numbers, negations, names and words of a prompt."""
    values, names, words, last, begins = set(), set(), set(), 0, True
    for match in _TOKEN.finditer(prompt):
        token = match[0]
        begins = begins or _BREAK.search(prompt, last, match.start()) is not None
        last, word = match.end(), token.casefold()
        words.add(word)
        if token[-1].isdigit() or word in NEGATIONS:
            values.add(word)
        elif token[0].isupper() and not begins:
            names.add(word)
        begins = False
    return Deciding(frozenset(values), frozenset(names), frozenset(words))


def numbers_in(text: str) -> list[str]:
    """The numbers of a text, without separators of thousands."""
    return [n.replace("−", "-").replace(",", "") for n in _NUMBER.findall(text)]


def polarity(answer: str) -> bool | None:
    """Whether an answer says yes (True) or no (False) with its first word; None where it says neither."""
    first = re.match(r"\W*(\w+)", answer)
    word = first[1].casefold() if first else ""
    return True if word in _YES else False if word in _NO else None
