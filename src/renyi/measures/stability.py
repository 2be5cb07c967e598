"""The critical alpha: the α above which a small spread of the members lowers the loss at a fitted point.

Let all members be at one fitted point, and then move by small δ_m of mean zero and covariance Σ. Let
V = E[−∇² log p] be the curvature and J = E[∇ log p ∇ log pᵀ] the second moment of the gradients, both of whole
examples. To second order the α-Rényi loss changes by

    ½ tr((V − αJ) Σ)                                                   `second_order_change`

The curvature V makes a spread costly. The responsibilities make it useful, because each example goes to the members
that explain it best. The gain is greater than the cost along some direction as soon as α exceeds

    critical alpha = min over v of vᵀVv / vᵀJv = 1 / λ_max,   J v = λ V v        `critical_alpha`

A model that is right has V = J (the information equality). Its critical alpha is 1, and all directions are equally
good. Data that contradict the model lower the critical alpha. Their gradients agree within an example and disagree
between examples. This makes J greater, but not V.

J is not centred. A mean gradient that is not zero means that the point is not fitted yet, and it raises J as a conflict
would. So fit the point first.

There are three ways to the same numbers: from matrices (`stability_spectrum`), from matrix-vector products
(`critical_directions`) and in a subspace (`stability_within`). The critical alpha of a subspace is never below that of
the whole space. On finite data all three find directions that fit noise, so 1/λ_max is too low. The error grows with
the number of directions. So `cross_fitted` finds directions on some examples and measures them on others.

Read next: `ensemble/curvature.py`, which computes the gradients and the curvature of an adapter, and
`inference/diagnose.py`, which draws conclusions from the critical alpha.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # multiplies columns [P, n] by a symmetric matrix [P, P]


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
    """The leading solutions of J v = λ V v that an iteration found.

    Attributes:
        critical_alpha: as in `Stability`.
        eigenvalues: as in `Stability`.
        directions: as in `Stability`.
        residuals: ‖Jv − λVv‖ / λ_max‖Vv‖ of each solution, [k].
        converged: whether all residuals are within the tolerance.
    """

    critical_alpha: float
    eigenvalues: Tensor
    directions: Tensor
    residuals: Tensor
    converged: bool


class CrossFitted(NamedTuple):
    """A critical alpha that was measured on other examples than those that gave its direction.

    Attributes:
        critical_alpha: pooled over folds. No direction's value is below the best direction's, so this errs upwards,
            that is, towards not spreading.
        low: lower end of an interval for the subspace's true critical alpha; `cross_fitted` explains the interval.
        high: upper end of that interval.
        plug_in: 1/λ_max of all examples. It errs downwards, and more so if there are few examples per direction.
        eigenvalues: λ of all examples, [k], descending.
        direction: the leading direction of all examples, in the subspace's coordinates, [k].
        loadings: each example's gradient along the direction that was found without it, [N], in units of the root mean
            square. Examples with large loadings of opposite signs contradict each other.
        mean_share: the share of the mean gradient in the gradients' second moment along the directions. It is near 0 if
            the adapter is fitted.
        calibration: second moment of single tokens' gradients divided by curvature, along the directions (see
            `cross_fitted`). It is 1 if predictions are calibrated, and above 1 if the adapter is not fitted or too
            small. None without `empirical`, and without curvature along the directions.
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
        A positive number, or inf if J is zero. If it is above 1, no α in the range from 0 to 1 makes a spread useful.

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
    """½ tr((V − αJ) Σ): the change of the loss when members spread with a small covariance Σ [P, P]; nats, 0-d."""
    return 0.5 * ((V - alpha * J) * covariance.mT).sum()


# ---- Large spaces ----------------------------------------------------------------------------------------------------


