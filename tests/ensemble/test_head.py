"""The frozen head against plain autograd: values, gradients and chunks, with what models do to their logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from renyi.ensemble import head
from renyi.ensemble.head import LogitTransform, check_head, token_scores
from renyi.errors import ConfigError

VOCABULARY, FEATURES, ROWS = 23, 6, 11
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def naive(
    hidden: Tensor, linear: nn.Linear, targets: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and top-1 hit, as anybody would write them, in the precision of `hidden`."""
    logits = transform.scale * (hidden @ linear.weight.to(hidden.dtype).T)
    if linear.bias is not None:
        logits = logits + transform.scale * linear.bias.to(hidden.dtype)
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy, log_p.argmax(-1) == targets


def problem(bias: bool, size: float = 2.0, seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(FEATURES, VOCABULARY, bias=bias).requires_grad_(False)
    linear.weight.copy_(torch.randn(VOCABULARY, FEATURES, generator=generator))
    if bias:
        linear.bias.copy_(torch.randn(VOCABULARY, generator=generator))
    hidden = size * torch.randn(ROWS, FEATURES, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, linear, targets, torch.randn(ROWS, generator=generator)


@pytest.mark.parametrize("block", [(1, 1), (3, 5), (11, 23), (1000, 1000)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.4), LogitTransform(0.5, 3.0)])
def test_values_and_gradients_are_the_naive_ones_in_float64(monkeypatch, transform, bias, block):
    monkeypatch.setattr(head, "BLOCK_ON_CPU", block)
    hidden, linear, targets, upstream = problem(bias)
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    scores = token_scores(ours, linear, targets, transform)
    log_probs, entropy, is_top1 = naive(exact, linear, targets, transform)
    torch.testing.assert_close(scores.log_probs.double(), log_probs, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(scores.entropy.double(), entropy, atol=3e-6, rtol=3e-6)
    assert torch.equal(scores.is_top1, is_top1)
    (scores.log_probs * upstream).sum().backward()
    (log_probs * upstream.double()).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(0.05, 8.0),
    softcap=st.none() | st.floats(0.5, 50.0),
    seed=st.integers(0, 1000),
    size=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_gradient_is_the_finite_difference(scale, softcap, seed, size):
    """Along a random direction, in float64 throughout, against the naive value moved by a little."""
    transform = LogitTransform(scale, softcap)
    hidden, linear, targets, upstream = problem(bias=True, size=size, seed=seed)
    hidden.requires_grad_()
    (token_scores(hidden, linear, targets, transform).log_probs * upstream).sum().backward()
    direction = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed)).double()
    step = 1e-5

    def value(sign: int) -> Tensor:
        moved = hidden.detach().double() + sign * step * direction
        return (naive(moved, linear, targets, transform)[0] * upstream.double()).sum()

    expected = (value(1) - value(-1)) / (2 * step)
    scale_of_terms = (hidden.grad.double() * direction).abs().sum()
    assert abs((hidden.grad.double() * direction).sum() - expected) <= 1e-4 * scale_of_terms + 1e-5


def test_no_gradient_for_the_head_and_none_through_entropy():
    hidden, linear, targets, _ = problem(bias=True)
    scores = token_scores(hidden.requires_grad_(), linear.requires_grad_(True), targets, LogitTransform())
    assert scores.log_probs.requires_grad
    assert not scores.entropy.requires_grad
    scores.log_probs.sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad is None


