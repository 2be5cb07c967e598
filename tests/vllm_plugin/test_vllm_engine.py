"""vLLM as the server's engine: our own answers from a stand-in for vLLM, and errors where they would be wrong."""

import asyncio

import pytest
import torch
from fake_vllm import FakeVllm
from openai import BadRequestError, OpenAI
from serving import Live, live, tiny_folder

from renyi.cli.main import main
from renyi.errors import BusyError, ConfigError, EngineError
from renyi.inference.abstention import remove_abstention, write_abstention
from renyi.serve.engine import EngineRequest
from renyi.serve.replica import Capacity, ReplicaAddress, address_of
from renyi.serve.run import ServerSettings, answers_of
from renyi.serve.vllm import VllmEngine

NAMES = ["member_0", "member_1", "member_2"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture
def fake(loaded):
    with FakeVllm(loaded.ensemble, NAMES) as running:
        yield running


def engine_of(loaded, *fakes, **more):
    return VllmEngine(loaded.folder, [address_of(each.address) for each in fakes], **more)


async def collected(stream):
    return [token async for token in stream]


async def follow(stream, tokens):
    async for token in stream:
        tokens.append(token)


def answered(engine, *requests):
    """Answers, or errors, of requests that are made at once."""

    async def main():
        await engine.start()
        try:
            streams = [engine.submit(request) for request in requests]
            return await asyncio.gather(*map(collected, streams), return_exceptions=True)
        finally:
            await engine.stop()

    return asyncio.run(main())


def request(prompt=(5, 6, 7), tokens=6, **more):
    return EngineRequest(list(prompt), tokens, **{"settings": {"do_sample": False}, **more})


@pytest.mark.parametrize("mixture", ["sequence", "token"])
def test_answers_are_our_own(loaded, fake, mixture):
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [20, 21]]
    asked = [request(prompt, mixture=mixture, alternatives=2, members=True) for prompt in prompts]
    answers = answered(engine_of(loaded, fake), *asked)
    for prompt, answer in zip(prompts, answers, strict=True):
        ours = loaded.ensemble.generate(
            torch.tensor([prompt]), max_new_tokens=6, mixture=mixture, do_sample=False, eos_token_id=63
        )
        assert [token.token for token in answer] == ours.new_tokens[0].tolist()
        for name in ("log_prob", "total", "aleatoric", "epistemic"):
            assert [getattr(t, name) for t in answer] == pytest.approx(getattr(ours, name)[0].tolist(), abs=2e-5)
        weights = torch.tensor([token.weights for token in answer])
        torch.testing.assert_close(weights, ours.weights[:, 0].T.float(), rtol=0, atol=2e-5)
        ell = torch.tensor([token.member_log_probs for token in answer]).sum(0)
        torch.testing.assert_close(ell, ours.member_log_likelihood[:, 0].float(), rtol=0, atol=1e-4)
        assert all(token.alternatives[0].token == token.token for token in answer)
        assert all(len(token.member_alternatives) == 3 for token in answer)
        assert [token.finish for token in answer] == [None] * 5 + ["length"]


def test_a_member_answers_alone(loaded, fake):
    (answer,) = answered(engine_of(loaded, fake), request(member=2))
    ours = loaded.ensemble.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=6, mixture="member", member=2, do_sample=False, eos_token_id=63
    )
    assert [token.token for token in answer] == ours.new_tokens[0].tolist()
    assert all(token.weights == [1.0] and token.epistemic == 0 for token in answer)


def test_an_end_token_ends_and_a_seed_repeats(loaded, fake):
    sampled = {"settings": {"temperature": 1.5}, "seed": 7}
    first, second, other = answered(
        engine_of(loaded, fake), request(**sampled), request(**sampled), request(**{**sampled, "seed": 8})
    )
    tokens = [token.token for token in first]
    assert tokens == [token.token for token in second]
    assert tokens != [token.token for token in other]
    (cut,) = answered(engine_of(loaded, fake), request(**sampled, end_tokens=[tokens[2]]))
    assert [token.token for token in cut] == tokens[: tokens.index(tokens[2]) + 1]
    assert cut[-1].finish == "stop"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("row", r"did not run the members together: a step held members \[0, 1\] of 3"),
        ("token", "different tokens"),
        ("end", "ended an answer early"),
        ("error", "Internal server error"),
    ],
)
def test_a_broken_group_is_an_error_at_once(loaded, fake, fault, message):
    fake.fault = fault
    engine = engine_of(loaded, fake)

    async def main():
        await engine.start()
        tokens = []
        with pytest.raises(EngineError, match=message):
            await follow(engine.submit(request()), tokens)
        await engine.stop()
        return tokens

    assert len(asyncio.run(main())) <= 2  # none after the fault


