"""Attention of short rows on a CPU: equal to PyTorch's kernel, and taken by shape and precision where nobody chose."""

import pytest
import torch
from tiny import lora, padded_batch, tiny_ensemble, tiny_model
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from renyi import LoraEnsemble
from renyi.ensemble import attention


def layer(heads_a_key: int) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads_a_key, True  # type: ignore[assignment]
    return module


def inputs(heads: int, keys: int, tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def drawn(number: int) -> Tensor:
        made = torch.randn(3, tokens, number, 8, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        return made.requires_grad_()

    return [drawn(heads), drawn(keys), drawn(keys)]


def allowed(kind: str, tokens: int) -> Tensor:
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if kind == "left-padded":
        padded = causal.expand(3, 1, -1, -1).clone()
        padded[1, :, :, : tokens // 3] = False  # the first tokens of row 1 are padding, and see nothing
        return padded
    if kind == "packed":
        causal[tokens // 2 :, : tokens // 2] = False
    return causal[None, None]


@pytest.mark.parametrize("kind", ["causal", "left-padded", "packed"])
@pytest.mark.parametrize(("heads", "keys"), [(6, 2), (4, 4), (4, 1)])
def test_products_equal_the_kernel(heads: int, keys: int, kind: str) -> None:
    mask = allowed(kind, 12)
    found: list[list[Tensor]] = []
    for is_ours in (True, False):
        given = inputs(heads, keys, 12)
        if is_ours:
            out = attention.products(*given, mask, 0.3)
        else:
            out, _ = sdpa_attention_forward(layer(heads // keys), *given, mask, scaling=0.3)
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
        if kind == "left-padded":  # nothing reads what padding sees
            weight[1, :4] = 0
        (out * weight).sum().backward()
        found.append([out * (weight != 0), *(x.grad for x in given)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_half_precision_is_as_exact_as_eager_attention() -> None:
    exact, _ = sdpa_attention_forward(layer(3), *inputs(6, 2, 100), None)
    half = inputs(6, 2, 100, torch.bfloat16)
    minus = torch.zeros(100, 100, dtype=torch.bfloat16).masked_fill(~allowed("causal", 100), -torch.inf)
    eager, _ = eager_attention_forward(layer(3), *half, minus, scaling=8**-0.5)
    ours, _ = attention.attend(layer(3), *half, None)
    assert (ours - exact).abs().mean() < 1.05 * (eager - exact).abs().mean()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("heads", "keys"), [(6, 2), (4, 4)])
def test_new_tokens_after_others_equal_the_kernel(
    monkeypatch: pytest.MonkeyPatch, heads: int, keys: int, tokens: int
) -> None:
    """In decoding a row has few new tokens, and keys of all tokens before."""
    monkeypatch.setattr(attention, "LITTLE", 0)
    query, key, value = inputs(heads, keys, 12, torch.bfloat16)
    mask = allowed("left-padded", 12)[:, :, -tokens:]
    with torch.no_grad():
        for given in (mask, None) if tokens == 1 else (mask,):  # without a mask, the only new token sees all keys
            asked = query[:, :, -tokens:]
            ours, _ = attention.attend(layer(heads // keys), asked, key, value, given)
            exact, _ = sdpa_attention_forward(
                layer(heads // keys), asked.double(), key.double(), value.double(), given, is_causal=False
            )
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=0.02)


def test_only_half_precision_leaves_the_kernel_for_short_rows_in_training_and_few_new_tokens_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def called(name: str) -> None:
        monkeypatch.setattr(attention, name, lambda *args, **kwargs: calls.append(name) or (args[0], None))

    called("products")
    called("sdpa_attention_forward")

    def way(tokens: int, mask: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, **kwargs: object) -> str:
        query, key, value = inputs(2, 2, tokens, dtype)
        attention.attend(layer(1), query[:, :, -last:], key, value, mask, **kwargs)
        return calls.pop()

    monkeypatch.setattr(attention, "LITTLE", 239)  # numbers of 5 keys of 3 rows and 2 heads, less one
    last = attention.SHORT + 1
    assert way(attention.SHORT) == "products"
    assert way(attention.SHORT + 1) == way(5, dtype=torch.float32) == "sdpa_attention_forward"
    assert way(5, dropout=0.1) == way(5, softcap=30.0) == "sdpa_attention_forward"
    assert way(5, torch.zeros(5, 5)) == way(5, position_bias=torch.zeros(1)) == "sdpa_attention_forward"
    with torch.no_grad():
        assert way(attention.FEW + 1) == "sdpa_attention_forward"
        last = 1  # a token after tokens that were read before
        assert way(5) == "products"
        assert way(4) == "sdpa_attention_forward"
        assert way(5, dtype=torch.float32) == "sdpa_attention_forward"
        last = 2
        assert way(5, is_causal=False) == "products"
        assert way(5) == "sdpa_attention_forward"  # causal, but which of the keys come before is not said
    last = 1
    assert way(5) == "sdpa_attention_forward"  # with gradients


def test_an_ensemble_chooses_by_length_unless_somebody_chose() -> None:
    assert tiny_ensemble().base.config._attn_implementation == attention.NAME
    base = tiny_model()
    base.set_attn_implementation("eager")
    assert LoraEnsemble.from_base(base, 2, lora()).base.config._attn_implementation == "eager"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_in_half_precision_stays(monkeypatch: pytest.MonkeyPatch, checkpointed: bool) -> None:
    ids, mask = padded_batch()
    results, calls = [], []
    products = attention.products
    monkeypatch.setattr(attention, "products", lambda *args: calls.append(1) or products(*args))
    for short in (attention.SHORT, 0):
        monkeypatch.setattr(attention, "SHORT", short)
        ensemble = tiny_ensemble().train()
        if checkpointed:
            ensemble.activation_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            log_likelihood = ensemble.log_likelihood(ids, mask)
        log_likelihood.sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad]))
    assert len(calls) == 2 * (1 + checkpointed)  # in each of two layers, and again in the backward
    assert (results[0] - results[1]).norm() < 0.02 * results[1].norm()
