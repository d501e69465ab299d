"""A slower tier that answers when it likes, loses values, refuses, and sees what others do to rows that it uses."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

KEY_BYTES = 32
FETCHING = np.uint64(0xFE7C4)
"""In rows that a fetch owns and has not filled."""


@dataclass(slots=True)
class Medium:
    """What outlives an engine."""

    source: Random
    fail_share: float
    generation: int = 0
    values: dict[tuple[int, bytes, int], Any] = field(default_factory=dict)
    """Content of the rows by (generation, key, rank)."""

    def lose(self) -> None:
        """Something goes, now and then."""
        if self.values and self.source.random() < 0.01:
            del self.values[self.source.choice(list(self.values))]

    def reset(self) -> None:
        """As `Tier.reset`."""
        if self.source.random() < 2 * self.fail_share:
            raise RuntimeError("injected: not reached")
        self.generation += 1

    def found(self, keys: list[bytes], ranks: int) -> bytes:
        """For each key whether all parts are there."""
        parts = ([(self.generation, key, rank) in self.values for rank in range(ranks)] for key in keys)
        return bytes(all(there) for there in parts)


@dataclass(slots=True)
class World:
    """What engines have in common. `weights` name the model that they serve: KV of others is never right."""

    media: dict[str, Medium]
    weights: int = 0


class Claims:
    """Rows that are being fetched: nobody else's before all ranks have answered, but a rank may load what it has."""

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self.violations: list[str] = []
        self._missing: dict[int, set[int]] = {}
        self._jobs: dict[int, int] = {}

    def touch(self, rank: int, job: int, rows: Any, what: str) -> None:
        """Somebody uses these rows."""
        for row in rows.tolist():
            owner = self._jobs.get(row, job)
            if owner != job and (what != "load" or rank in self._missing[owner]):
                self.violations.append(f"{what} {job} uses row {row}, which job {owner} fetches")

    def claim(self, rank: int, job: int, rows: Any) -> None:
        self.touch(rank, job, rows, "fetch")
        self._missing.setdefault(job, set(self.ranks))
        self._jobs |= dict.fromkeys(rows.tolist(), job)

    def answered(self, rank: int, job: int) -> None:
        self._missing[job].remove(rank)
        if not self._missing[job]:
            self._jobs = {row: owner for row, owner in self._jobs.items() if owner != job}


@dataclass(slots=True, eq=False)
class Task:
    """A search, or a chunk of a load or a store, on its way. `content`: what its rows must stay until it ended."""

    kind: str
    job: int
    index: int
    keys: list[bytes]
    rows: Any = None
    memory: Any = None
    content: Any = None
    value: Any = None
    generation: int = 0
    begun: bool = False
    refused: str | None = None


