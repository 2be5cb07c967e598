"""How well an ensemble answers multiple-choice questions, and whether it knows where it is wrong, beside baselines.

Read next: `metrics.py` (the figures), `selective.py` (the threshold for abstention).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from renyi.evaluation import bootstrap, metrics
from renyi.evaluation.bootstrap import RESAMPLES, Estimate, Statistic, intervals
from renyi.evaluation.member_groups import Specialisation, rows_by_group, specialisation
from renyi.evaluation.metrics import Array, ReliabilityBin
from renyi.measures import draw_uncertainty, token_uncertainty
from renyi.objectives import renyi_loss

COVERAGE = 0.8


class Opinion(NamedTuple):
    """The probabilities that one ensemble gives to the options of N questions.

    Attributes:
        log_probs: each member's log-probabilities of the options, [M, N, C]; −inf where there is no such option.
        weights: mixture weights [M].
        log_likelihood: log p_m(option | prompt) [M, N, C], nats, if the perplexity of answers is wanted.
        tokens: of each option, [N, C], with `log_likelihood`.
        num_draws: how many members, one after another, are draws of one.
    """

    log_probs: Tensor
    weights: Tensor
    log_likelihood: Tensor | None = None
    tokens: Tensor | None = None
    num_draws: int = 1

    def mixture(self) -> Array:
        """Probabilities Σ_m π_m p_m, float64 [N, C]."""
        log_weights = self.weights.detach().cpu().double().log()
        return _normalised((-renyi_loss(self.log_probs.double(), 1.0, log_weights)).exp().numpy())

    def members(self) -> list[Array]:
        """Each member's probabilities, float64 [N, C]."""
        return [_normalised(p.double().exp().numpy()) for p in self.log_probs]

    def uncertainty(self) -> dict[str, Array]:
        """Scores [N] of how unsure the answer is: higher is less sure. Scores of disagreement exist only if M > 1.

        `max_probability` is 1 − max p, so that it rises with doubt like the others. `perplexity` is that of the chosen
        option: exp of the mixture's NLL per token.
        """
        log_weights = self.weights.detach().cpu().double().log()
        found = token_uncertainty(self.log_probs, log_weights)._asdict()
        if self.num_draws > 1:
            found |= draw_uncertainty(self.log_probs, log_weights, self.num_draws)._asdict()
        scores = {"max_probability": 1 - self.mixture().max(axis=1), "total": found["total"].numpy()}
        if self.log_likelihood is not None and self.tokens is not None:
            taken = torch.from_numpy(self.mixture().argmax(axis=1))[:, None]
            nll_NC = renyi_loss(self.log_likelihood.double(), 1.0, self.weights.detach().cpu().double().log())
            scores["perplexity"] = (nll_NC.gather(1, taken) / self.tokens.gather(1, taken)).exp().squeeze(1).numpy()
        if len(self.weights) == 1:
            return scores
        return scores | {name: x.numpy() for name, x in found.items() if name != "total"}

    def rows(self, rows: NDArray[np.int64]) -> "Opinion":
        """The same for some of the questions."""
        picked = torch.from_numpy(rows)
        return Opinion(
            self.log_probs[:, picked],
            self.weights,
            None if self.log_likelihood is None else self.log_likelihood[:, picked],
            None if self.tokens is None else self.tokens[picked],
            self.num_draws,
        )

    def pooled(self) -> "Opinion":
        """The mixture as the opinion of one member."""
        return Opinion(torch.from_numpy(self.mixture()).log()[None], torch.ones(1))

    def alone(self, member: int) -> "Opinion":
        """The opinion of one member."""
        ell, of_member = self.log_likelihood, slice(member, member + 1)
        return Opinion(self.log_probs[of_member], torch.ones(1), None if ell is None else ell[of_member], self.tokens)


def _normalised(probs: Array) -> Array:
    return probs / probs.sum(axis=1, keepdims=True)


class Detection(NamedTuple):
    """How well an uncertainty finds wrong answers; see `metrics`.

    Attributes:
        auroc, aupr: how well it separates wrong answers from right ones.
        aurc: area under the risk–coverage curve; lower is better.
        prr: prediction rejection ratio.
        accuracy_at_coverage: accuracy on the 80 % most certain questions.
    """

    auroc: Estimate
    aupr: Estimate
    aurc: Estimate
    prr: Estimate
    accuracy_at_coverage: Estimate


class OutOfDistribution(NamedTuple):
    """How well an uncertainty tells the questions of another dataset from those evaluated."""

    auroc: Estimate
    aupr: Estimate


