"""After repeated failures the cache turns itself off for a while: what fails again and again only costs time."""

import time
from collections import deque
from collections.abc import Callable

from lmcache_rs.log import init_logger

logger = init_logger(__name__)

FAILURES_MAX = 8
"""So many failures (of hooks, loads or stores) within `WINDOW_S` turn the cache off."""

WINDOW_S = 30.0

OFF_S = 60.0
"""How long the cache stays off. After that it starts with a clean slate."""


class Breaker:
    """Counts failures by time. Off means: nothing is found or stored; what was promised or ordered still ends."""

    def __init__(self, count: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=FAILURES_MAX)
        self._off_until: float | None = None

    def note_failure(self) -> None:
        """Something failed. While the cache is off that is no news: only what was promised before still runs."""
        if self._off_until is not None:
            return
        now = self._clock()
        self._failures.append(now)
        if len(self._failures) < FAILURES_MAX or now - self._failures[0] > WINDOW_S:
            return
        self._off_until = now + OFF_S
        self._failures.clear()
        self._count("turned_off")
        logger.error(
            "%d failures within %.0f s: the cache is off for %.0f s, nothing is found or stored until then",
            FAILURES_MAX,
            WINDOW_S,
            OFF_S,
        )

    def is_off(self) -> bool:
        """Whether the cache is off now; turns it on again once its time is over."""
        if self._off_until is None:
            return False
        if self._clock() < self._off_until:
            return True
        self._off_until = None
        logger.warning("The cache is on again after %.0f s", OFF_S)
        return False
