"""How fast tiers load and the model computes, as measured: what is quicker to compute is not loaded."""

import time
from collections import deque

STEP_TOKENS_MIN = 256
"""Steps with fewer tokens say nothing about how fast prompts are computed."""

STEPS_LOOKED_AT = 16
"""Of the last so many steps the fastest counts: the others may have waited for something."""

LOADS_LOOKED_AT = 8
"""Likewise of a tier's last loads."""

LOADS_MIN = 3
"""With fewer loads a tier's speed is not known: the first ones open files and connections."""

OLD_S = 60.0
"""A speed measured longer ago is measured anew, whatever it was."""


class Rates:
    """Bytes a second of each tier, and tokens a second of the model."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
        self._step: tuple[float, int] | None = None
        self._loads: dict[str, deque[float]] = {}
        self._loaded_at: dict[str, float] = {}

    def step(self, tokens: int) -> None:
        """A step with so many tokens begins; the one before has ended."""
        now = time.monotonic()
        if self._step is not None and self._step[1] >= STEP_TOKENS_MIN:
            self._steps.append(self._step[1] / max(1e-6, now - self._step[0]))
        self._step = (now, tokens)

    def fetched(self, tier: str, size: int, seconds: float) -> None:
        """So many bytes came from `tier` in so many seconds."""
        if size > 0 and seconds > 0:
            self._loads.setdefault(tier, deque(maxlen=LOADS_LOOKED_AT)).append(size / seconds)
            self._loaded_at[tier] = time.monotonic()

    def is_quicker_to_compute(self, tier: str, size: int, tokens: int) -> bool:
        """Whether `tokens` tokens are computed sooner than their `size` bytes come from `tier`; unknown: no."""
        loads = self._loads.get(tier, ())
        if len(loads) < LOADS_MIN or not self._steps or time.monotonic() - self._loaded_at[tier] > OLD_S:
            return False
        return size / max(loads) > tokens / max(self._steps)
