"""A figure with its interval. How intervals are found is in `bootstrap`, how they are written in `sections`."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A figure, and the interval that holds 95 % of its values on resampled examples.

    The value is NaN where the figure is undefined. The interval is NaN where there is none: without resamples, and
    where all resamples give one value (a single example, or examples that are all alike), which says nothing about
    how sure the figure is.
    """

    value: float
    low: float
    high: float