def test_cancelling_frees_the_rows(loaded, fake):
    fake.seconds = 0.05
    engine = engine_of(loaded, fake)

    async def main():
        await engine.start()
        stream = engine.submit(request(tokens=50))
        await anext(stream)
        assert engine.load().running == 1
        stream.cancel()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        for _ in range(200):
            if len(fake.cancelled) == 3 and engine.load().running == 0:
                break
            await asyncio.sleep(0.02)
        assert len(fake.cancelled) == 3
        assert engine.load().running == engine.load().waiting == 0
        await engine.stop()

    asyncio.run(main())


def test_groups_go_to_replicas_whole(loaded, fake):
    with FakeVllm(loaded.ensemble, NAMES) as other:
        answers = answered(engine_of(loaded, fake, other), *(request([5 + i]) for i in range(6)))
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        assert fake.begun + other.begun == 6
        assert min(fake.begun, other.begun) >= 1


def test_a_replica_is_not_sent_more_than_it_runs(loaded):
    """It has 6 rows: two groups of three run, and two are sent ahead. All are answered, cancelled ones make room."""
    with FakeVllm(loaded.ensemble, NAMES, rows=6) as fake:
        fake.seconds = 0.05
        engine = engine_of(loaded, fake)

        async def main():
            await engine.start()
            streams = [engine.submit(request([5 + i], 4)) for i in range(9)]
            await anext(streams[0])
            assert 3 <= fake.open <= 12
            streams[1].cancel()  # has begun
            streams[8].cancel()  # waits
            answers = await asyncio.gather(*map(collected, streams[2:8]))
            assert [len(answer) for answer in answers] == [4] * 6
            assert fake.most == 12
            await engine.stop()

        asyncio.run(main())


def test_a_replica_that_is_lost(loaded):
    with FakeVllm(loaded.ensemble, NAMES) as first, FakeVllm(loaded.ensemble, NAMES) as other:
        first.seconds = 0.05
        engine = engine_of(loaded, first)

        async def main():
            await engine.start()
            stream = engine.submit(request(tokens=50))
            await anext(stream)
            first.records.close()
            with pytest.raises(EngineError, match="lost"):
                await collected(stream)
            await engine.stop()

        asyncio.run(main())
        answers = answered(engine_of(loaded, other), request())
        assert len(answers[0]) == 6


def test_what_it_refuses(loaded, fake):
    engine = engine_of(loaded, fake, most=1)

    async def main():
        await engine.start()
        for wrong in (request([5] * 86, mixture="token"), request([5] * 257), request([5] * 257, member=1)):
            with pytest.raises(ConfigError, match="--max-num-batched-tokens"):
                engine.submit(wrong)
        with pytest.raises(ConfigError, match="needs sampling"):
            engine.submit(request(settings={"do_sample": False, "temperature": 0.5}))
        assert engine.load().waiting == 0
        engine.submit(request())
        with pytest.raises(BusyError):
            engine.submit(request())
        await engine.stop()
        with pytest.raises(EngineError, match="no vLLM is up"):
            engine.submit(request())

    asyncio.run(main())


