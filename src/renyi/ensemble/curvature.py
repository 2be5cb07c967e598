"""Per-example gradients and curvature of log-likelihoods in the parameters of one fitted adapter.

The joint forward runs M stacked adapters, each on its own block of rows. If the stack holds copies of *one* adapter,
the same pass gives other results, for any architecture and without a loop:

    one copy per example     the gradient of Σ_i ℓ_i in the stack is the matrix of per-example gradients [E, P]
    one copy per direction   tangents in the stack are the derivatives of logits along k directions at once, J_t U

`renyi.measures.stability` needs two matrices. J comes from the gradients. V is one of

    "fisher"    Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t, the Gauss–Newton matrix at the data's own prefixes; never negative
    "hessian"   −∇² ℓ_i, which also has the curvature of the residuals; equal on average if the model is right

With "fisher" there is also the empirical matrix of single tokens, Σ_t g_t g_tᵀ. It is equal to V on average if tokens
are calibrated. It is less sensitive to a fit that is not quite finished.

LoRA has a gauge freedom: A → GA, B → BG⁻¹ does not change any logit. So V is singular along R² directions per layer. J
is zero along them as well. So this does no harm with damping, or in a subspace that gradients span.

Everything runs without dropout, and log-probabilities are in float32 or better. Read next: `inference/diagnose.py`,
which uses this file to compute a critical alpha.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from renyi.ensemble import attention
from renyi.ensemble.ensemble import LoraEnsemble, Snapshot
from renyi.ensemble.head import LOGITS_PER_CHUNK, LogitTransform, token_scores
from renyi.ensemble.member_rows import repeat_rows
from renyi.ensemble.modes import evaluating
from renyi.errors import ConfigError, DataError
from renyi.labels import IGNORED
from renyi.measures import gradient_basis, random_basis
from renyi.objectives import Votes, outcome_log_probs, votes_slope

TOKENS_PER_PASS = 1 << 12  # tokens of all copies together; larger passes were not faster on a CPU

Batch: TypeAlias = Mapping[str, Tensor]  # input_ids, attention_mask, labels [rows, T], padded on the right
Score: TypeAlias = Callable[[Tensor, Batch], Tensor]  # token log-probabilities [rows, T − 1] to one number per example
Curvature: TypeAlias = Literal["fisher", "hessian"]


class Projected(NamedTuple):
    """Gradients and curvature of examples in the coordinates of k directions: the arguments of `cross_fitted`.

    Attributes:
        log_likelihood: ℓ_i, [N], nats.
        gradients: Uᵀ∇ℓ_i, [N, k].
        curvature: Uᵀ V_i U, [N, k, k].
        empirical: Σ_t (Uᵀ∇ℓ_it)(Uᵀ∇ℓ_it)ᵀ over trained tokens, [N, k, k]; None unless curvature is "fisher".
        basis: U, [P, k].
    """

    log_likelihood: Tensor
    gradients: Tensor
    curvature: Tensor
    empirical: Tensor | None
    basis: Tensor


class AdapterSpace:
    """The parameters of one member of an ensemble as vectors [P].

    A vector holds the layers in the model's order: for each layer A [R, I] row by row, then B [O, R] row by row.

    Attributes:
        ensemble: the ensemble of the member.
        origin: the member's parameters when this object was created, [P].
    """

    def __init__(self, ensemble: LoraEnsemble, member: int = 0):
        if not 0 <= member < ensemble.num_members:
            raise ConfigError(f"there is no member {member} of {ensemble.num_members}", where="member")
        self.ensemble = ensemble
        self._shapes = {name: (A.shape, B.shape) for name, (A, B) in ensemble.adapter(member).items()}
        self.origin = self.flatten(ensemble.adapter(member)).detach()

    @property
    def size(self) -> int:
        """P."""
        return len(self.origin)

    def flatten(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Flatten every layer's (A […, R, I], B […, O, R]) to vectors […, P]."""
        return torch.cat([x.flatten(-2) for name in self._shapes for x in matrices[name]], dim=-1)

    def unflatten(self, vectors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Split vectors […, P] into every layer's (A […, R, I], B […, O, R])."""
        sizes = [shape.numel() for pair in self._shapes.values() for shape in pair]
        parts = iter(vectors.split(sizes, dim=-1))
        return {
            name: (next(parts).unflatten(-1, shape_A), next(parts).unflatten(-1, shape_B))
            for name, (shape_A, shape_B) in self._shapes.items()
        }

    def displaced(self, offsets: Tensor) -> Snapshot:
        """K copies of the member as a snapshot with equal weights. Copy k is moved by row k of `offsets` [K, P]."""
        weights = self.ensemble.weights.new_full((len(offsets),), 1 / len(offsets))
        return Snapshot(weights, list(self.unflatten(self.origin + offsets.to(self.origin)).values()))


def per_example_gradients(
    space: AdapterSpace,
    batch: Batch,
    score: Score | None = None,
    rows_per_example: int = 1,
) -> tuple[Tensor, Tensor]:
    """ℓ_i of every example and its gradient in the adapter's parameters, in one forward and one backward.

    It needs memory for about 2EP floats beside the activations of the batch's rows.

    Args:
        space: the adapter.
        batch: E · rows_per_example rows. The rows of one example are E rows apart, as in TRL's batches of pairs.
        score: from token log-probabilities of the rows and the batch to ℓ_i, or to any other number per example; by
            default the sum over tokens.
        rows_per_example: 2 for pairs.

    Returns:
        ℓ [E] and gradients [E, P]; zero for examples without trained tokens.
    """
    rows = torch.arange(len(batch["input_ids"])).view(rows_per_example, -1).T.flatten()
    grouped = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}
    stack = space.origin.expand(len(rows) // rows_per_example, -1).clone().requires_grad_()
    with evaluating(space.ensemble), torch.enable_grad():
        hidden, targets, mask = _supervised(space, stack, grouped)
        head = space.ensemble.get_output_embeddings()
        log_probs = token_scores(hidden, head, targets, _transform(space)).log_probs
        scores = (score or _sequence)(_by_position(log_probs, mask)[rows.argsort()], batch)
        (gradients,) = torch.autograd.grad(scores.sum(), stack)
    return scores.detach(), gradients


def diagnose_curvature(
    space: AdapterSpace,
    batches: Iterable[Batch],
    spanning: Iterable[Batch] | None,
    num_directions: int = 32,
    *,
    curvature: Curvature = "fisher",
    margin: Score | None = None,
    tie_strength: float = 0.0,
    tokens_per_pass: int = TOKENS_PER_PASS,
    seed: int = 0,
) -> Projected:
    """Gradients and curvature of a dataset's examples along the directions in which gradients are greatest.

    Args:
        space: the fitted adapter.
        batches: the examples to project. This takes the time of num_directions forwards over each.
        spanning: other examples, whose gradients span the subspace. They take one forward and backward each, and memory
            for P times (2 · num_directions + the rows of a batch) floats. None takes random directions; these show
            little of a conflict.
        num_directions: the greatest k. There are fewer directions if the gradients span fewer.
        curvature: "fisher" or "hessian".
        margin: computes the margin Δ of preference pairs; the examples are then pairs with ℓ_i = log σ(Δ_i), see
            `project_pairs`. None for sequences.
        tie_strength: ν of pairs with votes, see `renyi.objectives.votes`.
        tokens_per_pass: number of tokens of all copies that run at once, for "fisher".
        seed: of the random directions.

    Raises:
        ValueError: the gradients of the spanning examples are all zero.
    """
    if spanning is None:
        basis = random_basis(space.size, num_directions, seed).to(space.origin)
    else:
        basis = gradient_basis((_gradients(space, batch, margin, tie_strength) for batch in spanning), num_directions)
    if margin is not None:
        return project_pairs(space, batches, basis, margin, tie_strength)
    return project(space, batches, basis, curvature, tokens_per_pass)


def project(
    space: AdapterSpace,
    batches: Iterable[Batch],
    basis: Tensor,
    curvature: Curvature = "fisher",
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> Projected:
    """Gradients and curvature of sequences' log-likelihoods along the columns of a basis [P, k], exactly.

    Args:
        space: the adapter.
        batches: one example per row.
        basis: U, any k columns [P, k].
        curvature: "fisher", by forward-mode tangents; or "hessian", by k backward passes through the gradient, with P
            floats per example.
        tokens_per_pass: number of tokens of all copies that run at once, for "fisher".
    """
    of_batch = {"fisher": _project_fisher, "hessian": _project_hessian}.get(curvature)
    if of_batch is None:
        raise ConfigError(f"unknown curvature {curvature!r}", where="curvature", hint='Use "fisher" or "hessian".')
    with evaluating(space.ensemble), _twice_differentiable(space.ensemble):
        of_batches = [of_batch(space, batch, basis, tokens_per_pass) for batch in batches]
    if not of_batches:
        raise DataError("there are no examples to project", where="batches")
    ell_N, g_Nk, V_Nkk, *empirical = (torch.cat(parts) for parts in zip(*of_batches, strict=True))
    return Projected(ell_N, g_Nk, V_Nkk, empirical[0] if empirical else None, basis)


def project_pairs(
    space: AdapterSpace, batches: Iterable[Batch], basis: Tensor, margin: Score, tie_strength: float = 0.0
) -> Projected:
    """Gradients and curvature of preference pairs (Bradley–Terry): ℓ_i = log σ(Δ_i), V_i = σ(Δ_i) σ(−Δ_i) ∇Δ_i ∇Δ_iᵀ.

    A pair with one label has one outcome, so there is no agreement within an example that could raise J. A model that
    gives each pair its right odds has critical alpha 1, however much annotators differ. Several votes of a pair can
    agree: see `renyi.objectives.votes` for their ℓ, slope and information.

    Args:
        space: the adapter.
        batches: batches of pairs, chosen rows first, with the other entries that `margin` needs.
        basis: U, [P, k].
        margin: from the token log-probabilities of the 2B rows and the batch to Δ [B].
        tie_strength: ν, for votes. A batch has them as `votes` [B, 3], for chosen, rejected and tie.
    """
    found = []
    for batch in batches:
        margin_B, gradients = per_example_gradients(space, batch, margin, rows_per_example=2)
        ell_B, slope_B, information_B = of_labels(margin_B, batch, tie_strength)
        direction_Bk = gradients.to(basis) @ basis
        V_Bkk = information_B[:, None, None] * direction_Bk[:, :, None] * direction_Bk[:, None]
        found.append((ell_B, slope_B[:, None] * direction_Bk, V_Bkk))
    ell_N, g_Nk, V_Nkk = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Projected(ell_N, g_Nk, V_Nkk, None, basis)


class Labels(NamedTuple):
    """What the labels of B pairs say about their margins Δ.

    Attributes:
        log_likelihood: ℓ of all labels of a pair, nats, [B].
        slope: dℓ/dΔ, [B].
        information: −d²ℓ/dΔ², the Fisher information, [B].
    """

    log_likelihood: Tensor
    slope: Tensor
    information: Tensor


def of_labels(margin_B: Tensor, batch: Batch, tie_strength: float = 0.0) -> Labels:
    """The labels of a batch of pairs: its `votes` [B, 3], or one vote for each chosen completion."""
    if "votes" in batch:
        votes_B3 = batch["votes"].to(margin_B)
    else:
        votes_B3 = margin_B.new_tensor([1.0, 0.0, 0.0]).expand(len(margin_B), 3)
    slope_B, information_B = votes_slope(margin_B, Votes(*votes_B3.T), tie_strength)
    log_p_B3 = outcome_log_probs(margin_B, tie_strength)
    ell_B = torch.where(votes_B3 > 0, votes_B3 * log_p_B3, 0.0).sum(dim=-1)
    return Labels(ell_B, slope_B, information_B)


# ---- Products in the whole space -------------------------------------------------------------------------------------


def fisher_product(
    space: AdapterSpace, batches: Iterable[Batch], vectors: Tensor, tokens_per_pass: int = TOKENS_PER_PASS
) -> Tensor:
    """The mean Fisher matrix of sequences times the columns of `vectors` [P, n].

    It is computed by forward-mode tangents of the logits, followed by a backward pass.
    """
    product, examples = torch.zeros_like(vectors), 0
    with evaluating(space.ensemble), _twice_differentiable(space.ensemble):
        for batch in batches:
            examples += len(batch["input_ids"])
            for columns in _columns_per_pass(batch, vectors.shape[1], tokens_per_pass):
                hidden, tangents, _, _ = _tangents(space, batch, vectors[:, columns], tokens_per_pass)
                back = torch.empty_like(tangents)
                head: Any = space.ensemble.get_output_embeddings()
                for at, log_p_nV, dz_knV, slope_nV in _logit_tangents(space, hidden, tangents):
                    p_nV = log_p_nV.exp()
                    row = p_nV * (dz_knV - (p_nV * dz_knV).sum(dim=-1, keepdim=True)) * slope_nV
                    back[:, at] = row.to(head.weight.dtype) @ head.weight
                copies = len(tangents)
                stack = space.origin.expand(copies, -1).clone().requires_grad_()
                with torch.enable_grad():
                    rows, _, _ = _supervised(space, stack, _repeated(batch, copies))
                    (gradients,) = torch.autograd.grad(rows, stack, back.flatten(0, 1))
                product[:, columns] += gradients.T.to(product)
    return product / examples


def hessian_product(
    space: AdapterSpace, batches: Iterable[Batch], vectors: Tensor, tokens_per_pass: int = TOKENS_PER_PASS
) -> Tensor:
    """The mean Hessian of sequences' negative log-likelihood times the columns of `vectors` [P, n]."""
    product, examples = torch.zeros_like(vectors), 0
    with evaluating(space.ensemble), _twice_differentiable(space.ensemble), torch.enable_grad():
        for batch in batches:
            examples += len(batch["input_ids"])
            for columns in _columns_per_pass(batch, vectors.shape[1], tokens_per_pass):
                along = vectors[:, columns].T.to(space.origin)
                stack = space.origin.expand(len(along), -1).clone().requires_grad_()
                nll = -_plain_log_probs(space, stack, _repeated(batch, len(along))).sum()
                (gradients,) = torch.autograd.grad(nll, stack, create_graph=True)
                (second,) = torch.autograd.grad((gradients * along).sum(), stack)
                product[:, columns] += second.T.to(product)
    return product / examples


# ---- One batch -------------------------------------------------------------------------------------------------------


def _gradients(space: AdapterSpace, batch: Batch, margin: Score | None, tie_strength: float = 0.0) -> Tensor:
    """∇ℓ_i of sequences, or of pairs, [E, P]."""
    if margin is None:
        return per_example_gradients(space, batch)[1]
    margins, gradients = per_example_gradients(space, batch, margin, rows_per_example=2)
    return of_labels(margins, batch, tie_strength).slope[:, None] * gradients


def _project_fisher(space: AdapterSpace, batch: Batch, basis: Tensor, tokens_per_pass: int) -> tuple[Tensor, ...]:
    hidden, tangents, targets, mask = _tangents(space, batch, basis, tokens_per_pass)
    example_n = mask.nonzero()[:, 0]
    examples, k = len(mask), basis.shape[1]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ell = torch.zeros(examples, dtype=dtype, device=hidden.device)
    g, V, empirical = (ell.new_zeros(examples, *shape) for shape in ((k,), (k, k), (k, k)))
    for at, log_p_nV, dz_knV, _ in _logit_tangents(space, hidden, tangents):
        p_nV = log_p_nV.exp()
        # ∂ log p_v along each direction, for every possible next token v.
        score_nkV = (dz_knV - (p_nV * dz_knV).sum(dim=-1, keepdim=True)).transpose(0, 1).to(dtype)
        target_n11 = targets[at, None, None]
        g_nk = score_nkV.gather(2, target_n11.expand(-1, k, 1))[..., 0]
        ell.index_add_(0, example_n[at], log_p_nV.gather(1, target_n11[..., 0])[:, 0].to(dtype))
        g.index_add_(0, example_n[at], g_nk)
        with torch.autocast(hidden.device.type, enabled=False):
            V.index_add_(0, example_n[at], (score_nkV * p_nV[:, None]) @ score_nkV.mT)
        empirical.index_add_(0, example_n[at], g_nk[:, :, None] * g_nk[:, None])
    return ell, g, V, empirical


def _project_hessian(space: AdapterSpace, batch: Batch, basis: Tensor, tokens_per_pass: int) -> tuple[Tensor, ...]:
    """Derivatives in the coordinates c: example i runs at θ + U c_i, and log p is differentiated at c = 0."""
    coordinates = space.origin.new_zeros(len(batch["input_ids"]), basis.shape[1], requires_grad=True)
    with torch.enable_grad():
        log_probs_NT = _plain_log_probs(space, space.origin + coordinates @ basis.T.to(space.origin), batch)
        ell = log_probs_NT.sum(dim=1)
        (g,) = torch.autograd.grad(ell.sum(), coordinates, create_graph=True)
        # Each example has its own coordinates, so the gradient of a column's sum has one row per example.
        rows = [torch.autograd.grad(column.sum(), coordinates, retain_graph=True)[0] for column in g.unbind(1)]
    return ell.detach(), g.detach(), -torch.stack(rows, dim=1)


@torch.no_grad()
def _tangents(
    space: AdapterSpace, batch: Batch, basis: Tensor, tokens_per_pass: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [n, D] of trained positions, their derivatives along k directions [k, n, D], targets, and mask."""
    parts = []
    for columns in _columns_per_pass(batch, basis.shape[1], tokens_per_pass):
        along = basis[:, columns].T.to(space.origin)
        with forward_ad.dual_level():
            stack = forward_ad.make_dual(space.origin.expand(len(along), -1).clone(), along.contiguous())
            dual, targets, mask = _supervised(space, stack, _repeated(batch, len(along)))
            hidden, tangents = forward_ad.unpack_dual(dual)
            n = len(targets) // len(along)
            parts.append(tangents.view(len(along), n, tangents.shape[-1]))
    return hidden[:n], torch.cat(parts), targets[:n], mask[: len(batch["input_ids"])]


def _logit_tangents(
    space: AdapterSpace, hidden: Tensor, tangents: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Chunks of positions: slice, log p [n, V], tangents of the logits [k, n, V], slope of the transform [n, V]."""
    head: Any = space.ensemble.get_output_embeddings()
    transform = _transform(space)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chunk = max(1, LOGITS_PER_CHUNK // (len(tangents) * head.weight.shape[0]))
    with torch.no_grad():
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            z_nV = transform(head(hidden[at]).to(dtype))
            slope_nV = torch.full_like(z_nV, transform.scale)
            if transform.softcap is not None:
                slope_nV = slope_nV * (1 - (z_nV / transform.softcap).square())
            # Contiguous, because a CPU is a hundred times slower with a slice in half precision.
            dz_knV = F.linear(tangents[:, at].contiguous(), head.weight).to(dtype) * slope_nV
            yield at, z_nV.log_softmax(dim=-1), dz_knV, slope_nV


def _plain_log_probs(space: AdapterSpace, stack: Tensor, batch: Batch) -> Tensor:
    """Token log-probabilities [rows, T − 1] that can be differentiated twice; those of `head.py` cannot."""
    hidden, targets, mask = _supervised(space, stack, batch)
    head: Any = space.ensemble.get_output_embeddings()
    z_nV = _transform(space)(head(hidden).to(torch.promote_types(hidden.dtype, torch.float32)))
    return _by_position(z_nV.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0], mask)


def _supervised(space: AdapterSpace, stack: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [n, D] before trained tokens. Each adapter of the stack [E, P] sees its own share of the rows.

    The other results are the trained tokens [n], and a mask of their positions [rows, T − 1].
    """
    backbone = space.ensemble.base.base_model
    if space.ensemble.stack.selection.members is not None:
        raise ConfigError("curvature is of one adapter by itself", hint="Leave `using(...)` first.")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    with space.ensemble.stack.acting_as(list(space.unflatten(stack).values())):
        hidden = backbone(**inputs).last_hidden_state
    targets = batch["labels"][:, 1:]
    mask = targets != IGNORED
    return hidden[:, :-1][mask], targets[mask], mask


def _by_position(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _sequence(log_probs: Tensor, batch: Batch) -> Tensor:
    return log_probs.sum(dim=-1)


def _transform(space: AdapterSpace) -> LogitTransform:
    return LogitTransform.from_config(space.ensemble.base.config)


def _columns_per_pass(batch: Batch, columns: int, tokens_per_pass: int) -> Iterator[slice]:
    step = max(1, tokens_per_pass // batch["input_ids"].numel())
    return (slice(start, start + step) for start in range(0, columns, step))


def _repeated(batch: Batch, copies: int) -> dict[str, Tensor]:
    rows = len(batch["input_ids"])
    return {name: repeat_rows(batch[name], copies, rows) for name in ("input_ids", "attention_mask", "labels")}


@contextmanager
def _twice_differentiable(ensemble: LoraEnsemble) -> Iterator[None]:
    """Compute attention with plain operations, because fused kernels have no forward-mode and no second derivatives."""
    implementation, plain = ensemble.base.config._attn_implementation, ("eager", "sdpa", attention.NAME)
    if implementation not in plain:
        ensemble.base.set_attn_implementation("eager")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if implementation not in plain:
            ensemble.base.set_attn_implementation(implementation)
