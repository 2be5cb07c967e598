"""A figure with its interval. Read next: `bootstrap.py` (computes intervals), `sections.py` (writes them)."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A figure, and the interval that holds 95 % of its values on resampled examples.

    The value is NaN if the figure is undefined. The interval is NaN without resamples, and for a single example.
    """

    value: float
    low: float
    high: float
