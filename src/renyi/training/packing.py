"""Check, on one pair of examples before training, whether a model keeps the examples of a packed row apart."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from renyi.ensemble import LoraEnsemble, example_log_likelihood
from renyi.errors import ConfigError

LENGTH = 12  # tokens of each example of the pair


@torch.no_grad()
def check_packing(ensemble: LoraEnsemble, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
    """Raise `ConfigError` unless two packed examples are as likely as each of them alone.

    In a packed row, an example's tokens must not attend to the example before, and positions start again at each
    example. A packed batch says both through `position_ids` only, and some models do not read them there.

    Args:
        ensemble: the model of the training.
        collate: TRL's padding-free collator, from rows with `seq_lengths` to a batch.
    """
    vocabulary = ensemble.base.config.get_text_config().vocab_size
    first, other, second = torch.randint(vocabulary, (3, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()

    def of_packed(*examples: list[int]) -> Tensor:
        row = {"input_ids": [*chain(*examples)], "seq_lengths": [len(x) for x in examples]}
        batch = {k: v.to(ensemble.device) if isinstance(v, Tensor) else v for k, v in collate([row]).items()}
        return example_log_likelihood(ensemble(**batch), batch["position_ids"])[0]

    try:
        packed = of_packed(first, second)
    except ValueError as error:  # Falcon-H1 and others refuse packed rows if an optional kernel is missing
        raise ConfigError(
            f"{type(ensemble.base).__name__} cannot run packed rows ({error})",
            where="packing",
            hint="Train without packing and padding_free.",
        ) from error
    alone = torch.cat([of_packed(first), of_packed(second)], dim=1)
    # Equal shapes round equally. So a difference shows the influence of the first example, in any precision.
    leaks = (packed[:, 1] - of_packed(other, second)[:, 1]).abs().max() / LENGTH
    differs = (packed - alone).abs().max() / LENGTH
    precision = torch.finfo(ensemble.dtype).eps
    if leaks > 1e-5 or differs > max(1e-4, 8 * precision):
        raise ConfigError(
            f"{type(ensemble.base).__name__} does not keep the examples of a packed row apart: "
            f"one packed behind another is {differs * LENGTH:.2g} nats from its own log-likelihood",
            where="packing",
            hint="Train without packing and padding_free, or with an attn_implementation that reads where examples "
            "begin (flash_attention_2).",
        )
