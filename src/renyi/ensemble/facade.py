"""The attributes and methods that trainers expect of a transformers model, for a module that wraps one.

Read next: `ensemble.py`, whose `LoraEnsemble` derives from this class.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn
from transformers import PreTrainedModel

from renyi.members.layer import MemberSelection


class TrainableModel(nn.Module):
    """A mixin for a module whose `base` is a transformers model. It passes the trainer's questions on to the base.

    Attributes:
        base: the transformers model.
        recomputes_members: whether gradient checkpointing runs blocks again with the members of their first run. False
            for checkpointing with `use_reentrant`, which is correct only for passes of all members.
    """

    base: PreTrainedModel
    recomputes_members = True
    _selection: MemberSelection
    _num_active: Callable[[], int]

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
        """Compile the base's blocks for training; the settings are those of `torch.compile`.

        All blocks but the first share one graph, and it is used again in every step. The first block is left as it is:
        it would need a graph of its own, because its input has no gradient and is the same for all members. A graph of
        the whole model would have to be compiled again for every number of layers, rows and tokens.

        Forwards without gradients run as they are, and so do those of selected members (`using`, `pairing`), for which
        a graph would have to be compiled again and again.
        """
        names = self.base._no_split_modules or ()
        blocks = [module for module in self.base.modules() if type(module).__name__ in names]
        compiled = torch.compile(_run_block, **settings)
        for block in blocks[1:] or blocks:
            block._compiled_call_impl = partial(self._call_compiled, compiled, block)

    def _call_compiled(
        self, compiled: Callable[..., Any], block: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a compiled block with the members as a dimension of its input, [M, N, …] or, packed, [1, M, N, …].

        The layers divide the rows M·N by M. If the compiler knew only the number of rows, it would have to prove again
        and again that a quotient times M is the number of rows, and a graph would take minutes.
        """
        if self._selection.members is not None or not torch.is_grad_enabled():
            return block._call_impl(hidden_states, *args, **kwargs)  # noqa: SLF001 - what it would call uncompiled
        from torch._dynamo import config, mark_static  # the compiler takes seconds to import

        num_members = self._num_active()
        dim = 0 if len(hidden_states) % num_members == 0 else 1  # a packed row has the members in sequence
        by_member = hidden_states.unflatten(dim, (num_members, -1))
        mark_static(by_member, dim)
        # Numbers such as the attention's scale never change. As variables they would have the graph traced twice.
        with config.patch(specialize_float=True):
            return compiled(block, by_member, dim, *args, **kwargs)

    @contextmanager
    def compiling(self, **settings: Any) -> Iterator[None]:
        """Compile the base's blocks as `compile` does, for the forwards inside only."""
        plain = {module: module._compiled_call_impl for module in self.base.modules()}
        self.compile(**settings)
        try:
            yield
        finally:
            for module, call in plain.items():
                module._compiled_call_impl = call

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers; in addition, a block that is run again in the backward sees the members of its first run.

        With `use_reentrant` this is not possible, because PyTorch then takes no context for the second run. See
        `recomputes_members`.
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


def _run_block(block: nn.Module, by_member: Tensor, dim: int, *args: Any, **kwargs: Any) -> Any:
    rows = by_member.flatten(dim, dim + 1)
    return block._call_impl(rows, *args, **kwargs)  # noqa: SLF001 - what `block.compile` compiles
