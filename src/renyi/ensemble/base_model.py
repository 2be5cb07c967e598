"""Loads the base model of an ensemble, and checks that an ensemble can be built on it.

Read next: `head.py`, which checks the head.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl.trainer.reward_trainer import suppress_seqcls_warning

from renyi.ensemble.head import check_head
from renyi.ensemble.modes import evaluating
from renyi.errors import ConfigError, EnsembleFormatError
from renyi.members.head import HEAD_NAME


def load_base(name: str | Path, rates: bool = False) -> PreTrainedModel:
    """Load the base model from a folder or a hub id, with the class that its config names.

    Args:
        name: the folder or the hub id.
        rates: whether it is the base of a reward model. Its head is then a drawn one, for members' heads to replace.

    Training uses the same class, so a vision-language model is the same model in both places. Code that comes with a
    model is never run.

    Raises:
        EnsembleFormatError: the model cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        # The checkpoint of a model without a language-model head names a class that cannot generate text.
        writes = getattr(named, "__name__", "").endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
        kind: Any = named if writes else AutoModelForCausalLM
        if rates:
            with suppress_seqcls_warning():
                return AutoModelForSequenceClassification.from_pretrained(name, dtype="auto", num_labels=1)
        return kind.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise EnsembleFormatError(
            f"the base model could not be loaded ({str(error).splitlines()[0]})",
            where=str(name),
            hint="Give `base`: a folder, a hub id, or a model that you loaded yourself.",
        ) from error


def check_base(base: PreTrainedModel) -> None:
    """Raise `ConfigError` unless a model is a causal language model with a supported head, or one that rates texts."""
    if is_rating(base):
        _check_rating(base)
        return
    kind, hint = type(base).__name__, "Give a causal language model, such as Llama, Qwen or GPT-2."
    if base.config.is_encoder_decoder:
        raise ConfigError(f"{kind} is an encoder with a decoder", where="model", hint=hint)
    if base.get_output_embeddings() is None:
        raise ConfigError(f"{kind} has no language-model head", where="model", hint=hint)
    if base.device.type != "meta" and base.base_model is not base and _sees_what_follows(base):
        raise ConfigError(f"{kind} is an encoder: its tokens also see later tokens", where="model", hint=hint)
    check_head(base)


def is_rating(base: PreTrainedModel) -> bool:
    """Whether a model rates sequences (`…ForSequenceClassification`) instead of writing them."""
    return type(base).__name__.endswith("ForSequenceClassification")


def _check_rating(base: PreTrainedModel) -> None:
    """Raise `ConfigError` unless a model that rates sequences has one plain output."""
    head = getattr(base, HEAD_NAME, None)
    kind = type(base).__name__
    if type(head) is not nn.Linear or head.bias is not None:
        hint = "Give a decoder such as Llama, Qwen or GPT-2."
        raise ConfigError(f"{kind} has no plain head named {HEAD_NAME}", where="model", hint=hint)
    if head.out_features != 1:
        what = f"{kind} has {head.out_features} outputs"
        raise ConfigError(what, where="model", hint="A reward model has one: load it with num_labels=1.")


def _sees_what_follows(base: PreTrainedModel) -> bool:
    """Whether the last token changes the hidden states of earlier tokens, as in BERT."""
    ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]], device=base.device)
    with torch.no_grad(), evaluating(base):
        states = base.base_model(input_ids=ids).last_hidden_state[:, :-1].float()
    rounding = 1e-5 if base.dtype == torch.float32 else 1e-2
    return bool((states[0] - states[1]).abs().max() > rounding * states.abs().max())


def outside_language_model(base: PreTrainedModel) -> list[str]:
    """The names of linear layers that text does not pass through: those of a vision tower and its projector."""
    decoder = base.get_decoder() if hasattr(base.config, "vision_config") else None
    if decoder is None or decoder is base:
        return []
    inside = {id(module) for module in decoder.modules()}
    head = base.get_output_embeddings()
    linear = ((n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return [name for name, module in linear if id(module) not in inside]
