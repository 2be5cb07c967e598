"""Samples and their log-probabilities: against logits of one pass, and against what they must be on average."""

import math
from collections.abc import Sequence

import pytest
import torch
from tiny import EOS, tiny_ensemble, tiny_tokenizer
from torch import Tensor

from renyi import LoraEnsemble
from renyi.errors import DataError
from renyi.inference import score_continuations
from renyi.inference.draws import Draw, base_log_likelihood, draw_samples
from renyi.inference.generate import prompt_ids

PROMPTS = ["w1 w2 w3", "w7", [{"role": "user", "content": "w4 w5"}]]
IDS = [prompt_ids(prompt, tiny_tokenizer()) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def ensemble() -> LoraEnsemble:
    return tiny_ensemble(3)


def draw(ensemble: LoraEnsemble, samples: int = 4, prompts: Sequence = PROMPTS, **settings) -> list[list[Draw]]:
    settings = {"max_new_tokens": 6, "seed": 0, "batch_size": 2, **settings}
    return draw_samples(ensemble, prompts, tiny_tokenizer(), samples, **settings)


def flat(found: list[list[Draw]]) -> tuple[list[list[int]], list[list[int]], list[Draw]]:
    """The context, the tokens, and all of every sample."""
    pairs = [(ids, d) for ids, draws in zip(IDS, found, strict=True) for d in draws]
    return [ids for ids, _ in pairs], [d.token_ids for _, d in pairs], [d for _, d in pairs]


def steps(ensemble: LoraEnsemble, context: list[int], d: Draw) -> Tensor:
    """Log-probabilities [N, V] of what each token of a sample was drawn from, of one member or of the base."""
    (logits_TV,) = ensemble.logits(torch.tensor([[*context, *d.token_ids]]))[0].detach()
    return logits_TV[len(context) - 1 : -1].double().log_softmax(-1)


def test_of_the_mixture(ensemble: LoraEnsemble) -> None:
    found = draw(ensemble)
    contexts, tokens, draws = flat(found)
    assert [len(of) for of in found] == [4, 4, 4]
    assert len({d.text for d in found[0]}) > 1
    scores = score_continuations(ensemble, contexts, tokens)
    assert [d.log_prob for d in draws] == pytest.approx([s.log_likelihood for s in scores], rel=1e-4)
    assert all(d.truncated == (d.token_ids[-1] != EOS) and len(d.token_ids) <= 6 for d in draws)
    assert all(len(d.token_ids) == 6 for d in draws if d.truncated)


def test_of_the_base_and_its_own_likelihood(ensemble: LoraEnsemble) -> None:
    with ensemble.using(()):
        found = draw(ensemble)
        contexts, tokens, draws = flat(found)
        entropies = [
            -(p.exp() * p).sum().item() for p in (steps(ensemble, x, d) for x, d in zip(contexts, draws, strict=True))
        ]
    assert [d.log_prob for d in draws] == pytest.approx(base_log_likelihood(ensemble, contexts, tokens), rel=1e-4)
    assert [d.entropy for d in draws] == pytest.approx(entropies, rel=1e-4)
    assert found != draw(ensemble)


def test_the_base_likelihood_is_that_of_its_logits(ensemble: LoraEnsemble) -> None:
    contexts, tokens, draws = flat(draw(ensemble))
    found = base_log_likelihood(ensemble, [*contexts, IDS[0]], [*tokens, []], tokens_per_batch=20)
    with ensemble.using(()):
        of_steps = [steps(ensemble, x, d) for x, d in zip(contexts, draws, strict=True)]
    expected = [p.gather(1, torch.tensor(y)[:, None]).sum().item() for p, y in zip(of_steps, tokens, strict=True)]
    assert found == pytest.approx([*expected, 0.0], rel=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.5, 0.8)])
def test_of_what_was_sampled_from(ensemble: LoraEnsemble, temperature: float, top_p: float) -> None:
    """Tempered, then cut to the nucleus, then made to sum to one."""
    with ensemble.using(()):
        found = draw(ensemble, temperature=temperature, top_p=top_p)
        contexts, _, draws = flat(found)
        for context, d in zip(contexts, draws, strict=True):
            p_NV = (steps(ensemble, context, d) / temperature).softmax(-1)
            order = p_NV.argsort(-1, descending=True)
            before = p_NV.gather(1, order).cumsum(-1) - p_NV.gather(1, order)
            p_NV = p_NV.masked_fill(torch.zeros_like(p_NV).scatter(1, order, before.ge(top_p).double()) == 1, 0.0)
            p_NV = p_NV / p_NV.sum(-1, keepdim=True)
            own = p_NV.gather(1, torch.tensor(d.token_ids)[:, None]).log().sum().item()
            assert d.log_prob == pytest.approx(own, rel=1e-4)
            assert d.entropy == pytest.approx(torch.special.entr(p_NV).sum().item(), rel=1e-4)


def test_both_estimates_of_the_entropy_agree_on_average() -> None:
    """E[−log q(y)] = E[Σ_t H_t], cut or not: the chain rule of entropy."""
    found = draw(tiny_ensemble(2), samples=1500, prompts=["w1"], max_new_tokens=4, temperature=1.3)
    own = torch.tensor([-d.log_prob for d in found[0]])
    exact = torch.tensor([d.entropy for d in found[0]])
    assert abs(float((own - exact).mean())) < 4 * float((own - exact).std()) / math.sqrt(1500)
    assert exact.std() < own.std()


def test_first_tokens_are_as_frequent_as_they_are_likely(ensemble: LoraEnsemble) -> None:
    (draws,) = draw(ensemble, samples=4000, prompts=["w1 w2 w3"], max_new_tokens=1)
    p_V = (ensemble.logits(torch.tensor([IDS[0]]))[:, 0, -1].double().softmax(-1).mean(0)).detach()
    seen_V = torch.bincount(torch.tensor([d.token_ids[0] for d in draws]), minlength=len(p_V)) / 4000
    assert (seen_V - p_V).abs().sum() / 2 < 0.06  # total variation of 64 outcomes by chance is about 0.04


def test_nothing_of_the_bases_generation_config_has_a_part() -> None:
    plain, configured = tiny_ensemble(2), tiny_ensemble(2)
    config = configured.base.generation_config
    config.temperature, config.top_k, config.top_p, config.do_sample = 0.1, 1, 0.3, True
    config.repetition_penalty, config.min_p = 3.0, 0.5
    assert [d.token_ids for of in draw(configured) for d in of] == [d.token_ids for of in draw(plain) for d in of]


def test_one_member_and_the_seed(ensemble: LoraEnsemble) -> None:
    with ensemble.using([1]):
        alone = draw(ensemble)
        contexts, tokens, draws = flat(alone)
    ell = [s.member_log_likelihood[1] for s in score_continuations(ensemble, contexts, tokens)]
    assert [d.log_prob for d in draws] == pytest.approx(ell, rel=1e-4)
    assert draw(ensemble) == draw(ensemble)
    assert draw(ensemble) != draw(ensemble, seed=1)
    counted: list[int] = []
    draw(ensemble, progress=counted.append)
    assert counted == [2, 3]


def test_a_prompt_without_tokens_is_refused_before_any_is_answered(ensemble: LoraEnsemble) -> None:
    counted: list[int] = []
    with pytest.raises(DataError, match="prompt 3"):
        draw(ensemble, prompts=["w1", "w2", ""], batch_size=1, progress=counted.append)
    assert not counted
