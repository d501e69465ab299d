"""What is quicker to compute than to load, by a clock of the tests' own."""

import pytest

from lmcache_rs.connector import rates
from lmcache_rs.connector.rates import LOADS_MIN, OLD_S, Rates


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rates, "time", clock)
    return clock


def measured(clock: Clock, bytes_per_second: int, tokens_per_second: int) -> Rates:
    found = Rates()
    for _ in range(3):
        found.step(tokens_per_second)
        clock.now += 1
    for _ in range(LOADS_MIN):
        found.fetched("disk", bytes_per_second, 1.0)
    return found


def test_the_measured_speeds_decide(clock: Clock) -> None:
    speeds = measured(clock, bytes_per_second=1_000_000, tokens_per_second=1_000)
    assert not speeds.is_quicker_to_compute("disk", 900, 1)
    assert speeds.is_quicker_to_compute("disk", 1_100, 1)


def test_what_is_not_known_is_loaded(clock: Clock) -> None:
    speeds = measured(clock, bytes_per_second=1, tokens_per_second=1_000)
    assert not speeds.is_quicker_to_compute("redis", 1_000_000, 1)
    for _ in range(LOADS_MIN - 1):
        speeds.fetched("redis", 1, 1.0)
    assert not speeds.is_quicker_to_compute("redis", 1_000_000, 1)
    speeds.fetched("redis", 1, 1.0)
    assert speeds.is_quicker_to_compute("redis", 1_000_000, 1)
    # Measured long ago: once more, whatever it was.
    clock.now += OLD_S + 1
    assert not speeds.is_quicker_to_compute("redis", 1_000_000, 1)
    assert not Rates().is_quicker_to_compute("disk", 1_000_000, 1)


def test_hiccups_and_short_steps_do_not_count(clock: Clock) -> None:
    speeds = measured(clock, bytes_per_second=1_000_000, tokens_per_second=1_000)
    speeds.fetched("disk", 1, 10.0)
    speeds.fetched("disk", 0, 0.0)
    speeds.step(1_000)
    clock.now += 60  # the engine had nothing to do
    for _ in range(50):
        speeds.step(8)
        clock.now += 1e-6
    speeds.fetched("disk", 1_000_000, 1.0)
    assert not speeds.is_quicker_to_compute("disk", 900, 1)
    assert speeds.is_quicker_to_compute("disk", 1_100, 1)