class LateQueue:
    """One rank's `TierQueue` over a medium; that of a searcher has no rank."""

    def __init__(self, medium: Medium, rank: int, ranks: int, claims: Claims) -> None:
        self.hurry = False
        self.violations: list[str] = []
        self._medium, self._source = medium, medium.source
        self._rank, self._ranks, self._claims = rank, ranks, claims
        self._tasks: list[Task] = []
        self._closed = False

    def find(self, job: int, keys: bytes) -> None:
        self._accept()
        assert keys, "a search for nothing"
        if not self.hurry and self._source.random() < 0.02:
            return  # never answered
        self._tasks.append(Task("find", job, 0, split(keys)))

    def load(self, job: int, pool: Any, keys: bytes, positions: Any, counts: Any, rows: Any) -> None:
        memory = memory_of(pool)
        tasks = self._chunks("load", job, memory, keys, counts, rows)
        for task in tasks:
            self._claims.claim(self._rank, task.job + task.index, task.rows)
        try:
            self._accept(rows, memory)
        except (RuntimeError, ValueError):
            for task in tasks:
                self._claims.answered(self._rank, task.job + task.index)
            raise
        for task in tasks:
            memory[task.rows] = FETCHING
            task.content = memory[task.rows]
        self._tasks += tasks

    def store(self, job: int, pool: Any, keys: bytes, positions: Any, counts: Any, rows: Any) -> None:
        memory = memory_of(pool)
        self._accept(rows, memory)
        for task in self._chunks("store", job, memory, keys, counts, rows):
            self._claims.touch(self._rank, task.job + task.index, task.rows, "write")
            task.content = memory[task.rows]
            self._tasks.append(task)

    def poll(self) -> list[tuple[int, int, str | None, Any, float]]:
        if self._closed:
            raise RuntimeError("closed")
        if not self.hurry:
            self._medium.lose()
        ended = []
        for task in self._source.sample(self._tasks, len(self._tasks)):
            if not self.hurry and self._source.random() < 0.5:
                continue
            if not task.begun:
                self._begin(task)
            elif task in self._tasks:
                self._tasks.remove(task)
                ended.append(self._end(task))
                if task.kind == "load" and task.refused:
                    ended += self._break(task)
        return ended

    def counters(self) -> Mapping[str, int]:
        return {}

    def close(self, timeout_s: float) -> bool:
        self._closed = True
        return True

    def die(self) -> None:
        """The process is killed: what was begun may still be done, by the kernel or at the other end."""
        for task in self._tasks:
            if task.kind == "store" and task.begun and self._source.random() < 0.5:
                self._end(task)
        self._tasks.clear()

    def _accept(self, rows: Any = None, memory: Any = None) -> None:
        if self._closed or self._source.random() < self._medium.fail_share / 4:
            raise RuntimeError("injected: refused")
        if rows is not None and int(rows.max(initial=0)) >= len(memory):
            raise ValueError("a row outside of the pool")

    def _chunks(self, kind: str, job: int, memory: Any, keys: bytes, counts: Any, rows: Any) -> list[Task]:
        assert sum(counts.tolist()) == len(rows)
        parts = np.split(rows, np.cumsum(counts)[:-1])
        named = zip(split(keys), parts, strict=True)
        return [Task(kind, job, i, [key], part, memory) for i, (key, part) in enumerate(named)]

    def _begin(self, task: Task) -> None:
        task.begun, task.generation = True, self._medium.generation
        if task.kind == "find":
            task.value = self._medium.found(task.keys, self._ranks)
        elif task.kind == "load":
            task.value = self._medium.values.get((task.generation, task.keys[0], self._rank))
        else:
            task.value = task.memory[task.rows]
        if not self.hurry and self._source.random() < self._medium.fail_share / 2:
            task.refused = "io_error"
        elif task.kind == "load" and task.value is None:
            task.refused = "absent"

    def _end(self, task: Task) -> tuple[int, int, str | None, Any, float]:
        if task.kind == "find":
            return task.job, 0, task.refused, b"" if task.refused else task.value, 0.0
        if not np.array_equal(task.memory[task.rows], task.content):
            self.violations.append(
                f"rows of {task.kind} {task.job + task.index} were written by somebody else"
            )
        if task.kind == "load":
            self._claims.answered(self._rank, task.job + task.index)
            if not task.refused:
                task.memory[task.rows] = task.value
        elif not task.refused:
            self._medium.values.setdefault((task.generation, task.keys[0], self._rank), task.value)
        return task.job, task.index, task.refused, 0 if task.refused else task.content.nbytes, 1e-3

    def _break(self, missed: Task) -> list[tuple[int, int, str | None, Any, float]]:
        """What comes after a hole and was not begun is not loaded."""
        rest = [t for t in self._tasks if (t.kind, t.job, t.begun) == ("load", missed.job, False)]
        for task in rest:
            self._tasks.remove(task)
            task.refused = "prefix_broken"
        return [self._end(task) for task in rest]


def memory_of(pool: Any) -> Any:
    """The cells of a pool's rows."""
    return pool if isinstance(pool, np.ndarray) else np.from_dlpack(pool).view(np.uint64)


def split(keys: bytes) -> list[bytes]:
    assert len(keys) % KEY_BYTES == 0
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


class LateTiers:
    """One engine's queues of all its tiers, those of its searcher first."""

    def __init__(self, media: Mapping[str, Medium], ranks: int) -> None:
        self.claims = Claims()
        self._media, self._ranks = media, ranks
        self._queues: list[LateQueue] = []
        uses = [(True, True), (True, True), (True, True), (True, False), (False, True)]
        self._uses = {name: medium.source.choice(uses) for name, medium in media.items()}

    def open(self, rank: int) -> dict[str, Any]:
        """The tiers by name, as `open_tiers` makes them."""
        opened = {}
        for name, medium in self._media.items():
            queue = LateQueue(medium, rank, self._ranks, self.claims)
            self._queues.append(queue)
            may_load, may_store = self._uses[name]
            tier = SimpleNamespace(reset=medium.reset)
            opened[name] = SimpleNamespace(queue=queue, tier=tier, may_load=may_load, may_store=may_store)
        return opened

    def opener(self, rank: int) -> Callable[[bytes], dict[str, Any]]:
        """Opens the tiers of a rank whose fetches count."""
        self.claims.ranks.add(rank)
        return lambda namespace: self.open(rank)

    def hurry(self) -> None:
        """Everything is answered soon from now on, and nothing refused."""
        for queue in self._queues:
            queue.hurry = True

    def die(self) -> None:
        for queue in self._queues:
            queue.die()

    def violations(self) -> list[str]:
        return self.claims.violations + [what for queue in self._queues for what in queue.violations]


class Background:
    """In place of `threading`: a thread's work is done when a test says so."""

    def __init__(self) -> None:
        self._works: list[Callable[[], None]] = []
        self.Lock = nullcontext
        self.Event = lambda: SimpleNamespace(is_set=bool, set=bool, wait=lambda seconds: False)

    def Thread(self, target: Callable[..., None], args: tuple[Any, ...] = (), **_: Any) -> Any:  # noqa: N802
        return SimpleNamespace(start=lambda: self._works.append(partial(target, *args)))

    def run(self) -> None:
        """Do what was started."""
        works, self._works = self._works, []
        for work in works:
            work()

    def drop(self) -> None:
        """The process has gone."""
        self._works.clear()
