"""Who only asks the members gets the same answer each time, and every submodule keeps the mode that it had."""

import pytest
import torch
from datasets import Dataset
from tiny import lora, padded_batch, scatter_members, tiny_ensemble, tiny_model
from torch import nn

from renyi import LoraEnsemble
from renyi.data import ThumbPreparation
from renyi.ensemble import KeptThumbs, Reference, evaluating
from renyi.inference import score, score_thumbs
from renyi.inference.continuation import score_continuations
from renyi.members import layer
from renyi.members.adapters import joint_layers
from renyi.objectives import ThumbLoss

BASE_DROPOUT = {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3}


def dropping_ensemble(lora_dropout: float, **of_base: float) -> LoraEnsemble:
    """An ensemble on GPT-2 in the mode that `from_base` leaves it in."""
    config = lora(lora_dropout=lora_dropout, target_modules=["c_attn", "c_fc"])
    return scatter_members(LoraEnsemble.from_base(tiny_model("gpt2", **of_base), 3, config))


@pytest.mark.parametrize(("lora_dropout", "of_base"), [(0.05, {}), (0.0, BASE_DROPOUT)], ids=["lora", "base"])
def test_two_calls_are_equal_whatever_came_before(tmp_path, lora_dropout, of_base):
    ids, mask = padded_batch()
    ensemble = dropping_ensemble(lora_dropout, **of_base)
    expected = dropping_ensemble(0.0).log_likelihood(ids, mask)
    first = ensemble.log_likelihood(ids, mask)  # with a gradient: it is the mode that decides
    torch.testing.assert_close(first, expected)
    assert torch.equal(ensemble.log_likelihood(ids, mask), first)
    ensemble.generate(ids, mask, max_new_tokens=2)
    assert torch.equal(ensemble.log_likelihood(ids, mask), first)
    ensemble.save(tmp_path)
    loaded = LoraEnsemble.load(tmp_path, base=tiny_model("gpt2", **of_base))
    assert torch.equal(loaded.log_likelihood(ids, mask), first)
    assert not any(module.training for module in (*ensemble.modules(), *loaded.modules()))


@pytest.mark.parametrize(("lora_dropout", "of_base"), [(0.5, {}), (0.0, BASE_DROPOUT)], ids=["lora", "base"])
def test_nothing_drops_without_a_gradient(lora_dropout, of_base):
    ids, mask = padded_batch()
    ensemble = dropping_ensemble(lora_dropout, **of_base).train()
    quiet = dropping_ensemble(0.0)
    assert not torch.allclose(ensemble.log_likelihood(ids, mask), quiet.log_likelihood(ids, mask), atol=0.1)
    with torch.no_grad():
        torch.testing.assert_close(ensemble.log_likelihood(ids, mask), quiet.log_likelihood(ids, mask))
        torch.testing.assert_close(ensemble.logits(ids), quiet.logits(ids))
        torch.testing.assert_close(
            next(ensemble.next_token_log_probs(ids, mask, mask > 0)),
            next(quiet.next_token_log_probs(ids, mask, mask > 0)),
        )
    settings = {"max_new_tokens": 4, "do_sample": True, "seed": 3}
    assert torch.equal(
        ensemble.generate(ids, mask, **settings).sequences, quiet.generate(ids, mask, **settings).sequences
    )
    assert ensemble.training


def test_every_submodule_gets_its_own_mode_back():
    ensemble = tiny_ensemble().train()
    for number, module in enumerate(ensemble.modules()):
        module.training = number % 3 == 0
    before = [module.training for module in ensemble.modules()]
    with evaluating(ensemble):
        assert not any(module.training for module in ensemble.modules())
    assert [module.training for module in ensemble.modules()] == before
    with pytest.raises(RuntimeError, match="stop"), evaluating(ensemble):
        raise RuntimeError("stop")
    assert [module.training for module in ensemble.modules()] == before
    ensemble.generate(padded_batch()[0], max_new_tokens=1)
    assert [module.training for module in ensemble.modules()] == before


class Linear4bit(nn.Linear):
    """Named as bitsandbytes names it, whose own needs a kernel: on a CPU it is rewritten when it is evaluated."""


def test_a_layer_that_evaluation_changes_for_good_is_left_alone():
    base = tiny_model()
    for name, module in list(base.named_modules()):
        if name.endswith("q_proj"):
            module.__class__ = Linear4bit
    ensemble = LoraEnsemble.from_base(base, 2, lora())
    layers = [layer.base_layer for layer in joint_layers(ensemble.base).values()]
    quantised = [layer for layer in layers if isinstance(layer, Linear4bit)]
    assert len(quantised) == 2
    for change in (lambda: None, ensemble.eval, ensemble.train, ensemble.eval):
        change()
        with evaluating(ensemble):
            assert [layer.training for layer in layers] == [isinstance(layer, Linear4bit) for layer in layers]
        assert all(layer.training for layer in quantised)


