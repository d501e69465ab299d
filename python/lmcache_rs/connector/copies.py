"""Jobs that a mover carries out in several copies, also several jobs in the same ones: nobody else knows of that."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

FIRST_COPY = 1 << 62
"""Copies have names of their own, above those of the scheduler side's jobs."""

Ended = tuple[int, int, float]
"""As `Mover.poll` tells it: job, bytes or -1, seconds. Of a job that was cut instead of the bytes `CUT`."""

CUT = -2
"""It failed since something of it did not come: nothing is wrong with what was there."""


@dataclass(slots=True)
class Copied:
    """Jobs that end together, with the blocks of each, and their copies in flight. `more`: others may follow."""

    jobs: Mapping[int, int]
    more: bool = True
    names: set[int] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    bytes: int = 0
    failed: bool = False
    cut: bool = False

    def fail(self, cut: bool = False) -> None:
        """No other copy follows, and the jobs fail when those in flight have ended; `cut`: the rest is missing."""
        self.cut = cut and (self.cut or not self.failed)
        self.failed, self.more = True, False


class Copies:
    """All such jobs of a worker."""

    def __init__(self) -> None:
        self._open: list[Copied] = []
        self._owners: dict[int, Copied] = {}
        self._names = itertools.count(FIRST_COPY)

    def begin(self, copied: Copied) -> None:
        """Its jobs end once it has no more copies to come, and none in flight."""
        self._open.append(copied)

    def add(self, copied: Copied, submit: Callable[[int], None]) -> None:
        """One copy more: `submit` hands it to the mover under the name that it is given. Raises what `submit` does."""
        name = next(self._names)
        submit(name)
        copied.names.add(name)
        self._owners[name] = copied

    def is_copy(self, name: int) -> bool:
        """Whether this is a copy in flight, not a job."""
        return name in self._owners

    def whole(self, ended: Iterable[Ended]) -> Iterator[Ended]:
        """What the mover's `poll` told, with one end for all copies of a job."""
        for name, moved, seconds in ended:
            copied = self._owners.pop(name, None)
            if copied is None:
                yield name, moved, seconds
                continue
            copied.names.discard(name)
            copied.bytes += max(0, moved)
            if moved < 0:
                copied.fail()
        for copied in [copied for copied in self._open if not copied.more and not copied.names]:
            self._open.remove(copied)
            seconds, blocks = time.monotonic() - copied.began, sum(copied.jobs.values())
            failed = CUT if copied.cut else -1
            for job, count in copied.jobs.items():
                yield job, failed if copied.failed else copied.bytes * count // blocks, seconds
