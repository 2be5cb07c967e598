"""The demo's figure: which member follows which school, and which facts are uncertain.

Read next: `measure.py`, the measures that it draws.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from renyi.zoo.measure import Measured

TITLES = {"single": "one adapter", "alpha_0": "ensemble, α = 0", "alpha_renyi": "α-Rényi ensemble"}
DOUBT, DISAGREEMENT = "#b8c4d6", "#c8553d"


def draw_demo(measured: Mapping[str, Measured], file: Path) -> None:
    """Draw members × schools for both ensembles, and the split of uncertainty for all runs, to a PNG file."""
    figure = Figure(figsize=(12, 4.4), dpi=130, layout="constrained")
    ensembles = [name for name, m in measured.items() if len(m.member_load) > 1]
    columns = figure.subplots(1, len(ensembles) + 1, width_ratios=[*[1.0] * len(ensembles), 1.9])
    for axes, name in zip(columns, ensembles, strict=False):
        _draw_schools(axes, measured[name], TITLES.get(name, name))
    _draw_uncertainty(columns[-1], measured)
    figure.suptitle(
        "Two schools contradict each other on half of the facts. Nobody labelled who said what.", fontsize=12
    )
    figure.savefig(file)


def _draw_schools(axes: Axes, measured: Measured, title: str) -> None:
    """Share of the contested facts that each member answers as each school does."""
    followed_MS = np.asarray(measured.source_followed)
    axes.imshow(followed_MS, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (m, s), share in np.ndenumerate(followed_MS):
        axes.text(s, m, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black")
    axes.set_xticks(range(followed_MS.shape[1]), [f"as school {chr(65 + s)}" for s in range(followed_MS.shape[1])])
    axes.set_yticks(
        range(len(followed_MS)), [f"member {m}\n{load:.0%} of records" for m, load in enumerate(measured.member_load)]
    )
    axes.tick_params(length=0)
    axes.set_title(f"{title}\nhow members answer contested facts", fontsize=10)


def _draw_uncertainty(axes: Axes, measured: Mapping[str, Measured]) -> None:
    """Stacked bars: total uncertainty as each member's own doubt plus the members' disagreement."""
    groups = ("contested facts", "agreed facts")
    width = 0.8 / len(measured)
    for run, (name, m) in enumerate(measured.items()):
        x = np.arange(len(groups)) + (run - (len(measured) - 1) / 2) * width
        doubt = np.array([m.aleatoric_contested, m.aleatoric_agreed])
        disagreement = np.array([m.mi_contested, m.mi_agreed])
        first = run == 0
        axes.bar(x, doubt, 0.9 * width, color=DOUBT, label="aleatoric: each member's own doubt" if first else None)
        axes.bar(
            x,
            disagreement,
            0.9 * width,
            bottom=doubt,
            color=DISAGREEMENT,
            label="epistemic: the members disagree" if first else None,
        )
        for at, top in zip(x, doubt + disagreement, strict=True):
            axes.text(
                at, top + 0.02, TITLES.get(name, name).replace(" ", "\n", 1), ha="center", va="bottom", fontsize=8
            )
    axes.axhline(np.log(2), color="grey", lw=0.8, ls=":")
    axes.text(1.45, np.log(2) + 0.01, "ln 2: a coin toss between two schools", ha="right", fontsize=8, color="grey")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("uncertainty of an answer (nats)")
    axes.set_title("what the model does not know", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