# ---- The precision of inference --------------------------------------------------------------------------------------


@pytest.fixture
def in_half() -> LoraEnsemble:
    """Float32 adapters on a base in bfloat16, as a folder loads."""
    return scatter_members(LoraEnsemble.from_base(tiny_model().to(torch.bfloat16), 3, lora()))


@pytest.fixture
def rounded_whole(monkeypatch) -> None:
    """Updates of few rows are rounded as all others are."""
    monkeypatch.setattr(layer, "FEW_ROWS", 0)


@pytest.mark.usefixtures("rounded_whole")
def test_inference_has_the_numbers_of_adapters_in_the_bases_precision(in_half):
    ids, mask = padded_batch()
    rows = Dataset.from_list(
        [{"input_ids": x[:n].tolist(), "labels": x[:n].tolist()} for x, n in zip(ids, mask.sum(1), strict=True)]
    )
    pairs = [([5, 6], [7, 8]), ([6], [9])]
    thumbs = Dataset.from_list(
        [{"prompt_ids": x, "completion_ids": y, "label": len(x) == 1} for x, y in pairs],
    )
    rounded = scatter_members(LoraEnsemble.from_base(tiny_model().to(torch.bfloat16), 3, lora())).to(torch.bfloat16)

    def asked(ensemble):
        settings = {"max_new_tokens": 6, "do_sample": True, "seed": 3}
        written = ensemble.generate(ids, mask, **settings).sequences.tolist()
        kept = KeptThumbs(ThumbLoss(), Reference(ensemble), torch.zeros(3))
        approved = score_thumbs(ensemble, thumbs, kept, ThumbPreparation())
        return score(ensemble, rows), score_continuations(ensemble, *zip(*pairs, strict=True)), approved, written

    assert asked(in_half) == asked(rounded)
    assert score(in_half, rows)[0].log_likelihood != in_half.log_likelihood(ids, mask)[:, 0].tolist()


def test_few_rows_have_updates_in_float32_on_a_cpu(in_half):
    """Decoding sees few. The numbers are those of float32 adapters, and any number of rows is near them."""
    a_token, many = torch.tensor([[5]]), torch.arange(5, 60)[None]
    with torch.no_grad(), evaluating(in_half):
        expected = [in_half.hidden_states(ids, None, {}) for ids in (a_token, many)]
    with torch.no_grad(), in_half.inference():
        found = [in_half.hidden_states(ids, None, {}) for ids in (a_token, many)]
    assert a_token.numel() * in_half.num_members <= layer.FEW_ROWS < many.numel() * in_half.num_members
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[1], expected[1], atol=0.1, rtol=0.1)


def test_inference_leaves_the_members_as_they_are(in_half):
    before = {name: tensor.clone() for name, tensor in in_half.state_dict().items()}
    layers = in_half.stack.layers.values()
    with in_half.inference():
        assert all({x.dtype for x in of.rounded} == {torch.bfloat16} for of in layers)
    assert all(of.rounded is of.acting is None for of in layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in in_half.state_dict().items())
    assert {A.dtype for A, _ in in_half.stack.matrices().values()} == {torch.float32}


def test_float32_adapters_leave_a_float64_base_its_precision():
    """Fresh members are the base."""
    base, (ids, mask) = tiny_model().double(), padded_batch()
    ensemble = LoraEnsemble.from_base(base, 2, lora())
    for of in ensemble.stack.layers.values():
        of.members.float()
    with torch.no_grad(), ensemble.inference():
        found = ensemble.hidden_states(ids, mask, {})
        with ensemble.using(()):
            expected = ensemble.hidden_states(ids, mask, {})
    torch.testing.assert_close(found, expected.expand_as(found), atol=1e-12, rtol=1e-12)


def test_other_members_act_in_the_bases_precision_too(in_half):
    ids, mask = padded_batch()
    start = in_half.snapshot()
    scatter_members(in_half, seed=5)
    with in_half.acting_as(start), in_half.inference():
        found = in_half.log_likelihood(ids, mask)
    scatter_members(in_half, seed=1)  # the members of `start`
    with in_half.inference():
        assert torch.equal(in_half.log_likelihood(ids, mask), found)


def test_a_float32_base_is_left_alone():
    ensemble = tiny_ensemble()
    ids, mask = padded_batch()
    expected = ensemble.log_likelihood(ids, mask)
    with ensemble.inference():
        assert all(of.acting is None for of in ensemble.stack.layers.values())
        assert torch.equal(ensemble.log_likelihood(ids, mask), expected)
