"""What an ensemble can stand on: a causal language model, loaded as training loads it. Others are refused by name."""

import pytest
import torch
from tiny import lora, padded_batch, scatter_members, tiny_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from renyi import LoraEnsemble
from renyi.ensemble.base_model import load_base
from renyi.errors import ConfigError

SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: BertForMaskedLM(BertConfig(**SIZE)),
        lambda: BertLMHeadModel(BertConfig(**SIZE)),
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1)),
    ],
    ids=["BertForMaskedLM", "BertLMHeadModel", "T5ForConditionalGeneration"],
)
def test_encoders_are_refused_by_name(encoder, request):
    with pytest.raises(ConfigError, match="is an encoder") as caught:
        LoraEnsemble.from_base(encoder(), 2, lora())
    assert request.node.callspec.id in str(caught.value)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny vision-language model, saved."""
    torch.manual_seed(0)
    text = LlamaConfig(**SIZE, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    folder = tmp_path_factory.mktemp("llava")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_vision_language_model_is_tuned_on_text_and_loads_as_it_was_trained(llava, tmp_path, targets):
    ensemble = scatter_members(LoraEnsemble.from_base(str(llava), 2, lora(target_modules=targets)))
    assert all("language_model" in name for name in ensemble.stack.layers)
    ell = ensemble.log_likelihood(*padded_batch())
    assert (ell[0] - ell[1]).abs().max() > 0.01
    ensemble.save(tmp_path)
    loaded = LoraEnsemble.load(tmp_path)
    assert type(loaded.base) is LlavaForConditionalGeneration
    assert torch.equal(loaded.log_likelihood(*padded_batch()), ell)


def test_a_bare_backbone_is_loaded_with_a_head(tmp_path):
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    assert type(load_base(tmp_path)) is type(model)


@pytest.mark.parametrize(
    ("targets", "odd", "near"),
    [(["q_proj", "v_prj"], "v_prj", "v_proj"), (["layers.0.q_proj"], "layers.0.q_proj", "q_proj")],
)
def test_a_target_that_fits_nothing_is_refused_beside_those_that_fit(targets, odd, near):
    with pytest.raises(ConfigError, match="fits no layer") as caught:
        LoraEnsemble.from_base(tiny_model(), 2, lora(target_modules=targets))
    assert odd in str(caught.value)
    assert f"Did you mean {near}?" in str(caught.value)


def test_a_mixture_of_experts_adapts_its_attention():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    shared = {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZE, **moe, **shared))
    ensemble = scatter_members(LoraEnsemble.from_base(model, 2, lora(target_modules=["q_proj", "v_proj"])))
    assert torch.isfinite(ensemble.log_likelihood(*padded_batch())).all()


def test_experts_by_default_targets_are_refused_with_what_to_adapt():
    """PEFT takes a mixture's experts for linear layers; their tokens are sorted by expert, not by member."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4, num_key_value_heads=2))
    with pytest.raises(ConfigError) as caught:
        LoraEnsemble.from_base(model, 2, lora())
    assert caught.value.where == "lora_target_modules"
    assert "model.layers.0.mlp.experts is inside a mixture of experts" in caught.value.what
    assert caught.value.hint == "Adapt attention: k_proj, o_proj, q_proj, v_proj."
    ensemble = LoraEnsemble.from_base(model, 2, lora(target_modules=["k_proj", "o_proj", "q_proj", "v_proj"]))
    assert ensemble.log_likelihood(*padded_batch()).shape == (2, 3)
