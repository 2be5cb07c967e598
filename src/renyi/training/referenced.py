"""What trainers share whose log-ratios are measured against a reference: `dpo.py` and `kto.py`.

The reference is the frozen base, or each member as it was when training began. It is computed as training goes, or
before training and then kept on disk. Read next: `renyi.ensemble.reference`, the reference itself.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from renyi.data import CompletionPreparation
from renyi.ensemble import LoraEnsemble, Reference
from renyi.errors import ConfigError
from renyi.training.config import EnsembleConfig, require
from renyi.training.reference_cache import with_reference
from renyi.training.start import as_ensemble
from renyi.training.trainer import EnsembleTrainer


@dataclass
class ReferencedConfig(EnsembleConfig):
    """The settings of a reference, mixed in before a TRL config.

    Args:
        reference: what log-ratios are measured against: "start", each member as it was when training began (for fresh
            members that is the base, computed once for all), or "base", the frozen base without adapters.
    """

    reference: str = field(
        default="start",
        metadata={
            "help": "What margins are measured against: each member as training began, or the base.",
            "choices": ["start", "base"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        args: Any = self  # with the fields of the TRL config
        require("beta", args.beta, 0 < args.beta < math.inf, "a number above 0")
        require("reference", self.reference, self.reference in ("start", "base"), "'start' or 'base'")
        require("sync_ref_model", True, not args.sync_ref_model, "false: the reference is the frozen base")


class ReferencedTrainer(EnsembleTrainer):
    """Mixin for a TRL trainer that compares the ensemble with a reference."""

    args: Any
    preparation: CompletionPreparation

    def __init__(
        self,
        model: str | PreTrainedModel | LoraEnsemble,
        args: Any,
        train_dataset: Dataset | IterableDataset,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("ref_model") is not None:
            raise ConfigError("a second model is never needed", where="ref_model", hint="Set `reference` instead.")
        if args.precompute_ref_log_probs and isinstance(train_dataset, IterableDataset):
            raise ConfigError(
                "needs the whole dataset, and it is streamed",
                where="precompute_ref_log_probs",
                hint="Load the dataset whole, or compute the reference as training goes.",
            )
        ensemble = as_ensemble(model, args, peft_config, quantization_config)
        apart = args.reference == "start" and not ensemble.is_fresh
        if args.precompute_ref_log_probs and ensemble.mesh and (apart or args.shard_base):
            raise ConfigError(
                "needs all members and the whole base in every process, which are split here",
                where="precompute_ref_log_probs",
                hint="Leave it out: the reference is then computed as training goes.",
            )
        kwargs["ref_model"] = _NoSecondModel(ensemble)
        super().__init__(ensemble, args, train_dataset, callbacks=callbacks, **kwargs)
        if kwargs.get("data_collator") is None:  # then TRL's collator is used, and it cuts rows
            collator: Any = self.data_collator
            collator.inner.max_length = self.preparation.within(self.limits).max_length
        _ = self.reference  # made now, before a checkpoint is resumed or a step is taken

    @cached_property
    def reference(self) -> Reference:
        """The reference that log-ratios are measured against."""
        keeps_start = self.args.reference == "start" and not self.model.is_fresh
        return Reference(self.model, self.model.snapshot() if keeps_start else None)

    @abstractmethod
    def reference_log_probs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probabilities [S, B] of a batch's completions under the reference, by the names of TRL's columns."""

    def known_log_probs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The same [S, B], taken from the batch if they were computed before training."""
        known = {name: x for name, x in inputs.items() if name.startswith("ref_")}
        if known:
            return {name: x.view(len(x), -1).T for name, x in known.items()}
        return self.reference_log_probs(inputs)

    @property
    def against(self) -> str:
        """The reference in words."""
        return "the base" if self.reference.start is None else "each member's start (folder `reference`)"

    def loss_units(self) -> int:
        if not isinstance(self.train_dataset, Dataset):
            raise ConfigError(
                f"the number of {self.unit}s of a streamed dataset is unknown",
                where="prior_std",
                hint="Load the dataset whole, or train without a prior.",
            )
        return len(self.train_dataset)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As in TRL, but kept on disk by content. TRL uses the dataset's own cache, which another run does not find."""
        settings = [getattr(self.args, key, None) for key in ("max_length", "truncation_mode", "ld_alpha")]
        settings += [bool(self.args.bf16), bool(self.args.fp16)]
        compute, collate = self.reference_log_probs, self.data_collator
        return with_reference(dataset, self.reference, compute, collate, settings, self.accelerator, batch_size)


class _NoSecondModel(nn.Module):
    """Given to TRL so that it does not load the base again. The ensemble without its members is the reference."""

    def __init__(self, ensemble: LoraEnsemble):
        super().__init__()
        self.config = ensemble.config
