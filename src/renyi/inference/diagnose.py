"""Do the data contradict the model, and from which alpha on would members part? One fitted adapter gives the answer.

This file chooses examples, makes batches, and draws conclusions. Read next: `renyi.ensemble.curvature` (gradients and
curvature of examples), `renyi.measures.stability` (the figures). `renyi.cli.diagnose` is the command, and
`renyi.runs.auto` uses it for `alpha: auto`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from renyi.batches import batches_by_length, padded
from renyi.data import GROUP_COLUMN, VOTE_COLUMNS, PairPreparation
from renyi.ensemble import LoraEnsemble, Reference, completion_labels
from renyi.ensemble.curvature import (
    AdapterSpace,
    Batch,
    Curvature,
    Projected,
    Score,
    diagnose_curvature,
    of_labels,
    per_example_gradients,
)
from renyi.errors import ConfigError, DataError, RenyiError
from renyi.labels import IGNORED
from renyi.measures import cross_fitted, stability_spectrum
from renyi.objectives import QUANTITIES, LogRatios, PreferenceLoss, completion_log_prob, preference_margin, routed_units

_Batches: TypeAlias = Callable[[LoraEnsemble, Dataset, list[int], int, int], Iterator[tuple[list[int], Batch]]]

# The recommended alpha lies this share of the way from the critical alpha to 1; see docs/choosing-alpha.md.
ABOVE_CRITICAL = 0.5

# Above these, an apparent contradiction may come from an adapter that is not fitted yet, or fitted too closely.
UNFINISHED, OVERCONFIDENT = 0.1, 1.3
# Below this, predictions are less sure than they should be, and a contradiction may be overlooked.
UNDERCONFIDENT = 0.8
UNDECIDED = 0.7  # an interval from below this to above 1 decides nothing

FEWEST_MEASURED = 20  # a bootstrap over fewer examples says nothing


class Diagnosis(NamedTuple):
    """What the curvature of one fitted adapter says about a dataset.

    Attributes:
        critical_alpha: the α above which members part, measured along directions that other examples chose. It refers
            to what is routed: with length-normalised routing it is larger, by about the number of tokens.
        low, high: an interval that holds the subspace's critical alpha 95 % of the time; see `cross_fitted`.
        plug_in: 1/λ_max on the examples that chose the direction. It is too low if examples are few.
        eigenvalues: λ of J v = λ V v, descending. At order α members part in directions with λ above 1/α.
        mean_share: how much of the leading direction is unfinished fitting (the mean gradient's share), 0 to 1.
        calibration: the second moment of single tokens' gradients, divided by their curvature. 1: predictions are
            calibrated; above 1: the adapter is too sure; below 1: not sure enough. None for pairs and the Hessian.
        alpha: a recommended order.
        members: a recommended number of members: one more than the number of directions in which members part.
        examples: the rows that were projected, [N].
        loadings: of each example on the leading direction, in units of the root mean square, [N]. Examples that
            contradict each other lie far from zero on opposite sides.
        log_likelihood: of each example under the member, nats, [N]; for a pair, of its label.
        directions: leading directions in the adapter's parameters, [P, k], with vᵀVv = 1.
        groups: the names of the measured groups, if rows share a responsibility (`routing_group`). The figures are then
            of groups, whose ℓ is the sum over their rows; `examples` and their `loadings` are still rows.
        group_loadings: of each group on the leading direction, in units of the root mean square.
    """

    critical_alpha: float
    low: float
    high: float
    plug_in: float
    eigenvalues: list[float]
    mean_share: float
    calibration: float | None
    alpha: float
    members: int
    examples: list[int]
    loadings: list[float]
    log_likelihood: list[float]
    directions: Tensor
    groups: list[str] | None = None
    group_loadings: list[float] | None = None

    @property
    def contradicted(self) -> bool:
        """Whether the data contradict the model: the whole interval of the critical alpha is below 1."""
        return self.high < 1

    @property
    def undecided(self) -> bool:
        """Whether there are too few examples to decide."""
        return self.low < UNDECIDED and not self.contradicted


class Pairs(NamedTuple):
    """What is needed to score rows of preferences."""

    loss: PreferenceLoss
    reference: Reference
    preparation: PairPreparation


def diagnose(
    ensemble: LoraEnsemble,
    rows: Dataset,
    pairs: Pairs | None = None,
    *,
    member: int = 0,
    routing_quantity: str | None = None,
    curvature: Curvature = "fisher",
    num_directions: int = 32,
    max_examples: int = 512,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Diagnosis:
    """Diagnose one member on a dataset.

    Half of the chosen examples span the directions. The other half is measured along them. Rows with a column
    `renyi.data.GROUP_COLUMN` are measured in groups: a group's ℓ is the sum over its rows, and its critical alpha is
    lower, the more rows agree. Then whole groups are drawn, until there are as many rows as asked for.

    Args:
        ensemble: its member `member` was fitted to data like these rows.
        rows: prepared, with `input_ids` and `labels`; or as `prepare_pairs` makes them. Take rows that the member was
            not fitted to: it makes fewer errors on rows that it was fitted to.
        pairs: for preferences: loss, reference and preparation; None for sequences.
        member: number of the member to diagnose.
        routing_quantity: the quantity that is routed, one of `renyi.objectives.QUANTITIES`; None for the ensemble's.
        curvature: V as the "fisher" (Gauss–Newton) matrix, or as the "hessian". With "fisher", V is also estimated by
            the second moment of tokens' gradients, and the estimate with the greater critical alpha is used.
        num_directions: k, the dimension of the subspace that gradients span. It is smaller if they span less.
        max_examples: the most rows that are used, drawn at random.
        tokens_per_batch: limit on the tokens of one pass, copies included. `memory_needed` gives the memory.
        seed: of the draw, and of the bootstrap.
        progress: called with the number of rows done.

    Raises:
        DataError: there are too few rows.
        ConfigError: the settings cannot work.
    """
    if num_directions < 1 or max_examples < 4:
        raise ConfigError("is too few", where="num_directions" if num_directions < 1 else "max_examples")
    of_rows = list(map(str, rows[GROUP_COLUMN])) if GROUP_COLUMN in rows.column_names else None
    drawn = whole_groups(of_rows or list(range(len(rows))), max_examples, seed)
    number = len(drawn) // 2
    measured, spanning = ([row for group in part for row in group] for part in (drawn[:number], drawn[number:]))
    if number < FEWEST_MEASURED:
        kind = "rows" if of_rows is None else "groups"
        raise DataError(
            f"{len(set(of_rows)) if of_rows else len(rows)} {kind} are too few: half of them are measured, and fewer "
            f"than {FEWEST_MEASURED} say nothing",
            hint=f"Give at least {2 * FEWEST_MEASURED} {kind}.",
        )
    if getattr(ensemble.base, "is_quantized", False):
        raise ConfigError(
            "the base is quantised, and derivatives along directions do not pass through its layers",
            where="model",
            hint="Load the base as it was before; half precision is enough.",
        )
    space = AdapterSpace(ensemble, member)
    quantity = ensemble.routing_quantity if routing_quantity is None else routing_quantity
    if quantity not in QUANTITIES:
        raise ConfigError(f"is {quantity!r}", where="routing_quantity", hint=f"Give {' or '.join(QUANTITIES)}.")
    done = [0]
    order: list[int] = []
    tokens: list[int] = []  # trained tokens of each example, in that order

    def counted(batches: Iterator[tuple[list[int], Batch]], is_measured: bool) -> Iterator[Batch]:
        for numbers, batch in batches:
            yield batch
            if is_measured:
                order.extend(numbers)
                of_rows = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
                tokens.extend(of_rows.view(-1, len(numbers)).sum(dim=0).tolist())  # both rows of a pair
            done[0] += len(numbers)
            progress(done[0])

    batches_of = _sequence_batches if pairs is None else _pair_batches(pairs)
    margin = None if pairs is None else _margin(pairs, member)
    k = min(num_directions, len(spanning))
    limits = (tokens_per_batch, k)  # an example's gradient is as large as a direction

    with _explained(curvature):
        projected = diagnose_curvature(
            space,
            counted(batches_of(ensemble, rows, measured, *limits), is_measured=True),
            counted(batches_of(ensemble, rows, spanning, *limits), is_measured=False),
            k,
            curvature=curvature,
            margin=margin,
            tie_strength=_tie_strength(rows, pairs),
            tokens_per_pass=tokens_per_batch,
            seed=seed,
        )
    names, of_each = None, projected.log_likelihood.tolist()
    by_row_Nk = projected.gradients.double()
    if of_rows is not None:
        if quantity != "sequence":
            raise ConfigError(
                "divides by tokens, and a group's log-likelihood is a sum",
                where="routing_quantity",
                hint="Write sequence, or prepare the rows without routing_group.",
            )
        names, projected, tokens = _summed(projected, [of_rows[i] for i in order], tokens)
    # Both estimate V at a fitted, calibrated point. The Fisher matrix is too small if predictions are too sure. The
    # second moment of tokens is too small if answers are almost certain. So the greater critical alpha is used.
    estimates = [projected.curvature] if projected.empirical is None else [projected.curvature, projected.empirical]
    units_N = routed_units(torch.tensor(tokens), quantity).to(projected.gradients)
    with _explained(curvature):
        each = [
            cross_fitted(projected.gradients, V_Nkk, projected.empirical, units_N, seed=seed) for V_Nkk in estimates
        ]
    found, V_Nkk = max(zip(each, estimates, strict=True), key=lambda pair: pair[0].critical_alpha)
    g_Nk, V = projected.gradients.double() / units_N.double().sqrt()[:, None], V_Nkk.double().mean(dim=0)
    spectrum = stability_spectrum(V, g_Nk.mT @ g_Nk / len(g_Nk), 0.1 * V.diagonal().mean().item())
    directions = projected.basis.double() @ spectrum.directions
    alpha = recommended_alpha(found.critical_alpha)
    # Eigenvalues are too great if examples are few. All are corrected by the factor of the leading one.
    shrink = min(1.0, found.plug_in / found.critical_alpha) if found.critical_alpha > 0 else 1.0
    apart = sum(1 for value in found.eigenvalues.tolist() if value * shrink > 1 / alpha) if found.high < 1 else 0
    loadings = found.loadings
    if names is not None:  # of rows, on the leading direction that the groups' figures are of
        of_rows_N = by_row_Nk @ spectrum.directions[:, 0]
        loadings = of_rows_N / of_rows_N.square().mean().sqrt().clamp(min=1e-300)
    return Diagnosis(
        critical_alpha=found.critical_alpha,
        low=found.low,
        high=found.high,
        plug_in=found.plug_in,
        eigenvalues=found.eigenvalues.tolist(),
        mean_share=found.mean_share,
        calibration=each[0].calibration,  # of the Fisher matrix, whichever estimate is used
        alpha=alpha,
        members=1 + apart,
        examples=order,
        loadings=loadings.tolist(),
        log_likelihood=of_each,
        directions=directions,
        groups=names,
        group_loadings=None if names is None else found.loadings.tolist(),
    )


def whole_groups(of_rows: Sequence[Any], most: int, seed: int) -> list[list[int]]:
    """The rows of groups that are drawn at random until there are `most` rows.

    Of large groups, enough are drawn for a measurement, even if their rows are more.

    Args:
        of_rows: the group of each row, [N].
        most: rows.
        seed: of the draw.
    """
    rows_of: dict[Any, list[int]] = {}
    for row, group in enumerate(of_rows):
        rows_of.setdefault(group, []).append(row)
    groups = list(rows_of.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn: list[list[int]] = []
    rows = 0
    for i in order:
        if rows + len(groups[i]) > most and (len(drawn) >= 2 * FEWEST_MEASURED or len(groups) == len(of_rows)):
            break
        drawn.append(groups[i])
        rows += len(groups[i])
    return drawn


def _summed(
    projected: Projected, groups: Sequence[str], tokens: Sequence[int]
) -> tuple[list[str], Projected, list[int]]:
    """The names of groups, what was projected summed over the rows of each, and their tokens."""
    names = sorted(set(groups))
    number = {name: i for i, name in enumerate(names)}
    group_N = torch.tensor([number[group] for group in groups], device=projected.gradients.device)

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(len(names), *values.shape[1:]).index_add(0, group_N, values)

    empirical = None if projected.empirical is None else summed(projected.empirical)
    sums = Projected(
        summed(projected.log_likelihood),
        summed(projected.gradients),
        summed(projected.curvature),
        empirical,
        projected.basis,
    )
    return names, sums, summed(torch.tensor(tokens, device=group_N.device)).tolist()


def loadings_along(
    ensemble: LoraEnsemble,
    rows: Dataset,
    directions: Tensor,
    pairs: Pairs | None = None,
    *,
    member: int = 0,
    tokens_per_batch: int = 1024,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """The log-likelihood of each row, [N] in nats, and its derivative along each of k directions, [N, k].

    It takes one forward and one backward of each row, for any k.

    Args:
        ensemble: as for `diagnose`.
        rows: prepared, as for `diagnose`; all of them are used.
        directions: in the adapter's parameters, [P, k], such as `Diagnosis.directions`.
        pairs: as for `diagnose`; the log-likelihood is then that of the label, or of all votes of the pair.
        member: number of the member.
        tokens_per_batch: limit on the tokens of one pass. At most 16 rows are in a pass, for each of which two floats a
            parameter of the adapter are kept.
        progress: called with the number of rows done.
    """
    space, rows_per_example = AdapterSpace(ensemble, member), 1 if pairs is None else 2
    batches_of = _sequence_batches if pairs is None else _pair_batches(pairs)
    margin = None if pairs is None else _margin(pairs, member)
    tie_strength = _tie_strength(rows, pairs)
    directions = directions.to(space.origin)
    ell_N, loadings_Nk = torch.zeros(len(rows)), torch.zeros(len(rows), directions.shape[1])
    done = 0
    with _explained("fisher"):
        for numbers, batch in batches_of(ensemble, rows, list(range(len(rows))), tokens_per_batch, 16):
            values_B, gradients_BP = per_example_gradients(space, batch, margin, rows_per_example)
            along_Bk = gradients_BP @ directions
            if margin is not None:  # of the labels, from those of Δ
                values_B, slope_B, _ = of_labels(values_B, batch, tie_strength)
                along_Bk = slope_B[:, None] * along_Bk
            ell_N[numbers], loadings_Nk[numbers] = values_B.float().cpu(), along_Bk.float().cpu()
            done += len(numbers)
            progress(done)
    return ell_N, loadings_Nk


def recommended_alpha(critical_alpha: float) -> float:
    """The order half-way between the critical alpha and 1."""
    return round(min(1.0, critical_alpha) + ABOVE_CRITICAL * (1 - min(1.0, critical_alpha)), 2)


def memory_needed(ensemble: LoraEnsemble, num_directions: int = 32, tokens_per_batch: int = 4096) -> int:
    """About how many bytes `diagnose` takes at its peak, beside the model and the activations of one batch.

    It is the greater of two amounts. One: the gradients of as many examples as there are directions, the directions so
    far (twice as many), and copies while both are merged. Measured: eleven floats for each parameter and direction.
    Two: the directions, and the derivatives of tokens' last hidden states along each.
    """
    parameters = AdapterSpace(ensemble).size
    head: Any = ensemble.get_output_embeddings()
    hidden = int(head.weight.shape[1])
    return 4 * num_directions * max(11 * parameters, 3 * parameters + 2 * tokens_per_batch * hidden)


def spread(diagnosis: Diagnosis, num_members: int, size: float = 0.5) -> Tensor:
    """Offsets [M, P] that move members apart along the leading directions. Their mean is zero, and all differ.

    At most M − 1 leading directions are used, those with λ above 1. The offsets along a direction are a column of the
    discrete cosine transform; these columns are orthogonal. At `size` 1 the mean cost of the spread along one direction
    is half a nat an example, because vᵀVv = 1.
    """
    worth = max(1, sum(value > 1 for value in diagnosis.eigenvalues))
    number = min(num_members - 1, worth)
    m = torch.arange(num_members, dtype=torch.float64)
    columns = [math.sqrt(2) * torch.cos(math.pi * (2 * m + 1) * j / (2 * num_members)) for j in range(1, number + 1)]
    positions_Mk = torch.stack(columns, dim=1) if columns else m.new_zeros(num_members, 0)
    directions = diagnosis.directions[:, :number].double()
    return size * positions_Mk.to(directions) @ directions.T


@contextmanager
def _explained(curvature: Curvature) -> Iterator[None]:
    """Turn errors of derivatives and matrices into errors that name the cause in the adapter or the model."""
    try:
        yield
    except RenyiError:
        raise
    except NotImplementedError as error:
        raise ConfigError(
            f"this model cannot be differentiated along directions ({str(error).splitlines()[0]})",
            where="curvature",
            hint='Try "hessian", which needs no forward-mode derivatives.',
        ) from error
    except torch.linalg.LinAlgError as error:
        raise DataError(
            "the examples' gradients are not finite",
            hint="The adapter's training diverged, or the base is loaded in a precision too low for it.",
        ) from error
    except ValueError as error:
        if curvature == "hessian":
            raise ConfigError(
                f"the Hessian is not positive, so the adapter is not at a fitted point ({error})",
                where="curvature",
                hint='Train it longer, or take "fisher", which is never negative.',
            ) from error
        raise DataError(
            f"there is nothing to part over: {error}",
            hint="The adapter predicts every example with certainty, or its training diverged.",
        ) from error


# ---- Batches ---------------------------------------------------------------------------------------------------------


def _sequence_batches(
    ensemble: LoraEnsemble, rows: Dataset, numbers: list[int], tokens: int, most: int
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of at most `most` prepared rows under a budget of tokens, padded on the right, with their row numbers."""
    columns = rows.select_columns(["input_ids", "labels"]).select(numbers)
    for chosen in _at_most(most, batches_by_length([len(ids) for ids in columns["input_ids"]], tokens)):
        part = columns[chosen]
        attended = [[1] * len(ids) for ids in part["input_ids"]]
        batch = {
            "input_ids": (part["input_ids"], 0),
            "attention_mask": (attended, 0),
            "labels": (part["labels"], IGNORED),
        }
        yield [numbers[i] for i in chosen], {k: padded(*v).to(ensemble.device) for k, v in batch.items()}


def _pair_batches(pairs: Pairs) -> _Batches:
    """The same for preference pairs, chosen rows first, with the reference's log-probabilities."""
    loss, reference, preparation = pairs
    collate = DataCollatorForPreference(0, preparation.max_length, preparation.truncation_mode)

    def batches(
        ensemble: LoraEnsemble, rows: Dataset, numbers: list[int], tokens: int, most: int
    ) -> Iterator[tuple[list[int], Batch]]:
        columns = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).select(numbers)
        lengths = [2 * (len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))) for r in columns]
        for chosen in _at_most(most, batches_by_length(lengths, tokens)):
            batch = {k: v.to(ensemble.device) for k, v in collate([columns[i] for i in chosen]).items()}
            batch["labels"] = completion_labels(batch)
            batch["reference"] = reference.log_probs(batch, loss.ld_alpha)
            if VOTE_COLUMNS[0] in rows.column_names:
                at = rows.select([numbers[i] for i in chosen])
                batch["votes"] = torch.tensor([at[column] for column in VOTE_COLUMNS], device=ensemble.device).T
            yield [numbers[i] for i in chosen], batch

    return batches


