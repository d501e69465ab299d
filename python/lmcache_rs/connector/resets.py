"""Has the slower tiers forget what they hold, and keeps them out of use until they have."""

import threading
import time
from collections.abc import Sequence

from lmcache_rs._core import Tier
from lmcache_rs.connector.barrier import Barrier

RETRY_EVERY_S = 5.0


class Resets:
    """Resets that are due. A tier that cannot be reached is tried again, by a thread, as long as the engine lives."""

    def __init__(self, tiers: Sequence[Tier], barrier: Barrier) -> None:
        self._tiers = tiers
        self._barrier = barrier
        self._due: list[Tier] = []
        self._thread: threading.Thread | None = None
        self._next_try = 0.0

    @property
    def due(self) -> bool:
        """Whether some tier may still find what it must not."""
        return bool(self._due)

    def reset(self, again: bool) -> bool:
        """Reset every tier now. `again`: and once more by `retry`. Whether all of them did it."""
        failed = self._reset(self._tiers)
        self._due = list(self._tiers) if again else failed
        return not failed

    def retry(self) -> None:
        """Reset what is due, in the background, unless that was just tried."""
        if self._thread is not None or time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + RETRY_EVERY_S
        self._thread = threading.Thread(target=self._retry, name="lmcache-tier-reset", daemon=True)
        self._thread.start()

    def _retry(self) -> None:
        due = self._due
        failed = self._reset(due)
        if self._due is due:  # no other reset came meanwhile
            self._due = failed
        self._thread = None

    def _reset(self, tiers: Sequence[Tier]) -> list[Tier]:
        failed = []
        for tier in tiers:
            try:
                tier.reset()
            except BaseException as error:
                self._barrier.report("tier_reset", error)
                failed.append(tier)
        return failed