def test_half_precision_rows_are_summed_in_float32():
    """bf16 logits are rounded once, as the model rounds them; the softmax over them is not."""
    hidden, linear, targets, _ = problem(bias=False)
    hidden, linear = hidden.bfloat16(), linear.bfloat16()
    scores = token_scores(hidden, linear, targets, LogitTransform())
    assert scores.log_probs.dtype == scores.entropy.dtype == torch.float32
    exact = linear(hidden).double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(scores.log_probs.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_an_all_but_certain_token_is_no_rounding(dtype):
    """1 − p is about 1e-4 here; the row gradient, as long as that, keeps its own relative precision."""
    hidden, linear, _, _ = problem(bias=False)
    hidden, linear = hidden.to(dtype), linear.to(dtype)
    targets = linear(hidden).argmax(-1)
    transform = LogitTransform(
        scale=float(9 / (linear(hidden).float().topk(2).values @ torch.tensor([1.0, -1.0])).mean())
    )
    ours, exact = hidden.clone().requires_grad_(), linear(hidden).detach().double().requires_grad_()
    token_scores(ours, linear, targets, transform).log_probs.sum().backward()
    log_p = (transform.scale * exact).log_softmax(-1).gather(1, targets[:, None])
    (by_logit,) = torch.autograd.grad(log_p.sum(), exact)
    expected = by_logit @ linear.weight.double()
    assert expected.norm(dim=1).median() < 0.01 * linear.weight.norm()
    error = (ours.grad.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= (1e-5 if dtype == torch.float32 else 0.02)


def test_a_token_of_probability_zero_adds_nothing_to_the_entropy():
    linear = nn.Linear(1, 3, bias=True).requires_grad_(False)
    linear.weight.zero_()
    linear.bias.copy_(torch.tensor([0.0, 0.0, -torch.inf]))
    scores = token_scores(torch.zeros(2, 1), linear, torch.tensor([0, 2]), LogitTransform())
    torch.testing.assert_close(scores.entropy, torch.full((2,), 2.0).log())
    assert scores.log_probs[1] == -torch.inf


def test_no_rows_give_no_scores():
    _, linear, _, _ = problem(bias=False)
    scores = token_scores(torch.zeros(0, FEATURES), linear, torch.zeros(0, dtype=torch.long), LogitTransform())
    assert [part.shape for part in scores] == [(0,)] * 3


def test_gradients_of_a_second_backward_are_refused():
    """The stored row gradient is no function of the rows: a double backward must fail, not be silently zero."""
    hidden, linear, targets, _ = problem(bias=False)
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(
        token_scores(hidden, linear, targets, LogitTransform()).log_probs.sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


# What configs declare


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), LogitTransform()),
        (Gemma2Config(final_logit_softcapping=30.0), LogitTransform(1.0, 30.0)),
        (Gemma2Config(final_logit_softcapping=None), LogitTransform()),
        (GraniteConfig(logits_scaling=4.0), LogitTransform(0.25)),
    ],
    ids=["llama", "gemma2", "gemma2-uncapped", "granite"],
)
def test_the_transform_is_read_off_the_config(config, expected):
    assert LogitTransform.from_config(config) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "gemma2", "cohere", "granite"])
def test_the_head_on_the_backbone_gives_the_models_probabilities(kind):
    model = tiny_model(kind)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        scores = token_scores(
            hidden, model.get_output_embeddings(), ids[0, 1:], LogitTransform.from_config(model.config)
        )
        expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(scores.log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "entries", "expected"),
    [
        ("cohere", {"logit_scale": 0.5}, LogitTransform(0.5)),
        ("grok", {"output_multiplier": 0.25}, LogitTransform(0.25)),
        ("falcon_h1", {"lm_head_multiplier": 3}, LogitTransform(3.0)),
        ("granite", {"logits_scaling": 8}, LogitTransform(0.125)),
        ("hyperclovax", {"logits_scaling": 8}, LogitTransform(8.0)),
        ("cohere", {"logit_scale": 0.5, "logits_scaling": 8}, LogitTransform(0.5)),
        ("recurrent_gemma", {"logits_soft_cap": 30}, LogitTransform(1.0, 30.0)),
        ("xlstm", {"output_logit_soft_cap": 20}, LogitTransform(1.0, 20.0)),
        ("gemma2", {"final_logit_softcapping": 30.0, "logit_scale": 2.0}, LogitTransform(2.0, 30.0)),
    ],
)
def test_each_name_of_a_factor_a_divisor_or_a_cap_is_read(model_type, entries, expected):
    config = type("Config", (PreTrainedConfig,), {"model_type": model_type})()
    for name, value in entries.items():
        setattr(config, name, value)
    found = LogitTransform.from_config(config)
    assert found == expected
    assert type(found.scale) is float


def test_a_config_of_text_and_images_is_read_where_it_describes_the_text():
    of_text = type("Text", (PreTrainedConfig,), {"model_type": "gemma2", "final_logit_softcapping": 30.0})()
    whole = type("Whole", (PreTrainedConfig,), {"get_text_config": lambda self: of_text})()
    assert LogitTransform.from_config(whole) == LogitTransform(1.0, 30.0)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(2.0), LogitTransform(0.5, 3.0)])
def test_the_slope_is_the_derivative_of_the_transform(transform):
    logits = torch.linspace(-9.0, 9.0, 7, dtype=torch.float64, requires_grad=True)
    transformed = transform(logits)
    (expected,) = torch.autograd.grad(transformed.sum(), logits)
    found = torch.as_tensor(transform.slope(transformed.detach()), dtype=torch.float64)
    torch.testing.assert_close(found.expand(7), expected)


