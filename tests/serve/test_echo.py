"""A prompt that is echoed: how likely the mixture finds its tokens, and what lm-evaluation-harness makes of that."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from serving import Live, events, live, tiny_folder
from tiny import EOS

from renyi.runs.load import Loaded
from renyi.serve.batching import EngineLimits

PROMPT = [9, 30, 12, 40, 9, 11, 25, 33, 8, 20, 17]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return tiny_folder(tmp_path_factory.mktemp("echo"))


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Live]:
    with live(loaded, engine=EngineLimits(step_tokens=12)) as running:  # four tokens of a prompt a step
        yield running


def asked(server: Live, **more: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    return httpx.post(f"{server.url}/v1/completions", json={**body, **more})


def members_log_probs(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """[M, T − 1] float64, log p_m of each token but the first."""
    with torch.inference_mode(), loaded.ensemble.inference():
        log_p = loaded.ensemble.logits(torch.tensor([ids]))[:, 0, :-1].double().log_softmax(-1)
    return log_p.gather(-1, torch.tensor(ids[1:]).expand(len(log_p), -1)[..., None]).squeeze(-1)


def test_a_prompt_is_one_sequence_of_the_mixture(server: Live, loaded: Loaded) -> None:
    """Sums of its tokens' log-probabilities are log Σ_m π_m p_m(text so far), whatever is in flight beside it."""
    own = members_log_probs(loaded, PROMPT)
    exact = (loaded.ensemble.weights.double().log()[:, None] + own.cumsum(1)).logsumexp(0)
    choice = asked(server, prompt=[[8, 9], PROMPT, [30]]).json()["choices"][1]
    found = choice["logprobs"]
    (answer,) = loaded.generate([loaded.tokenizer.decode(PROMPT)], plain=True, max_new_tokens=3, do_sample=False)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is found["epistemic"][0] is None
    echoed = torch.tensor(found["token_logprobs"][1 : len(PROMPT)], dtype=torch.float64)
    torch.testing.assert_close(echoed.cumsum(0), exact, rtol=0, atol=1e-4)
    assert found["token_logprobs"][len(PROMPT) :] == pytest.approx(answer.log_prob, abs=1e-5)
    assert "".join(found["tokens"]) == choice["text"]
    assert choice["text"].startswith(loaded.tokenizer.decode(PROMPT))
    assert choice["uncertainty"]["mixture_nll"] == pytest.approx(answer.mixture_nll, abs=1e-5)  # of the answer alone


def test_other_mixtures_and_members(server: Live, loaded: Loaded) -> None:
    own = members_log_probs(loaded, PROMPT)
    by_token = asked(server, mixture="token").json()["choices"][0]["logprobs"]["token_logprobs"]
    exact = (loaded.ensemble.weights.double().log()[:, None] + own).logsumexp(0)
    assert by_token[1 : len(PROMPT)] == pytest.approx(exact.tolist(), abs=1e-5)
    alone = asked(server, model="member_1", members=True).json()["choices"][0]["logprobs"]
    assert alone["token_logprobs"][1 : len(PROMPT)] == pytest.approx(own[1].tolist(), abs=1e-5)
    assert alone["members"][0] is None
    assert alone["members"][1][0]["logprob"] == alone["token_logprobs"][1]


def test_a_stream_says_the_same(server: Live) -> None:
    whole = asked(server).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in events(iter(asked(server, stream=True).text.splitlines()))[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name in ("token_logprobs", "text_offset"):
        told = [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]]
        assert told == whole["logprobs"][name]


def test_an_end_token_has_an_entry_beside_an_echo(server: Live, loaded: Loaded) -> None:
    """Clients leave the last entry out as the answer's. Without this one they would leave out the prompt's last."""
    pairs = torch.cartesian_prod(torch.arange(5, 64), torch.arange(5, 64))
    with torch.inference_mode(), loaded.ensemble.inference():
        log_p = loaded.ensemble.logits(pairs)[:, :, -1].log_softmax(-1)
    ends = (loaded.ensemble.weights.log()[:, None, None] + log_p).logsumexp(0).argmax(-1) == EOS
    choice = asked(server, prompt=pairs[ends.nonzero()[0, 0]].tolist(), max_tokens=1).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == 3
    assert choice["logprobs"]["tokens"][-1] == ""


def test_it_does_not_go_with_withholding(server: Live) -> None:
    refused = asked(server, withhold=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "withhold")


def test_lm_evaluation_harness_reads_it(server: Live, loaded: Loaded) -> None:
    """Its own body and its own parser: the likelihood of a continuation, and whether it is greedy."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    harness = completions.LocalCompletionsAPI
    context = PROMPT[:6]
    body = {"model": "tiny", "prompt": context, "max_tokens": 3, "temperature": 0}
    greedy = httpx.post(f"{server.url}/v1/completions", json={**body, "mixture": "sequence"}).json()
    likely = [*context, *loaded.tokenizer(greedy["choices"][0]["text"])["input_ids"][:1]]
    payload = harness._create_payload(SimpleNamespace(model="tiny"), [PROMPT, likely], seed=1)
    reply = httpx.post(f"{server.url}/v1/completions", json=payload).json()
    found = harness.parse_logprobs(reply, ctxlens=[len(context), len(context)])
    log_weights = loaded.ensemble.weights.double().log()
    for (value, _), ids in zip(found, (PROMPT, likely), strict=True):
        own = members_log_probs(loaded, ids)
        exact = (log_weights + own.sum(1)).logsumexp(0) - (log_weights + own[:, : len(context) - 1].sum(1)).logsumexp(0)
        assert value == pytest.approx(float(exact), abs=1e-5)
    assert not found[0][1]
