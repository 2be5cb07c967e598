"""What trainers ask of a model, answered by the base of an ensemble."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import noop_context_fn
from transformers import PreTrainedModel

from renyi.members.layer import MemberSelection


class TrainableModel(nn.Module):
    """A mixin for a module whose `base` is a transformers model: it answers as the base does.

    Attributes:
        base: the transformers model.
        recomputes_members: whether blocks that gradient checkpointing runs again see the members that they saw first.
            False after checkpointing with `use_reentrant`, which only suits passes of all members.
    """

    base: PreTrainedModel
    recomputes_members = True
    _selection: MemberSelection

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

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As transformers', and a block that is run again in the backward sees the members that it saw first.

        With `use_reentrant` nothing can be said to a block that is run again: see `recomputes_members`.
        """
        given = dict(activation_checkpointing_kwargs or {"use_reentrant": False})
        self.recomputes_members = not given.get("use_reentrant", True)
        if self.recomputes_members:
            contexts = given.get("context_fn", noop_context_fn)

            def with_members() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
                first, again = contexts()
                return first, _both(self._selection.as_now(), again)

            given["context_fn"] = with_members
        self.base.activation_checkpointing_enable(activation_checkpointing_kwargs=given, **kwargs)

    def add_model_tags(self, tags: list[str] | str) -> None:
        self.base.add_model_tags(tags)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
