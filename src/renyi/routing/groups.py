"""Groups of rows that share one responsibility, and what each row of a dataset said when it was last seen.

A group's responsibility follows from the log-likelihoods of all of its rows. Rows of the batch are known. For the
others the value is taken that they had when they were last run: incremental expectation–maximisation (Neal and Hinton
1998), where EM-DPO's E-step (arXiv 2405.15065) would run all rows again. A row that was not run yet says nothing. So a
group within one batch is exact, and a larger one becomes so as the members settle.

Read next: `kept.py`, where the values are kept, `renyi.objectives.group_sums`, and `training/group_batches.py`, which
keeps the rows of a group together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from renyi.routing.kept import RowScores


class BatchGroups(NamedTuple):
    """The groups of a batch of E rows.

    Attributes:
        of_rows: the number of each row's group within this batch, from 0, [E].
        others: ℓ of the rows of each group that are not in the batch, nats, as far as they are known; [M, G].
    """

    of_rows: Tensor
    others: Tensor


class GroupEvidence(RowScores):
    """The log-likelihoods of rows that have groups.

    Attributes:
        names: of the groups, in alphabetical order.
        group_N: the group of each row, a number into `names`, [N].
    """

    def __init__(self, groups: Sequence[str], num_members: int):
        names, group_N = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
        self.names: list[str] = names.tolist()
        self.group_N = torch.from_numpy(group_N)
        super().__init__(num_members, len(group_N))
        self._rows_of = self.group_N.argsort(stable=True).split(torch.bincount(self.group_N).tolist())

    def of_batch(self, rows_E: Tensor) -> BatchGroups:
        """The groups of a batch, from the numbers of its rows."""
        rows_E = rows_E.cpu()
        groups_G, group_E = self.group_N[rows_E].unique(return_inverse=True)
        here_N = torch.zeros(len(self.group_N), dtype=torch.bool)
        here_N[rows_E] = True
        others = []
        for group in groups_G.tolist():
            rows = self._rows_of[group]
            others.append(self.ell_MN[:, rows[~here_N[rows]]].nansum(dim=1))
        return BatchGroups(group_E, torch.stack(others, dim=1))
