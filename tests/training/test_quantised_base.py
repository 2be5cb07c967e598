"""A 4-bit base on a CPU: bitsandbytes rewrites a layer that is evaluated, and members go on learning through it."""

import pytest
import torch
from tiny import lora, member_distance, sft_config, text_rows, tiny_model, tiny_tokenizer
from transformers import BitsAndBytesConfig

from renyi import RenyiSFTTrainer

bnb = pytest.importorskip("bitsandbytes")


def test_evaluation_leaves_the_training_of_members_on_a_4_bit_base_as_it_is(tmp_path):
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    in_4_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def trained(name, **settings):
        trainer = RenyiSFTTrainer(
            str(tmp_path / "base"),
            sft_config(tmp_path / name, num_members=2, alpha=0.5, **settings),
            text_rows(),
            peft_config=lora(),
            quantization_config=in_4_bit,
            eval_dataset=text_rows(8, seed=2),
            processing_class=tiny_tokenizer(),
        )
        for layer in trainer.model.stack.layers.values():  # as on a processor for which layers are rewritten
            layer.base_layer.support_avx512bf16_for_cpu = True
        trainer.train()
        return trainer

    plain, evaluated = trained("plain"), trained("evaluated", eval_strategy="steps", eval_steps=2)
    assert len([row for row in evaluated.state.log_history if "eval_loss" in row]) == 3
    layers = [layer.base_layer for layer in evaluated.model.stack.layers.values()]
    assert all(isinstance(layer, bnb.nn.Linear4bit) for layer in layers)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    assert member_distance(evaluated.model, plain.model) == 0
    for _, B in evaluated.model.stack.matrices().values():
        assert B.abs().amax(dim=(1, 2)).min() > 1e-3  # every member of every layer was trained: B begins at zero
