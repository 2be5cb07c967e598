"""Describes an ensemble from its files: its base, its size, and the distances between its members.

It reads the adapters only and never loads the base model. Read next: `cli/info.py`, which prints the description.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.ensemble.storage import Manifest, read_ensemble, resolve_folder
from renyi.errors import EnsembleFormatError
from renyi.members import MemberLayer, kind_of
from renyi.members.adapters import Adapter, layer_scaling, read_adapter


class Description(NamedTuple):
    """A description of an ensemble of M members. A member's update is scaling·BA of all its layers, as one vector.

    Attributes:
        folder: the ensemble's folder.
        manifest: the content of `ensemble.json`.
        rank: the configured rank of every member.
        lora_alpha: numerator of the scaling.
        rslora: whether the scaling is lora_alpha/√rank.
        targets: last parts of the names of the adapted layers, such as q_proj.
        layers: number of adapted layers.
        parameters: number of parameters of one member.
        bytes: size of all adapter files together.
        norms: ‖update_m‖_F, [M].
        distances: ‖update_m − update_n‖_F, [M, M].
        cosines: ⟨update_m, update_n⟩ / (‖update_m‖·‖update_n‖), [M, M]; 0 where an update is 0.
        stds: mean standard deviation of the entries of A, by layer, [M] each; empty for members without spread. Of
            members that are distributions, norms and distances are those of the means.
    """

    folder: Path
    manifest: Manifest
    rank: int
    lora_alpha: int
    rslora: bool
    targets: list[str]
    layers: int
    parameters: int
    bytes: int
    norms: Tensor
    distances: Tensor
    cosines: Tensor
    stds: dict[str, list[float]]


def describe(path: str | Path) -> Description:
    """Describe an ensemble that is given as a folder or a hub id.

    Raises:
        EnsembleFormatError: a file is missing or damaged.
    """
    folder = resolve_folder(path)
    manifest = read_ensemble(folder)
    members = [read_adapter(folder / name) for name in manifest.members]
    _check_same_layers(folder, manifest, members)
    config, weights, *_ = members[0]
    gram = update_gram(members)
    norms = gram.diagonal().clamp(min=0).sqrt()
    square_distances = norms.square()[:, None] + norms.square()[None, :] - 2 * gram
    products = norms[:, None] * norms[None, :]
    return Description(
        folder=folder,
        manifest=manifest,
        rank=config.r,
        lora_alpha=config.lora_alpha,
        rslora=config.use_rslora,
        targets=sorted({name.rpartition(".")[2] for name in weights}),
        layers=len(weights),
        parameters=sum(A.numel() + B.numel() for A, B in weights.values()),
        bytes=sum(f.stat().st_size for name in manifest.members for f in (folder / name).iterdir() if f.is_file()),
        norms=norms,
        distances=square_distances.clamp(min=0).sqrt().fill_diagonal_(0),
        cosines=torch.where(products > 0, gram / products.clamp(min=1e-300), 0.0),
        stds=_stds(kind_of(manifest.member_kind), members),
    )


def _stds(kind: type[MemberLayer], members: Sequence[Adapter]) -> dict[str, list[float]]:
    """Each layer's standard deviations [M], from the files alone."""
    found: dict[str, list[float]] = {}
    for name in members[0].weights if kind.spreads else ():
        for adapter in members:
            A, B = adapter.weights[name]
            layer = kind.drawn(A[None].float(), B[None].float())
            layer.read(0, A, B, adapter.kept.get(name, {}))
            found.setdefault(name, []).append(float(layer.std().mean()))  # type: ignore[union-attr]
    return found


def update_gram(members: Sequence[Adapter]) -> Tensor:
    """Inner products of the members' updates, float64 [M, M].

    For updates s·BA of rank R, ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ). This needs two R × R matrices, but not BA itself.
    """
    gram = torch.zeros(len(members), len(members), dtype=torch.float64)
    for layer in members[0].weights:
        scaled = []
        for config, weights, *_ in members:
            A, B = (matrix.double() for matrix in weights[layer])
            scaled.append((A, B * layer_scaling(config, layer, rank=len(A))))
        for m, (A_m, B_m) in enumerate(scaled):
            for n, (A_n, B_n) in enumerate(scaled[: m + 1]):
                gram[m, n] += ((B_m.T @ B_n) * (A_m @ A_n.T)).sum()
    return gram + gram.tril(-1).T


def _check_same_layers(folder: Path, manifest: Manifest, members: Sequence[Adapter]) -> None:
    shapes = [{n: (A.shape[1], len(B)) for n, (A, B) in weights.items()} for _, weights, *_ in members]
    for name, shape in zip(manifest.members, shapes, strict=True):
        if shape != shapes[0]:
            odd = next(iter(dict(shape.items() ^ shapes[0].items())))
            raise EnsembleFormatError(
                f"adapts other layers than the other members (for example {odd})",
                where=str(folder / name),
                hint="Members of one ensemble share their base model and their target modules.",
            )
