"""When members should spread: the loss's second order at a fitted point, and the α from which apart beats together.

Let members stand at one fitted point and move off by small δ_m of mean zero and covariance Σ. With the curvature
V = E[−∇² log p] and the gradients' second moment J = E[∇ log p ∇ log pᵀ], both of whole examples, the α-Rényi loss
changes by

    ½ tr((V − αJ) Σ)                                                   `second_order_change`

to second order: curvature resists the spread, and routing, which gives each example to who explains it, rewards it.
The reward wins along some direction as soon as α exceeds

    critical alpha = min over v of vᵀVv / vᵀJv = 1 / λ_max,   J v = λ V v        `critical_alpha`

A model that is right has V = J (the information equality), so its critical alpha is 1 and no direction is any
better than another. Data that contradict the model lower it: gradients then agree within an example and disagree
between examples, which J sees and V does not.

J is not centred: a mean gradient that is not zero is unfinished work, which members would split among them as well.
So the point should be fitted first.

Three ways to the same numbers: matrices; matrix-vector products (`critical_directions`); and a subspace
(`stability_within`), whose critical alpha is never below the whole space's. On finite data all of them find
directions that fit the noise, and 1/λ_max comes out too low, the more so the more directions there are. So
`cross_fitted` finds directions on some examples and measures them on others.

All of this is on tensors. Where gradients and curvature come from is in `renyi.ensemble.curvature`, and what is made of
the figures in `renyi.inference.diagnose`. scipy, the one dependency besides torch, is imported where it is used.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # a symmetric matrix times columns [P, n]


class Stability(NamedTuple):
    """Solutions of J v = λ V v, the greatest λ first.

    Attributes:
        critical_alpha: 1/λ_max; inf where J is zero.
        eigenvalues: λ, [k], descending.
        directions: v in columns, [P, k], with vᵀ(V + damping)v = 1.
    """

    critical_alpha: float
    eigenvalues: Tensor
    directions: Tensor


class CriticalDirections(NamedTuple):
    """The leading solutions of J v = λ V v, as an iteration found them; fields as in `Stability`, and

    Attributes:
        residuals: ‖Jv − λVv‖ / λ_max‖Vv‖ of each, [k].
        converged: whether all residuals are within the tolerance.
    """

    critical_alpha: float
    eigenvalues: Tensor
    directions: Tensor
    residuals: Tensor
    converged: bool


class CrossFitted(NamedTuple):
    """A critical alpha measured on examples that had no part in finding its direction.

    Attributes:
        critical_alpha: pooled over folds. Each direction's is at least the best one's, so this errs upwards: towards
            not spreading.
        low: lower end of an interval for the subspace's true critical alpha; `cross_fitted` says how it is made.
        high: upper end.
        plug_in: 1/λ_max of all examples, which errs downwards, the more the fewer examples a direction.
        eigenvalues: all examples' λ, [k], descending.
        direction: all examples' leading direction in the subspace's coordinates, [k].
        loadings: each example's gradient along the direction found without it, [N], in units of the root mean square:
            far from zero, on either side, are the examples that contradict each other.
        mean_share: the share of the gradients' second moment along the directions that is the mean gradient's: near 0
            where fitted.
        calibration: single tokens' second moment over curvature along the directions (see `cross_fitted`): 1 where
            predictions are calibrated, above where the adapter is not fitted or too small; None if not asked for.
    """

    critical_alpha: float
    low: float
    high: float
    plug_in: float
    eigenvalues: Tensor
    direction: Tensor
    loadings: Tensor
    mean_share: float
    calibration: float | None


def critical_alpha(V: Tensor, J: Tensor, damping: float = 0.0) -> float:
    """The α above which a small spread lowers the loss: 1/λ_max of J v = λ (V + damping) v.

    Args:
        V: curvature [P, P], symmetric; computed in float64.
        J: second moment of the gradients [P, P], symmetric.
        damping: added to V's diagonal, in V's units.

    Returns:
        A positive number, inf where J is zero. Above 1 means: at no α in range.

    Raises:
        ValueError: shapes differ, an entry is not finite, or V + damping is not positive definite.
    """
    return stability_spectrum(V, J, damping).critical_alpha


def stability_spectrum(V: Tensor, J: Tensor, damping: float = 0.0) -> Stability:
    """All solutions of J v = λ (V + damping) v. Arguments and errors are those of `critical_alpha`."""
    _check(V, J, damping)
    eye = torch.eye(len(V), dtype=torch.float64, device=V.device)
    return _solved(_symmetric(V) + damping * eye, _symmetric(J))


def second_order_change(V: Tensor, J: Tensor, alpha: float, covariance: Tensor) -> Tensor:
    """½ tr((V − αJ) Σ): what the loss changes by when members spread with a small covariance Σ [P, P]; nats, 0-d."""
    return 0.5 * ((V - alpha * J) * covariance.mT).sum()


# ---- Large spaces ----------------------------------------------------------------------------------------------------


def stability_within(V_times: Product, J_times: Product, basis: Tensor, damping: float = 0.0) -> Stability:
    """The same for spreads within the span of a basis; its critical alpha is never below the whole space's.

    Args:
        V_times: [P, n] to [P, n].
        J_times: likewise.
        basis: [P, k] of full rank; `gradient_basis` or `random_basis`.
        damping: added to V in the whole space.

    Returns:
        k solutions, their directions in the whole space: [P, k].
    """
    V_U = basis.mT @ (V_times(basis) + damping * basis)
    J_U = basis.mT @ J_times(basis)
    _check(V_U, J_U, damping)
    found = _solved(_symmetric(V_U), _symmetric(J_U))
    return found._replace(directions=basis.to(torch.float64) @ found.directions)


def critical_directions(
    V_times: Product,
    J_times: Product,
    dim: int,
    k: int = 1,
    damping: float = 0.0,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 500,
    preconditioner: Product | None = None,
    seed: int = 0,
) -> CriticalDirections:
    """The k leading solutions from matrix-vector products alone, by LOBPCG (Knyazev 2001).

    Small spaces are solved densely. Convergence is checked on the residuals of what came back, never assumed: with an
    ill-conditioned V, raise the damping, or give a preconditioner.

    Args:
        V_times: [P, n] float64 to [P, n].
        J_times: likewise.
        dim: P.
        k: how many.
        damping: added to V's diagonal, in V's units. LoRA's V is singular along its gauge: not 0 there.
        tolerance: greatest relative residual that counts as converged; eigenvalues are off by about its square.
        max_iterations: each takes one product with V and one with J, of up to k + 4 columns.
        preconditioner: [P, n] to [P, n], roughly V⁻¹.
        seed: of the start.

    Raises:
        ValueError: V + damping is not positive definite, or k is not from 1 to P.
    """
    from scipy.sparse.linalg import LinearOperator, lobpcg

    if not 1 <= k <= dim:
        raise ValueError(f"k is {k}; it should be from 1 to the {dim} dimensions there are")

    def damped(x: Tensor) -> Tensor:
        return V_times(x) + damping * x

    def residuals_of(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        right = damped(vectors)
        scale = values[0].clamp(min=torch.finfo(values.dtype).tiny) * right.norm(dim=0)
        return (J_times(vectors) - right * values).norm(dim=0) / scale, scale

    block = min(k + 4, dim)  # guard vectors: the last of a block converge slowly
    if dim <= 5 * block:
        eye = torch.eye(dim, dtype=torch.float64)
        V, J = damped(eye), J_times(eye)
        _check(V, J, damping)
        solved = _solved(_symmetric(V), _symmetric(J))
        values, vectors = solved.eigenvalues[:k], solved.directions[:, :k]
        residuals, _ = residuals_of(values, vectors)
    else:
        generator = torch.Generator().manual_seed(seed)
        guess = torch.randn(dim, block, generator=generator, dtype=torch.float64)
        if not bool((guess * damped(guess)).sum(dim=0).gt(0).all()):
            raise ValueError(_not_positive(f" at damping {damping:g}"))

        def operator(times: Product) -> Any:
            def of_array(x: Any) -> Any:
                columns = torch.from_numpy(x.reshape(dim, -1).copy())
                return times(columns).to("cpu", torch.float64).numpy().reshape(x.shape)

            return LinearOperator((dim, dim), matvec=of_array, matmat=of_array, dtype="float64")

        A, B = operator(J_times), operator(damped)
        M = None if preconditioner is None else operator(preconditioner)
        target = 0.0  # its own tolerance is absolute, and what is small is known after a round only
        left, length = max_iterations, 10
        while left > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of what `converged` says
                found, columns, history = lobpcg(
                    A, guess.numpy(), B, M, None, target, min(length, left), True, retResidualNormsHistory=True
                )
            order = found.argsort()[::-1].copy()
            values, vectors = torch.from_numpy(found[order[:k]]), torch.from_numpy(columns[:, order[:k]].copy())
            residuals, scale = residuals_of(values, vectors)
            if bool((residuals <= tolerance).all()):
                break
            # With gradients of low rank a block may run out of new directions and stop: fresh guard vectors go on.
            left -= len(history)
            target, length = 0.5 * tolerance * scale.min().item(), 200
            guess = torch.cat([vectors, torch.randn(dim, block - k, generator=generator, dtype=torch.float64)], dim=1)
    converged = bool((residuals <= tolerance).all())
    return CriticalDirections(_inverse(values[0].item()), values, vectors, residuals, converged)


def gradient_basis(gradients: Iterable[Tensor], k: int) -> Tensor:
    """An orthonormal basis [P, ≤ k] of the directions along which per-example gradients are greatest.

    The leading right singular vectors, fewer than k where gradients span fewer directions. Gradients come in blocks
    [n, P]; between blocks the 2k leading directions are kept, so that memory is (2k + n) P floats for any number of
    examples. One block is exact.

    Raises:
        ValueError: there are no gradients, or all are zero.
    """
    kept: Tensor | None = None
    for block in gradients:
        kept = _leading_rows(block if kept is None else torch.cat([kept, block]), 2 * k)
    if kept is None or not len(kept):
        raise ValueError("the gradients span no direction: there are none, or all are zero")
    return torch.linalg.qr(kept[:k].mT)[0]


def random_basis(dim: int, k: int, seed: int = 0) -> Tensor:
    """An orthonormal basis [P, k] of a uniformly random subspace, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, k, generator=generator))[0]


