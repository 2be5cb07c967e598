"""The server around the API: clients that go, faults, withheld answers, limits, what is logged and counted."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import Live, events, live, tiny_folder

from renyi.errors import ConfigError
from renyi.inference.abstention import write_abstention
from renyi.runs.load import Loaded
from renyi.serve.answers import AnswerLimits
from renyi.serve.batching import EngineLimits
from renyi.serve.run import ServerSettings, is_loopback

MESSAGES = [{"role": "user", "content": "w1 w2 w3"}]
# The most likely tokens of this model never end an answer.
LONG = {"model": "tiny", "messages": MESSAGES, "max_tokens": 900, "temperature": 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return tiny_folder(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Live]:
    with live(
        loaded, body_bytes=20_000, answers=AnswerLimits(answers=4), engine=EngineLimits(step_tokens=30)
    ) as running:
        yield running


def client_of(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def counted(server: Live, line: str) -> float:
    found = [text for text in httpx.get(f"{server.url}/metrics").text.splitlines() if text.startswith(line)]
    return float(found[0].split()[-1]) if found else 0.0


# ---- Clients that go, and faults -------------------------------------------------------------------------------------


def test_closing_a_stream_ends_its_work(server: Live) -> None:
    stream = client_of(server).chat.completions.create(**LONG, stream=True)
    next(iter(stream))
    assert server.engine.load().running + server.engine.load().waiting == 1
    stream.close()
    assert server.wait_for_idle()
    assert counted(server, "renyi_completion_tokens_total") < 900


@pytest.mark.parametrize("words", [3, 1900], ids=["while writing", "while the prompt is read"])
def test_a_client_that_waits_for_the_whole_and_goes_ends_its_work(server: Live, words: int) -> None:
    gone = counted(server, 'renyi_requests_total{route="/v1/chat/completions",status="499"}')
    messages = [{"role": "user", "content": "w1 " * words}]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions", json={**LONG, "messages": messages, "max_tokens": 100}, timeout=0.1
        )
    assert server.wait_for_idle()
    assert counted(server, 'renyi_requests_total{route="/v1/chat/completions",status="499"}') == gone + 1


def test_a_fault_within_a_stream_raises_in_the_client(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = server.engine
    forward, calls = engine._in_flight, 0

    def failing(work: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("secret")
        return forward(work)

    monkeypatch.setattr(engine, "_in_flight", failing)
    stream = client_of(server).chat.completions.create(**LONG, stream=True)
    with pytest.raises(openai.APIError, match=r"the engine failed \(RuntimeError\)"):
        list(stream)
    assert client_of(server).chat.completions.create(**{**LONG, "max_tokens": 3}).choices


def test_a_request_that_takes_too_long_is_ended_by_name(loaded: Loaded) -> None:
    with live(loaded, answers=AnswerLimits(seconds=0.2)) as server:
        for stream in (False, True):
            with pytest.raises(openai.APIError, match=r"took longer than 0\.2 s"):
                list(client_of(server).chat.completions.create(**LONG, stream=stream))
        assert server.wait_for_idle()


def test_a_graceful_stop_lets_answers_end(loaded: Loaded) -> None:
    with live(loaded) as server:
        stream = iter(client_of(server).chat.completions.create(**{**LONG, "max_tokens": 60}, stream=True))
        next(stream)
        server.server.should_exit = True
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert not server.engine.is_ready
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health/live")


# ---- Withheld answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_answers_above_the_threshold_are_withheld(loaded: Loaded, stream: bool) -> None:
    write_abstention(loaded.folder, {"score": "epistemic", "threshold": 0.0})
    try:
        with live(loaded) as server:
            asked = {**LONG, "max_tokens": 8, "temperature": 1.0, "seed": 1, "logprobs": True, "stream": stream}
            said = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
            unsaid = httpx.post(f"{server.url}/v1/chat/completions", json={**asked, "withhold": True})
            (answer,) = loaded.generate([MESSAGES], max_new_tokens=8, temperature=1.0, top_k=0, seed=1)
            text = client_of(server).completions.create(
                model="tiny", prompt="w1", max_tokens=8, seed=1, extra_body={"withhold": True}
            )
    finally:
        (loaded.folder / "abstention.json").unlink()
    words = answer.text.split()
    assert all(word in said.text for word in words)
    assert not any(f'"{word}"' in unsaid.text or f" {word}" in unsaid.text for word in words if word not in "w1 w2 w3")
    reply = events(iter(unsaid.text.splitlines()))[-2] if stream else unsaid.json()
    choice = reply["choices"][0]
    assert choice["uncertainty"]["withheld"] is True
    assert choice["uncertainty"]["threshold"]["is_above"] is True
    assert choice["uncertainty"]["threshold"]["value"] == pytest.approx(max(answer.epistemic), rel=1e-4)
    assert "I do not know: epistemic is" in choice["delta" if stream else "message"]["refusal"]
    assert choice["logprobs"] is None
    assert text.choices[0].text == ""


# ---- Limits ----------------------------------------------------------------------------------------------------------


def test_large_bodies_are_refused(server: Live) -> None:
    large = b'{"model": "' + b"x" * 30_000 + b'"}'
    headers = {"content-type": "application/json"}

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for content in (large, pieces()):
        refused = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "body_too_large"


def test_limits_are_refused_by_name(server: Live) -> None:
    client = client_of(server)
    with pytest.raises(openai.BadRequestError, match="asks for 5 answers, and the most is 4"):
        client.chat.completions.create(**{**LONG, "n": 5})
    with pytest.raises(openai.BadRequestError, match="asks for 6 answers"):
        client.completions.create(model="tiny", prompt=["w1"] * 3, n=2)
    with pytest.raises(openai.BadRequestError, match="is 5,000, and the most is 1,024"):
        client.chat.completions.create(**{**LONG, "max_tokens": 5000})
    rows = [{"prompt": "w1", "completion": " w2"}] * 65
    refused = httpx.post(f"{server.url}/v1/score", json={"model": "tiny", "rows": rows})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rows")


def test_a_page_of_another_site_is_refused(server: Live) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(f"{server.url}/v1/models", headers={"host": "localhost:9"}).status_code == 200
    form = {"content-type": "text/plain"}  # what a page may send anywhere without asking
    content = json.dumps({"model": "tiny", "messages": MESSAGES})
    assert httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=form).status_code == 422


def test_a_server_is_not_open_to_others_by_accident() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "example.org")))
    with pytest.raises(ConfigError, match="there is no key"):
        ServerSettings(host="0.0.0.0").check()
    ServerSettings(host="0.0.0.0", keys=("k",)).check()
    ServerSettings(host="0.0.0.0", is_open=True).check()
    ServerSettings().check()


# ---- What is logged and counted --------------------------------------------------------------------------------------


def test_neither_log_nor_metrics_have_keys_or_text(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "renyi.serve.requests")
    headers = {"authorization": "Bearer topsecret", "x-request-id": "mine-1"}
    with live(loaded, keys=("topsecret",)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="topsecret", max_retries=0)
        messages = [{"role": "user", "content": "w41 w42"}]
        reply = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, temperature=0, extra_headers={"x-request-id": "mine-1"}
        )
        assert reply._request_id == "mine-1"
        httpx.get(f"{server.url}/v1/models/w43", headers=headers)
        httpx.get(f"{server.url}/w44", headers={"authorization": "Bearer w45"})
        forged = httpx.get(f"{server.url}/v1/models", headers={**headers, "x-request-id": 'a"b\\c' + "x" * 100})
        assert forged.headers["x-request-id"].startswith("req_")
        metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
        time.sleep(0.05)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "renyi.serve.requests"]
    chat = next(line for line in lines if line["route"] == "/v1/chat/completions")
    assert chat["request_id"] == "mine-1"
    assert (chat["status"], chat["completion_tokens"], chat["model"]) == (200, reply.usage.completion_tokens, "tiny")
    assert chat["first_token_seconds"] <= chat["seconds"]
    assert 'renyi_requests_total{route="/v1/chat/completions",status="200"} 1.0' in metrics
    assert 'renyi_requests_total{route="/v1/models/",status="404"} 1.0' in metrics
    assert f"renyi_completion_tokens_total {float(reply.usage.completion_tokens)}" in metrics
    for secret in ("topsecret", "w41", "w43", "w44", "w45"):
        assert secret not in metrics
        assert secret not in json.dumps(lines)


def test_text_is_logged_if_asked_for(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "renyi.serve.requests")
    with live(loaded, log_text=True) as server:
        reply = client_of(server).chat.completions.create(**{**LONG, "max_tokens": 4})
        list(client_of(server).chat.completions.create(**{**LONG, "max_tokens": 4}, stream=True))
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "renyi.serve.requests"]
    assert [line["text"] for line in lines] == [[reply.choices[0].message.content]] * 2
    assert lines[0]["body"]["messages"] == MESSAGES


def test_health_tells_a_stopped_engine(loaded: Loaded) -> None:
    with live(loaded) as server:
        assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ready"}
        engine: Any = server.engine
        engine._is_stopping = True
        engine.wake()
        engine._thread.join(5)
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        with pytest.raises(openai.InternalServerError) as raised:
            client_of(server).chat.completions.create(**LONG)
        assert raised.value.status_code == 503


def test_many_clients_at_once(server: Live, loaded: Loaded) -> None:
    texts: dict[int, str] = {}

    def one(seed: int) -> None:
        reply = client_of(server).chat.completions.create(
            **{**LONG, "max_tokens": 12, "temperature": 1.0, "seed": seed}
        )
        texts[seed] = reply.choices[0].message.content or ""

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, text in texts.items():
        (answer,) = loaded.generate([MESSAGES], max_new_tokens=12, temperature=1.0, top_k=0, seed=seed)
        assert text == answer.text
    assert len(texts) == 6
