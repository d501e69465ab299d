"""How soon vLLM uses what a worker tells it, judged by the last steps."""

import itertools
import statistics
import time
from collections import deque

STEPS_LOOKED_AT = 3
"""Of the last so many steps the median counts: a long prefill among them says nothing about the next ones, nor does one
that was begun late, and so looks long, and the one after it short."""


class Pace:
    """The time from telling vLLM of a load's end to the first forward that can read its blocks.

    `steps_ahead`: steps that the GPU does meanwhile.
    """

    def __init__(self, steps_ahead: int) -> None:
        self._steps_ahead = steps_ahead
        self._begun: deque[float] = deque(maxlen=STEPS_LOOKED_AT + 1)

    def step(self) -> None:
        """A step begins. One without tokens counts too: an engine that only waits looks every millisecond."""
        self._begun.append(time.perf_counter())

    def lead(self) -> float:
        """Seconds; 0 where too few steps are known."""
        return self._steps_ahead * self.step_seconds()

    def step_seconds(self) -> float:
        """What a step takes; 0 where too few are known."""
        if len(self._begun) <= STEPS_LOOKED_AT:
            return 0.0
        return statistics.median(b - a for a, b in itertools.pairwise(self._begun))
