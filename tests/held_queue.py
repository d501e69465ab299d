"""A rank's queue of a slower tier that tells of what it fetched in its order, and of no more than it may."""

from typing import Any


class HeldQueue:
    """Stands before a `TierQueue`; everything but the ends of loads passes."""

    def __init__(self, queue: Any, may_tell: int = 0) -> None:
        self._queue = queue
        self._next: dict[int, int] = {}
        self._fetched: list[Any] = []
        self.may_tell = may_tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def load(self, job: int, *arguments: Any) -> None:
        self._next[job] = 0
        self._queue.load(job, *arguments)

    def poll(self) -> list[Any]:
        ended = self._queue.poll()
        self._fetched = sorted(self._fetched + [end for end in ended if end[0] in self._next])
        told = [end for end in ended if end[0] not in self._next]
        while self.may_tell and self._fetched:
            job, index = self._fetched[0][:2]
            if index != self._next[job]:
                break
            self._next[job] += 1
            self.may_tell -= 1
            told.append(self.tell(self._fetched.pop(0)))
        return told

    def tell(self, end: Any) -> Any:
        """What is told of a fetched chunk."""
        return end
