"""What vLLM calls with its batch: `--logits-processors renyi.vllm.processor:MixtureProcessor`.

It hands the batch to `mixing.py`, and what it knows of each token to `records.py`.
"""

import logging
import os
from typing import Any

import torch
from vllm import SamplingParams
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from renyi.errors import ConfigError
from renyi.vllm import SCHEDULER
from renyi.vllm.groups import membership_of
from renyi.vllm.mixing import Mixing
from renyi.vllm.records import DEFAULT_HOST, DEFAULT_PORT, FORMAT, Broadcaster

logger = logging.getLogger("vllm.renyi")
_SETTINGS = ("host", "port")


class MixtureProcessor(LogitsProcessor):
    """Writes the mixture of a group's members to the group's rows.

    It takes two settings from vLLM's `--additional-config '{"renyi": {"host": …, "port": …}}'`: where the uncertainty
    of tokens can be read.

    Raises:
        ConfigError: the scheduler is another one, log-probabilities would not be the members' own, or a setting is
            unknown.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request of a group whose answer would not be the mixture's. vLLM answers with status 400."""
        if membership_of(sampling_params.extra_args) is None:
            return
        if sampling_params.n != 1:
            raise ConfigError(
                "is not possible for a request of a group", where="n", hint="Send a group for each answer."
            )
        if sampling_params.temperature > 0 and sampling_params.seed is None:
            raise ConfigError(
                "is missing, so the members would draw different tokens", where="seed", hint="Give one to the group."
            )
        # These change the members' logits before they are mixed, or end one row of a group before the others.
        for name in ("logit_bias", "min_tokens", "allowed_token_ids", "bad_words", "structured_outputs", "stop"):
            if getattr(sampling_params, name, None):
                raise ConfigError("is not possible in a group", where=name)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        chosen = vllm_config.scheduler_config.scheduler_cls
        name = chosen if isinstance(chosen, str) or chosen is None else f"{chosen.__module__}.{chosen.__qualname__}"
        if name != SCHEDULER:
            raise ConfigError(
                f"vLLM's scheduler is {name or 'its own'}, which may run a part of a group",
                where="--logits-processors",
                hint=f"Add --scheduler-cls {SCHEDULER}.",
            )
        if vllm_config.model_config.logprobs_mode != "raw_logprobs":
            raise ConfigError(
                f"is {vllm_config.model_config.logprobs_mode}, and members would not say their own log-probabilities",
                where="--logprobs-mode",
                hint="Leave it out.",
            )
        settings = (vllm_config.additional_config or {}).get("renyi", {})
        for key in settings:
            if key not in _SETTINGS:
                raise ConfigError("there is no such setting", where=f"--additional-config renyi.{key}")
        broadcaster = None
        if get_tp_group().rank_in_group == 0 and get_pp_group().is_last_rank:  # one of the workers tells
            scheduler, lora = vllm_config.scheduler_config, vllm_config.lora_config
            facts = {
                "format": FORMAT,
                "rows": scheduler.max_num_seqs,
                "step_tokens": scheduler.max_num_batched_tokens,
                "positions": vllm_config.model_config.max_model_len,
                "adapters": lora.max_loras if lora else 0,
            }
            host, port = settings.get("host", DEFAULT_HOST), settings.get("port", DEFAULT_PORT)
            broadcaster = Broadcaster(host, port, os.environ.get("VLLM_API_KEY"), facts)
            logger.info("renyi: the uncertainty of tokens can be read at http://%s:%s", host, port)
        self._mixing = Mixing(None if broadcaster is None else broadcaster.tell)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        added = [(index, membership_of(params.extra_args), output) for index, params, _, output in batch_update.added]
        moved = [(start, end, way is MoveDirectionality.SWAP) for start, end, way in batch_update.moved]
        self._mixing.update(batch_update.removed, added, moved)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self._mixing.apply(logits)
