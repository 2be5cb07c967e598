"""Our engine: the answers of `LoraEnsemble.generate` whatever else is in flight, and rows that are free at once."""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import tiny_folder

from renyi.errors import BusyError, ConfigError, EngineError
from renyi.runs.load import Loaded
from renyi.serve.batching import EngineLimits, OurEngine
from renyi.serve.engine import EngineRequest, EngineToken


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return tiny_folder(tmp_path_factory.mktemp("engine"))


def run(loaded: Loaded, test: Callable[[OurEngine], Any], **limits: Any) -> Any:
    """Run an async test with a started engine."""

    async def started() -> Any:
        engine = OurEngine(loaded, EngineLimits(**limits))
        await engine.start()
        try:
            return await test(engine)
        finally:
            await engine.stop()

    return asyncio.run(started())


async def whole(engine: OurEngine, request: EngineRequest) -> list[EngineToken]:
    return [token async for token in engine.submit(request)]


def various(number: int, seed: int) -> list[EngineRequest]:
    """Requests that differ in everything."""
    draw = random.Random(seed)
    how: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 1.0, "top_k": 0},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    ]
    return [
        EngineRequest(
            prompt=[draw.randrange(5, 64) for _ in range(draw.choice([1, 3, 30, 200]))],
            max_new_tokens=draw.randrange(1, 30),
            member=draw.choice([None, None, 0, 2]),
            mixture=draw.choice(["sequence", "token"]),
            end_tokens=[1],
            settings=how[i % 4],
            seed=i,
        )
        for i in range(number)
    ]


def test_answers_equal_generate_whatever_else_is_in_flight(loaded: Loaded) -> None:
    requests = various(24, seed=0)

    async def together(engine: OurEngine) -> list[list[EngineToken]]:
        async def late(number: int, request: EngineRequest) -> list[EngineToken]:
            await asyncio.sleep(0.01 * (number % 7))  # they come and go at different times
            return await whole(engine, request)

        return await asyncio.gather(*(late(i, request) for i, request in enumerate(requests)))

    for request, tokens in zip(requests, run(loaded, together, running=16, step_tokens=96), strict=True):
        how: dict[str, Any] = {**request.settings, "mixture": request.mixture}
        if request.member is not None:
            how |= {"mixture": "member", "member": request.member}
        alone = loaded.ensemble.generate(
            torch.tensor([request.prompt]),
            seed=request.seed,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=[1],
            **how,
        )
        assert [token.token for token in tokens] == alone.new_tokens[0][alone.mask[0]].tolist()
        assert tokens[-1].finish == ("stop" if tokens[-1].token == 1 else "length")
        for name in ("log_prob", "total", "aleatoric", "epistemic"):
            assert [getattr(t, name) for t in tokens] == pytest.approx(getattr(alone, name)[0].tolist(), abs=2e-5)
        weights = torch.tensor([token.weights for token in tokens], dtype=torch.float64)
        torch.testing.assert_close(weights, alone.weights[:, 0].T, atol=2e-5, rtol=0)


def test_alternatives_are_the_likeliest(loaded: Loaded) -> None:
    request = EngineRequest([7, 8], 5, settings={"do_sample": False}, alternatives=64, members=True)
    for token in run(loaded, lambda engine: whole(engine, request)):
        mixed = {a.token: a.log_prob for a in token.alternatives}
        assert token.alternatives[0].token == token.token
        assert mixed[token.token] == pytest.approx(token.log_prob, abs=1e-5)
        each = [{a.token: a.log_prob for a in own} for own in token.member_alternatives]
        assert [own[token.token] for own in each] == pytest.approx(list(token.member_log_probs), abs=1e-5)
        for v in range(64):
            p = sum(w * torch.tensor(own[v]).exp().item() for w, own in zip(token.weights, each, strict=True))
            assert torch.tensor(mixed[v]).exp().item() == pytest.approx(p, abs=1e-5)


