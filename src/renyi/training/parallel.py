"""An Accelerator for members that are split over processes. Processes with different members see the same examples.

Transformers and TRL ask their Accelerator how many processes share the data. Processes with the same examples count as
one there. This file has what that changes for batches, gradients and sums over processes. Read next:
`renyi.ensemble.mesh`, the mesh itself.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from renyi.ensemble.mesh import MemberMesh


class MemberAccelerator(Accelerator):
    """An Accelerator whose processes are those that examples are split over."""

    mesh: MemberMesh

    @classmethod
    def take_over(cls, accelerator: Accelerator, mesh: MemberMesh) -> None:
        """Turn `accelerator` into a MemberAccelerator. Transformers makes its own, and its class cannot be chosen."""
        accelerator.__class__ = cls
        accelerator.mesh = mesh

    @property
    def num_processes(self) -> int:
        return self.mesh.data_size

    @property
    def process_index(self) -> int:
        return self.mesh.data_rank

    @property
    def dispatch_batches(self) -> bool:
        """False: one process would cut each streamed batch for all others, whatever their members."""
        return False

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Without DDP, which would average the gradients of different members."""
        if self.device.type == "cuda":
            # Each process draws dropout for its own members. The order of the data comes from the CPU's generator.
            torch.cuda.manual_seed(torch.initial_seed() + self.mesh.rank)
        return super().prepare_model(model, device_placement, evaluation_mode=True)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward. Before an optimizer step, average gradients over the processes of the same members."""
        super().backward(loss, **kwargs)
        if self.sync_gradients:
            parameters = [p for model in self._models for p in model.parameters()]
            self.mesh.average([p.grad for p in parameters if p.grad is not None])

    def gather(self, tensor: Any) -> Any:
        """Concatenate along dimension 0 what each part of the data gave."""

        def of_data(everyones: Tensor) -> Tensor:
            by_process = everyones.unflatten(0, (self.mesh.data_size, self.mesh.size, -1))
            return by_process[:, 0].flatten(0, 1)

        return recursively_apply(of_data, super().gather(tensor))

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum over the parts of the data; each part counts with the mean of its processes. Or the mean over all."""
        reduced = super().reduce(tensor, reduction, scale)
        if reduction != "sum":
            return reduced
        return reduced / self.mesh.size if reduced.is_floating_point() else reduced // self.mesh.size


def gather_state(state: dict[str, Any], mesh: MemberMesh) -> dict[str, Any]:
    """An optimizer's state dict with the state of all members, in the first process.

    The state of a stacked parameter has the members on dimension 0. The rest are step counts.
    """
    return {**state, "state": {i: {k: _gathered(v, mesh) for k, v in of.items()} for i, of in state["state"].items()}}


def own_state(state: dict[str, Any], members: range) -> dict[str, Any]:
    """The part of such a state dict that the optimizer of `members` needs."""

    def own(value: Any) -> Any:
        return value[members.start : members.stop] if _by_member(value) else value

    return {**state, "state": {i: {k: own(v) for k, v in of.items()} for i, of in state["state"].items()}}


def save_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler, mesh: MemberMesh, writes: bool) -> None:
    """Write the optimizer's state of all members, and the scheduler's, as one process without a mesh does."""
    state = gather_state(optimizer.state_dict(), mesh)
    if writes:
        torch.save(state, folder / OPTIMIZER_NAME)
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler, members: range) -> None:
    """Read back the scheduler's state and what the optimizer of `members` needs."""
    state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(own_state(state, members))
    scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _gathered(value: Any, mesh: MemberMesh) -> Any:
    return mesh.gather_to_first(value) if _by_member(value) else value


def _by_member(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
