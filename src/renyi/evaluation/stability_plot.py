"""The figure of a diagnosis, as PNG bytes: the spectrum that says from which alpha on members part, and who parts them.

Read next: `renyi.inference.diagnose`, which makes the `Diagnosis`.
"""

import io

import numpy as np
from matplotlib.figure import Figure

from renyi.evaluation.plots import ACCENT, MIXTURE, OTHERS
from renyi.inference.diagnose import Diagnosis


def draw_diagnosis(diagnosis: Diagnosis) -> bytes:
    """Eigenvalues λ of J v = λ V v with the levels above which members part, and examples' loadings on the first.

    Members part along a direction at every α above 1/λ. A well-specified model has λ = 1 everywhere. Loadings lie near
    zero if examples agree, and on both sides of zero if they contradict each other.
    """
    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    spectrum, histogram = figure.subplots(1, 2)

    eigenvalues = np.asarray(diagnosis.eigenvalues)
    order = np.arange(1, len(eigenvalues) + 1)
    colours = np.where(order < diagnosis.members, ACCENT, OTHERS).tolist()
    spectrum.vlines(order, 0, eigenvalues, color=colours, lw=1.5)
    spectrum.scatter(order, eigenvalues, c=colours, s=28, zorder=3)
    ends = (diagnosis.critical_alpha, diagnosis.high, diagnosis.low)
    measured, low, high = (1 / x if x > 0 else np.nan for x in ends)
    spectrum.errorbar(
        [0.6],  # beside the first eigenvalue, because it measures that one
        [measured],
        [[max(measured - low, 0)], [max(high - measured, 0)]],
        fmt="o",
        color=MIXTURE,
        ms=5,
        capsize=3,
        zorder=4,
        label=f"the first on other examples: 1 / {diagnosis.critical_alpha:.3g}",
    )
    spectrum.axhline(1, color="grey", lw=1, ls=":", label="1: a model that is right")
    if diagnosis.contradicted:
        label = f"1/α: members part at α = {diagnosis.alpha:g}"
        spectrum.axhline(1 / diagnosis.alpha, color=ACCENT, lw=1.2, ls="--", label=label)
    spectrum.set(xlabel="direction", ylabel="λ: gradients' second moment over curvature", xlim=(0, len(order) + 1))
    spectrum.set_ylim(0, 1.15 * max(1.25, float(np.nanmax([*eigenvalues, high]))))
    spectrum.legend(frameon=False, fontsize=9, loc="upper right")

    loadings = np.asarray(diagnosis.loadings)
    widest = max(float(np.abs(loadings).max(initial=0)), 1e-12)
    edges = np.linspace(-widest, widest, 41)
    for here, colour in ((loadings >= 0, MIXTURE), (loadings < 0, ACCENT)):  # an edge is at zero
        histogram.hist(loadings[here], edges.tolist(), color=colour, alpha=0.75)
    histogram.axvline(0, color="grey", lw=0.8, ls=":")
    histogram.set(xlabel="loading on the leading direction, in units of its root mean square", ylabel="examples")
    for axes in (spectrum, histogram):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
