"""The reference of preference margins, and its files in the folder of an ensemble that was tuned on preferences.

Read next: `objectives/preference.py`, the margins, and `training/reference_cache.py`, which computes the
reference before training.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from renyi.ensemble.ensemble import LoraEnsemble, Snapshot
from renyi.errors import EnsembleFormatError
from renyi.labels import IGNORED
from renyi.layout import PREFERENCE_FILE, REFERENCE_FOLDER, THUMBS_FILE
from renyi.objectives import PreferenceLoss, ThumbLoss, completion_log_prob

Loss = TypeVar("Loss", PreferenceLoss, ThumbLoss)


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
                Without `ld_alpha` it may also be [B, T], of single completions.
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


class KeptThumbs(NamedTuple):
    """The same for an ensemble that was tuned on thumbs.

    Attributes:
        loss: the loss and its settings.
        reference: what log-ratios are measured against.
        reference_point: z of each member at the end of training, nats, [M].
    """

    loss: ThumbLoss
    reference: Reference
    reference_point: Tensor


def write_preference(folder: str | Path, loss: PreferenceLoss, reference: Reference) -> None:
    """Write the loss's settings into an ensemble's folder, and the members' start if that is the reference."""
    _write(Path(folder), PREFERENCE_FILE, asdict(loss), reference)


def write_thumbs(folder: str | Path, kept: KeptThumbs) -> None:
    """The same for an ensemble that was tuned on thumbs, with the members' reference points."""
    settings = {**asdict(kept.loss), "reference_point": kept.reference_point.tolist()}
    _write(Path(folder), THUMBS_FILE, settings, kept.reference)


def _write(folder: Path, file: str, settings: Mapping[str, Any], reference: Reference) -> None:
    if reference.start is not None:
        with reference.ensemble.acting_as(reference.start):
            reference.ensemble.save(folder / REFERENCE_FOLDER)
    if reference.ensemble.mesh is not None and not reference.ensemble.mesh.is_first:
        return
    kept = {"reference": "base" if reference.start is None else REFERENCE_FOLDER, **settings}
    (folder / file).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def read_preference(folder: str | Path, ensemble: LoraEnsemble) -> KeptPreference:
    """Read the loss and the reference. Without a file they are the default loss and the base as reference.

    Raises:
        EnsembleFormatError: the file or the reference is damaged.
    """
    folder = Path(folder)
    if not (folder / PREFERENCE_FILE).is_file():
        return KeptPreference(PreferenceLoss(), Reference(ensemble))
    return KeptPreference(*_read(folder, PREFERENCE_FILE, lambda kept: PreferenceLoss(**kept), ensemble))


def read_thumbs(folder: str | Path, ensemble: LoraEnsemble) -> KeptThumbs | None:
    """Read what training on thumbs kept; None if the ensemble was not trained on thumbs.

    Raises:
        EnsembleFormatError: the file or the reference is damaged.
    """
    folder = Path(folder)
    if not (folder / THUMBS_FILE).is_file():
        return None
    point: list[float] = []

    def loss_of(kept: dict[str, Any]) -> ThumbLoss:
        point.extend(float(x) for x in kept.pop("reference_point"))
        return ThumbLoss(**kept)

    loss, reference = _read(folder, THUMBS_FILE, loss_of, ensemble)
    point_M = torch.tensor(point).repeat_interleave(ensemble.num_draws)  # draws have that of their member
    if len(point_M) != ensemble.num_members:
        raise _other_members(len(point_M), ensemble.num_members, folder / THUMBS_FILE)
    return KeptThumbs(loss, reference, point_M)


def needed_thumbs(folder: str | Path, ensemble: LoraEnsemble) -> KeptThumbs:
    """The same, where it is needed.

    Raises:
        EnsembleFormatError: also if the ensemble was not trained on thumbs.
    """
    kept = read_thumbs(folder, ensemble)
    if kept is None:
        what = f"was not trained on thumbs: it has no {THUMBS_FILE}"
        raise EnsembleFormatError(what, where=str(folder), hint="Train it by `renyi kto`.")
    return kept


def _read(
    folder: Path, name: str, loss_of: Callable[[dict[str, Any]], Loss], ensemble: LoraEnsemble
) -> tuple[Loss, Reference]:
    """The loss and the reference that a file of an ensemble's folder names."""
    file = folder / name
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        against = kept.pop("reference")
        loss = loss_of({name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise EnsembleFormatError(
            f"cannot be read ({error})", where=str(file), hint="Copy it again from where the ensemble was trained."
        ) from error
    start = None if against == "base" else ensemble.read_snapshot(folder / against)
    if start and ensemble.num_draws > 1:  # draws have the reference of the member that they are drawn from
        repeated = [tuple(x.repeat_interleave(ensemble.num_draws, dim=0) for x in pair) for pair in start.layers]
        start = Snapshot(start.weights.repeat_interleave(ensemble.num_draws) / ensemble.num_draws, repeated)  # type: ignore[arg-type]
    if start and len(start.weights) != ensemble.num_members:
        raise _other_members(len(start.weights), ensemble.num_members, folder / against)
    return loss, Reference(ensemble, start)


def _other_members(there: int, members: int, where: Path) -> EnsembleFormatError:
    return EnsembleFormatError(
        f"holds {there} members, not {members}",
        where=str(where),
        hint="It keeps the members as they were when training began; copy both from the same run.",
    )
