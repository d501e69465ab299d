"""Random lives of random requests on random engines, against what must hold whatever happens.

No row or block is touched after it was given back; leases are zero when nothing runs; every held block is released;
every row that is found holds the KV of the tokens asked for, under the present weights, and so does every value of a
slower tier; every request ends, with tokens computed from its own KV.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from late_ranks import Shape
from late_tier import Background, Medium, World
from random_engine import RandomEngine
from toy_engine import BLOCK
from toy_prompts import Prompt

from lmcache_rs.connector import fetches, ledger, lookup, pieces, rates, resets, tiering
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
    *("fetched_chunks:near", "written_chunks:near", "failed_fetches:near", "failed_writes:near"),
    *("new weights", "dropped_fetches:pool_full", "loads_as_fetched"),
    *("fetch_timeouts", "search_timeouts", "values looked at", "new weights, told later", "restarts"),
    *("failed_loads", "dropped_stores:void", "dropped_stores:failed", "pending_timeouts", "failed plans"),
)
BLOCKS_MIN = -(-(PROMPT_MAX + TOKENS_MAX) // BLOCK) + 2


@dataclass(slots=True)
class Time:
    """What only tests move: the clock, and threads."""

    now: float = 0.0
    background: Background = field(default_factory=Background)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    """The time, and no log: tens of thousands of failed loads are told of otherwise."""
    time = Time()
    for module in (fetches, ledger, lookup, pieces, rates, tiering):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.now))
    monkeypatch.setattr(resets, "threading", time.background)
    monkeypatch.setattr(resets, "RETRY_EVERY_S", 0.01)
    monkeypatch.setattr(tiering, "sleep", lambda seconds: None)
    # These engines have few blocks.
    monkeypatch.setattr(fetches, "LENT_SHARE_MAX", 1.0)
    monkeypatch.setattr(tiering, "FIND_S_MAX", 0.02)
    logger = logging.getLogger("lmcache_rs")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield time
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
    tiers = pick([(), (), ("near",), ("near", "far")])
    if tiers:
        extra |= {
            "lmcache.chunk_size": BLOCK * source.randrange(1, 5),
            "lmcache.write_policy": pick(["through", "reuse"]),
            "lmcache.blocking_timeout_secs": pick([0, 0.02, 0.1, 1, 1]),
        }
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
        tiers=tiers,
        extra=extra,
    )


def fetching(shape: Shape) -> Shape:
    """The same, with chunks of one block that are written at once, so that a fetch has many of them."""
    extra = shape.extra | {
        "lmcache.chunk_size": BLOCK,
        "lmcache.write_policy": "through",
        "lmcache.blocking_timeout_secs": 1,
        "lmcache.max_tokens_per_load": 0,
    }
    return replace(shape, tiers=("near",), extra=extra)


class Life:
    """One sequence: requests come, go and meet what operators and machines do."""

    def __init__(self, seed: int, time: Time, some_shape: Callable[[Random], Shape] = some_shape) -> None:
        self.source = source = Random(seed)
        self.time = time
        self.seen: Counter[str] = Counter()
        self.shape = shape = some_shape(source)
        self.world = World({name: Medium(source, shape.fail_share) for name in shape.tiers})
        self.engine = RandomEngine(shape, self.world, source)
        self.earlier: list[Prompt] = []
        self.stems = [self._tokens(PROMPT_MAX) for _ in range(2)]
        self.left = source.randrange(2, REQUESTS_MAX)
        self.haste = source.choice([0.3, 0.3, 1.0])
        """How likely a request comes in a step."""

    def _tokens(self, count: int) -> list[int]:
        return [self.source.randrange(1000) for _ in range(count)]

    def _add(self) -> None:
        source, engine = self.source, self.engine
        self.left -= 1
        earlier = [r for r in (*self.earlier, *engine.all) if r.num_tokens <= PROMPT_MAX]
        if earlier and source.random() < (0.9 if self.earlier else 0.6):
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
            engine.look(source.choice([*self.earlier, *engine.all]))
        elif what < 0.14:
            engine.load_weights()
        elif what < 0.17 and self.shape.tiers:
            self._restart()
        if source.random() < 0.3:
            self.time.background.run()

    def _restart(self) -> None:
        """The engine is killed, and another one finds what this one left behind."""
        self._take_counts()
        self.seen["restarts"] += 1
        self.engine.kill()
        self.time.background.drop()
        self.earlier += self.engine.all
        self.left += self.source.randrange(1, 4)
        rows = self.source.choice([self.shape.rows, 10, 60])
        self.engine = RandomEngine(replace(self.shape, rows=rows), self.world, self.source)

    def _take_counts(self) -> None:
        engine = self.engine
        self.seen.update(engine.seen)
        self.seen.update(engine.counters.totals())
        self.seen["evictions"] += engine.scheduler.index.stats()["evictions"]
        assert not engine.wrong
        assert not engine.ranks.violations()

    def run(self) -> Counter[str]:
        for _ in range(STEPS_MAX):
            if self.left and (self.source.random() < self.haste or not self.engine.busy):
                self._add()
            self._disturb()
            self._step()
            engine = self.engine
            if not self.left and not engine.waiting and not engine.running and not engine.loading:
                if not self.shape.tiers or self.source.random() < 0.5:
                    break
                self._restart()
        self.rest()
        self._take_counts()
        return self.seen

    def _step(self) -> None:
        self.engine.step()
        self.time.now += 1e-3

    def rest(self) -> None:
        """Nothing runs any more: everything must have been given back."""
        engine = self.engine
        for _ in range(STEPS_MAX):  # nobody disturbs them any more
            if not (engine.waiting or engine.running or engine.loading):
                break
            self.time.background.run()
            self._step()
        hanging = [r.request_id for r in engine.all if not r.ended]
        assert not hanging, f"{hanging} hang"
        engine.ranks.hurry()
        for medium in self.world.media.values():
            medium.fail_share = 0
        for _ in range(4):
            self._step()
        for _ in range(STEPS_MAX):
            self.time.background.run()
            if not engine.scheduler.has_work() and not engine.is_moving_chunks:
                break
            self._step()
        engine.drain()
        stats = engine.scheduler.index.stats()
        assert stats["leases"] == stats["reserved"] == stats["leaving"] == stats["mismatches"] == 0, stats
        assert stats["free"] + stats["visible"] == stats["rows"] <= engine.ranks.rows, stats
        assert len(engine.pool.free) == engine.pool.num_gpu_blocks - 1, "blocks are still held"
        assert engine.scheduler._held.orphans == engine.scheduler._lookup._waiting_rows == 0
        assert not engine.scheduler.has_work()
        engine.assert_tiering_is_idle()
        turns = engine.scheduler._turns
        assert not any([turns._holders, turns._early, turns._due])
        for request in (*self.earlier, *engine.all):
            engine.look(request)


@pytest.mark.soak
def test_random_lives_break_nothing(soak: Soak, time: Time) -> None:
    seen: Counter[str] = Counter()
    for seed in soak.rounds(10_000, "sequences"):
        time.background.drop()
        seen.update(Life(seed, time).run())
    if soak.count < ENOUGH:
        return
    for name in MEANT_TO_BE_MET:
        assert seen[name] > soak.count / 100, (name, seen)


@pytest.mark.soak
def test_random_lives_that_fetch_break_nothing(soak: Soak, time: Time) -> None:
    seen: Counter[str] = Counter()
    for seed in soak.rounds(1_500, "sequences that fetch"):
        time.background.drop()
        seen.update(Life(seed, time, lambda source: fetching(some_shape(source))).run())
    if soak.count < ENOUGH:
        return
    for name in ("loads_as_fetched", "cut_loads", "failed_loads", "failed_fetches:near", "restarts"):
        assert seen[name] > soak.count / 200, (name, seen)
