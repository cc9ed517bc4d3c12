"""How many rows of decoding a step takes while several clients want some. Pure.

A step of n rows takes about a + b n: one more row is cheap for the stage and slows everybody. So a
step that serves all who are due does most work, and lets a client of many streams slow down one of
few without end. What a client is owed is its share of the stage's time: of K clients, tokens no
slower than K times what its own rows would take alone. Where a is large that is so however many
rows others have; otherwise the step is cut so that it holds, but never so short that all together
compute more than ``LOSS_MAX`` less.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

LOSS_MAX = 0.1
"""Of the rows computed in a time, for the sake of those with few."""
_EXACT = 1e-9
"""What rounding may cost a whole row."""


@dataclass(slots=True)
class StepLine:
    """What a step takes by its rows: a straight line, fitted by least squares that forget.

    ``fixed_us`` is what a step takes besides its rows, ``row_us`` what a row adds: 0 until steps of
    several sizes were measured.
    """

    KEPT = 0.98
    """Of the weight of what was measured before, at each step."""
    OUTLIER = 3.0
    """A step counts for so many times the mean at most: to be stopped is not to be slow."""
    VARIANCE_MIN = 0.25
    """Of the rows: below, the slope says nothing and stays as it was."""

    row_us: float = 0.0
    _weight: float = 0.0
    _rows: float = 0.0
    _took: float = 0.0
    _rows_rows: float = 0.0
    _rows_took: float = 0.0

    @property
    def fixed_us(self) -> float:
        """Of a step of any size."""
        return self._took - self.row_us * self._rows

    def cost_us(self, rows: float) -> float:
        """The expected time of a step."""
        return self.fixed_us + self.row_us * rows

    def note(self, rows: int, took_us: float) -> None:
        """Note what a step of so many rows took."""
        if self._weight:
            took_us = min(took_us, self.OUTLIER * max(self._took, self.cost_us(rows)))
        self._weight = self._weight * self.KEPT + 1.0
        share = 1.0 / self._weight
        self._rows += share * (rows - self._rows)
        self._took += share * (took_us - self._took)
        self._rows_rows += share * (rows * rows - self._rows_rows)
        self._rows_took += share * (rows * took_us - self._rows_took)
        variance = self._rows_rows - self._rows**2
        if variance >= self.VARIANCE_MIN:
            slope = (self._rows_took - self._rows * self._took) / variance
            self.row_us = min(max(slope, 0.0), self._took / self._rows)


def rows_allowed(line: StepLine, rows: Collection[int], loss_max: float = LOSS_MAX) -> int:
    """How many rows the next step takes, of clients with so many each: all if none is spared."""
    total = sum(rows)
    if len(rows) < 2 or line.row_us <= 0.0:
        return total
    fixed = line.fixed_us / line.row_us
    owed = (fixed + min(rows)) * len(rows) - fixed
    kept = 1.0 - loss_max
    cheap = kept * fixed * total / (fixed + loss_max * total) if fixed else 1.0
    return min(total, max(1, math.floor(owed + _EXACT), math.ceil(cheap - _EXACT)))


def level_of(rows: Collection[int], allowed: int) -> int:
    """How many rows of each client at most, for all of them to have ``allowed`` together.

    Who has fewer keeps them all: the others share the rest alike.
    """
    level, left = 0, max(1, allowed)
    above = sorted(rows)
    while above and left > 0:
        step = min(above[0] - level, -(-left // len(above)))
        level, left = level + step, left - step * len(above)
        above = [one for one in above if one > level]
    return level
