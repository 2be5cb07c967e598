"""The reference of preference margins, and its files in the folder of an ensemble that was tuned on preferences.

Read next: `objectives/preference.py`, the margins, and `training/reference.py`, which computes the reference before
training.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi.ensemble.ensemble import LoraEnsemble, Snapshot
from renyi.errors import EnsembleFormatError
from renyi.labels import IGNORED
from renyi.layout import PREFERENCE_FILE, REFERENCE_FOLDER
from renyi.objectives import PreferenceLoss, completion_log_prob


class Reference:
    """The policy in the denominator of log-ratios: the base alone, or each member as it was when training began.

    Attributes:
        ensemble: the ensemble that runs the forwards.
        start: the members as they were when training began; None for the base, which is the same for all members.
    """

    def __init__(self, ensemble: LoraEnsemble, start: Snapshot | None = None):
        self.ensemble, self.start = ensemble, start

    @torch.no_grad()
    def log_probs(self, pairs: Mapping[str, Tensor], ld_alpha: float | None = None) -> Tensor:
        """Log-probabilities of completions, nats: [1, 2B] under the base, [M, 2B] under the members' start.

        Args:
            pairs: a batch from TRL: `input_ids`, `attention_mask` and `completion_mask` [2B, T], chosen rows first.
            ld_alpha: as in `completion_log_prob`.
        """
        acting = self.ensemble.using(()) if self.start is None else self.ensemble.acting_as(self.start)
        with acting:
            output = self.ensemble(pairs["input_ids"], pairs["attention_mask"], completion_labels(pairs))
        log_probs_S2B = completion_log_prob(output.log_probs, pairs["completion_mask"][:, 1:], ld_alpha)
        return log_probs_S2B if self.start is None else self.ensemble.gathered(log_probs_S2B)

    def fingerprint(self) -> str:
        """A hash of every tensor that `log_probs` depends on: the base's and, if there is one, the start's."""
        digest = blake2b(digest_size=16)
        own = self.ensemble.stack.names()
        tensors = [(n, t) for n, t in self.ensemble.base.state_dict().items() if n not in own]
        tensors += [(f"start.{i}", t) for i, pair in enumerate(self.start.layers if self.start else []) for t in pair]
        if self.start:
            digest.update(repr([layer.scaling for layer in self.ensemble.stack.layers.values()]).encode())
        for name, tensor in tensors:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def completion_labels(pairs: Mapping[str, Tensor]) -> Tensor:
    """Labels [2B, T] of a batch of pairs: token ids in completions, −100 in prompts and padding."""
    return pairs["input_ids"].masked_fill(pairs["completion_mask"] == 0, IGNORED)


class KeptPreference(NamedTuple):
    """The loss and the reference of a preference-tuned ensemble, from which its margins can be computed again."""

    loss: PreferenceLoss
    reference: Reference


def write_preference(folder: str | Path, loss: PreferenceLoss, reference: Reference) -> None:
    """Write the loss's settings into an ensemble's folder, and the members' start if that is the reference."""
    folder = Path(folder)
    if reference.start is not None:
        with reference.ensemble.acting_as(reference.start):
            reference.ensemble.save(folder / REFERENCE_FOLDER)
    if reference.ensemble.mesh is not None and not reference.ensemble.mesh.is_first:
        return
    kept = {"reference": "base" if reference.start is None else REFERENCE_FOLDER, **asdict(loss)}
    (folder / PREFERENCE_FILE).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def read_preference(folder: str | Path, ensemble: LoraEnsemble) -> KeptPreference:
    """Read the loss and the reference. Without a file they are the default loss and the base as reference.

    Raises:
        EnsembleFormatError: the file or the reference is damaged.
    """
    folder = Path(folder)
    file = folder / PREFERENCE_FILE
    if not file.is_file():
        return KeptPreference(PreferenceLoss(), Reference(ensemble))
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        against = kept.pop("reference")
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
        loss = PreferenceLoss(**settings)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise EnsembleFormatError(
            f"cannot be read ({error})", where=str(file), hint="Copy it again from where the ensemble was trained."
        ) from error
    start = None if against == "base" else ensemble.read_snapshot(folder / against)
    if start and ensemble.num_draws > 1:  # draws have the reference of the member that they are drawn from
        repeated = [tuple(x.repeat_interleave(ensemble.num_draws, dim=0) for x in pair) for pair in start.layers]
        start = Snapshot(start.weights.repeat_interleave(ensemble.num_draws) / ensemble.num_draws, repeated)  # type: ignore[arg-type]
    if start and len(start.weights) != ensemble.num_members:
        raise EnsembleFormatError(
            f"holds {len(start.weights)} members, not {ensemble.num_members}",
            where=str(folder / against),
            hint="It keeps the members as they were when training began; copy both from the same run.",
        )
    return KeptPreference(loss, Reference(ensemble, start))
