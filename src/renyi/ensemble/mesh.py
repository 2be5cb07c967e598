"""Members that are split over processes: which members a process holds, and what the processes exchange.

The processes form a grid of `data` × `member`:

- The processes of one row see the same examples, and each holds other members.
- The processes of one column hold the same members, and each sees other examples. They may split the frozen base.

The loss couples members through their log-likelihoods only. So in a step the processes of a row exchange only one float
per member and example. Read next: `training/parallel.py`, which trains on a grid.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from renyi.errors import ConfigError


class MemberMesh:
    """A grid of processes that torchrun or accelerate started. All processes must create it together.

    Attributes:
        size: number of processes that the members are split over.
        rank: number of this process among them.
        data_size: number of processes that the examples are split over.
        data_rank: number of this process among them.
    """

    def __init__(self, size: int, device_type: str):
        """Create the grid. `size` must divide the number of processes; `device_type` is "cpu" or "cuda"."""
        shape = (distributed.get_world_size() // size, size)
        self._mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "member"))
        self.data_size, self.size = shape
        self.data_rank, self.rank = self._mesh.get_local_rank("data"), self._mesh.get_local_rank("member")

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.data_rank == self.rank == 0

    def share(self, num_members: int) -> range:
        """The members that this process holds.

        Raises:
            ConfigError: the processes would hold different numbers of members.
        """
        if num_members % self.size:
            raise ConfigError(
                f"{num_members} members do not divide among {self.size} processes",
                where="member_parallel",
                hint="Choose num_members as a multiple of member_parallel.",
            )
        own = num_members // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def gather(self, own: Tensor) -> Tensor:
        """Gather the values [M, …] of all members in every process. Only a process's own values have a gradient.

        This is enough for a loss over all members, because each process trains only its own members.
        """
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own.detach(), group=self._mesh.get_group("member"))
        parts[self.rank] = own
        return torch.cat(parts)

    def gather_to_first(self, own: Tensor) -> Tensor | None:
        """Gather the values [M, …] of all members on the CPU of the first process; None in the other processes."""
        if self.data_rank != 0:
            return None
        own = own.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.is_first else None
        distributed.gather(own, parts, dst=0, group=self._mesh.get_group("member"))
        return None if parts is None else torch.cat([part.cpu() for part in parts])

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Average gradients in place over the processes that hold the same members."""
        if self.data_size == 1:
            return
        group, gradients = self._mesh.get_group("data"), list(gradients)
        sums = [distributed.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]
        for gradient, work in zip(gradients, sums, strict=True):
            work.wait()
            gradient.div_(self.data_size)

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], whole: set[nn.Parameter]) -> None:
        """Split the parameters of a model's blocks over the processes that hold the same members.

        A block is gathered when it runs, and the next block is gathered in the meantime. So these processes must run
        every block equally often.

        Args:
            model: the model that has the blocks.
            blocks: the modules whose parameters are split.
            whole: parameters that are not split.
        """
        for block in blocks:
            fully_shard(block, mesh=self._mesh["data"], reshard_after_forward=True, ignored_params=whole)
        # All other parameters are ignored. The call on the model only tells its blocks which block comes next.
        rest = {p for p in model.parameters() if not isinstance(p, DTensor)}
        fully_shard(model, mesh=self._mesh["data"], ignored_params=rest)