@pytest.mark.parametrize("prompt", [3, 3000], ids=["while writing", "while the prompt is read"])
def test_cancelled_rows_are_free_within_a_step(loaded: Loaded, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel(engine: OurEngine) -> tuple[int, list[EngineToken]]:
        step, ran = engine._step, []

        def noting(running: list[Any]) -> None:
            ran.append([answer.stream for answer in running])
            step(running)

        monkeypatch.setattr(engine, "_step", noting)
        other = asyncio.ensure_future(whole(engine, EngineRequest([9] * 4, 40, settings={"do_sample": False})))
        stream = engine.submit(EngineRequest([7] * prompt, 10_000, settings={"do_sample": False}))
        while engine.load().cached_tokens < 40:
            await asyncio.sleep(0)
        stream.cancel()
        steps = len(ran)
        assert [token async for token in stream] == []
        tokens = await other
        assert stream in ran[steps - 1]
        return sum(stream in streams for streams in ran[steps:]), tokens

    steps, other = run(loaded, cancel, step_tokens=30)
    assert steps <= 1  # the one that had begun when it was cancelled
    alone = loaded.ensemble.generate(torch.tensor([[9] * 4]), max_new_tokens=40, do_sample=False, eos_token_id=[])
    assert [token.token for token in other] == alone.new_tokens[0].tolist()


def test_the_queue_is_bounded_and_fair(loaded: Loaded) -> None:
    async def fill(engine: OurEngine) -> list[int]:
        ended: list[int] = []

        async def one(number: int) -> None:
            await whole(engine, EngineRequest([7, number], 12, settings={"do_sample": False}))
            ended.append(number)

        waiting = [asyncio.ensure_future(one(number)) for number in range(10, 16)]
        await asyncio.sleep(0)
        assert engine.load().running + engine.load().waiting == 6
        late = [engine.submit(EngineRequest([7], 12)) for _ in range(8 - engine.load().waiting)]
        with pytest.raises(BusyError, match="8 requests wait already"):
            engine.submit(EngineRequest([7], 12))
        for stream in late:
            stream.cancel()
        await asyncio.gather(*waiting)
        return ended

    assert run(loaded, fill, running=2, waiting=8) == list(range(10, 16))


def test_memory_for_caches_is_bounded(loaded: Loaded) -> None:
    async def fill(engine: OurEngine) -> int:
        with pytest.raises(ConfigError, match="the server keeps 64 in all"):
            engine.submit(EngineRequest([7] * 60, 5))
        greatest = 0
        tasks = [asyncio.ensure_future(whole(engine, EngineRequest([7] * 20, 10))) for _ in range(6)]
        while not all(task.done() for task in tasks):
            greatest = max(greatest, engine.load().cached_tokens)
            await asyncio.sleep(0)
        assert all(len(task.result()) == 10 for task in tasks)
        return greatest

    assert 20 < run(loaded, fill, cached_tokens=64) <= 64


def test_a_fault_ends_its_requests_only(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(engine: OurEngine) -> None:
        forward, calls = engine._in_flight, 0

        def failing(work: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("out of memory: secret text")
            return forward(work)

        monkeypatch.setattr(engine, "_in_flight", failing)
        stream = engine.submit(EngineRequest([7, 8], 10))
        await anext(stream)
        await anext(stream)
        with pytest.raises(EngineError, match=r"the engine failed \(RuntimeError\)") as raised:
            await anext(stream)
        assert "secret" not in str(raised.value)
        assert len(await whole(engine, EngineRequest([7, 8], 4))) == 4

    run(loaded, fail)


def test_stopping_ends_what_is_in_progress_by_name(loaded: Loaded) -> None:
    async def end(engine: OurEngine) -> None:
        stream = engine.submit(EngineRequest([7], 100_000))
        scoring = asyncio.ensure_future(engine.score([{"prompt": "w1", "completion": " w2"}] * 200))
        await anext(stream)
        await engine.stop()
        with pytest.raises(EngineError, match="the server ended"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="the server ended"):
            await scoring
        with pytest.raises(EngineError, match="does not run"):
            engine.submit(EngineRequest([7], 1))
        assert not engine.is_ready

    run(loaded, end, step_tokens=1)


def test_scoring_does_not_hold_answers_up(loaded: Loaded) -> None:
    rows = [{"prompt": "w1 w2", "completion": " w3 w4 w5"}] * 120

    async def both(engine: OurEngine) -> tuple[int, float]:
        scoring = asyncio.ensure_future(engine.score(rows))
        await asyncio.sleep(0.05)
        tokens = await whole(engine, EngineRequest([7], 4))
        assert not scoring.done()
        scoring.cancel()
        began = time.monotonic()
        while engine.load().waiting:
            await asyncio.sleep(0)
        return len(tokens), time.monotonic() - began

    tokens, seconds = run(loaded, both, step_tokens=1)
    assert tokens == 4
    assert seconds < 5


def test_equal_seeds_give_equal_answers_and_no_seed_different_ones(loaded: Loaded) -> None:
    async def ask(engine: OurEngine) -> list[list[int]]:
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0}
        asked = [EngineRequest([7], 12, settings=settings, seed=seed) for seed in (4, 4, None, None)]
        return [[t.token for t in tokens] for tokens in await asyncio.gather(*(whole(engine, r) for r in asked))]

    first, second, third, fourth = run(loaded, ask)
    assert first == second
    assert third != fourth


def test_folder_of_one_adapter(tmp_path: Path) -> None:
    loaded = tiny_folder(tmp_path, num_members=1)
    (tokens,) = [run(loaded, lambda engine: whole(engine, EngineRequest([7], 3)))]
    assert [token.epistemic for token in tokens] == [0.0, 0.0, 0.0]
