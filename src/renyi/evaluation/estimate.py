"""A figure with its interval. How intervals are found is in `bootstrap`, how they are written in `sections`."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A figure, and the interval that holds 95 % of its values on resampled examples.

    The value is NaN where the figure is undefined, the interval where there is none: without resamples, and of a single
    example.
    """

    value: float
    low: float
    high: float
