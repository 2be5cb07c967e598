"""Tokens become text: pieces join, nothing of a stop string is shown, and nothing is held longer than needed."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from renyi.serve.engine import Alternative, EngineToken
from renyi.serve.writing import Writing


class Letters:
    """A tokenizer whose token is a piece of text."""

    all_special_ids = (0,)

    def __init__(self, pieces: list[str]):
        self.pieces = ["", *pieces]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


def token(number: int, finish: str | None = None) -> EngineToken:
    return EngineToken(
        number, -1.0, [0.5, 0.5], [-1.0, -1.0], 0.0, 0.0, 0.0, 0.0, [Alternative(number, -1.0)], (), finish
    )


def first_stop(pieces: list[str], stops: list[str]) -> tuple[str, int | None]:
    """The text before the stop string that is complete first, and the token that completes it, counted from 1."""
    text = ""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], count
    return text, None


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_an_answer_ends_before_its_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    writing: Any = Writing(Letters(pieces), [0.5, 0.5], stops)  # type: ignore[arg-type]
    text, last = first_stop(pieces, stops)
    shown, released = "", []
    for number in range(1, len(pieces) + 1):
        released += writing.add(token(number, "length" if number == len(pieces) else None))
        shown = "".join(written.text for written in released)
        assert text.startswith(shown)
        if writing.finish is not None:
            break
        read = "".join(pieces[:number])
        waits = max((n for stop in stops for n in range(len(stop)) if read.endswith(stop[:n])), default=0)
        assert len(read) - len(shown) < waits + max(map(len, pieces))  # no more is held than may be needed
    assert (shown, writing.text) == (text, text)
    assert writing.finish == ("length" if last is None else "stop")
    assert len(writing.tokens) == (last or len(pieces))
    answer = writing.answer()
    assert "".join(answer.tokens) == answer.text == text
    assert answer.mixture_nll == len(writing.tokens)
    assert answer.effective_members == 2.0


def test_an_end_token_adds_no_text_but_counts() -> None:
    writing: Any = Writing(Letters(["a", "</s>"]), [1.0])  # type: ignore[arg-type]
    assert [w.text for w in writing.add(token(1)._replace(weights=[1.0], member_log_probs=[-2.0]))] == ["a"]
    assert [w.text for w in writing.add(token(2, "stop")._replace(weights=[1.0], member_log_probs=[-3.0]))] == [""]
    assert (writing.text, writing.finish) == ("a", "stop")
    assert writing.answer().member_log_likelihood == [-5.0]


def test_alternatives_have_the_text_that_they_would_add() -> None:
    writing: Any = Writing(Letters(["a", "b"]), [0.5, 0.5])  # type: ignore[arg-type]
    (written,) = writing.add(token(1)._replace(alternatives=[Alternative(2, -0.5), Alternative(1, -1.0)]))
    assert [told.text for told in written.alternatives] == ["b", "a"]
    assert SimpleNamespace(**written._asdict()).text == "a"
