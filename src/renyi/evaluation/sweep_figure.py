"""The figure of a sweep as PNG bytes: figures over alpha, one line for each number of members, the chosen cell ringed.

Read next: `sweep_choice.py`, the figures and the choice.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from renyi.evaluation.plots import ACCENT, OTHERS
from renyi.evaluation.sweep_choice import Cell, CellQuality

_COLOURS = ("#1f4e79", "#3a7d44", "#8e5ea2", "#c9a227", "#3c8dad", "#7a5230")
_LEAST_SHARE = 0.4  # the least share of the panel's height for the mixtures' NLL; much worse members lie outside


def draw_sweep(cells: Mapping[Cell, CellQuality], chosen: Cell, unit: str) -> bytes:
    """Mixture and member NLL, Jensen gap, effective members and calibration over alpha.

    Bars are 95 % intervals over held-out examples. One adapter is a level line, because alpha does not change it.
    """
    figure = Figure(figsize=(10.5, 7.2), dpi=130, layout="constrained")
    nll, *others = figure.subplots(2, 2).ravel()
    colours = dict(zip(sorted({c.members for c in cells if c.members > 1}), _COLOURS * len(cells), strict=False))
    handles = _draw_nll(nll, cells, colours)
    handles.append(_ring(nll, chosen, cells[chosen].mixture_nll.value, f"chosen: {chosen}"))
    nll.set_ylabel(f"held-out NLL, nats a {unit}")
    named: dict[str, Callable[[CellQuality], float]] = {
        f"Jensen gap, nats a {unit}": lambda q: q.jensen_gap,
        "effective members at order 1": lambda q: q.effective_members,
        "calibration error of the mixture": lambda q: q.ece,
    }
    for axes, (name, figure_of) in zip(others, named.items(), strict=True):
        _draw_each(axes, cells, colours, figure_of)
        _ring(axes, chosen, figure_of(cells[chosen]))
        axes.set_ylabel(name)
        axes.set_ylim(0, 1.1 * max(map(figure_of, cells.values())) or 1.0)
    for axes in (nll, *others):
        axes.set_xlabel("alpha")
        axes.set_xlim(-0.05, 1.05)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(colours) + 1, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_nll(axes: Axes, cells: Mapping[Cell, CellQuality], colours: Mapping[int, str]) -> list[Any]:
    handles: list[Any] = []
    for number, (members, colour) in enumerate(colours.items()):
        line = _line_of(cells, members)
        aside = 0.012 * (number - (len(colours) - 1) / 2)  # so that bars at one alpha stand side by side
        alphas, mixture = [c.alpha + aside for c in line], [q.mixture_nll for q in line.values()]
        bars = [[max(x.value - x.low, 0) for x in mixture], [max(x.high - x.value, 0) for x in mixture]]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "capsize": 3, "lw": 1.8}
        values, label = [x.value for x in mixture], f"{members} members: mixture"
        handles.append(axes.errorbar(alphas, values, bars, label=label, zorder=3, **style))
        of_members = [q.member_nll for q in line.values()]
        handles += axes.plot(
            alphas, of_members, color=colour, ls="--", lw=1.2, marker=".", label=f"{members} members: their mean"
        )
    single = next((q.mixture_nll for c, q in cells.items() if c.members == 1), None)
    if single is not None:
        handles.append(axes.axhline(single.value, color=OTHERS, lw=1.4, label="one adapter"))
        axes.axhspan(single.low, single.high, color=OTHERS, alpha=0.2, lw=0)
    ends = [x for q in cells.values() for x in (q.mixture_nll.low, q.mixture_nll.value, q.mixture_nll.high) if x == x]
    low, high = min(ends), max(ends)
    highest = max(high, *(q.member_nll for q in cells.values()))
    if high > low and (high - low) < _LEAST_SHARE * (highest - low):
        axes.set_ylim(low - 0.1 * (high - low), low + (high - low) / _LEAST_SHARE)
    return handles


def _draw_each(
    axes: Axes,
    cells: Mapping[Cell, CellQuality],
    colours: Mapping[int, str],
    figure_of: Callable[[CellQuality], float],
) -> None:
    for members, colour in colours.items():
        line = _line_of(cells, members)
        axes.plot(
            [c.alpha for c in line], [figure_of(q) for q in line.values()], color=colour, marker="o", ms=4, lw=1.8
        )
    single = next((q for c, q in cells.items() if c.members == 1), None)
    if single is not None:
        axes.axhline(figure_of(single), color=OTHERS, lw=1.4)


def _line_of(cells: Mapping[Cell, CellQuality], members: int) -> dict[Cell, CellQuality]:
    return {c: q for c, q in sorted(cells.items()) if c.members == members}


def _ring(axes: Axes, chosen: Cell, value: float, label: str | None = None) -> Any:
    style: dict[str, Any] = {"facecolors": "none", "edgecolors": ACCENT, "linewidths": 2, "zorder": 5, "clip_on": False}
    return axes.scatter([chosen.alpha], [value], s=130, label=label, **style)
