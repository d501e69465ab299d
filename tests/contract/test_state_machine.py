"""Random lives of random requests on random engines, against what must hold whatever happens.

No row or block is touched after it was given back; leases are zero when nothing runs; every held block is released;
every row that is found holds the KV of the tokens asked for; every request ends, with tokens computed from its own KV.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from late_ranks import Shape
from random_engine import RandomEngine
from toy_engine import BLOCK
from toy_prompts import Prompt

from lmcache_rs.connector import ledger, lookup
from support import Soak

REQUESTS_MAX = 10
PROMPT_MAX = 36
TOKENS_MAX = 8
STEPS_MAX = 600
"""A request that makes no progress for so many steps hangs."""
ENOUGH = 1000
"""So many sequences meet whatever they are meant to meet."""
MEANT_TO_BE_MET = (
    *("loads", "stores", "evictions", "hit_tokens", "preemptions", "roll-backs", "rows looked at"),
    *("failed_loads", "dropped_stores:void", "dropped_stores:failed", "pending_timeouts", "failed plans"),
)
BLOCKS_MIN = -(-(PROMPT_MAX + TOKENS_MAX) // BLOCK) + 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that only tests move, and no log: tens of thousands of failed loads are told of otherwise."""
    now = [0.0]
    for module in (ledger, lookup):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    logger = logging.getLogger("lmcache_rs")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield now
    logger.setLevel(level)


def some_shape(source: Random) -> Shape:
    pick = source.choice
    extra: dict[str, Any] = {
        "lmcache.sync_load_max_size": pick([0, 0, 64, 1 << 20]),
        "lmcache.save_decode_cache": pick([False, True]),
        "lmcache.save_unfull_chunk": pick([False, True, True]),
        "lmcache.pending_timeout_ms": pick([0, 5, 20]),
        "lmcache.max_held_blocks_percent": pick([10, 50, 100]),
    }
    if source.random() < 0.2:
        extra |= {"lmcache.max_tokens_per_load": pick([4, 12])}
    if source.random() < 0.1:
        extra |= {"lmcache.skip_last_n_tokens": pick([1, 5])}
    return Shape(
        blocks=pick([BLOCKS_MIN, source.randrange(BLOCKS_MIN, 3 * BLOCKS_MIN)]),
        caches=pick([False, False, True]),
        rows=pick([3, 10, 30, 60]),
        ranks=pick([1, 1, 1, 2, 3]),
        chunk=pick([4, 7, 16, 64]),
        overlap=pick([0, 1, 1, 2]),
        fail_share=pick([0, 0, 0.02, 0.2]),
        failed_as_blocks=pick([False, True]),
        resumed_are_new=pick([False, True]),
        holders_go_first=pick([False, True]),
        nearby=pick([False, True]),
        layered=pick([False, True]),
        extra=extra,
    )


class Life:
    """One sequence: requests come, go and meet what operators and machines do."""

    def __init__(self, seed: int, now: list[float]) -> None:
        self.source = Random(seed)
        self.engine = RandomEngine(some_shape(self.source), self.source)
        self.now = now
        self.stems = [self._tokens(PROMPT_MAX) for _ in range(2)]
        self.left = self.source.randrange(2, REQUESTS_MAX)
        self.haste = self.source.choice([0.3, 0.3, 1.0])
        """How likely a request comes in a step."""

    def _tokens(self, count: int) -> list[int]:
        return [self.source.randrange(1000) for _ in range(count)]

    def _add(self) -> None:
        source, engine = self.source, self.engine
        self.left -= 1
        earlier = [r for r in engine.all if r.num_tokens <= PROMPT_MAX]
        if earlier and source.random() < 0.6:
            stem = source.choice(earlier).all_token_ids
            own = source.choice([0, 0, 3, 9])
        else:
            stem, own = source.choice(self.stems), source.choice([0, 0, 1, 6])
            stem = stem[: source.randrange(1, PROMPT_MAX)]
        prompt = (stem + self._tokens(own))[:PROMPT_MAX]
        limit = source.randrange(1, TOKENS_MAX)
        salt = int(source.random() < 0.1)
        engine.add(Prompt(f"r{len(engine.all)}", prompt, salt, limit, source.randrange(1, TOKENS_MAX)))

    def _disturb(self) -> None:
        source, engine = self.source, self.engine
        what = source.random()
        alive = [r for r in engine.all if not r.ended]
        if what < 0.03 and alive:
            engine.abort(source.choice(alive))
        elif what < 0.06 and engine.running:
            engine.preempt(source.choice(engine.running), drop=True)
        elif what < 0.07:
            engine.reset(clear=source.random() < 0.5)
        elif what < 0.08:
            engine.scheduler.frozen = not engine.scheduler.frozen
        elif what < 0.13 and engine.all:
            engine.look(source.choice(engine.all))

    def run(self) -> RandomEngine:
        engine = self.engine
        for _ in range(STEPS_MAX):
            if self.left and (self.source.random() < self.haste or not engine.busy):
                self._add()
            self._disturb()
            engine.step()
            self.now[0] += 1e-3
            if not self.left and not engine.waiting and not engine.running and not engine.loading:
                break
        self.rest()
        return engine

    def rest(self) -> None:
        """Nothing runs any more: everything must have been given back."""
        engine = self.engine
        hanging = [r.request_id for r in engine.all if not r.ended]
        assert not hanging, f"{hanging} hang"
        for mover in engine.ranks.movers:
            mover.hurry = True
        for _ in range(4):
            engine.step()
        engine.drain()
        stats = engine.scheduler.index.stats()
        assert stats["leases"] == stats["reserved"] == stats["leaving"] == stats["mismatches"] == 0, stats
        assert stats["free"] + stats["visible"] == stats["rows"] <= engine.ranks.rows, stats
        assert len(engine.pool.free) == engine.pool.num_gpu_blocks - 1, "blocks are still held"
        assert engine.scheduler._held.orphans == engine.scheduler._lookup._waiting_rows == 0
        assert not engine.scheduler.has_work()
        turns = engine.scheduler._turns
        assert not any([turns._holders, turns._early, turns._due])
        for request in engine.all:
            engine.look(request)
        assert not engine.wrong
        assert not engine.ranks.violations()


@pytest.mark.soak
def test_random_lives_break_nothing(soak: Soak, clock: list[float]) -> None:
    seen: Counter[str] = Counter()
    for seed in soak.rounds(10_000, "sequences"):
        engine = Life(seed, clock).run()
        seen.update(engine.seen)
        seen.update(engine.counters.totals())
        seen["evictions"] += engine.scheduler.index.stats()["evictions"]
    if soak.count < ENOUGH:
        return
    for name in MEANT_TO_BE_MET:
        assert seen[name] > soak.count / 100, (name, seen)
