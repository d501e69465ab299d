"""Faults that can be put anywhere behind the connector's hooks."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

from lmcache_rs._core import Departure, Index, Lease, Match, Reservation
from lmcache_rs.connector import (
    admission,
    fetches,
    holds,
    ledger,
    lookup,
    scheduler,
    stores,
    tier_worker,
    tiering,
    turns,
    worker,
    writes,
)


@dataclass
class Fault:
    """Raises `make()` in `times` calls of `place` from the nth on; a name that ends in "." is all of a class."""

    place: str
    nth: int
    times: int
    make: Callable[[], BaseException]

    def hit(self, name: str) -> None:
        if name != self.place and not (self.place[-1] == "." and name.startswith(self.place)):
            return
        self.nth -= 1
        if self.nth < 0 and self.times > 0:
            self.times -= 1
            raise self.make()


class Faults:
    """Counts calls and raises where it is told to, while it is on."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.on = False
        self._armed: list[Fault] = []

    def arm(self, place: str, nth: int, times: int, make: Callable[[], BaseException]) -> None:
        """See `Fault`."""
        self._armed.append(Fault(place, nth, times, make))

    def hit(self, name: str) -> None:
        if self.on:
            self.calls[name] += 1
            for fault in self._armed:
                fault.hit(name)


GUARDS = (Departure, Lease, Match, Reservation)


class Faulty:
    """A stand-in for an object of the Rust core, or a mover, whose calls can fail."""

    def __init__(self, real: Any, faults: Faults) -> None:
        self._real, self._faults = real, faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self._faults.hit(f"{type(self._real).__name__}.{name}")
            result = value(*arguments, **options)
            return (
                Faulty(result, self._faults)
                if isinstance(result, (Departure, Match, Lease, Reservation))
                else result
            )

        return call

    def __len__(self) -> int:
        return len(self._real)


CLASSES = [
    admission.Admission,
    fetches.Fetches,
    holds.HeldBlocks,
    ledger.Ledger,
    lookup.Lookup,
    scheduler.SchedulerSide,
    stores.StorePlanner,
    tier_worker.TierWorker,
    tiering.Tiering,
    turns.Turns,
    writes.Writes,
    worker.WorkerSide,
]
UNTOUCHED = {
    "__init__",
    # vLLM's own pool: what it may have taken back must not be given back again.
    "_release",
    "release",
    # The loops that keep one job's end from another's.
    "_end_loads",
    "_end_stores",
    "_survives",
    "_close_load",
    "_close_store",
    "_void_above",
    # What is called when something has failed: a second fault at once is not looked at.
    "break_promise",
    "open_broken",
    "take_orders",
    "rescue_orders",
    "acknowledge_later",
    "drop_request",
    "withdraw",
    "shut",
    "_fail_rest",
    "_end",
    "_enter",
    "_begins",
    "_or_failed",
}


@contextmanager
def faulty(faults: Faults) -> Iterator[None]:
    """Within it every function behind the hooks can be made to fail."""

    def watched(function: Any, name: str) -> Any:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            faults.hit(name)
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for owner in CLASSES:
            for name, function in inspect.getmembers(owner, inspect.isfunction):
                if name not in UNTOUCHED:
                    place = f"{owner.__name__}.{name}"
                    stack.enter_context(patch.object(owner, name, watched(function, place)))
        stack.enter_context(patch.object(scheduler, "Index", lambda rows: Faulty(Index(rows), faults)))
        yield
