"""A load that fails is computed, its rows are forgotten, what was stored on top is void, and nobody waits for ever."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hooked_engine import HookedEngine
from test_faults import prompt
from toy_engine import BLOCK, Request

from lmcache_rs.connector.orders import LoadOrder, StepOrders

ENGINES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "asynchronous": {"extra": {"lmcache.sync_load_max_size": 0}},
    "vLLM 0.29": {"old": True, "extra": {"lmcache.sync_load_max_size": 0}},
    "overlapping steps": {"acks_late": 2},
    "two ranks": {"ranks": 2},
}


class Failing:
    """A mover in front of another, whose loads fail: in the call, or when they are polled, with bad bytes written."""

    def __init__(self, mover: Any, late: bool) -> None:
        self._mover, self._late = mover, late
        self._ended: list[tuple[int, int, float]] = []
        self.failed_rows: list[int] = []
        self.on = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mover, name)

    def load_now(self, job: int, rows: Any, blocks: Any, by_layers: bool) -> None:
        self._load(self._mover.load_now, job, rows, blocks)

    def submit_load(self, job: int, rows: Any, blocks: Any, by_layers: bool) -> None:
        self._load(self._mover.submit_load, job, rows, blocks)

    def _load(self, call: Any, job: int, rows: Any, blocks: Any) -> None:
        if not self.on:
            call(job, rows, blocks)
            return
        self.failed_rows += rows.tolist()
        if not self._late:
            raise RuntimeError("injected")
        self._ended.append((job, -1, 0.0))

    def poll(self) -> list[tuple[int, int, float]]:
        ended, self._ended = self._ended, []
        return ended + self._mover.poll()


class Rescued(Failing):
    """A mover that has another way."""

    def rescue(self, rows: Any, blocks: Any) -> bool:
        self._mover.load_now(0, rows, blocks)
        return True


def failing(engine: HookedEngine, late: bool) -> Failing:
    side = engine.workers[-1].side
    side._mover = Failing(side._mover, late)
    return side._mover


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ENGINES)
def test_what_is_computed_on_a_failed_load_is_not_kept(kind: str, late: bool) -> None:
    """The step that was to load also computes and stores what follows: on garbage, under a right key."""
    engine = HookedEngine(**ENGINES[kind])
    engine.run(Request("first", prompt(1, 24)))
    mover = failing(engine, late)
    longer = Request("longer", prompt(1, 24) + prompt(2, 10))
    beside = Request("beside", prompt(3, 30))
    engine.run(longer, beside)
    mover.on = False
    engine.assert_idle()
    assert mover.failed_rows
    if kind in ("synchronous", "overlapping steps", "two ranks"):
        assert engine.counters.totals()["dropped_stores:void"] >= 1
    longest = Request("longest", prompt(1, 24) + prompt(2, 10) + prompt(4, 5))
    engine.run(longest)
    engine.assert_idle()
    assert engine.done["longer"].output == [sum(longer.prompt) % 97]


@pytest.mark.parametrize("kind", ["synchronous", "asynchronous"])
def test_failed_rows_leave_the_index(kind: str) -> None:
    engine = HookedEngine(**ENGINES[kind], rows=64)
    engine.run(Request("first", prompt(1, 24)))
    before = engine.scheduler.index.stats()
    mover = failing(engine, late=True)
    engine.scheduler.side.frozen = True  # nothing comes in their place
    engine.run(Request("second", prompt(1, 24)))
    after = engine.scheduler.index.stats()
    assert after["visible"] == before["visible"] - len(set(mover.failed_rows)) == 0
    engine.assert_idle()


@pytest.mark.parametrize("kind", ["synchronous", "asynchronous", "vLLM 0.29", "two ranks"])
def test_a_request_whose_loads_fail_is_offered_less_and_then_nothing(kind: str) -> None:
    """Also when the mover is at fault: two loads, and the rows of the second end before those of the first."""
    engine = HookedEngine(**ENGINES[kind])
    engine.run(Request("first", prompt(1, 40)))
    offers: list[Any] = []
    admit = engine.scheduler.hooks.update_state_after_alloc
    engine.scheduler.hooks.update_state_after_alloc = lambda request, blocks, tokens: (
        offers.append(tokens),
        admit(request, blocks, tokens),
    )
    failing(engine, late=True)
    # Preempted after each step, so that it is asked about again and again.
    victim = engine.add(Request("victim", prompt(1, 40), max_tokens=12))
    for _ in range(12):
        engine.step()
        if victim in engine.running:
            engine.preempt(victim)
    engine.run()
    positive = [tokens for tokens in offers if tokens]
    assert len(positive) <= 2
    assert positive == sorted(set(positive), reverse=True), "strictly shorter"
    engine.assert_idle()


class Stuck:
    """A mover that cannot end its copies in time: a thread may still write."""

    rows = 64

    def __init__(self) -> None:
        self.ended: list[tuple[int, int, float]] = []

    def submit_load(self, *_: Any) -> None:
        pass

    def settle_loads(self, *_: float) -> list[int]:
        return []

    def poll(self) -> list[tuple[int, int, float]]:
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> bool:
        return False


def test_closing_never_gives_up_blocks_that_a_copy_can_still_write() -> None:
    """The request waits rather than have its blocks computed, or freed, while they are written."""
    engine = HookedEngine(**ENGINES["asynchronous"])
    engine.run(Request("first", prompt(1, 24)))
    mover = engine.workers[0].side._mover
    engine.workers[0].side._mover = stuck = Stuck()
    waiting, other = engine.add(Request("waiting", prompt(1, 24))), engine.add(Request("other", prompt(5, 9)))
    engine.step()
    (job,) = engine.workers[0].side.answers.asynchronous
    table = list(waiting.table)
    engine.workers[0].hooks.shutdown()
    for _ in range(20):
        engine.step()
    assert other.request_id in engine.done
    assert waiting.request_id in engine.loading
    assert waiting.table == table
    assert all(engine.pool.blocks[i].ref_cnt for i in table)
    # A mover that did end everything lets the side fail what is left.
    settled = HookedEngine(**ENGINES["asynchronous"])
    settled.workers[0].side._mover = SimpleNamespace(
        submit_load=stuck.submit_load,
        settle_loads=stuck.settle_loads,
        poll=stuck.poll,
        close=lambda: True,
        rows=64,
    )
    settled.workers[0].side.begin_step(engine_orders(job, table))
    settled.workers[0].hooks.shutdown()
    assert settled.workers[0].side.take_received() == ({"waiting"}, {"waiting"})
    mover.close()


def engine_orders(job: int, table: list[int]) -> Any:
    blocks = np.array(table, np.uint32)
    return StepOrders(loads=[LoadOrder(job, "waiting", blocks, blocks, asynchronous=True)])


def test_an_abort_keeps_blocks_and_rows_until_the_load_has_ended() -> None:
    engine = HookedEngine(**ENGINES["asynchronous"])
    engine.run(Request("first", prompt(1, 24)))
    mover = engine.workers[0].side._mover
    poll, mover.poll = mover.poll, list
    victim = engine.add(Request("victim", prompt(1, 24)))
    engine.step()
    engine.abort(victim)
    for _ in range(5):
        engine.step()
    assert engine.scheduler.index.stats()["leases"] == 1
    assert len(engine.pool.free) == engine.pool.num_gpu_blocks - 1 - 24 // BLOCK
    mover.poll = poll
    while engine.loading:
        engine.step()
    engine.assert_idle()


def test_the_next_answer_is_shorter_although_the_rows_are_there_again() -> None:
    engine = HookedEngine()
    engine.run(Request("first", prompt(1, 40)))
    mover = failing(engine, late=True)
    victim = engine.add(Request("victim", prompt(1, 40), max_tokens=3))
    engine.step()
    assert engine.counters.totals()["failed_loads"] == 1
    engine.preempt(victim)
    engine.waiting.remove(victim)
    mover.on = False
    engine.run(Request("other", prompt(1, 40)))
    again = engine.scheduler.matched_tokens(victim, 0)
    assert again == (36, False), "the block of the failed load's last token is not offered again"
    engine.waiting.append(victim)
    engine.run()
    engine.assert_idle()


def test_a_request_that_missed_a_step_is_not_stored_again() -> None:
    """Its block table has a gap then: what would be stored is other blocks under right keys."""
    engine = HookedEngine(acks_late=4, extra={"lmcache.save_decode_cache": True})
    engine.run(Request("first", prompt(1, 24)))
    settle(engine)
    mover = failing(engine, late=True)
    victim = engine.add(Request("victim", prompt(1, 24) + prompt(2, 3), max_tokens=30))
    planner = engine.scheduler.side._storing._planner
    plan, planner.plan = planner.plan, lambda *_: 1 / 0
    engine.step()
    planner.plan = plan
    mover.on = False
    engine.run()
    settle(engine)
    again = Request("again", victim.all_token_ids)
    engine.run(again)
    settle(engine)
    engine.assert_idle()
    assert engine.counters.totals()["dropped_stores:planning"] == 1


def settle(engine: HookedEngine) -> None:
    for _ in range(5):
        engine.step()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_that_has_another_way_does_not_fail(late: bool, ranks: int) -> None:
    engine = HookedEngine(ranks=ranks)
    engine.run(Request("first", prompt(1, 24)))
    side = engine.workers[-1].side
    side._mover = Rescued(side._mover, late)
    told, take = [], side.take_bad_blocks
    side.take_bad_blocks = lambda: told.append(take()) or told[-1]
    longer = Request("longer", prompt(1, 24) + prompt(2, 10))
    engine.run(longer)
    engine.assert_idle()
    assert longer.cached_tokens == 24
    assert told
    assert not any(told)
    assert "failed_loads" not in engine.counters.totals()
