"""What OpenAI's own client gets from the server, and that it equals what `LoraEnsemble.generate` gives."""

import math
from collections.abc import Iterator

import httpx
import openai
import pytest
from serving import Live, events, live, tiny_folder
from tiny import EOS

from renyi.runs.load import Loaded
from renyi.serve.batching import EngineLimits

MESSAGES = [{"role": "user", "content": "w1 w2 w3"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return tiny_folder(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Live]:
    with live(loaded, keys=("secret",)) as running:
        yield running


@pytest.fixture
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "member_0", "member_1", "member_2"]
    assert client.models.retrieve("member_1").id == "member_1"
    assert client.models.retrieve("tiny").model_extra["members"] == names[1:]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_a_plain_chat_parses_with_usage(client: openai.OpenAI, loaded: Loaded) -> None:
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    (answer,) = loaded.generate([MESSAGES], max_new_tokens=8, do_sample=False)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", answer.text)
    assert choice.finish_reason == ("stop" if answer.token_ids[-1] == EOS else "length")
    assert reply.usage.completion_tokens == len(answer.token_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.object == "chat.completion"
    assert reply._request_id


def test_a_stream_gives_role_text_usage_and_done(server: Live, client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [
        *[None] * (len(chunks) - 2),
        whole.choices[0].finish_reason,
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    headers = {"authorization": "Bearer secret"}
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**asked, "stream": True}, headers=headers
    ) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-accel-buffering"] == "no"
        assert events(raw.iter_lines())[-1] == "[DONE]"


@pytest.mark.parametrize("top", [0, 1, 20])
def test_logprobs_join_to_the_text(client: openai.OpenAI, loaded: Loaded, top: int) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 10, "seed": 5, "logprobs": True, "top_logprobs": top}
    reply = client.chat.completions.create(**asked)
    content = reply.choices[0].logprobs.content
    text = reply.choices[0].message.content
    assert bytes(b for entry in content for b in entry.bytes).decode() == text
    assert all(len(entry.top_logprobs) == top for entry in content)
    for entry in content:
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-6
    (answer,) = loaded.generate([MESSAGES], max_new_tokens=10, temperature=1.0, top_k=0, seed=5)
    assert [entry.logprob for entry in content] == pytest.approx(answer.log_prob[: len(content)], abs=1e-5)
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in content]


def test_errors_have_openais_form(server: Live, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create
    own_template = {"chat_template_kwargs": {"chat_template": "{% for i in range(9**9) %}x{% endfor %}"}}
    for ask, kind, status in (
        (lambda: chat(model="nobody", messages=MESSAGES), openai.NotFoundError, 404),
        (lambda: chat(model="tiny", messages=MESSAGES, temperature=-1), openai.UnprocessableEntityError, 422),
        (lambda: chat(model="tiny", messages=[]), openai.UnprocessableEntityError, 422),
        (lambda: chat(model="tiny", messages=MESSAGES, extra_body={"temprature": 1}), openai.BadRequestError, 400),
        (lambda: chat(model="tiny", messages=MESSAGES, presence_penalty=1), openai.BadRequestError, 400),
        (lambda: chat(model="tiny", messages=MESSAGES, extra_body=own_template), openai.BadRequestError, 400),
        (lambda: chat(model="tiny", messages=MESSAGES, max_tokens=10**6), openai.BadRequestError, 400),
        (lambda: chat(model="tiny", messages=MESSAGES, extra_body={"withhold": True}), openai.BadRequestError, 400),
        (lambda: client.with_options(api_key="wrong").models.list(), openai.AuthenticationError, 401),
    ):
        with pytest.raises(kind) as raised:
            ask()
        assert raised.value.status_code == status
        assert set(raised.value.body) == {"message", "type", "param", "code"}
        assert raised.value.body["message"]
    with pytest.raises(openai.BadRequestError, match="Did you mean temperature"):
        chat(model="tiny", messages=MESSAGES, extra_body={"temprature": 1})
    long = [{"role": "user", "content": "w1 " * 3000}]
    with pytest.raises(openai.BadRequestError) as raised:
        chat(model="tiny", messages=long)
    assert raised.value.code == "context_length_exceeded"
    broken = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=b"{nonsense",
        headers={"authorization": "Bearer secret", "content-type": "application/json"},
    )
    assert broken.status_code == 400
    assert "no JSON" in broken.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/docs", "/nowhere"]
)
def test_every_route_but_health_needs_the_key(server: Live, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(server.url + path, headers={"authorization": "Bearer secre"}).status_code == 401
    assert httpx.get(server.url + path, auth=("anyone", "secret")).status_code != 401
    for health in ("/health/live", "/health/ready"):
        assert httpx.get(server.url + health).status_code == 200


def test_posts_need_the_key_too(server: Live) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/score"):
        refused = httpx.post(server.url + path, json={})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["x-request-id"]


def test_a_full_queue_is_429_and_the_clients_retry_succeeds(loaded: Loaded) -> None:
    with live(loaded, engine=EngineLimits(running=1, waiting=1)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        long = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1000, "temperature": 0, "stream": True}
        first = client.chat.completions.create(**long)
        next(iter(first))  # it runs now, and no longer waits
        second = client.chat.completions.create(**long)
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4)
        assert raised.value.response.headers["retry-after"] == "1"
        assert raised.value.code == "queue_full"
        second.close()
        first.close()
        patient = client.with_options(max_retries=2)
        assert patient.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4).choices


