"""Has the slower tiers forget what they hold, and keeps them out of use until they have."""

import threading
from collections.abc import Sequence

from lmcache_rs._core import Tier
from lmcache_rs.connector.barrier import Barrier

RETRY_EVERY_S = 5.0


class Resets:
    """Resets that are due. A tier that cannot be reached is tried again, by a thread, as long as the engine lives."""

    def __init__(self, tiers: Sequence[Tier], barrier: Barrier) -> None:
        self._tiers = tiers
        self._barrier = barrier
        self._lock = threading.Lock()
        """Over what the thread changes too: the tiers that are due, and whether there is a thread."""
        self._due: list[Tier] = []
        self._retrying = False
        self._closed = threading.Event()

    @property
    def due(self) -> bool:
        """Whether some tier may still find what it must not."""
        return bool(self._due)

    @property
    def retrying(self) -> bool:
        """Whether a thread sees to what is due."""
        return self._retrying

    def reset(self, again: bool) -> bool:
        """Reset every tier now. `again`: and once more by `retry`. Whether nothing is due."""
        failed = self._reset(self._tiers)
        with self._lock:
            # Always a new list, by which a thread that is at work knows that another reset came meanwhile.
            self._due = list(self._tiers) if again else failed
        return not self.due

    def retry(self) -> None:
        """Reset what is due, in the background, until it is done."""
        with self._lock:
            if self._retrying or not self._due or self._closed.is_set():
                return
            thread = threading.Thread(
                target=self._retry, args=(self._due,), name="lmcache-tier-reset", daemon=True
            )
            thread.start()
            self._retrying = True

    def close(self) -> None:
        """Try no more."""
        self._closed.set()

    def _retry(self, due: list[Tier]) -> None:
        while due and not self._closed.is_set():
            failed = self._reset(due)
            with self._lock:
                if self._due is due:
                    self._due = due = failed
                else:  # another reset came meanwhile: a later thread does what is due
                    due = []
                self._retrying = bool(due)
            if due:
                self._closed.wait(RETRY_EVERY_S)

    def _reset(self, tiers: Sequence[Tier]) -> list[Tier]:
        failed = []
        for tier in tiers:
            try:
                tier.reset()
            except BaseException as error:
                self._barrier.report("tier_reset", error)
                failed.append(tier)
        return failed
