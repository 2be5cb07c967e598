"""What the rows of a dataset said when they were last scored: the log-likelihoods of each row under all members.

A responsibility need not be computed from scores of this step. With those of an earlier visit it is the E-step of a
generalised expectation–maximisation (Neal and Hinton 1998): the loss with these responsibilities held fixed bounds the
α-Rényi loss from above, and a step on it lowers that bound.

Read next: `groups.py`, rows that share one responsibility, and `router.py`, which draws members by kept scores.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class RowScores:
    """The log-likelihood of each of N rows under M members when the row was last scored.

    Attributes:
        ell_MN: nats, float64; NaN for a row that was not scored yet.
    """

    def __init__(self, num_members: int, num_rows: int):
        self.ell_MN = torch.full((num_members, num_rows), torch.nan, dtype=torch.float64)

    def record(self, rows_E: Tensor, ell_ME: Tensor) -> None:
        """Keep ℓ [M, E] of the rows of a batch."""
        self.ell_MN[:, rows_E.cpu()] = ell_ME.detach().double().cpu()

    def save(self, file: Path) -> None:
        """Write the scores into a file of a checkpoint."""
        save_file(self._state(), file)

    def restore(self, file: Path) -> None:
        """Take the scores of the same rows from a file of a checkpoint.

        Raises:
            ValueError: they are of other rows or members.
        """
        kept, own = load_file(file), self._state()
        for name, values in own.items():
            if kept[name].shape != values.shape:
                raise ValueError(f"{file} holds {name} of shape {list(kept[name].shape)}, not {list(values.shape)}")
            values.copy_(kept[name])

    def _state(self) -> dict[str, Tensor]:
        return {"log_likelihood": self.ell_MN}


class KeptScores(RowScores):
    """Scores that route a row until it is scored again, on every `refresh`-th visit.

    Attributes:
        refresh: how many visits a row is routed by its scores, the visit at which it was scored included.
        visits_N: visits since a row was scored, that one included, [N]; 0 for a row that was not scored yet.
    """

    def __init__(self, num_members: int, num_rows: int, refresh: int):
        super().__init__(num_members, num_rows)
        self.refresh, self.visits_N = refresh, torch.zeros(num_rows, dtype=torch.long)

    def are_due(self, rows_E: Tensor) -> Tensor:
        """Whether each row is to be scored at its next visit, [E] on the CPU: it is unknown, or was visited enough."""
        visits_E = self.visits_N[rows_E.cpu()]
        return (visits_E == 0) | (visits_E >= self.refresh)

    def visit(self, rows_E: Tensor) -> Tensor | None:
        """The kept ℓ [M, E] of the rows of a batch; None if one of them is due."""
        if self.are_due(rows_E).any():
            return None
        self.visits_N[rows_E.cpu()] += 1
        return self.ell_MN[:, rows_E.cpu()]

    def record(self, rows_E: Tensor, ell_ME: Tensor) -> None:
        super().record(rows_E, ell_ME)
        self.visits_N[rows_E.cpu()] = 1

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "visits": self.visits_N}