class System(NamedTuple):
    """The mixture, a member, or a baseline.

    Attributes:
        name: its name in tables.
        accuracy, nll, brier, ece, adaptive_ece: of its probabilities; see `metrics`. NLL in nats a question.
        detection: how well each of its uncertainties finds its errors.
        out_of_distribution: how well each of its uncertainties finds another dataset's questions; empty without one.
        reliability: its probabilities against the share that was right.
        risk: for each of its uncertainties the mean error of the n most certain answers, n = 1 to N.
        temperature: the divisor of its log-probabilities; 1 unless it was fitted. Of two fitted on halves, the
            geometric mean.
    """

    name: str
    accuracy: Estimate
    nll: Estimate
    brier: Estimate
    ece: Estimate
    adaptive_ece: Estimate
    detection: dict[str, Detection]
    out_of_distribution: dict[str, OutOfDistribution]
    reliability: list[ReliabilityBin]
    risk: dict[str, list[float]]
    temperature: float = 1.0


class ChoiceGroup(NamedTuple):
    """The mixture on one group of questions, and each member's accuracy there."""

    group: str
    questions: int
    accuracy: float
    nll: float
    ece: float
    epistemic: float
    members: list[float]


class ChoiceEvaluation(NamedTuple):
    """What `evaluate_choice` finds.

    Attributes:
        questions: how many were evaluated.
        calibration_questions: how many were set aside for the temperature and the threshold.
        systems: the mixture, its members if more than one, the baselines, the temperature-scaled single member, and the
            temperature-scaled mixture if it has more than one.
        most_contested: positions of the evaluated questions, those with the most epistemic uncertainty first.
        groups, specialisation: by group, if groups were given.
    """

    questions: int
    calibration_questions: int
    systems: list[System]
    most_contested: list[int]
    groups: list[ChoiceGroup] | None = None
    specialisation: Specialisation | None = None