def test_seed_stop_temperature_max_tokens_and_n(client: openai.OpenAI, loaded: Loaded) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16}
    text = {}
    for seed in (1, 2):
        text[seed] = client.chat.completions.create(**asked, seed=seed).choices[0].message.content
        (answer,) = loaded.generate([MESSAGES], max_new_tokens=16, temperature=1.0, top_k=0, seed=seed)
        assert text[seed] == answer.text
    assert text[1] != text[2]
    several = client.chat.completions.create(**asked, seed=1, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [choice.message.content for choice in several.choices[:2]] == [text[1], text[2]]
    word = text[1].split()[2]
    stopped = client.chat.completions.create(**asked, seed=1, stop=[f" {word}", "never"])
    assert stopped.choices[0].message.content == text[1][: text[1].index(f" {word}")]
    assert stopped.choices[0].finish_reason == "stop"
    greedy = [client.chat.completions.create(**asked, temperature=0).choices[0].message.content for _ in range(2)]
    cold = client.chat.completions.create(**asked, temperature=1e-300)  # divided by which, logits would be infinite
    assert greedy[0] == greedy[1] == cold.choices[0].message.content
    short = client.chat.completions.create(**{**asked, "max_tokens": 3}, temperature=0)
    assert short.usage.completion_tokens <= 3


def test_extra_fields_arrive(client: openai.OpenAI, loaded: Loaded) -> None:
    body = {"members": True, "mixture": "token"}
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, seed=1, logprobs=True, top_logprobs=2, extra_body=body
    )
    (answer,) = loaded.generate([MESSAGES], max_new_tokens=6, temperature=1.0, top_k=0, seed=1, mixture="token")
    found = reply.choices[0].model_extra["uncertainty"]
    assert found["epistemic"]["mean"] == pytest.approx(answer.mean_epistemic, rel=1e-4)
    assert found["epistemic"]["max"] == pytest.approx(answer.max_epistemic, rel=1e-4)
    assert found["total"]["max_token"] == max(range(len(answer.total)), key=answer.total.__getitem__)
    assert found["effective_members"] == pytest.approx(answer.effective_members, rel=1e-4)
    assert found["disagreement"] == pytest.approx(answer.disagreement, abs=1e-6)
    assert found["mixture_nll"] == pytest.approx(answer.mixture_nll, rel=1e-4)
    assert [own["log_likelihood"] for own in found["members"]] == pytest.approx(answer.member_log_likelihood, rel=1e-4)
    assert sum(own["responsibility"] for own in found["members"]) == pytest.approx(1)
    for place, entry in enumerate(reply.choices[0].logprobs.content):
        assert entry.model_extra["epistemic"] == pytest.approx(answer.epistemic[place], abs=1e-5)
        members = entry.model_extra["members"]
        assert [own["weight"] for own in members] == pytest.approx(answer.weights[place], abs=1e-5)
        assert [len(own["top_logprobs"]) for own in members] == [2, 2, 2]


def test_a_members_answer_is_its_own(client: openai.OpenAI, loaded: Loaded) -> None:
    for member in range(3):
        reply = client.chat.completions.create(
            model=f"member_{member}", messages=MESSAGES, max_tokens=10, temperature=0, extra_body={"members": True}
        )
        (answer,) = loaded.generate([MESSAGES], max_new_tokens=10, do_sample=False, mixture="member", member=member)
        assert reply.choices[0].message.content == answer.text
        assert [own["model"] for own in reply.choices[0].model_extra["uncertainty"]["members"]] == [f"member_{member}"]


def test_completions_take_text_ids_and_lists(client: openai.OpenAI, loaded: Loaded) -> None:
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    (answer,) = loaded.generate(["w1 w2"], plain=True, max_new_tokens=6, do_sample=False)
    ids = loaded.tokenizer("w1 w2")["input_ids"]
    for prompt in ("w1 w2", ids):
        reply = client.completions.create(**asked, prompt=prompt, logprobs=2)
        assert reply.choices[0].text == answer.text
        logprobs = reply.choices[0].logprobs
        assert "".join(logprobs.tokens) == answer.text
        assert [answer.text[at:][: len(t)] for at, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)] == (
            logprobs.tokens
        )
        assert all(len(top) == 2 for top in logprobs.top_logprobs)
    both = client.completions.create(**asked, prompt=["w1 w2", "w3"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == answer.text
    streamed = client.completions.create(**asked, prompt=["w1 w2", "w3"], stream=True)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in both.choices]
    with pytest.raises(openai.BadRequestError, match="has a token 64, of 64"):
        client.completions.create(**asked, prompt=[64])


def test_scores_equal_the_commands(server: Live, loaded: Loaded) -> None:
    rows = [
        {"prompt": "w1 w2", "completion": " w3 w4"},
        {"prompt": "w5", "completion": " w6 w7 w8 w9"},
        {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "w4"}]},
    ]
    for given in (rows[:2], rows[2:]):
        reply = httpx.post(
            f"{server.url}/v1/score", json={"model": "tiny", "rows": given}, headers={"authorization": "Bearer secret"}
        ).json()
        for found, score in zip(reply["data"], loaded.score(given), strict=True):
            assert found["tokens"] == score.tokens
            assert found["log_likelihood"] == pytest.approx(score.log_likelihood, rel=1e-6)
            assert found["responsibilities"] == pytest.approx(score.responsibilities, abs=1e-6)
            assert found["mixture_nll"] == pytest.approx(score.mixture_nll, rel=1e-6)
    headers = {"authorization": "Bearer secret"}
    wrong = httpx.post(f"{server.url}/v1/score", json={"model": "tiny", "rows": [{"nothing": 1}]}, headers=headers)
    assert wrong.status_code == 400
