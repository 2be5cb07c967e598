"""Sequences in flight get the logits that they would get alone, whatever else is read with them."""

import pytest
import torch
from tiny import lora, scatter_members, tiny_ensemble, tiny_model

from renyi import LoraEnsemble
from renyi.ensemble import in_flight
from renyi.ensemble.in_flight import Flight, InFlight
from renyi.errors import ConfigError


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(5, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(ensemble: LoraEnsemble, ids: list[int]) -> torch.Tensor:
    """The logits [M, V] after some tokens, by the model's own forward."""
    return ensemble.logits(torch.tensor([ids]))[:, 0, -1]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox", "gemma2", "granite", "cohere"])
def test_mixed_lengths_chunks_and_members(kind: str) -> None:
    ensemble = tiny_ensemble(3, kind)
    forward = InFlight(ensemble)
    long, short, lone = ids_of(40, 0), ids_of(3, 1), ids_of(9, 2)
    all_long, all_short, only_1 = Flight(), Flight(), Flight(1)
    forward([(all_long, long[:17])])
    forward([(only_1, lone[:4]), (all_long, long[17:39])])
    found = forward([(all_short, short), (only_1, lone[4:]), (all_long, long[39:])])
    expected = alone(ensemble, short), alone(ensemble, lone)[1:2], alone(ensemble, long)
    for logits_K1V, own_KV in zip(found, expected, strict=True):
        torch.testing.assert_close(logits_K1V[:, 0], own_KV, atol=2e-5, rtol=1e-4)
    assert (all_long.length, all_short.length, only_1.length) == (40, 3, 9)
    (found_alone,) = forward([(only_1, [7])])  # the other members' blocks are not run
    torch.testing.assert_close(found_alone[:, 0], alone(ensemble, [*lone, 7])[1:2], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_sliding_window_is_kept(implementation: str) -> None:
    layers = ["sliding_attention", "full_attention"]
    base = tiny_model("qwen2", sliding_window=5, use_sliding_window=True, layer_types=layers)
    base.set_attn_implementation(implementation)
    ensemble = scatter_members(LoraEnsemble.from_base(base, 2, lora()))
    ids, flight = ids_of(23, 0), Flight()
    forward = InFlight(ensemble)
    forward([(flight, ids[:4])])
    for start, stop in ((4, 11), (11, 12), (12, 22)):
        forward([(flight, ids[start:stop])])
    (found,) = forward([(flight, ids[22:])])
    torch.testing.assert_close(found[:, 0], alone(ensemble, ids), atol=2e-5, rtol=1e-4)
    whole = Flight()
    torch.testing.assert_close(forward([(whole, ids)])[0][:, 0], alone(ensemble, ids), atol=2e-5, rtol=1e-4)


def test_a_base_that_would_answer_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = tiny_ensemble(2)
    with monkeypatch.context() as patched:
        patched.setattr(in_flight, "_mask", lambda *_: None)
        with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot answer several requests .* would be wrong"):
            InFlight(ensemble)
    with monkeypatch.context() as patched:
        patched.setattr(Flight, "add", lambda self, layer, key, value: (key, value))
        with pytest.raises(ConfigError, match="would be wrong"):
            InFlight(ensemble)
    ensemble.base.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="it has layers of linear_attention"):
        InFlight(ensemble)
    ensemble.base.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ConfigError, match="do not say how wide"):
        InFlight(ensemble)


def test_few_widths_are_run_so_that_kept_matrix_products_stay_few() -> None:
    widths = [in_flight._rounded(n) for n in range(1, 1025)]
    assert widths[:17] == [*range(1, 17), 18]
    assert all(n <= width <= 1.125 * n for n, width in enumerate(widths, 1))
    assert len(set(widths)) == 64


def test_the_models_own_attention_is_back_after_a_step() -> None:
    ensemble = tiny_ensemble(2)
    before = ensemble.base.config._attn_implementation
    InFlight(ensemble)([(Flight(), [7, 8])])
    assert ensemble.base.config._attn_implementation == before