def calibration_split(questions: int, share: float, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions set aside for calibration, and those evaluated, both ascending; at least one is evaluated."""
    order = np.random.default_rng(seed).permutation(questions)
    aside = min(round(share * questions), questions - 1)
    return np.sort(order[:aside]), np.sort(order[aside:])


def evaluate_choice(
    ensemble: Opinion,
    labels: Sequence[int],
    *,
    baselines: Mapping[str, Opinion] | None = None,
    groups: Sequence[str] | None = None,
    out_of_distribution: Mapping[str, Opinion] | None = None,
    calibration: NDArray[np.int64] | None = None,
    cross_fitted: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ChoiceEvaluation:
    """Evaluate an ensemble, each of its members and baselines on the same questions.

    Args:
        ensemble: its opinion on N questions.
        labels: which option is right, [N].
        baselines: other ensembles, or single adapters, on the same questions, by name.
        groups: the group of each question, such as its subject, [N].
        out_of_distribution: opinions on another dataset: of the ensemble ("mixture") and of baselines (by name).
        calibration: questions that are not evaluated. A temperature is fitted on them: for the first baseline with a
            single member, else for member 0, and for the mixture of several members (pooled first, then scaled:
            arXiv 2007.08792). None for no temperature.
        cross_fitted: without such questions, fit the temperature of each half of the questions on the other half.
        resamples: draws for the intervals.
        seed: of the draws.

    Raises:
        ValueError: lengths do not match.
    """
    right = np.asarray(labels)
    for name, opinion in {"mixture": ensemble, **(baselines or {})}.items():
        if opinion.log_probs.shape[1] != len(right):
            raise ValueError(f"there are {len(right)} labels of {opinion.log_probs.shape[1]} questions of {name}")
    aside = np.empty(0, np.int64) if calibration is None else calibration
    kept = np.setdiff1d(np.arange(len(right)), aside)
    elsewhere = out_of_distribution or {}
    systems = []

    def add(name: str, opinion: Opinion, other: Opinion | None = None, temperature: float = 1.0) -> None:
        systems.append(_system(name, opinion.rows(kept), right[kept], other, temperature, resamples, seed))

    add("mixture", ensemble, elsewhere.get("mixture"))
    if len(ensemble.weights) > 1:
        for member in range(len(ensemble.weights)):
            other = elsewhere.get("mixture")
            add(f"member {member}", ensemble.alone(member), other and other.alone(member))
    for name, opinion in (baselines or {}).items():
        add(name, opinion, elsewhere.get(name))
    source, single = next(
        ((n, o) for n, o in (baselines or {}).items() if len(o.weights) == 1), ("mixture", ensemble.alone(0))
    )
    if len(aside) or (cross_fitted and len(right) > 1):
        other = elsewhere.get(source)
        scaled = {("member 0" if source == "mixture" else source): (single, other and other.alone(0))}
        if len(ensemble.weights) > 1:
            other = elsewhere.get("mixture")
            scaled["mixture"] = (ensemble.pooled(), other and other.pooled())
        for name, (opinion, other) in scaled.items():
            own = opinion.log_probs[0].double().numpy()
            if len(aside):
                temperature_N = np.full(len(right), metrics.fit_temperature(own[aside], right[aside]))
            else:
                temperature_N = metrics.cross_fitted_temperatures(own, right, seed)
            typical = float(np.exp(np.log(temperature_N).mean()))
            tempered = _tempered(opinion, temperature_N)
            add(f"{name}, temperature", tempered, other and _tempered(other, typical), typical)
    of_mixture = ensemble.rows(kept)
    epistemic = of_mixture.uncertainty().get("epistemic", np.zeros(len(kept)))
    names = None if groups is None else [groups[i] for i in kept]
    correct_MN = of_mixture.log_probs[:, torch.arange(len(kept)), torch.from_numpy(right[kept])]
    return ChoiceEvaluation(
        questions=len(kept),
        calibration_questions=len(aside),
        systems=systems,
        most_contested=kept[np.argsort(-epistemic, kind="stable")].tolist(),
        groups=None if names is None else _groups(names, of_mixture, right[kept], epistemic),
        specialisation=None if names is None else specialisation(correct_MN, of_mixture.weights.cpu(), names),
    )


def _tempered(opinion: Opinion, temperature_N: ArrayLike) -> Opinion:
    """With the log-probabilities of each question divided by its temperature, or all by the same one."""
    divisor = torch.from_numpy(np.asarray(temperature_N))[..., None]
    return opinion._replace(log_probs=(opinion.log_probs.double() / divisor).log_softmax(dim=-1))


def _system(
    name: str,
    opinion: Opinion,
    labels: NDArray[np.int64],
    elsewhere: Opinion | None,
    temperature: float,
    resamples: int,
    seed: int,
) -> System:
    probs, scores = opinion.mixture(), opinion.uncertainty()
    correct = metrics.is_right(probs, labels)
    quality: dict[str, tuple[float, Statistic]] = {
        "accuracy": (metrics.accuracy(probs, labels), bootstrap.mean(correct)),
        "nll": (metrics.nll(probs, labels), bootstrap.mean(metrics.example_nll(probs, labels))),
        "brier": (metrics.brier(probs, labels), bootstrap.mean(metrics.example_brier(probs, labels))),
        "ece": (metrics.ece(probs, labels), bootstrap.ece(probs, labels)),
        "adaptive_ece": (metrics.adaptive_ece(probs, labels), bootstrap.adaptive_ece(probs, labels)),
    }
    return System(
        name=name,
        **_estimates(quality, len(labels), resamples, seed),
        detection={k: _detection(score, correct, resamples, seed) for k, score in scores.items()},
        out_of_distribution={}
        if elsewhere is None
        else {k: _told_apart(scores[k], other, resamples, seed) for k, other in elsewhere.uncertainty().items()},
        reliability=metrics.reliability(probs, labels),
        risk={k: metrics.risk_coverage(score, ~correct).risk.tolist() for k, score in scores.items()},
        temperature=temperature,
    )


def _estimates(
    figures: dict[str, tuple[float, Statistic]], examples: int, resamples: int, seed: int
) -> dict[str, Estimate]:
    values, statistics = ({name: pair[i] for name, pair in figures.items()} for i in (0, 1))
    return intervals(values, statistics, examples, resamples, seed)  # type: ignore[arg-type]


def _detection(score: Array, correct: NDArray[np.bool_], resamples: int, seed: int) -> Detection:
    by: dict[str, tuple[Callable[..., float], Callable[..., Statistic]]] = {
        name: (getattr(metrics, name), getattr(bootstrap, name)) for name in ("auroc", "aupr", "aurc", "prr")
    }
    figures = {name: (value(score, ~correct), statistic(score, ~correct)) for name, (value, statistic) in by.items()}
    figures["accuracy_at_coverage"] = (
        metrics.accuracy_at_coverage(score, correct, COVERAGE),
        bootstrap.accuracy_at_coverage(score, correct, COVERAGE),
    )
    return Detection(**_estimates(figures, len(score), resamples, seed))


def _told_apart(here: Array, elsewhere: Array, resamples: int, seed: int) -> OutOfDistribution:
    score = np.concatenate([here, elsewhere])
    is_elsewhere = np.arange(len(score)) >= len(here)
    figures = {
        "auroc": (metrics.auroc(score, is_elsewhere), bootstrap.auroc(score, is_elsewhere)),
        "aupr": (metrics.aupr(score, is_elsewhere), bootstrap.aupr(score, is_elsewhere)),
    }
    return OutOfDistribution(**_estimates(figures, len(score), resamples, seed))


def _groups(names: Sequence[str], opinion: Opinion, labels: NDArray[np.int64], epistemic: Array) -> list[ChoiceGroup]:
    probs, members = opinion.mixture(), opinion.members()
    rows_of = rows_by_group(names)
    group_N = np.empty(len(names), np.int64)
    for g, rows in enumerate(rows_of.values()):
        group_N[rows] = g
    right_MN = [metrics.is_right(q, labels) for q in members]
    ece_G = metrics.ece_by_group(probs, labels, group_N)
    right_N, nll_N = metrics.is_right(probs, labels), metrics.example_nll(probs, labels)
    return [
        ChoiceGroup(
            name,
            len(rows),
            float(right_N[rows].mean()),
            float(nll_N[rows].mean()),
            float(ece_G[g]),
            float(epistemic[rows].mean()),
            [float(right[rows].mean()) for right in right_MN],
        )
        for g, (name, rows) in enumerate(rows_of.items())
    ]
