"""The tiny pretrained base model of the zoo, and probes of a world as its tokens.

The weights ship in this package. Read next: `build.py`, which made them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from renyi.zoo.world import Probe


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The zoo's base model, in float32 and evaluation mode, and its tokenizer.

    It is a Llama that speaks the language of every `World` and answers with the facts of `world.YESTERDAY`, so that
    fine-tuning moves knowledge and not grammar. Each call loads a fresh copy.
    """
    path = base_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def base_path() -> Path:
    """The folder that `load_base` loads. It can be given as `model_name_or_path`."""
    return Path(__file__).parent / "weights"


class EncodedProbes(NamedTuple):
    """Probes as a right-padded batch of P rows: the value is the token after position `last` of its row."""

    input_ids: Tensor  # [P, T]
    attention_mask: Tensor  # [P, T]
    last: Tensor  # [P]
    values: Tensor  # [P, number of sources]: the token each source gives as the value


def encode_probes(tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> EncodedProbes:
    """Questions with their answers up to the value, ready for a forward pass.

    With `logits` [P, T, V] of that batch, `logits[torch.arange(P), last]` [P, V] holds the distributions of the
    values, and `values[:, s]` is what source s would have said.
    """
    prompts = tokenizer.apply_chat_template(
        [probe.prompt for probe in probes], add_generation_prompt=True, tokenize=False
    )
    texts = [prompt + probe.prefix for prompt, probe in zip(prompts, probes, strict=True)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    values = [tokenizer.convert_tokens_to_ids(list(probe.fact.values)) for probe in probes]
    return EncodedProbes(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        last=batch["attention_mask"].sum(dim=1) - 1,
        values=torch.tensor(values),
    )
