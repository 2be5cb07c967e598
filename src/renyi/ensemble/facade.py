"""What trainers ask of a model, answered by the base of an ensemble."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class TrainableModel(nn.Module):
    """A mixin for a module whose `base` is a transformers model: it answers as the base does.

    Attributes:
        base: the transformers model.
    """

    base: PreTrainedModel

    @property
    def base_model_name(self) -> str:
        """Hub id or folder of the base model, as it was loaded."""
        name = self.base.config._name_or_path
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def generation_config(self) -> Any:
        return self.base.generation_config

    @property
    def loss_type(self) -> str | None:
        return self.base.loss_type

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def compile(self, **settings: Any) -> None:
        """Compile the base's blocks, one graph for all of them, which holds from step to step; as `torch.compile`.

        A graph of the whole model would be another one for every number of layers, rows and tokens.
        """
        for module in self.base.modules():
            if type(module).__name__ in (self.base._no_split_modules or ()):
                module.compile(**settings)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self.base.activation_checkpointing_enable(**kwargs)

    def add_model_tags(self, tags: list[str] | str) -> None:
        self.base.add_model_tags(tags)
