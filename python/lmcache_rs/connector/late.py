"""Answers whose hook failed are taken in with a later step, a few times at most."""

from collections import deque
from collections.abc import Callable

from lmcache_rs.connector.orders import WorkerAcks

KEPT_MAX = 64
"""Answers kept; beyond it the oldest is lost."""

TRIES_MAX = 3


class LateAcks:
    """Answers that could not be taken in."""

    def __init__(self, take: Callable[[WorkerAcks], None]) -> None:
        self._take = take
        self._kept: deque[tuple[WorkerAcks, int]] = deque(maxlen=KEPT_MAX)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, acks: WorkerAcks) -> None:
        """Take these in with the next step."""
        self._kept.append((acks, 1))

    def retry(self) -> None:
        """Take in what is kept; what fails again is kept again, `TRIES_MAX` times in all."""
        for _ in range(len(self._kept)):
            acks, tries = self._kept.popleft()
            try:
                self._take(acks)
            except BaseException:
                if tries < TRIES_MAX:
                    self._kept.append((acks, tries + 1))
                raise
