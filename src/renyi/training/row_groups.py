"""The groups of a trainer's rows (`routing_group`): what each row said when it was last run, and batches of groups.

Read next: `renyi.routing.groups`, what the rows of a group share, and `group_batches.py`, the batches.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from renyi.data import GROUP_COLUMN
from renyi.errors import ConfigError, DataError
from renyi.routing import ROUTED_ROW, GroupEvidence
from renyi.training.group_batches import GroupBatches
from renyi.training.objective import Objective

GROUPS_FILE = "routing_groups.safetensors"  # of a checkpoint: what the rows of groups said when they were last run


class RowGroups:
    """The groups of the training rows, and of the rows of an evaluation while it lasts.

    Args:
        rows: the prepared rows to train on, with the name of the group of each.
        num_members: M.
    """

    def __init__(self, rows: Dataset, num_members: int):
        self.num_members = num_members
        self.training = GroupEvidence(rows[GROUP_COLUMN], num_members)
        self._evaluation: GroupEvidence | None = None

    def begin_evaluation(self, rows: Any) -> None:
        """The rows that are evaluated next. Nothing is known of them yet, so a group's loss is exact in any batches."""
        self._evaluation = GroupEvidence(rows[GROUP_COLUMN], self.num_members)

    def loss(
        self, objective: Objective, ell_ME: Tensor, rows_E: Tensor, alpha: float, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss [G] of a batch's groups, and the responsibilities [M, E] of its examples; see `Objective.of_groups`.

        Args:
            objective: of the trainer.
            ell_ME: log-likelihoods of the batch's examples, nats. They are kept, for other batches of these groups.
            rows_E: the numbers of the batch's rows.
            alpha: the order.
            is_training: whether these are rows of the training set, or of the evaluation that was begun last.
        """
        evidence = self.training if is_training else self._evaluation
        assert evidence is not None
        found = objective.of_groups(ell_ME, evidence.of_batch(rows_E), alpha)
        evidence.record(rows_E, ell_ME)
        return found

    def loader(
        self, rows: Any, args: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    ) -> DataLoader[Any]:
        """Batches of the training rows that keep groups together, as the trainer's config `args` asks for them."""
        seed = args.seed if args.data_seed is None else args.data_seed
        groups = self.training.group_N.tolist()
        return DataLoader(
            rows,
            batch_sampler=GroupBatches(groups, args.train_batch_size, seed, args.dataloader_drop_last),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def save(self, checkpoint: Path) -> None:
        """Write what the training rows said into a checkpoint."""
        self.training.save(checkpoint / GROUPS_FILE)

    def restore(self, checkpoint: Path) -> None:
        """Take what a checkpoint of the same rows holds.

        Raises:
            ValueError: it is of other rows or members.
        """
        self.training.restore(checkpoint / GROUPS_FILE)


def numbered(rows: Any, key: str) -> Dataset:
    """Prepared rows with their numbers, by which their batches are recognised.

    Args:
        rows: a dataset.
        key: the setting that needs the numbers.

    Raises:
        ConfigError: the rows are streamed.
    """
    if not isinstance(rows, Dataset):
        raise ConfigError(
            "needs all rows by their numbers, and the dataset is streamed",
            where=key,
            hint=f"Load the dataset whole, or leave {key} out.",
        )
    return rows.add_column(ROUTED_ROW, list(range(len(rows))))


def grouped(rows: Any, name: str) -> Dataset:
    """Prepared rows that have groups, with their numbers.

    Raises:
        ConfigError: the rows are streamed.
        DataError: they have no groups.
    """
    rows = numbered(rows, "routing_group")
    if GROUP_COLUMN not in rows.column_names:
        raise DataError(
            f"has no column {GROUP_COLUMN!r}",
            where=name,
            hint="Prepared rows need the name of their group there (routing_group).",
        )
    return rows