def _leading_rows(rows: Tensor, number: int) -> Tensor:
    """σ_i v_iᵀ of the greatest singular values σ of [n, P]: rows of the same second moment, but for what is left out.

    By way of the n × n Gram matrix, whose rounding hides squares of singular values below that of the greatest.
    """
    squares, left = torch.linalg.eigh((rows @ rows.mT).double())
    real = squares > squares[-1].clamp(min=0.0) * 10 * torch.finfo(rows.dtype).eps
    chosen = real.nonzero()[:, 0].flip(0)[:number]
    return left[:, chosen].mT.to(rows.dtype) @ rows


# ---- Finite data -----------------------------------------------------------------------------------------------------


def cross_fitted(
    gradients: Tensor,
    curvature: Tensor,
    empirical: Tensor | None = None,
    routed: Tensor | None = None,
    *,
    folds: int = 5,
    relative_damping: float = 0.1,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> CrossFitted:
    """The critical alpha from finite data: directions found on some examples, measured on the others.

    λ_max is the best of all directions, so on the examples that chose it the best one looks better than it is. A
    direction chosen elsewhere has no such luck: its vᵀVv / vᵀJv is estimated fairly, and is at least the least one.
    For that to hold, the subspace itself should come from other examples as well.

    The interval is for the subspace's critical alpha. It rests on the bootstrap over examples, in which every resample
    finds its directions anew, since a part of the uncertainty is which direction it is. (With the directions held
    fixed, intervals of 95 % covered between 56 and 86 % in simulated worlds.) The figure measured on the examples that
    chose the direction errs downwards and the cross-fitted one upwards, so the one gives the lower end and the other
    the upper. On the scale of logarithms, either is moved back by half of the bootstrap's estimate of its bias, and out
    by the bootstrap's standard error.

    Tokens have a second measure of curvature, `empirical`, which equals V wherever predictions are calibrated. Where
    they are not yet, the two err apart: overconfidence lowers the critical alpha in V most (V too small, J too great),
    underconfidence the one in `empirical` (residuals that all point one way). So measure with either for
    `curvature`, and believe the greater.

    Args:
        gradients: of ℓ_i in a subspace's coordinates, [N, k].
        curvature: V_i in the same, [N, k, k]; its mean over examples is V.
        empirical: Σ_t g_t g_tᵀ over an example's tokens, [N, k, k], for `calibration`. It is J without the terms
            between tokens, so it equals V where every token's prediction is calibrated, whatever the tokens have to
            do with each other.
        routed: what each ℓ_i is divided by before it is routed, [N]: its number of tokens T_i for length-normalised
            responsibilities, for which the loss is T_i loss_α(ℓ_i / T_i) and J = E[g gᵀ / T]. None for whole examples.
        folds: parts of the examples; each is measured with the direction of the others.
        relative_damping: added to V where directions are chosen, in units of its mean eigenvalue. Measured values have
            none.
        resamples: of the bootstrap.
        level: of the interval.
        seed: of folds and bootstrap.

    Raises:
        ValueError: fewer than two examples a fold, shapes that do not fit, or V not positive definite.
    """
    g_Nk, V_Nkk = gradients.double(), curvature.double()
    N, k = g_Nk.shape
    if V_Nkk.shape != (N, k, k) or (empirical is not None and empirical.shape != (N, k, k)):
        raise ValueError(f"gradients are [{N}, {k}], so curvature should be [{N}, {k}, {k}], not {list(V_Nkk.shape)}")
    if folds < 2 or 2 * folds > N:
        raise ValueError(f"{N} examples cannot make {folds} folds of at least two; there should be two folds or more")
    pull_Nk = g_Nk if routed is None else g_Nk / routed.to(g_Nk)[:, None].sqrt()
    J_Nkk = pull_Nk[:, :, None] * pull_Nk[:, None]

    generator = torch.Generator().manual_seed(seed)
    fold_N = torch.empty(N, dtype=torch.long)
    fold_N[torch.randperm(N, generator=generator)] = torch.arange(N) % folds
    draws_SN = torch.randint(N, (resamples, N), generator=generator)
    # Equal examples stay in one fold: each would otherwise be measured along a direction that it helped to find.
    fold_N, times_SN = fold_N.to(g_Nk.device), torch.zeros(1 + resamples, N, dtype=torch.float64)
    times_SN[0] = 1.0  # the examples themselves, before their resamples
    times_SN[1:].scatter_add_(1, draws_SN, torch.ones_like(draws_SN, dtype=torch.float64))
    chosen_in, crossed, v_Fk = _ratios(V_Nkk, J_Nkk, times_SN.to(g_Nk.device), fold_N, folds, relative_damping)

    mean_V = V_Nkk.mean(dim=0)
    everything = stability_spectrum(mean_V, J_Nkk.mean(dim=0), relative_damping * mean_V.diagonal().mean().item())
    leading = everything.directions[:, 0]
    v_Fk = torch.where(((v_Fk @ mean_V @ leading) >= 0)[:, None], v_Fk, -v_Fk)
    v_Nk = v_Fk[fold_N]
    pull_N, slope_N = (pull_Nk * v_Nk).sum(dim=1), (g_Nk * v_Nk).sum(dim=1)
    low, _ = _bootstrapped(chosen_in, level)
    _, high = _bootstrapped(crossed, level)
    critical = crossed[0].exp().item()
    calibration = None
    if empirical is not None:
        of_tokens, of_V = (torch.einsum("nij,ni,nj->", X.double(), v_Nk, v_Nk).item() for X in (empirical, V_Nkk))
        calibration = of_tokens / of_V
    return CrossFitted(
        critical_alpha=critical,
        low=min(low, critical),
        high=max(high, critical),
        plug_in=everything.critical_alpha,
        eigenvalues=everything.eigenvalues,
        direction=leading,
        loadings=pull_N / pull_N.square().mean().sqrt(),
        mean_share=(slope_N.mean().square() / slope_N.square().mean()).item(),
        calibration=calibration,
    )


def _ratios(
    V_Nkk: Tensor, J_Nkk: Tensor, times_SN: Tensor, fold_N: Tensor, folds: int, relative_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log vᵀVv / vᵀJv of S resamples: on the examples that chose v [S], and cross-fitted [S]; and folds' v [F, k].

    Args:
        times_SN: how often each example is in each resample. The directions are those of the first.
    """
    k = V_Nkk.shape[-1]
    in_fold_FN = torch.nn.functional.one_hot(fold_N, folds).mT.to(times_SN)
    # Sums over a resample's examples in each fold: [2, S, F, k, k], and over all of them.
    times = (times_SN[:, None] * in_fold_FN).flatten(0, 1)
    part = (times @ torch.stack([V_Nkk, J_Nkk]).flatten(2)).view(2, len(times_SN), folds, k, k)
    whole = part.sum(dim=2)

    def along(v: Tensor, matrices: Tensor) -> Tensor:
        return torch.einsum("...i,...ij,...j->...", v, matrices, v)

    rest = whole[:, :, None] - part
    v_Sk, v_SFk = (_leading(V, J, relative_damping) for V, J in (whole, rest))
    tiny = torch.finfo(V_Nkk.dtype).tiny
    V_S, J_S = along(v_Sk, whole)
    crossed_V, crossed_J = along(v_SFk, part).sum(dim=-1)
    chosen_in, crossed = ((V.clamp(min=0.0) / J.clamp(min=tiny)).log() for V, J in ((V_S, J_S), (crossed_V, crossed_J)))
    return chosen_in, crossed, v_SFk[0]


def _leading(V: Tensor, J: Tensor, relative_damping: float) -> Tensor:
    """The leading v [..., k] of J v = λ (V + damping) v for sums [..., k, k]; NaN where that is not positive."""
    damping = relative_damping * V.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    L, failed = torch.linalg.cholesky_ex(V + damping[..., None, None] * torch.eye(V.shape[-1]).to(V))
    half = torch.linalg.solve_triangular(L, J, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    usable = (failed == 0)[..., None, None]
    _, vectors = torch.linalg.eigh(torch.where(usable, whitened + whitened.mT, 0.0))
    v = torch.linalg.solve_triangular(L.mT, vectors[..., -1:], upper=True)
    return torch.where(usable, v, torch.nan)[..., 0]


def _bootstrapped(logs: Tensor, level: float) -> tuple[float, float]:
    """A normal interval of exp(logs[0]) from its resamples logs[1:], with half of the bootstrap's bias taken back."""
    drawn = logs[1:][logs[1:].isfinite()]
    if 2 * len(drawn) <= len(logs) or not logs[0].isfinite():
        return 0.0, float("inf")  # most resamples have no curvature to measure
    reach = torch.special.ndtri(torch.tensor((1 + level) / 2)).item() * drawn.std()
    centre = logs[0] - 0.5 * (drawn.mean() - logs[0])
    return (centre - reach).exp().item(), (centre + reach).exp().item()


# ---- The generalised eigenproblem ------------------------------------------------------------------------------------


def _solved(V: Tensor, J: Tensor) -> Stability:
    """Whiten by V = LLᵀ; then it is the eigenproblem of L⁻¹ J L⁻ᵀ."""
    L, failed = torch.linalg.cholesky_ex(V)
    if failed:
        least, greatest = torch.linalg.eigvalsh(V)[[0, -1]].tolist()
        raise ValueError(_not_positive(f" (eigenvalues from {least:.3g} to {greatest:.3g})"))
    half = torch.linalg.solve_triangular(L, J, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    values, vectors = torch.linalg.eigh(_symmetric(whitened))
    values, vectors = values.flip(0), vectors.flip(1)
    return Stability(_inverse(values[0].item()), values, torch.linalg.solve_triangular(L.mT, vectors, upper=True))


def _inverse(greatest: float) -> float:
    return 1 / greatest if greatest > 0 else float("inf")


def _symmetric(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return (matrix + matrix.mT) / 2


def _check(V: Tensor, J: Tensor, damping: float) -> None:
    if V.dim() != 2 or V.shape[0] != V.shape[1] or V.shape != J.shape or not len(V):
        raise ValueError(f"V and J should be square and of one size, not {list(V.shape)} and {list(J.shape)}")
    if not (bool(V.isfinite().all()) and bool(J.isfinite().all())):
        raise ValueError("V or J has an entry that is not finite: the fitted point gives impossible examples")
    if damping < 0:
        raise ValueError(f"damping is {damping}; it should be 0 or more")


def _not_positive(found: str) -> str:
    return (
        f"V + damping is not positive definite{found}: raise `damping`, restrict the problem to directions that "
        "gradients span, or take the Gauss–Newton (Fisher) matrix for V, which is never negative"
    )