def test_a_server_that_does_not_fit(loaded, fake):
    with (
        FakeVllm(loaded.ensemble, NAMES[:2]) as lacking,
        FakeVllm(loaded.ensemble, NAMES, rows=2) as small,
    ):
        for other, why in ((lacking, "does not serve member_2"), (small, "--max-num-seqs")):
            with pytest.raises(EngineError, match=why):
                asyncio.run(engine_of(loaded, other).check())
        asyncio.run(engine_of(loaded, lacking, fake).check())  # one is enough


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--engine", "vllm"], ["--vllm_url"]),
        (["--vllm_url", "http://127.0.0.1:9"], ["--engine vllm"]),
        (["--engine", "vllm", "--vllm_url", "gpu-0"], ["--vllm_url", "http://HOST:8000"]),
        (["--engine", "vllm", "--vllm_url", "http://127.0.0.1:9"], ["no vLLM can be used", "http://127.0.0.1:9"]),
    ],
)
def test_the_command_says_what_is_missing(loaded, capsys, flags, parts):
    assert main(["serve", str(loaded.folder), *flags]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert all(part in said for part in parts)
    assert "Traceback" not in said


# ---- One member for the mixture --------------------------------------------------------------------------------------


def streamed(engine, *requests):
    """Of requests that are made at once, the streams and their tokens, or errors."""

    async def main():
        await engine.start()
        try:
            streams = [engine.submit(request) for request in requests]
            answers = await asyncio.gather(*map(collected, streams), return_exceptions=True)
            return list(zip(streams, answers, strict=True))
        finally:
            await engine.stop()

    return asyncio.run(main())


def members_log_probs(loaded, prompt, answer):
    """[M, N] float64, log p_m of each token of an answer."""
    with torch.inference_mode(), loaded.ensemble.inference():
        ids = torch.tensor([[*prompt, *answer]])
        log_p = loaded.ensemble.logits(ids)[:, 0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return log_p.gather(-1, torch.tensor(answer).expand(len(log_p), -1)[..., None]).squeeze(-1)


@pytest.mark.parametrize(
    ("fault", "prompt", "mixture", "why"),
    [
        (None, [5, 6, 7], "sampled", "the request asks for it"),
        (None, [5] * 86, "sequence", "86 tokens, and vLLM reads 256 in a step for 3 members"),
        ("refuse", [5, 6, 7], "sequence", "Internal server error"),
    ],
)
def test_where_members_cannot_answer_together_one_does_and_all_rescore(loaded, fake, fault, prompt, mixture, why):
    fake.fault = fault
    sampling = {"settings": {"temperature": 1.0, "top_k": 0}, "seed": 3}
    more = {**sampling, "mixture": mixture, "alternatives": 2, "members": True}
    ((stream, answer),) = streamed(engine_of(loaded, fake), request(prompt, **more))
    assert why in stream.sampled.why
    tokens = [token.token for token in answer]
    (alone,) = answered(engine_of(loaded, fake), request(prompt, member=stream.sampled.member, **sampling))
    assert tokens == [token.token for token in alone]
    assert [token.finish for token in answer] == [None] * 5 + ["length"]
    own = members_log_probs(loaded, prompt, tokens)
    log_w = loaded.ensemble.weights.double().log()
    exact = (log_w[:, None] + own.cumsum(1)).logsumexp(0)
    assert torch.tensor([token.log_prob for token in answer]).cumsum(0).tolist() == pytest.approx(
        exact.tolist(), abs=1e-4
    )
    weights = torch.tensor([token.weights for token in answer[1:]]).T
    expected = (log_w[:, None] + own.cumsum(1)[:, :-1]).softmax(0)
    torch.testing.assert_close(weights, expected.float(), rtol=0, atol=1e-5)
    assert all(0 <= token.epistemic <= token.total for token in answer)


def test_an_answer_of_the_mixture_of_tokens_is_no_members(loaded, fake):
    fake.fault = "refuse"
    ((stream, error),) = streamed(engine_of(loaded, fake), request(mixture="token"))
    assert isinstance(error, EngineError)
    assert stream.sampled is None


def test_members_are_drawn_by_their_weights(loaded, fake):
    found = streamed(
        engine_of(loaded, fake, most=1000), *(request(tokens=1, seed=s, mixture="sampled") for s in range(45))
    )
    counts = [sum(stream.sampled.member == member for stream, _ in found) for member in range(3)]
    assert all(abs(count - 15) < 4 * (45 * 2 / 9) ** 0.5 for count in counts)


def test_greedy_answers_of_one_member_are_the_same_again(loaded, fake):
    (_, first), (_, again) = streamed(engine_of(loaded, fake), *[request(mixture="sampled")] * 2)
    assert [token.token for token in first] == [token.token for token in again]


def test_an_echo_is_what_ours_would_be(loaded, fake):
    prompt = [5, 6, 7, 30, 12]
    for fault in (None, "refuse"):
        fake.fault = fault
        (answer,) = answered(engine_of(loaded, fake), request(prompt, echo=True))
        own = members_log_probs(loaded, prompt[:1], prompt[1:])
        exact = (loaded.ensemble.weights.double().log()[:, None] + own.cumsum(1)).logsumexp(0)
        echoed = torch.tensor([token.log_prob for token in answer[:4]]).cumsum(0).tolist()
        assert echoed == pytest.approx(exact.tolist(), abs=1e-4)
        assert len(answer) == 4 + 6


def test_a_response_says_that_one_member_answered(loaded, fake, caplog):
    caplog.set_level("INFO", "renyi.serve.requests")
    settings = ServerSettings()
    engine = engine_of(loaded, fake)
    server = Live(answers_of(engine, engine, settings), settings)
    write_abstention(loaded.folder, {"score": "epistemic", "threshold": 0.5})
    server.answers.abstention = loaded.abstention
    server.start()
    try:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 5, "seed": 1}
        exact = client.chat.completions.create(**asked).choices[0].model_extra["uncertainty"]
        assert exact["mixture"] == "sequence"
        assert exact["threshold"]["score"] == "epistemic"
        assert "sampled" not in exact
        alone = client.chat.completions.create(**{**asked, "model": "member_1"}).choices[0].model_extra["uncertainty"]
        assert alone["mixture"] is None
        fake.fault = "refuse"
        sampled = client.chat.completions.create(**asked).choices[0].model_extra["uncertainty"]
        assert sampled["mixture"] == "sampled"
        assert sampled["sampled"]["model"] in NAMES
        assert "Internal server error" in sampled["sampled"]["why"]
        assert sampled["threshold"] is None  # it bounds an uncertainty that is not known here
        with pytest.raises(BadRequestError, match="cannot be judged"):
            client.chat.completions.create(**asked, extra_body={"withhold": True})
        with pytest.raises(BadRequestError, match="does not go with mixture: sampled"):
            client.chat.completions.create(**asked, extra_body={"withhold": True, "mixture": "sampled"})
        assert any('"sampled": 1' in record.getMessage() for record in caplog.records)
    finally:
        server.stop()
        remove_abstention(loaded.folder)


def test_our_engine_has_no_need_of_it(loaded):
    with live(loaded) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(BadRequestError, match="--engine vllm"):
            client.completions.create(model="tiny", prompt="w1", extra_body={"mixture": "sampled"})


def test_scores_are_our_own(loaded, fake):
    rows = [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w7", "completion": " w8 w9 w10"}]
    engine = engine_of(loaded, fake)

    async def main():
        await engine.start()
        try:
            return await engine.score(rows)
        finally:
            await engine.stop()

    for found, ours in zip(asyncio.run(main()), loaded.score(rows), strict=True):
        assert (found.index, found.tokens) == (ours.index, ours.tokens)
        for name in ("log_likelihood", "responsibilities", "mixture_nll", "jensen_gap"):
            assert getattr(found, name) == pytest.approx(getattr(ours, name), abs=1e-4)


def test_behind_openais_api(loaded, fake):
    """The whole way: OpenAI's client, the server, this engine."""
    settings = ServerSettings()
    engine = engine_of(loaded, fake)
    server = Live(answers_of(engine, engine, settings), settings)
    server.start()
    try:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "w1 w2"}], temperature=0, max_tokens=5
        )
        expected = loaded.generate([[{"role": "user", "content": "w1 w2"}]], do_sample=False, max_new_tokens=5)[0]
        assert answer.choices[0].message.content == expected.text
        uncertainty = answer.choices[0].model_extra["uncertainty"]
        assert uncertainty["epistemic"]["mean"] == pytest.approx(expected.mean_epistemic, abs=1e-5)
    finally:
        server.stop()


