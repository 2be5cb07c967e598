"""Bodies drawn from the API's own schema, with values that fit and values that do not: each is answered or refused.

`benchmarks/serve_fuzz.py` sends thousands, drawn by schemathesis.
"""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Live, live, tiny_folder

from renyi.serve.answers import AnswerLimits
from renyi.serve.schemas import ChatBody, CompletionBody, ScoreBody

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from(["w1", "w2 w3", "", " ", "<eos>", "\x00", "é🎉", "nothing known"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]), "content": WORDS | st.none()}
    ),
    max_size=3,
)
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny", "member_0", "member_2"]),
    "messages": st.just([{"role": "user", "content": "w1"}]) | MESSAGES,
    "prompt": WORDS | st.lists(WORDS, max_size=3) | st.lists(st.integers(0, 70), max_size=5),
    "max_tokens": st.integers(1, 3),
    "max_completion_tokens": st.integers(1, 3),
    "n": st.integers(1, 2),
    "stop": WORDS | st.lists(WORDS, max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "temperature": st.floats(0, 100),
    "top_p": st.floats(1e-9, 1),
    "top_k": st.integers(0, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 100),
    "logprobs": st.sampled_from([True, False, 0, 5, 20, None]),
    "top_logprobs": st.integers(0, 20),
    "stream": st.booleans(),
    "mixture": st.sampled_from(["sequence", "token"]),
    "members": st.booleans(),
    "rows": st.lists(st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}), max_size=3),
}
PATHS = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody, "/v1/score": ScoreBody}


@st.composite
def request(draw: st.DrawFn) -> tuple[str, Any]:
    """A path and a body: its needed fields, some others, and of all these at most one that does not fit."""
    path = draw(st.sampled_from(sorted(PATHS)))
    fields = PATHS[path].model_fields
    needed = [name for name, field in fields.items() if field.is_required()]
    others = draw(st.lists(st.sampled_from(sorted(fields.keys() & FITTING.keys())), max_size=4))
    odd = draw(st.sampled_from([None, None, None, *sorted(fields)]))
    body = {name: draw(FITTING[name]) for name in dict.fromkeys([*needed, *others])}
    if odd is not None:
        body[odd] = draw(ANYTHING)
    return path, body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tiny_folder(tmp_path_factory.mktemp("fuzz")), answers=AnswerLimits(max_tokens=3)) as running:
        yield running


def test_each_body_is_answered_or_refused_by_name(server: Live) -> None:
    seen = set()
    with httpx.Client(base_url=server.url, timeout=60) as client:

        @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(request())
        def send(asked: tuple[str, Any]) -> None:
            path, body = asked
            try:
                reply = client.post(path, json=body)
            except ValueError:  # httpx writes no numbers that JSON does not have
                return
            seen.add((path, reply.status_code))
            assert reply.status_code in (200, 400, 404, 422), (reply.status_code, reply.text)
            if reply.status_code != 200:
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

        send()
    assert {(path, 200) for path in PATHS} <= seen
    assert server.wait_for_idle()
