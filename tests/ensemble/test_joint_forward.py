"""The joint forward against plain PEFT: each member by itself, on every kind of model, target and precision."""

import contextlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import lora, padded_batch, scatter_members, tiny_ensemble, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from renyi import LoraEnsemble
from renyi.ensemble import head
from renyi.members.adapters import joint_layers
from renyi.members.layer import _JointLinear, draw_kept

KINDS = ["llama", "qwen2", "gpt2", "neox", "gemma2", "cohere", "granite"]
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "neox": ["query_key_value", "dense_h_to_4h"],
}


def peft_member(folder: Path, member: int, kind: str = "llama") -> PeftModel:
    """Member `member` of a saved ensemble on a fresh base, as anybody else would load it."""
    return PeftModel.from_pretrained(tiny_model(kind), str(folder / f"member_{member}")).eval()


def naive_log_likelihood(logits: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """[…, B, T]: entry t is log softmax(logits at t − 1)[token t] where label t is not −100, else 0."""
    log_p = torch.log_softmax(logits[..., :-1, :].float(), dim=-1)
    index = input_ids[:, 1:, None].expand(*log_p.shape[:-1], 1)
    taken = log_p.gather(-1, index).squeeze(-1).masked_fill(labels[:, 1:] == -100, 0.0)
    return torch.nn.functional.pad(taken, (1, 0))


def gradients(ensemble: LoraEnsemble) -> list[Tensor]:
    return [p.grad.clone() for p in ensemble.parameters() if p.requires_grad]


def relative_difference(one: list[Tensor], two: list[Tensor]) -> float:
    a, b = (torch.cat([g.double().flatten() for g in grads]) for grads in (one, two))
    return float((a - b).norm() / b.norm())


def backward_of(ensemble: LoraEnsemble, *batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-likelihoods and the gradients of an uneven sum of them."""
    ensemble.zero_grad()
    ell = ensemble.log_likelihood(*batch)
    (ell * torch.linspace(0.5, 1.5, ell.numel()).view_as(ell)).sum().backward()
    return ell.detach(), gradients(ensemble)


# Each member is what PEFT makes of its folder


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_each_saved_member_under_peft(tmp_path, kind):
    ensemble = tiny_ensemble(3, kind)
    ensemble.save(tmp_path)
    input_ids, mask = padded_batch()
    with torch.no_grad():
        joint = ensemble.logits(input_ids, mask)
        for member in range(3):
            alone = peft_member(tmp_path, member, kind)(input_ids=input_ids, attention_mask=mask).logits
            assert ((joint[member] - alone) * mask[..., None]).abs().max() <= 1e-5
        members_differ = (joint[0] - joint[1]).abs().max()
    assert members_differ > 0.01


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihood_is_the_naive_one_of_each_row_alone(tmp_path, kind, side):
    """Padding on either side, against PEFT's logits for the unpadded row."""
    ensemble = tiny_ensemble(2, kind)
    ensemble.save(tmp_path)
    input_ids, mask = padded_batch(side)
    with torch.no_grad():
        per_token, ell = ensemble.token_log_likelihood(input_ids, mask), ensemble.log_likelihood(input_ids, mask)
        assert per_token.dtype == ell.dtype == torch.float32
        assert per_token.shape == (2, 3, 9)
        for member in range(2):
            model = peft_member(tmp_path, member, kind)
            for row in range(3):
                alone = input_ids[row][mask[row] == 1][None]
                expected = naive_log_likelihood(model(input_ids=alone).logits, alone, alone)[0]
                torch.testing.assert_close(per_token[member, row][mask[row] == 1], expected, atol=2e-5, rtol=1e-5)
                torch.testing.assert_close(ell[member, row], expected.sum(), atol=5e-5, rtol=1e-5)


def test_labels_choose_what_is_summed():
    ensemble = tiny_ensemble()
    input_ids, mask = padded_batch()
    labels = input_ids.masked_fill(torch.arange(9) < 3, -100).masked_fill(mask == 0, -100)
    everything = ensemble.token_log_likelihood(input_ids, mask)
    torch.testing.assert_close(
        ensemble.log_likelihood(input_ids, mask, labels), everything[..., 3:].sum(-1), atol=1e-5, rtol=0
    )
    assert (ensemble.token_log_likelihood(input_ids, mask, labels)[..., :3] == 0).all()


def test_explicit_labels_of_left_padded_rows_do_not_score_the_first_token():
    """Nothing precedes the first token but padding, whatever its label says."""
    ensemble = tiny_ensemble()
    input_ids, mask = padded_batch("left")
    labels = input_ids.masked_fill(mask == 0, -100)
    torch.testing.assert_close(
        ensemble.log_likelihood(input_ids, mask, labels), ensemble.log_likelihood(*padded_batch()), atol=1e-4, rtol=0
    )


def test_a_batch_without_trained_tokens_scores_zero():
    ensemble = tiny_ensemble().train()
    input_ids, mask = padded_batch()
    ell = ensemble.log_likelihood(input_ids, mask, torch.full_like(input_ids, -100))
    assert ell.tolist() == [[0.0] * 3] * 3
    ell.sum().backward()


def test_output_parts_agree_with_the_logits():
    ensemble = tiny_ensemble()
    input_ids, mask = padded_batch()
    output, logits = ensemble(input_ids, mask), ensemble.logits(input_ids, mask)[:, :, :-1]
    log_p = logits.log_softmax(-1)
    trained = mask[:, 1:].bool()
    assert torch.equal(output.label_mask, trained)
    entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~trained, 0.0)
    torch.testing.assert_close(output.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(output.is_top1, (logits.argmax(-1) == input_ids[:, 1:]) & trained)
    assert not output.entropy.requires_grad


# Targets, scaling and dropout are PEFT's


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, on Conv1D
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *((kind, {"target_modules": targets}) for kind, targets in TARGETS.items()),
        ("llama", {"target_modules": r".*layers\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)"}),
        ("llama", {"use_rslora": True, "lora_alpha": 5}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}),
        ("llama", {"exclude_modules": ["down_proj"]}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("llama", {"init_lora_weights": "gaussian"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_targets_and_scaling_are_chosen_as_peft_chooses_them(tmp_path, kind, config):
    ensemble = tiny_ensemble(2, kind, **config)
    expected = get_peft_model(tiny_model(kind), lora(**config))
    names = {n.split(".lora_A")[0] for n, p in expected.named_parameters() if "lora_A" in n}
    assert {f"base_model.model.{name}" for name in joint_layers(ensemble.base)} == names
    ensemble.save(tmp_path)
    input_ids, mask = padded_batch()
    with torch.no_grad():
        joint = ensemble.logits(input_ids, mask)
        for member in range(2):
            alone = peft_member(tmp_path, member, kind)(input_ids=input_ids, attention_mask=mask).logits
            assert ((joint[member] - alone) * mask[..., None]).abs().max() <= 1e-5


def test_dropout_is_drawn_apart_for_every_member():
    """Members with equal weights answer equally in evaluation and differently under dropout."""
    ensemble = tiny_ensemble(2, lora_dropout=0.5)
    for layer in joint_layers(ensemble.base).values():
        for stacked in layer.members.parameters():
            stacked.data[1] = stacked.data[0]
    input_ids, mask = padded_batch()
    first, second = ensemble.log_likelihood(input_ids, mask)
    torch.testing.assert_close(first, second)
    ensemble.train()
    first, second = ensemble.log_likelihood(input_ids, mask)
    assert ((first - second).abs() > 1e-3).all()


def test_rows_that_do_not_divide_among_members_are_refused():
    ensemble = tiny_ensemble(3)
    layer = next(iter(joint_layers(ensemble.base).values()))
    with pytest.raises(ValueError, match="member-major"):
        layer(torch.zeros(4, 1, 32))


# One draw a member, and nobody else's random state


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, on Conv1D
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_member_m_is_what_peft_draws_after_seed_plus_m(kind):
    base = tiny_model(kind)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    ensemble = LoraEnsemble.from_base(base, 3, lora(), seed=11)
    assert torch.equal(torch.random.get_rng_state(), state)
    for member in range(3):
        model = tiny_model(kind)
        torch.manual_seed(11 + member)
        drawn = dict(get_peft_model(model, lora()).named_parameters())
        for name, (lora_a, lora_b) in ensemble.adapter(member).items():
            assert torch.equal(lora_a, drawn[f"base_model.model.{name}.lora_A.default.weight"])
            assert torch.equal(lora_b, drawn[f"base_model.model.{name}.lora_B.default.weight"])


def test_only_adapters_are_trained_and_the_base_keeps_its_weights():
    plain = dict(tiny_model().named_parameters())
    ensemble = tiny_ensemble(scattered=False)
    trained = [name for name, p in ensemble.named_parameters() if p.requires_grad]
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert len(trained) == 2 * len(joint_layers(ensemble.base)) == 2 * 7 * 2
    for name, parameter in ensemble.base.named_parameters():
        if not name.endswith(("lora_A", "lora_B")):
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")])


def test_fresh_members_are_the_base():
    ensemble = tiny_ensemble(3, scattered=False)
    input_ids, mask = padded_batch()
    expected = tiny_model()(input_ids=input_ids, attention_mask=mask).logits
    for logits in ensemble.logits(input_ids, mask):
        # Not bitwise: a matrix product rounds by where in a matrix, and in how large a one, a row lies.
        torch.testing.assert_close(logits, expected, atol=2e-6, rtol=1e-5)


# Choosing members


def test_using_runs_the_chosen_members_in_their_order():
    ensemble = tiny_ensemble(4)
    input_ids, mask = padded_batch()
    everyone = ensemble.log_likelihood(input_ids, mask)
    with ensemble.using([3, 1]):
        torch.testing.assert_close(ensemble.log_likelihood(input_ids, mask), everyone[[3, 1]])
        with ensemble.using([2]):
            torch.testing.assert_close(ensemble.log_likelihood(input_ids, mask), everyone[[2]])
        assert ensemble.logits(input_ids, mask).shape[0] == 2
    assert torch.equal(ensemble.log_likelihood(input_ids, mask), everyone)


def test_using_nobody_is_the_base_alone():
    ensemble = tiny_ensemble(3)
    input_ids, mask = padded_batch()
    with ensemble.using(()):
        logits = ensemble.logits(input_ids, mask)
        ell = ensemble.log_likelihood(input_ids, mask)
    base = tiny_model()(input_ids=input_ids, attention_mask=mask).logits
    assert torch.equal(logits, base[None])
    labels = input_ids.masked_fill(mask == 0, -100)
    torch.testing.assert_close(ell[0], naive_log_likelihood(base, input_ids, labels).sum(-1), atol=1e-4, rtol=1e-5)


def test_gradients_reach_only_the_chosen_members():
    ensemble = tiny_ensemble(3).train()
    with ensemble.using([2]):
        ensemble.log_likelihood(*padded_batch()).sum().backward()
    for grad in gradients(ensemble):
        assert (grad[:2] == 0).all()
        assert (grad[2] != 0).any()


# Gradients equal the naive ones, however the forward is run


def naive_backward_of(ensemble: LoraEnsemble, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    ensemble.zero_grad()
    labels = input_ids.masked_fill(mask == 0, -100)
    ell = naive_log_likelihood(ensemble.logits(input_ids, mask), input_ids, labels).sum(-1)
    (ell * torch.linspace(0.5, 1.5, ell.numel()).view_as(ell)).sum().backward()
    return ell.detach(), gradients(ensemble)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_naive_ones(kind):
    ensemble = tiny_ensemble(3, kind).train()
    batch = padded_batch()
    (expected, naive), (ell, ours) = naive_backward_of(ensemble, *batch), backward_of(ensemble, *batch)
    torch.testing.assert_close(ell, expected, atol=1e-4, rtol=1e-5)
    assert relative_difference(ours, naive) <= 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(kind, use_reentrant):
    """In float64, because the first layer takes another way where its input needs a gradient."""
    plain, checkpointed = (tiny_ensemble(3, kind, lora_dropout=0.2).double().train() for _ in range(2))
    checkpointed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert checkpointed.base.is_activation_checkpointing
    results = []
    for ensemble in (plain, checkpointed):
        torch.manual_seed(5)  # the same dropout
        results.append(backward_of(ensemble, *padded_batch()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    assert relative_difference(results[1][1], results[0][1]) <= 1e-10


def test_gradient_checkpointing_recomputes_with_the_chosen_member():
    ensemble = tiny_ensemble(3).train()
    ensemble.activation_checkpointing_enable()
    with ensemble.using([1]):
        _, checkpointed = backward_of(ensemble, *padded_batch())
    plain = tiny_ensemble(3).train()
    with plain.using([1]):
        _, expected = backward_of(plain, *padded_batch())
    assert relative_difference(checkpointed, expected) <= 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_autocast_rounds_no_more_than_the_plain_forward_does(tmp_path, kind):
    """bf16 autocast: float32 log-likelihoods, as near to PEFT's under autocast as bf16 resolves."""
    ensemble = tiny_ensemble(2, kind)
    ensemble.save(tmp_path)
    batch = padded_batch()
    exact, exact_gradients = backward_of(ensemble, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        ell, rounded_gradients = backward_of(ensemble, *batch)
        plain = []
        for member in range(2):
            with torch.no_grad():
                logits = peft_member(tmp_path, member, kind)(input_ids=batch[0], attention_mask=batch[1]).logits
            labels = batch[0].masked_fill(batch[1] == 0, -100)
            plain.append(naive_log_likelihood(logits, batch[0], labels).sum(-1))
    assert ell.dtype == torch.float32
    error, plain_error = (ell - exact).abs().max(), (torch.stack(plain) - exact).abs().max()
    assert 0 < error <= max(3 * plain_error, 0.02)
    assert relative_difference(rounded_gradients, exact_gradients) <= 0.03


def test_a_half_precision_base_keeps_float32_adapters_and_sums(tmp_path):
    ensemble = scatter_members(LoraEnsemble.from_base(tiny_model().to(torch.bfloat16), 2, lora()))
    assert all(p.dtype == torch.float32 for p in ensemble.parameters() if p.requires_grad)
    ensemble.eval().save(tmp_path)
    input_ids, mask = padded_batch()
    assert ensemble.log_likelihood(input_ids, mask).dtype == torch.float32
    joint = ensemble.logits(input_ids, mask)
    for member in range(2):
        alone = PeftModel.from_pretrained(tiny_model().to(torch.bfloat16), str(tmp_path / f"member_{member}")).eval()
        logits = alone(input_ids=input_ids, attention_mask=mask).logits
        assert joint.dtype == logits.dtype == torch.bfloat16
        assert ((joint[member] - logits).float() * mask[..., None]).abs().max() <= 0.01


@pytest.mark.slow
def test_compiled_values_and_gradients_are_the_plain_ones():
    ensemble = tiny_ensemble(2).train()
    expected, plain = backward_of(ensemble, *padded_batch())
    torch._dynamo.reset()
    compiled = torch.compile(ensemble, backend="aot_eager")
    ensemble.zero_grad()
    ell = compiled(*padded_batch()).log_probs.sum(-1)
    (ell * torch.linspace(0.5, 1.5, ell.numel()).view_as(ell)).sum().backward()
    torch.testing.assert_close(ell.detach(), expected, atol=1e-5, rtol=1e-6)
    assert relative_difference(gradients(ensemble), plain) <= 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_layer_drops_inputs_of_its_update_at_the_rate():
    """In one graph. Over many draws the mean is the output without dropout, and each draw differs."""
    ensemble = scatter_members(tiny_ensemble(2, lora_dropout=0.3)).train()
    layer = next(layer for name, layer in joint_layers(ensemble.base).items() if "up_proj" in name)
    torch.manual_seed(0)
    x = torch.randn(6, 5, 32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    drawn = torch.stack([compiled(x).detach() for _ in range(400)])
    torch._dynamo.reset()
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0) - layer.eval()(x)) / (drawn.std(0) / 400**0.5)
    assert error.detach().std() == pytest.approx(1, abs=0.1)


# Memory


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch):
    """Forward and backward of M = 3, B = 4, T = 16 with V = 4,096 never hold M·B·T·V, nor B·T·V, numbers."""
    monkeypatch.setattr(head, "BLOCK_ON_CPU", (64, 1024))
    model = tiny_model(vocab_size=4096, tie_word_embeddings=False)
    ensemble = scatter_members(LoraEnsemble.from_base(model, 3, lora())).train()
    input_ids = torch.randint(0, 4096, (4, 16))
    with LargestTensor() as ours:
        ensemble.log_likelihood(input_ids).sum().backward()
    embedding = 4096 * 32
    assert ours.numel == embedding
    assert embedding < 4 * 16 * 4096
    with LargestTensor() as naive, torch.no_grad():
        ensemble.logits(input_ids)
    assert naive.numel == 3 * 4 * 16 * 4096


def test_scoring_keeps_no_graph():
    ensemble = tiny_ensemble()
    with torch.no_grad():
        assert not ensemble.log_likelihood(*padded_batch()).requires_grad


# A quantised base


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_stays_quantised(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=128, initializer_range=0.02).save_pretrained(tmp_path / "base")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantisation = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))

    def quantised_base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
        )

    input_ids, mask = padded_batch()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        try:
            quantised_base()(input_ids=input_ids, attention_mask=mask)
        except Exception as error:
            pytest.skip(f"bitsandbytes cannot run {bits}-bit layers here: {error}")
        kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
        ensemble = scatter_members(LoraEnsemble.from_base(quantised_base(), 2, lora())).eval()
        layers = joint_layers(ensemble.base).values()
        assert len(layers) == 14
        assert all(type(layer.base_layer) is kind for layer in layers)
        assert all(not layer.base_layer.weight.dtype.is_floating_point for layer in layers)
        ensemble.save(tmp_path / "ensemble")
        joint = ensemble.logits(input_ids, mask)
        for member in range(2):
            # 4-bit layers stay in training mode, as ours do: an evaluated one is repacked for a kernel that rounds.
            alone = PeftModel.from_pretrained(quantised_base(), str(tmp_path / "ensemble" / f"member_{member}"))
            alone.train(bits == 4)
            logits = alone(input_ids=input_ids, attention_mask=mask).logits
            assert ((joint[member] - logits) * mask[..., None]).abs().max() <= 1e-4
    # Training goes through the quantised weights, also after scoring; gradients are those over dequantised values.
    quantised = ensemble.train()
    dequantised = scatter_members(LoraEnsemble.from_base(quantised_base().dequantize(), 2, lora())).train()
    ell, grads = backward_of(quantised, input_ids, mask)
    expected, expected_grads = backward_of(dequantised, input_ids, mask)
    # 8-bit layers round their inputs, too.
    torch.testing.assert_close(ell, expected, rtol=1e-4 if bits == 4 else 0.02, atol=1e-4)
    assert relative_difference(grads, expected_grads) <= (1e-4 if bits == 4 else 0.1)


# What is computed once for all members


@pytest.mark.parametrize(("dropout", "times"), [(0.0, 1), (0.1, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_what_comes_before_the_first_joint_layer_is_computed_once(dropout, times, training):
    """By the base's layer, whose rows are counted; a base that drops at random has rows of its own for each member."""
    ensemble = LoraEnsemble.from_base(tiny_model("llama", attention_dropout=dropout), 3, lora(), seed=0).train(training)
    ids, mask = padded_batch()
    rows = {}
    for name, layer in joint_layers(ensemble.base).items():
        layer.base_layer.register_forward_pre_hook(
            lambda _, inputs, name=name: rows.update({name: inputs[0].numel() // inputs[0].shape[-1]})
        )
    ensemble(ids, mask)
    once = {n for n in rows if n.endswith(("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"))}
    assert len(once) == 3
    for name, count in rows.items():
        assert count == (times if name in once else 3) * ids.numel(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_and_its_updates_as_one_node_have_autograds_gradients(bias, dropout):
    """In float64, against the formula; dropped inputs of the update are zero, and the others are over what is kept."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, b, A, B = draw(6, 5, 7), draw(4, 7), draw(4) if bias else None, draw(3, 2, 7), draw(3, 4, 2)
    base = torch.nn.functional.linear(x, weight.detach(), None if b is None else b.detach())
    torch.manual_seed(1)
    kept, share = draw_kept(x.view(3, 10, 7), dropout) if dropout else (torch.ones(3, 10, 7), 1.0)
    assert kept.bool().all() == (dropout == 0)
    dropped = (x.view(3, 10, 7) * kept / share).view(3, 2, 5, 7)
    update = torch.einsum("mntr,mor->mnto", torch.einsum("mnti,mri->mntr", dropped, A), B)
    expected = base + 0.7 * update.reshape(6, 5, 4)
    torch.manual_seed(1)
    found = _JointLinear.apply(x, weight, b, A, B, 0.7, dropout)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for one, two in zip(*(torch.autograd.grad(y, (x, A, B), upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_keeps_the_share_that_it_says(rate, dtype):
    """The count is binomial, and neighbours, which share a word of random bits, are independent."""
    torch.manual_seed(0)
    like = torch.empty(3, 7001, 11, dtype=dtype)  # no multiple of four
    assert not draw_kept(like, 1.0)[0].any()
    kept, share = draw_kept(like, rate)
    assert kept.dtype == dtype
    assert kept.shape == like.shape
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert abs(share - (1 - rate)) <= 2**-17
    values = kept.double().flatten()
    limit = 4 * (share * (1 - share) / len(values)) ** 0.5
    assert abs(values.mean() - share) <= limit
    for apart in (1, 2, 3, 4):
        assert abs(((values[apart:] - share) * (values[:-apart] - share)).mean()) <= limit


# Rows that do not stay equal, and rows that begin late


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_left_padded_rows_are_the_right_padded_ones_in_every_forward(kind):
    """One rule for positions: `forward`, `logits`, log-likelihoods and hidden states count from the first token."""
    ensemble = tiny_ensemble(2, kind)
    (right, right_mask), (left, left_mask) = padded_batch("right"), padded_batch("left")
    with torch.no_grad():
        logits, hidden = (f(right, right_mask)[:, right_mask.bool()] for f in (ensemble.logits, ensemble.hidden_states))
        torch.testing.assert_close(ensemble.logits(left, left_mask)[:, left_mask.bool()], logits, atol=2e-5, rtol=1e-5)
        found = ensemble.hidden_states(left, left_mask)[:, left_mask.bool()]
        torch.testing.assert_close(found, hidden, atol=2e-5, rtol=1e-5)
        expected = ensemble(right, right_mask).log_probs.sum(-1)
        torch.testing.assert_close(ensemble(left, left_mask).log_probs.sum(-1), expected, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(ensemble.log_likelihood(left, left_mask), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_noise_on_embeddings_is_each_members_own(kind):
    """As of NEFTune: members whose rows get different noise answer as each does alone with its noise."""
    ensemble, (ids, mask) = tiny_ensemble(3, kind), padded_batch()
    noise = 0.3 * torch.randn(3, *ids.shape, 32, generator=torch.Generator().manual_seed(0))
    embedding = ensemble.base.get_input_embeddings()
    with torch.no_grad():
        with_hook = embedding.register_forward_hook(lambda module, given, output: output + noise.flatten(0, 1))
        together = ensemble(ids, mask).log_probs
        with_hook.remove()
        for member in range(3):
            hook = embedding.register_forward_hook(lambda module, given, output, m=member: output + noise[m])
            with ensemble.using([member]):
                alone = ensemble(ids, mask).log_probs[0]
            hook.remove()
            torch.testing.assert_close(together[member], alone, atol=2e-5, rtol=1e-5)