def _at_most(most: int, batches: Iterator[list[int]]) -> Iterator[list[int]]:
    return (batch[start : start + most] for batch in batches for start in range(0, len(batch), most))


def _tie_strength(rows: Dataset, pairs: Pairs | None) -> float:
    """ν of the rows' votes. Pairs without votes are Bradley–Terry, whatever the loss says of ties."""
    return pairs.loss.tie_strength if pairs is not None and VOTE_COLUMNS[0] in rows.column_names else 0.0


def _margin(pairs: Pairs, member: int) -> Score:
    """Δ [B] of a batch of pairs from its rows' token log-probabilities.

    Raises:
        ConfigError: the loss is no Bradley–Terry likelihood of the label.
    """
    loss = pairs.loss
    if loss.loss_type != ("sigmoid",) or loss.loss_weights:
        raise ConfigError(
            f"{' + '.join(loss.loss_type)} is no likelihood of the label, so its curvature is not the Fisher matrix's",
            where="loss_type",
            hint="Diagnose an adapter that was tuned with the sigmoid loss.",
        )

    def margin(log_probs: Tensor, batch: Batch) -> Tensor:
        mask, reference = batch["completion_mask"], batch["reference"]
        logps = completion_log_prob(log_probs[None], mask[:, 1:], loss.ld_alpha)
        ratios = logps - reference[member if len(reference) > 1 else 0]
        return preference_margin(LogRatios(*ratios.chunk(2, dim=1), *mask.sum(dim=1).chunk(2)), loss)[0]

    return margin