def stability_within(V_times: Product, J_times: Product, basis: Tensor, damping: float = 0.0) -> Stability:
    """The stability of spreads within the span of a basis. Its critical alpha is never below the whole space's.

    Args:
        V_times: multiplies columns [P, n] by V.
        J_times: multiplies columns [P, n] by J.
        basis: [P, k] of full rank, for example from `gradient_basis` or `random_basis`.
        damping: added to V's diagonal in the whole space.

    Returns:
        k solutions. Their directions are vectors of the whole space, [P, k].
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
    """The k leading solutions from matrix-vector products only, by LOBPCG (Knyazev 2001).

    Small problems are solved densely. Convergence is checked by computing the residuals of the result. If V is
    ill-conditioned and the iteration does not converge, raise the damping or give a preconditioner.

    Args:
        V_times: multiplies columns [P, n], float64, by V.
        J_times: multiplies columns [P, n], float64, by J.
        dim: P.
        k: how many solutions to find.
        damping: added to V's diagonal, in V's units. The V of LoRA is singular (see `ensemble/curvature.py`), so it
            needs a damping above 0.
        tolerance: greatest relative residual that counts as converged; the error of eigenvalues is about its square.
        max_iterations: each iteration takes one product with V and one with J, of up to k + 4 columns.
        preconditioner: multiplies columns [P, n] by roughly V⁻¹.
        seed: of the random start.

    Raises:
        ValueError: V + damping is not positive definite, or k is not from 1 to P.
    """
    from scipy.sparse.linalg import lobpcg

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

        def of_arrays(times: Product) -> Callable[[Any], Any]:
            return lambda x: times(torch.from_numpy(x.copy())).to("cpu", torch.float64).numpy()

        A, B = of_arrays(J_times), of_arrays(damped)
        M = None if preconditioner is None else of_arrays(preconditioner)
        target = 0.0  # LOBPCG's tolerance is absolute; the right size of it is known after the first round
        left, length = max_iterations, 10
        while left > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns if it does not converge, which `converged` says
                found, columns, history = lobpcg(
                    A, guess.numpy(), B, M, None, target, min(length, left), True, retResidualNormsHistory=True
                )
            order = found.argsort()[::-1].copy()
            values, vectors = torch.from_numpy(found[order[:k]]), torch.from_numpy(columns[:, order[:k]].copy())
            residuals, scale = residuals_of(values, vectors)
            if bool((residuals <= tolerance).all()):
                break
            # If the gradients have a low rank, a block may find no new directions and stop. New guard vectors help.
            left -= len(history)
            target, length = 0.5 * tolerance * scale.min().item(), 200
            guess = torch.cat([vectors, torch.randn(dim, block - k, generator=generator, dtype=torch.float64)], dim=1)
    converged = bool((residuals <= tolerance).all())
    return CriticalDirections(_inverse(values[0].item()), values, vectors, residuals, converged)


def gradient_basis(gradients: Iterable[Tensor], k: int) -> Tensor:
    """An orthonormal basis [P, ≤ k] of the directions along which per-example gradients are greatest.

    The basis holds the leading right singular vectors: k of them, or fewer if the gradients span fewer directions.
    Gradients come in blocks [n, P]. Between blocks the 2k leading directions are kept, so the memory is (2k + n) P
    floats for any number of examples. With one block the result is exact.

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
    """σ_i v_iᵀ of the greatest singular values σ of `rows` [n, P].

    Their second moment is that of the rows, except for the directions that are left out. They are computed from the
    n × n Gram matrix. Squared singular values below its rounding error are dropped.
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
    """The critical alpha from finite data: directions are found on some examples and measured on the others.

    λ_max belongs to the best of all directions. On the examples that chose it, that direction looks better than it is.
    A direction that was chosen on other examples has no such bias: its estimate of vᵀVv / vᵀJv is fair, and the true
    value is not below the minimum over directions. So the subspace should come from other examples, too.

    The interval is for the subspace's critical alpha. It uses the bootstrap over examples. Every resample finds its
    directions again, because the choice of the direction is a part of the uncertainty. (With fixed directions,
    intervals of 95 % covered the truth in 56 to 86 % of simulated cases.) The value measured on the examples that chose
    the direction errs downwards; it gives the lower end. The cross-fitted value errs upwards; it gives the upper end.
    Both are corrected on the logarithmic scale: each is moved back by half of the bootstrap's estimate of its bias, and
    outwards by the bootstrap's standard error times the quantile of the level.

    Without the examples of a fold, V + damping may not be positive definite: then these examples are measured along
    the leading direction of all, `critical_alpha` is `plug_in`, and the interval is from 0 to infinity.

    Tokens have a second measure of curvature, `empirical`. It equals V if predictions are calibrated. If they are not,
    the two differ. Overconfidence lowers the critical alpha most if `curvature` is V, because V is then too small and J
    too great. Underconfidence lowers it most if `curvature` is `empirical`, because all residuals then have the same
    sign. So measure with each of the two as `curvature`, and take the greater critical alpha.

    Args:
        gradients: gradients of ℓ_i in the coordinates of a subspace, [N, k].
        curvature: V_i in the same coordinates, [N, k, k]; its mean over examples is V.
        empirical: Σ_t g_t g_tᵀ over the tokens of each example, [N, k, k], for `calibration`. It is J without the terms
            between different tokens. So it equals V if every token's prediction is calibrated, however the tokens
            depend on each other.
        routed: the divisor of each ℓ_i before responsibilities are computed, [N]. It is the number of tokens T_i for
            length-normalised responsibilities, for which the loss is T_i loss_α(ℓ_i / T_i) and J = E[g gᵀ / T]. None
            for whole examples.
        folds: number of parts of the examples. Each part is measured with the direction of the other parts.
        relative_damping: added to V when directions are chosen, in units of V's mean eigenvalue. It is not added when
            they are measured.
        resamples: number of resamples of the bootstrap.
        level: of the interval.
        seed: of the folds and the bootstrap.

    Raises:
        ValueError: there are fewer than two examples per fold, shapes do not fit, or V is not positive definite.
    """
    g_Nk, V_Nkk = gradients.double(), curvature.double()
    N, k = g_Nk.shape
    for name, given in (("curvature", curvature), ("empirical", empirical)):
        if given is not None and given.shape != (N, k, k):
            raise ValueError(f"gradients are [{N}, {k}], so {name} should be [{N}, {k}, {k}], not {list(given.shape)}")
    if folds < 2 or 2 * folds > N:
        raise ValueError(f"{N} examples cannot make {folds} folds of at least two; there should be two folds or more")
    pull_Nk = g_Nk if routed is None else g_Nk / routed.to(g_Nk)[:, None].sqrt()
    J_Nkk = pull_Nk[:, :, None] * pull_Nk[:, None]

    generator = torch.Generator().manual_seed(seed)
    fold_N = torch.empty(N, dtype=torch.long)
    fold_N[torch.randperm(N, generator=generator)] = torch.arange(N) % folds
    draws_SN = torch.randint(N, (resamples, N), generator=generator)
    # Copies of an example stay in one fold. Otherwise one copy would be measured along a direction that another chose.
    fold_N, times_SN = fold_N.to(g_Nk.device), torch.zeros(1 + resamples, N, dtype=torch.float64)
    times_SN[0] = 1.0  # the examples themselves, before their resamples
    times_SN[1:].scatter_add_(1, draws_SN, torch.ones_like(draws_SN, dtype=torch.float64))
    chosen_in, crossed, v_Fk = _ratios(V_Nkk, J_Nkk, times_SN.to(g_Nk.device), fold_N, folds, relative_damping)

    mean_V = V_Nkk.mean(dim=0)
    everything = stability_spectrum(mean_V, J_Nkk.mean(dim=0), relative_damping * mean_V.diagonal().mean().item())
    leading = everything.directions[:, 0]
    v_Fk = torch.where(v_Fk.isnan(), leading, v_Fk)
    v_Fk = torch.where(((v_Fk @ mean_V @ leading) >= 0)[:, None], v_Fk, -v_Fk)
    v_Nk = v_Fk[fold_N]
    pull_N, slope_N = (pull_Nk * v_Nk).sum(dim=1), (g_Nk * v_Nk).sum(dim=1)
    low, _ = _bootstrapped(chosen_in, level)
    _, high = _bootstrapped(crossed, level)
    critical = everything.critical_alpha if crossed[0].isnan() else crossed[0].exp().item()
    calibration = None
    if empirical is not None:
        of_tokens, of_V = (torch.einsum("nij,ni,nj->", X.double(), v_Nk, v_Nk).item() for X in (empirical, V_Nkk))
        calibration = of_tokens / of_V if of_V > 0 else None
    tiny = torch.finfo(g_Nk.dtype).tiny  # without any gradient, loadings and the share of their mean are 0
    return CrossFitted(
        critical_alpha=critical,
        low=min(low, critical),
        high=max(high, critical),
        plug_in=everything.critical_alpha,
        eigenvalues=everything.eigenvalues,
        direction=leading,
        loadings=pull_N / pull_N.square().mean().clamp(min=tiny).sqrt(),
        mean_share=(slope_N.mean().square() / slope_N.square().mean().clamp(min=tiny)).item(),
        calibration=calibration,
    )


def _ratios(
    V_Nkk: Tensor, J_Nkk: Tensor, times_SN: Tensor, fold_N: Tensor, folds: int, relative_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log vᵀVv / vᵀJv of S resamples: on the examples that chose v [S], and cross-fitted [S].

    The third result is the direction v of each fold in the first resample, [F, k].

    Args:
        times_SN: how often each resample holds each example.
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
    V_S, J_S = along(v_Sk, whole)
    crossed_V, crossed_J = along(v_SFk, part).sum(dim=-1)
    chosen_in, crossed = (V.clamp(min=0.0).log() - J.log() for V, J in ((V_S, J_S), (crossed_V, crossed_J)))
    return chosen_in, crossed, v_SFk[0]


def _leading(V: Tensor, J: Tensor, relative_damping: float) -> Tensor:
    """The leading v [..., k] of J v = λ (V + damping) v; NaN where V + damping is not positive definite."""
    damping = relative_damping * V.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    L, failed = torch.linalg.cholesky_ex(V + damping[..., None, None] * torch.eye(V.shape[-1]).to(V))
    half = torch.linalg.solve_triangular(L, J, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    usable = (failed == 0)[..., None, None]
    _, vectors = torch.linalg.eigh(torch.where(usable, whitened + whitened.mT, 0.0))
    v = torch.linalg.solve_triangular(L.mT, vectors[..., -1:], upper=True)
    return torch.where(usable, v, torch.nan)[..., 0]


def _bootstrapped(logs: Tensor, level: float) -> tuple[float, float]:
    """A normal interval of exp(logs[0]) from its resamples logs[1:], after correcting half of the bootstrap's bias."""
    drawn = logs[1:][logs[1:].isfinite()]
    if 2 * len(drawn) <= len(logs) or not logs[0].isfinite():
        return 0.0, float("inf")  # most resamples have no curvature to measure
    reach = torch.special.ndtri(torch.tensor((1 + level) / 2)).item() * drawn.std()
    centre = logs[0] - 0.5 * (drawn.mean() - logs[0])
    return (centre - reach).exp().item(), (centre + reach).exp().item()


# ---- The generalised eigenproblem ------------------------------------------------------------------------------------


def _solved(V: Tensor, J: Tensor) -> Stability:
    """Solve J v = λ V v. With V = LLᵀ it is the ordinary eigenproblem of L⁻¹ J L⁻ᵀ."""
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
