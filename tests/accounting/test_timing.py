"""Repeats fill the time that was allowed; a long pass is not thrown away as a warm-up."""

from __future__ import annotations

import pytest

from openmsa.accounting import timing
from openmsa.accounting.timing import Times, timed


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.work(seconds)` moves."""

    class Clock:
        now = 0.0

        def work(self, seconds: float) -> None:
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


def test_short_work_warms_up_and_fills_the_time(clock):
    seconds = iter([5.0, *[1.0] * 100])
    assert timed(lambda: clock.work(next(seconds)), seconds=25).seconds == (1.0,) * 20


def test_repeats_have_a_limit(clock):
    assert len(timed(lambda: clock.work(1), seconds=1000, most=7).seconds) == 7


def test_a_long_pass_counts(clock):
    assert timed(lambda: clock.work(30), seconds=10).seconds == (30,)
    assert timed(lambda: clock.work(9), seconds=10).seconds == (9,)
    assert clock.now == 30 + 2 * 9


def test_work_that_warms_up_too_long_is_still_measured_once(clock):
    assert timed(lambda: clock.work(0), seconds=0).seconds == (0,)


def test_quantiles_are_between_the_repeats():
    times = Times((3.0, 1.0, 2.0, 5.0, 4.0))
    assert times.median == 3
    assert times.quantile(0.2) == pytest.approx(1.8)
    assert times.quantile(0.8) == pytest.approx(4.2)
    assert Times((2.0,)).quantile(0.8) == 2


def test_scaling_and_adding():
    a, b = Times((1.0, 1.0, 1.0)), Times((1.0, 2.0, 3.0))
    assert b.scaled(4).median == 8
    assert a.plus(b).median == 3
    assert a.plus(b).quantile(0.0) < a.plus(b).quantile(1.0)