class _Changed(LlamaForCausalLM):
    """A Llama that does something to its logits which no config declares."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


CHANGES = {
    "times 1.05": lambda z: 1.05 * z,
    "times 1.0005": lambda z: 1.0005 * z,
    "capped at 30": lambda z: 30 * torch.tanh(z / 30),
    "capped at 50": lambda z: 50 * torch.tanh(z / 50),
    "biased": lambda z: z + 0.01 * torch.arange(z.shape[-1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.02, 0.9])
@pytest.mark.parametrize("change", CHANGES)
def test_logits_that_no_config_declares_are_refused(change, size, dtype):
    """Whatever the size of the weights, and in half precision, too: rounding is not taken for a model's own rule."""
    model = tiny_model(initializer_range=size).to(dtype)
    check_head(model)
    model.__class__, model.change = _Changed, CHANGES[change]
    with pytest.raises(ConfigError, match="does something to its hidden states or logits") as caught:
        check_head(model)
    assert caught.value.where == "model"
    assert "Please report the architecture" in caught.value.hint
    difference = float(caught.value.hint.partition("here by ")[2].split()[0])
    assert difference > 1e-4
    assert difference < 0.1 or change != "times 1.0005"


class OtherLinear(nn.Linear):
    """A head that is not exactly `nn.Linear`, as quantised heads are: it computes in its own precision."""


def test_a_head_of_another_class_is_checked_up_to_the_rounding_of_its_precision():
    model = tiny_model(initializer_range=0.9, tie_word_embeddings=False)
    model.lm_head.__class__ = OtherLinear
    check_head(model)
    model.bfloat16()
    check_head(model)
    model.__class__, model.change = _Changed, CHANGES["times 1.0005"]
    check_head(model)  # less than bfloat16 can tell
    model.float()
    with pytest.raises(ConfigError, match="does something"):
        check_head(model)
    model.bfloat16().change = lambda z: 1.5 * z
    with pytest.raises(ConfigError, match="does something"):
        check_head(model)


def test_a_backbone_that_returns_float32_is_rounded_as_its_model_rounds():
    model = tiny_model().to(torch.bfloat16)
    model.model.norm.register_forward_hook(lambda module, given, output: output.float() * 1.003)
    model.lm_head.register_forward_pre_hook(lambda module, given: (given[0].to(torch.bfloat16),))
    check_head(model)


def test_a_model_without_a_linear_head_is_refused():
    for model in (tiny_model().model, tiny_model()):
        if hasattr(model, "lm_head"):
            model.lm_head = nn.Identity()
        with pytest.raises(ConfigError, match=f"{type(model).__name__} is not a causal language model") as caught:
            check_head(model)
        assert caught.value.where == "model"


def test_a_model_on_the_meta_device_has_nothing_to_check():
    check_head(tiny_model().to("meta"))


@pytest.mark.parametrize("width", [7, VOCABULARY])
def test_a_head_is_checked_in_parts_of_its_vocabulary(monkeypatch, width):
    """Large vocabularies are multiplied part by part; the last part is smaller here."""
    monkeypatch.setattr(head, "BLOCK", (8192, width))
    model = KNOWN["biased"]()
    nn.init.normal_(model.lm_head.bias)
    check_head(model)
    model = tiny_model()
    check_head(model)
    model.__class__, model.change = _Changed, CHANGES["biased"]
    with pytest.raises(ConfigError, match="does something to its hidden states or logits"):
        check_head(model)


def test_hidden_states_that_are_changed_after_the_backbone_are_refused():
    model = tiny_model()
    model.lm_head.register_forward_pre_hook(lambda module, given: (1.05 * given[0],))
    with pytest.raises(ConfigError, match="hidden states"):
        check_head(model)


KNOWN = {
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**SMALL, lru_width=32, attention_window_size=16, logits_soft_cap=3.0)
    ),
    "xlstm": lambda: xLSTMForCausalLM(
        xLSTMConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_heads=2, output_logit_soft_cap=3.0,
            chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native",
            step_kernel="native",
        )
    ),
    "gemma2": lambda: tiny_model("gemma2"),
    "granite": lambda: tiny_model("granite"),
    "cohere": lambda: tiny_model("cohere"),
    "biased": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_heads_that_cap_scale_or_add_a_bias_as_their_config_says_are_known(kind):
    torch.manual_seed(0)
    model = KNOWN[kind]().eval()
    if kind == "biased":
        nn.init.normal_(model.lm_head.bias)
    check_head(model)
    transform = LogitTransform.from_config(model.config)
    assert kind == "biased" or transform != LogitTransform()


@pytest.mark.parametrize("width", [1, 5, 6, 1000])
def test_of_equal_logits_the_first_is_the_most_likely_token_also_across_blocks(monkeypatch, width):
    monkeypatch.setattr(head, "BLOCK_ON_CPU", (1000, width))
    _, linear, _, _ = problem(bias=False)
    linear.weight[[2, 7, 19]] = torch.full((FEATURES,), 5.0)  # three tokens with the greatest logit
    targets = torch.tensor([2, 7, 19, 0])
    scores = token_scores(torch.ones(4, FEATURES), linear, targets, LogitTransform())
    assert scores.is_top1.tolist() == [True, False, False, False]
    assert (linear.weight.sum(1).argmax() == 2).all()
