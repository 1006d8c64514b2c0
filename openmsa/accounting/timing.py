"""How long something takes: repeated for as long as was allowed, told as median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of every repeat, in the order in which they were measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """The value below which `share` of the repeats lie, by linear interpolation."""
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def scaled(self, factor: float) -> Times:
        """What `factor` times as much of the same work would take."""
        return Times(tuple(factor * second for second in self.seconds))

    def plus(self, other: Times) -> Times:
        """One after the other: the sum of the medians, with both spreads added."""
        shares = (0.2, 0.5, 0.8)
        return Times(tuple(self.quantile(share) + other.quantile(share) for share in shares))


def timed(run: Callable[[], object], *, seconds: float, most: int = 50) -> Times:
    """Repeat `run` until `seconds` are over, at least once.

    The first pass warms caches and allocators up and does not count, unless it takes all the time:
    then warming is a small part of it, and another pass dear.
    """
    began = time.perf_counter()
    first = _once(run)
    found = [first] if first > seconds else []
    while not found or (time.perf_counter() - began < seconds and len(found) < most):
        found.append(_once(run))
    return Times(tuple(found))


def _once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
