"""The figures of an evaluation, as PNG bytes: calibration, selective prediction, members by groups, disagreement.

Read next: `shared_sections.py`, which puts them into reports.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from renyi.evaluation.metrics import ReliabilityBin
from renyi.evaluation.sections import shortened
from renyi.evaluation.vote_quality import ShareBin
from renyi.text import printable

MIXTURE, ACCENT, OTHERS = "#1f4e79", "#c8553d", "#9aa5b1"
_BASELINES = ("#c8553d", "#3a7d44", "#8e5ea2", "#c9a227", "#3c8dad")


def draw_reliability(systems: Mapping[str, Sequence[ReliabilityBin]]) -> bytes:
    """Share of right answers against confidence, one panel for each system. A dot's area is its bin's share."""
    figure = Figure(figsize=(3.4 * len(systems), 3.9), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(systems), squeeze=False)[0]
    for panel, (name, bins) in zip(panels, systems.items(), strict=True):
        total = sum(b.examples for b in bins)
        confidence, right = [b.confidence for b in bins], [b.accuracy for b in bins]
        panel.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
        panel.vlines(confidence, confidence, right, color=ACCENT, lw=2, alpha=0.5)
        panel.scatter(confidence, right, s=[12 + 500 * b.examples / total for b in bins], color=MIXTURE, alpha=0.85)
        panel.set(xlim=(0, 1.02), ylim=(-0.03, 1.05), xlabel="confidence")
        panel.set_box_aspect(1)
        panel.set_title(plain(name), fontsize=10)
        _bare(panel)
    panels[0].set_ylabel("share right")
    return _png(figure)


def draw_vote_shares(systems: Mapping[str, Sequence[ShareBin]]) -> bytes:
    """The annotators' share against the predicted one, one panel for each system. A dot's area is its bin's share."""
    figure = Figure(figsize=(3.4 * len(systems), 3.9), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(systems), squeeze=False)[0]
    for panel, (name, bins) in zip(panels, systems.items(), strict=True):
        total = sum(b.pairs for b in bins)
        predicted, annotators = [b.predicted for b in bins], [b.annotators for b in bins]
        panel.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
        panel.vlines(predicted, predicted, annotators, color=ACCENT, lw=2, alpha=0.5)
        panel.scatter(predicted, annotators, s=[12 + 500 * b.pairs / total for b in bins], color=MIXTURE, alpha=0.85)
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.05), xlabel="predicted share")
        panel.set_box_aspect(1)
        panel.set_title(plain(name), fontsize=10)
        _bare(panel)
    panels[0].set_ylabel("annotators' share")
    return _png(figure)


def draw_risk_coverage(risks: Mapping[str, Sequence[float]], target: float | None = None) -> bytes:
    """Error among answered questions against their share. The first system is in front, its members are grey."""
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = iter(_BASELINES * len(risks))
    labelled_members = False
    for i, (name, risk) in enumerate(risks.items()):
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        is_member = i > 0 and name.startswith("member ") and name[7:].isdecimal()
        style = {"color": OTHERS, "lw": 0.9} if is_member else {"color": next(colours), "lw": 1.6}
        label = None if is_member and labelled_members else "members alone" if is_member else plain(name)
        labelled_members |= is_member
        if i == 0:
            style = {"color": MIXTURE, "lw": 2.4, "zorder": 5}
        axes.plot(coverage, risk, label=label, **style)  # type: ignore[arg-type]
    if target is not None:
        axes.axhline(target, color="grey", lw=0.8, ls=":")
        axes.text(0.995, target, "wanted risk", ha="right", va="bottom", fontsize=8, color="grey")
    axes.set(xlim=(0, 1), xlabel="share answered, the most certain first", ylabel="share of those that is wrong")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    _bare(axes)
    return _png(figure)


def draw_members_by_groups(led: Sequence[Sequence[float]], groups: Sequence[str], most: int = 30) -> bytes:
    """Share of each group [M][G] that each member explains best."""
    shares_GM = np.asarray(led).T[:most]
    figure = Figure(
        figsize=(3.2 + 0.62 * shares_GM.shape[1], 1.3 + 0.3 * len(shares_GM)), dpi=130, layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(shares_GM, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (g, m), share in np.ndenumerate(shares_GM):
        axes.text(m, g, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "black")
    axes.set_xticks(range(shares_GM.shape[1]), [str(m) for m in range(shares_GM.shape[1])])
    axes.set_yticks(range(len(shares_GM)), [plain(shortened(g, 28)) for g in groups[:most]])
    axes.set_xlabel("member")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return _png(figure)


def draw_disagreement(epistemic: ArrayLike, correct: ArrayLike) -> bytes:
    """Histograms of epistemic uncertainty for right and for wrong answers, each as shares of its own total."""
    values, right = np.asarray(epistemic, np.float64), np.asarray(correct, bool)
    figure = Figure(figsize=(7, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, max(float(values.max()), 1e-12), 31).tolist()
    for here, colour, name in ((right, MIXTURE, "right"), (~right, ACCENT, "wrong")):
        if here.any():
            weights = np.full(int(here.sum()), 1 / here.sum())
            label = f"{name} ({here.sum():,}), mean {values[here].mean():.3g}"
            axes.hist(values[here], edges, weights=weights, color=colour, alpha=0.55, label=label)
    axes.set(xlabel="epistemic uncertainty (nats): how far the members disagree", ylabel="share of the answers")
    axes.legend(frameon=False, fontsize=9)
    _bare(axes)
    return _png(figure)


def plain(label: str) -> str:
    """A label from data, escaped so that matplotlib draws every character and reads no `$` as a formula."""
    return printable(label, keep="").replace("$", r"\$")


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
