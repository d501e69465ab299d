"""Whatever fails behind a hook, by an exception or a panic of Rust: no wrong cell, no request that hangs, no leak."""

import functools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from faulty import Faults, Faulty, faulty
from hooked_engine import HookedEngine
from late_tier import LateTiers, Medium
from toy_engine import Request

from lmcache_rs.copy.cpu import CpuMover
from lmcache_rs.errors import InternalError
from support import Soak


def prompt(seed: int, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1000) for _ in range(count)]


def panic() -> None:
    """A real one: tiktoken, which vLLM needs, is a Rust extension that panics when a byte is not in its table."""
    from tiktoken import _tiktoken

    _tiktoken.CoreBPE({b"a": 0}, {}, "a|b").encode_ordinary("b")


@functools.cache
def panic_class() -> type[BaseException]:
    with pytest.raises(BaseException, match="no entry found") as caught:
        panic()
    assert not issubclass(caught.type, Exception)
    return caught.type


def a_panic() -> BaseException:
    """What pyo3 raises for a panic, without the lines that each real one writes."""
    return panic_class()("on purpose")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """No records: pytest keeps them, with the frames of the exceptions in them and all that is in these."""
    logger = logging.getLogger("lmcache_rs")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


class FreshTiers:
    """Slower tiers that begin empty with each engine, and answer at once."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def __call__(self, rank: int, searching: bool) -> Any:
        if searching:
            self._tiers = LateTiers({"near": Medium(random.Random(1), 0.0)}, self._ranks)
            self._tiers.claims.ranks = set(range(self._ranks))
        opened = self._tiers.open(rank)
        self._tiers.hurry()
        return opened


VARIANTS: dict[str, dict[str, Any]] = {
    "synchronous": {"extra": {"lmcache.save_decode_cache": True}},
    "asynchronous": {"extra": {"lmcache.sync_load_max_size": 0, "lmcache.save_decode_cache": True}},
    "two ranks, synchronous": {"ranks": 2},
    "two ranks, asynchronous": {"ranks": 2, "extra": {"lmcache.sync_load_max_size": 0}},
    "a worker nearby": {"nearby": True, "extra": {"lmcache.sync_load_max_size": 64}},
    "a small pool": {"rows": 24, "blocks": 48},
    "a slower tier": {
        "rows": 16,
        "ranks": 2,
        "open_tiers": FreshTiers(2),
        "extra": {"lmcache.chunk_size": 8, "lmcache.write_policy": "through"},
    },
    "vLLM 0.29, overlapping steps": {
        "old": True,
        "acks_late": 2,
        "extra": {"lmcache.sync_load_max_size": 64},
    },
}


def life(engine: HookedEngine) -> None:
    """Requests that store, load, share, extend, are preempted and aborted."""
    shared = prompt(1, 26)
    engine.run(Request("first", shared, max_tokens=6))
    engine.run(
        Request("again", shared, max_tokens=2),
        Request("longer", shared + prompt(2, 21), max_tokens=3),
        Request("other", prompt(3, 30), max_tokens=2),
    )
    victim = engine.add(Request("victim", shared + prompt(4, 30), max_tokens=9))
    engine.add(Request("beside", prompt(3, 30) + prompt(5, 9), max_tokens=4))
    engine.step()
    if victim.request_id not in engine.done:
        engine.abort(victim)
    while engine.running:
        engine.preempt(engine.running[0])
    engine.run(Request("late", shared + prompt(2, 21) + prompt(6, 5), max_tokens=2))


def run_with(faults: Faults, options: dict[str, Any]) -> HookedEngine:
    def make_mover(*arguments: Any) -> Any:
        return Faulty(CpuMover(*arguments), faults)

    with faulty(faults):
        engine = HookedEngine(make_mover=make_mover, **options)
        faults.on = True
        life(engine)
        faults.on = False
        engine.run(Request("last", prompt(1, 26) + prompt(2, 21), max_tokens=2))
        engine.assert_idle()
        engine.close()
    return engine


def places(options: dict[str, Any]) -> dict[str, int]:
    faults = Faults()
    engine = run_with(faults, options)
    assert not [name for name in engine.counters.totals() if name.startswith("errors")]
    assert engine.done["again"].cached_tokens > 0
    return dict(faults.calls)


def check(
    options: dict[str, Any], place: str, nth: int, times: int, make: Callable[[], BaseException]
) -> None:
    faults = Faults()
    faults.arm(place, nth, times, make)
    try:
        counts = run_with(faults, options).counters.totals()
        errors = {name: count for name, count in counts.items() if name.startswith("errors")}
        # What else the barriers kept would be a toy engine that found something wrong.
        assert times > 1 or sum(errors.values()) <= 1, errors
    except BaseException as error:
        raise AssertionError(f"{times} faults from call {nth} of {place} on") from error


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_fault_anywhere(variant: str) -> None:
    for place, calls in places(VARIANTS[variant]).items():
        check(VARIANTS[variant], place, calls // 2, 1, RuntimeError)


def test_one_panic_anywhere() -> None:
    for place in places(VARIANTS["two ranks, asynchronous"]):
        check(VARIANTS["two ranks, asynchronous"], place, 0, 1, a_panic)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("part", ["Index.", "Lease.", "Reservation.", "Match.", "StorePlanner.", "Lookup."])
def test_a_part_that_fails_for_good(part: str, variant: str) -> None:
    """An index that panicked once refuses all further calls, so everything that ends a job fails."""
    for nth in (0, 7):
        check(VARIANTS[variant], part, nth, 10**9, InternalError)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("call", ["load_now", "submit_load", "store"])
def test_a_mover_that_takes_nothing(call: str, variant: str) -> None:
    for nth in (1,):
        check(VARIANTS[variant], f"CpuMover.{call}", nth, 10**9, InternalError)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_every_barrier(interrupt: type[BaseException]) -> None:
    options = VARIANTS["asynchronous"]
    for place in places(options):
        faults = Faults()
        faults.arm(place, 0, 1, interrupt)
        try:
            run_with(faults, options)
        except interrupt:
            continue
        assert not faults.calls[place], "copies end when they do, so some calls are not made each time"


@pytest.mark.soak
def test_many_faults_at_random_places(soak: Soak) -> None:
    """Two or three faults in one life, of any kind, anywhere."""
    known = {name: list(places(options).items()) for name, options in VARIANTS.items()}
    for seed in soak.rounds(100, "lives"):
        source = random.Random(seed)
        variant = source.choice(list(known))
        chosen = source.sample(known[variant], source.choice((1, 2, 2, 3)))
        several = [
            (place, source.randrange(calls), 1, source.choice((RuntimeError, a_panic)))
            for place, calls in chosen
        ]
        faults = Faults()
        for one in several:
            faults.arm(*one)
        try:
            run_with(faults, VARIANTS[variant])
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {variant}, {several}") from error