def test_addresses():
    assert address_of("http://gpu-0:8000/v1") == ReplicaAddress("http://gpu-0:8000", "http://gpu-0:8001")
    assert address_of("http://a:1,http://b:2/") == ReplicaAddress("http://a:1", "http://b:2")
    for wrong in ("gpu-0:8000", "http://", "http://a,http://b,http://c"):
        with pytest.raises(ConfigError, match="no address"):
            address_of(wrong)


def test_capacity_is_given_back_whatever_happens():
    async def main():
        capacity = Capacity(4)
        order = []

        async def work(name, several, seconds=0.0):
            async with capacity.room_for(several):
                order.append(name)
                await asyncio.sleep(seconds)

        first = asyncio.create_task(work("a", 3, 10))
        await asyncio.sleep(0)
        waits = [asyncio.create_task(work(name, several)) for name, several in (("b", 4), ("c", 1), ("d", 4))]
        await asyncio.sleep(0)
        assert order == ["a"]  # c would fit, but it came after b
        waits[0].cancel()
        first.cancel()  # in the same turn of the loop: b is cancelled and not yet gone when room is made
        await asyncio.wait([first, *waits], timeout=5)
        assert order == ["a", "c", "d"]
        await asyncio.wait_for(work("e", 4), 5)

    asyncio.run(main())
