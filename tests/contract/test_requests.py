"""The life of requests, driven through both sides without vLLM: what is stored, found, loaded, and never mixed up."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from toy_engine import BLOCK, Request, ToyEngine

from lmcache_rs.connector.ledger import STEPPING_S_MAX
from lmcache_rs.connector.orders import StepOrders, WorkerAcks
from lmcache_rs.connector.rules import Roles


def prompt(seed: int, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1000) for _ in range(count)]


def twice(engine: ToyEngine, tokens: list[int], **options: Any) -> Request:
    engine.run(Request("first", tokens, **options))
    return second(engine, tokens, **options)


def second(engine: ToyEngine, tokens: list[int], **options: Any) -> Request:
    request = Request("second", tokens, **options)
    engine.run(request)
    engine.assert_idle()
    return request


ASYNC = {"lmcache.sync_load_max_size": 0}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("count", [3, 4, 5, 30, 31, 32, 100])
def test_a_repeated_prompt_is_found_but_for_its_last_token(count: int, ranks: int) -> None:
    assert twice(ToyEngine(ranks=ranks), prompt(1, count)).cached_tokens == count - 1


def test_an_asynchronous_load_brings_the_whole_prompt() -> None:
    engine = ToyEngine(extra=ASYNC)
    engine.run(Request("first", prompt(1, 31)))
    others = [Request(f"other{i}", prompt(50 + i, 20), max_tokens=3) for i in range(2)]
    repeat = Request("second", prompt(1, 31))
    engine.run(*others, repeat)
    engine.assert_idle()
    assert repeat.cached_tokens == 31
    assert repeat.output == engine.done["first"].output


def test_a_longer_prompt_is_found_to_the_last_shared_block() -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 30)))
    assert second(engine, prompt(1, 30) + prompt(2, 9)).cached_tokens == 28


def test_tails_can_be_turned_off() -> None:
    assert twice(ToyEngine(extra={"lmcache.save_unfull_chunk": False}), prompt(1, 31)).cached_tokens == 28


def test_another_salt_or_tag_finds_nothing() -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 31), salt="a"))
    assert second(engine, prompt(1, 31), salt="b").cached_tokens == 0
    tagged = Request("tagged", prompt(1, 31), salt="a", kv_transfer_params={"lmcache.tag.user": "x"})
    engine.run(tagged)
    assert tagged.cached_tokens == 0


def test_skip_save_and_priority_limit_store_nothing() -> None:
    assert (
        twice(ToyEngine(), prompt(1, 31), kv_transfer_params={"lmcache.skip_save": True}).cached_tokens == 0
    )
    assert twice(ToyEngine(extra={"lmcache.priority_limit": 3}), prompt(1, 31), priority=4).cached_tokens == 0
    assert (
        twice(ToyEngine(extra={"lmcache.priority_limit": 3}), prompt(1, 31), priority=3).cached_tokens == 30
    )


@pytest.mark.parametrize(
    "roles", [Roles(may_store=False, may_load=True), Roles(may_store=True, may_load=False)]
)
def test_roles_that_only_store_or_only_load(roles: Roles) -> None:
    engine = ToyEngine(roles=roles)
    assert twice(engine, prompt(1, 31)).cached_tokens == 0
    assert bool(engine.scheduler.index.stats()["visible"]) == roles.may_store


def test_short_hits_are_left_alone() -> None:
    engine = ToyEngine(extra={"lmcache.min_retrieve_tokens": 20})
    assert twice(engine, prompt(1, 16)).cached_tokens == 0
    assert engine.counters.totals()["misses:below_min_retrieve_tokens"] == 1


def test_generated_tokens_are_stored_when_asked_for() -> None:
    for save, expected in ((False, 8), (True, 20)):
        engine = ToyEngine(extra={"lmcache.save_decode_cache": save})
        first = Request("first", prompt(1, 8), max_tokens=14)
        engine.run(first)
        follow_up = second(engine, [*first.all_token_ids, 7, 7, 7])
        assert follow_up.cached_tokens == expected
        assert engine.wrong == 0


def test_requests_of_one_step_store_shared_blocks_once() -> None:
    engine = ToyEngine()
    engine.run(*[Request(f"r{i}", prompt(1, 30)) for i in range(4)])
    engine.assert_idle()
    assert engine.scheduler.index.stats()["visible"] == 8


def test_preempted_requests_come_back_from_the_cache() -> None:
    engine = ToyEngine(blocks=24)
    requests = [Request(f"r{i}", prompt(i, 20), max_tokens=24) for i in range(4)]
    engine.run(*requests)
    engine.assert_idle()
    assert engine.resumed
    assert any(r.cached_tokens for r in requests)


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("extra", [{}, ASYNC])
def test_abort_at_every_step(after: int, extra: dict[str, Any]) -> None:
    engine = ToyEngine(extra=extra)
    engine.run(Request("first", prompt(1, 50)))
    victim = engine.add(Request("victim", prompt(1, 50) + prompt(2, 40), max_tokens=3))
    other = engine.add(Request("other", prompt(3, 50), max_tokens=6))
    for _ in range(after):
        engine.step()
    if victim.request_id not in engine.done:
        engine.abort(victim)
    while engine.running or engine.waiting or engine.loading:
        engine.step()
    engine.assert_idle()
    assert len(other.output) == 6
    assert second(engine, prompt(1, 50)).cached_tokens >= 49


def test_a_full_pool_keeps_what_fits_and_stays_right() -> None:
    engine = ToyEngine(rows=10)
    for i in range(8):
        engine.run(Request(f"r{i}", prompt(i % 3, 22 + i)))
        engine.assert_idle()
    assert engine.counters.take() is not None
    assert engine.scheduler.index.stats()["evictions"] > 0


class Broken:
    """A mover whose loads, or stores, fail."""

    def __init__(self, mover: Any, what: str) -> None:
        self._mover, self._what, self.left = mover, what, 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith(self._what) or (self._what == "load" and name == "submit_load"):
            return self._fail_once(getattr(self._mover, name))
        return getattr(self._mover, name)

    def _fail_once(self, call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            if self.left:
                self.left -= 1
                raise RuntimeError("injected")
            return call(*arguments)

        return wrapped


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("extra", [{}, ASYNC])
def test_a_failed_load_is_computed_again(extra: dict[str, Any], ranks: int) -> None:
    engine = ToyEngine(extra=extra, ranks=ranks)
    engine.run(Request("first", prompt(1, 50)))
    engine.workers[-1]._mover = Broken(engine.workers[-1]._mover, "load")
    repeat, beside = Request("second", prompt(1, 50)), Request("beside", prompt(1, 50) + prompt(2, 30))
    engine.run(repeat, beside)
    engine.assert_idle()
    assert repeat.output == engine.done["first"].output
    assert engine.counters.totals()["failed_loads"] >= 1
    third = Request("third", prompt(1, 50))
    engine.run(third)
    engine.assert_idle()
    assert third.cached_tokens >= 49, "what was computed again is stored again"


def test_a_mover_that_always_fails_does_not_livelock() -> None:
    engine = ToyEngine(extra=ASYNC)
    engine.run(Request("first", prompt(1, 50)))
    broken = engine.workers[0]._mover = Broken(engine.workers[0]._mover, "load")
    broken.left = 10**6
    for i in range(5):
        engine.run(Request(f"again{i}", prompt(1, 50)), Request(f"beside{i}", prompt(9, 12)))
    engine.assert_idle()


def test_a_failed_store_is_forgotten() -> None:
    engine = ToyEngine()
    engine.workers[0]._mover = Broken(engine.workers[0]._mover, "store")
    assert twice(engine, prompt(1, 15)).cached_tokens == 0
    assert engine.counters.totals()["dropped_stores:failed"] == 1


def test_planning_that_fails_still_ends_promised_loads() -> None:
    engine = ToyEngine(extra=ASYNC)
    engine.run(Request("first", prompt(1, 50)))
    planner = engine.scheduler._storing._planner
    plan = planner.plan
    planner.plan = lambda *_: 1 / 0
    repeat = Request("second", prompt(1, 50))
    engine.run(repeat, Request("beside", prompt(3, 30)))
    planner.plan = plan
    engine.assert_idle()
    assert repeat.output == engine.done["first"].output


def test_an_order_that_fails_ends_as_a_failed_load() -> None:
    for extra in ({}, ASYNC):
        engine = ToyEngine(extra=extra)
        engine.run(Request("first", prompt(1, 50)))
        open_load = engine.scheduler._ledger.open_load
        engine.scheduler._ledger.open_load = lambda *_: 1 / 0
        admit = engine.scheduler.admit
        engine.scheduler.admit = swallowing(engine.scheduler)
        repeat = Request("second", prompt(1, 50))
        engine.run(repeat, Request("beside", prompt(3, 30)))
        engine.scheduler._ledger.open_load, engine.scheduler.admit = open_load, admit
        engine.assert_idle()
        assert repeat.output == engine.done["first"].output


def test_what_is_computed_on_a_load_that_was_not_ordered_is_not_kept() -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 40)))
    open_load, admit = engine.scheduler._ledger.open_load, engine.scheduler.admit
    engine.scheduler._ledger.open_load = lambda *_: 1 / 0
    engine.scheduler.admit = swallowing(engine.scheduler)
    engine.run(Request("second", prompt(1, 40) + prompt(2, 16)))
    engine.scheduler._ledger.open_load, engine.scheduler.admit = open_load, admit
    third = Request("third", prompt(1, 40) + prompt(2, 16))
    engine.run(third)
    engine.assert_idle()
    assert third.cached_tokens >= 40


def test_a_store_waits_for_the_answer_of_a_load_that_it_may_have_read() -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 40)))
    worker, ledger = engine.workers[0], engine.scheduler._ledger
    ledger.open_load = lambda *_: 1 / 0
    engine.scheduler.admit = swallowing(engine.scheduler)
    take, withheld = worker.take_step_acks, [WorkerAcks()]

    def loads_a_step_late() -> WorkerAcks | None:
        acks, late = take() or WorkerAcks(), withheld.pop()
        withheld.append(WorkerAcks({i: acks.jobs.pop(i) for i in list(acks.jobs) if i in ledger._loads}))
        acks.merge(late)
        return acks

    worker.take_step_acks = loads_a_step_late
    engine.run(Request("second", prompt(1, 40) + prompt(2, 16)))
    del ledger.open_load
    engine.run(Request("third", prompt(1, 40) + prompt(2, 16)))
    engine.assert_idle()


def test_a_request_aborted_before_vllm_heard_of_its_failed_load_leaves_nothing() -> None:
    engine = ToyEngine(extra={**ASYNC, "lmcache.save_decode_cache": True})
    engine.run(Request("first", prompt(1, 40)))
    worker = engine.workers[0]
    worker._mover = Broken(worker._mover, "load")
    receive = worker.take_received
    worker.take_received = lambda: (set(), set())
    second = engine.add(Request("second", prompt(1, 40)))
    while not engine.counters.totals().get("failed_loads"):
        engine.step()
    engine.abort(second)
    worker.take_received = receive
    engine.step()
    engine.run(Request("third", prompt(1, 40)))
    engine.assert_idle()


def swallowing(scheduler: Any) -> Any:
    """`admit` behind the barrier of the real connector."""
    admit = scheduler.admit

    def swallow(request: Request, block_ids: list[int], tokens: int) -> None:
        try:
            admit(request, block_ids, tokens)
        except ZeroDivisionError:
            scheduler.break_promise(request.request_id, block_ids, tokens)

    return swallow


def test_clear_forgets_answers_and_rows() -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 31)))
    waiting = engine.add(Request("second", prompt(1, 31)))
    assert engine.scheduler.matched_tokens(waiting, 0)[0] == 30
    assert engine.scheduler.clear() == (8, True)
    assert engine.scheduler.matched_tokens(waiting, 0) == (0, False)
    assert engine.pool.reset_prefix_cache()


def test_what_is_half_computed_when_the_cache_is_cleared_is_not_stored_again() -> None:
    """Else the next chunk of it would offer its whole prefix: KV of the weights before."""
    engine = ToyEngine(chunk=8)
    request = engine.add(Request("first", prompt(1, 40)))
    engine.step()
    engine.step()
    assert 0 < request.num_computed_tokens < 40
    assert engine.scheduler.clear() == (4, True)
    while not request.output:
        engine.step()
    assert engine.scheduler.index.stats()["visible"] == 0
    assert second(engine, prompt(1, 40)).cached_tokens == 0
    assert second(engine, prompt(1, 40)).cached_tokens == 39, "those that come later are stored"


def test_freeze_serves_and_stores_nothing() -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 31)))
    engine.scheduler.frozen = True
    assert second(engine, prompt(1, 31) + prompt(2, 20)).cached_tokens == 28
    assert engine.scheduler.index.stats()["visible"] == 8


def test_a_reset_of_vllms_pool_releases_held_blocks() -> None:
    engine = ToyEngine()
    engine.workers[0].after_forward = lambda _orders: None  # the store is never acknowledged
    engine.run(Request("first", prompt(1, 12)))
    assert len(engine.pool.free) < engine.pool.num_gpu_blocks - 1
    assert engine.pool.reset_prefix_cache(), "held blocks are released before the pool looks"


@pytest.mark.parametrize("part", ["_ledger.void_stores", "_late_acks.retry"])
def test_a_reset_of_vllms_pool_ends_whatever_fails_behind_it(part: str) -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 12)))
    engine.scheduler.worker_nearby = SimpleNamespace(drain=lambda: None, take_acks=lambda: None)
    owner, name = part.split(".")
    setattr(getattr(engine.scheduler, owner), name, lambda: 1 / 0)
    assert engine.pool.reset_prefix_cache()
    assert engine.counters.totals()["errors:_before_reset"] == 1


def test_asking_again_costs_and_changes_nothing() -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 31)))
    waiting = engine.add(Request("second", prompt(1, 31)))
    before = None
    for _ in range(50):
        assert engine.scheduler.matched_tokens(waiting, 0) == (30, False)
        stats = engine.scheduler.index.stats()
        assert before in (None, stats)
        before = stats
    engine.abort(waiting)
    engine.assert_idle()


def test_blocks_in_flight_are_waited_for_within_the_limit() -> None:
    engine = ToyEngine(extra={"lmcache.pending_timeout_ms": 50})
    store = engine.workers[0].after_forward
    engine.workers[0].after_forward = lambda _orders: None
    engine.run(Request("first", prompt(1, BLOCK)))
    engine.workers[0].after_forward = store
    waiting = engine.add(Request("second", prompt(1, BLOCK)))
    assert engine.scheduler.matched_tokens(waiting, 0) == (None, False)
    assert engine.scheduler.has_work()
    while engine.scheduler.matched_tokens(waiting, 0)[0] is None:
        pass
    assert engine.scheduler.matched_tokens(waiting, 0) == (0, False)
    assert engine.counters.totals()["pending_timeouts"] == 1


def test_vllm_waits_only_for_blocks_that_no_request_needs() -> None:
    engine = ToyEngine(chunk=8)
    poll, engine.workers[0]._mover.poll = engine.workers[0]._mover.poll, list
    request = engine.add(Request("first", prompt(1, 40)))
    engine.step()
    assert not engine.scheduler.frees_blocks_soon(), "blocks of a request that runs"
    engine.preempt(request)
    assert engine.scheduler.frees_blocks_soon(), "blocks of one that this very schedule preempted"
    engine.step()
    assert engine.scheduler.frees_blocks_soon()
    engine.workers[0]._mover.poll = poll
    while not request.output:
        engine.step()
    engine.step()
    assert not engine.scheduler.frees_blocks_soon()
    engine.assert_idle()


def test_vllm_need_not_preempt_for_blocks_that_came_back_when_it_asked() -> None:
    engine = ToyEngine(chunk=8)
    (worker,) = engine.workers
    engine.scheduler.worker_nearby = worker
    poll, worker._mover.poll = worker._mover.poll, list
    request = engine.add(Request("first", prompt(1, 40)))
    engine.step()
    engine.preempt(request)
    worker._mover.poll = poll
    free = len(engine.pool.free)
    assert engine.scheduler.frees_blocks_soon()
    assert len(engine.pool.free) > free
    assert not engine.scheduler.frees_blocks_soon()


def test_an_engine_steps_for_new_answers_beside_one_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lmcache_rs.connector.ledger.time", SimpleNamespace(monotonic=lambda: now[0]))
    engine = ToyEngine()
    engine.workers[0]._mover.store = lambda *_: None
    engine.run(Request("first", prompt(1, 8)))
    assert engine.scheduler.has_work()
    now[0] = STEPPING_S_MAX
    assert not engine.scheduler.has_work()
    engine.run(Request("second", prompt(2, 8)))
    assert engine.scheduler.has_work()


def test_held_blocks_of_requests_that_have_gone_are_bounded() -> None:
    """Stores that are never acknowledged hold half of vLLM's pool at most; the others are dropped and counted."""
    engine = ToyEngine(blocks=41, rows=64)
    engine.workers[0]._mover.store = lambda *_: None
    for i in range(8):
        engine.run(Request(f"r{i}", prompt(i, 16)))
    held = engine.pool.num_gpu_blocks - 1 - len(engine.pool.free)
    assert 16 <= held <= 24
    assert engine.counters.totals()["dropped_blocks:held_limit"] >= 8


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_nearby_worker_that_fails_leaves_promised_loads_ordered(asynchronous: bool) -> None:
    engine = ToyEngine(extra=ASYNC if asynchronous else {})
    engine.run(Request("first", prompt(1, 31)))
    failed: list[int] = []

    def start_loads(orders: StepOrders) -> None:
        failed.append(len(orders.loads))
        raise RuntimeError("not now")

    engine.scheduler.worker_nearby = SimpleNamespace(take_acks=lambda: None, start_loads=start_loads)
    repeat = Request("second", prompt(1, 31))
    engine.run(repeat)
    engine.scheduler.worker_nearby = engine.workers[0]
    engine.assert_idle()
    # Asynchronous ones are begun when admitted, and all of them with the plan.
    assert failed[:2] == ([1, 1] if asynchronous else [1])
    assert repeat.cached_tokens == 30 + asynchronous


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_nearby_worker_begins_asynchronous_loads_at_their_admission(asynchronous: bool) -> None:
    """Synchronous ones with their step's plan, which stores what they are to bring: none may have failed before."""
    engine = ToyEngine(extra=ASYNC if asynchronous else {})
    engine.run(Request("first", prompt(1, 31)))
    engine.scheduler.worker_nearby = worker = engine.workers[0]
    begun: list[int] = []
    for name in ("load_now", "submit_load"):
        real = getattr(worker._mover, name)
        setattr(worker._mover, name, lambda job, *rest, real=real: (begun.append(job), real(job, *rest)))
    repeat = Request("second", prompt(1, 31))
    tokens, answer = engine.scheduler.matched_tokens(repeat, 0)
    assert (tokens, answer) == (30 + asynchronous, asynchronous)
    assert not begun
    engine._grow(repeat, 31)
    engine.scheduler.admit(repeat, list(repeat.table), tokens)
    assert len(begun) == asynchronous
    orders = engine.scheduler.take_orders()
    worker.before_forward(orders)
    assert begun == [order.job for order in orders.loads], "once"


def test_a_nearby_worker_is_asked_before_a_step_is_planned() -> None:
    engine = ToyEngine(extra={"lmcache.save_decode_cache": True})
    engine.scheduler.worker_nearby = engine.workers[0]
    first = Request("first", prompt(1, 8), max_tokens=14)
    engine.run(first)
    assert second(engine, [*first.all_token_ids, 7, 7, 7]).cached_tokens == 20


def test_a_nearby_worker_leaves_to_outputs_only_what_vllm_is_told_with_them() -> None:
    engine = ToyEngine()
    worker = engine.scheduler.worker_nearby = engine.workers[0]
    asked, output = worker.take_acks, worker.take_step_acks
    told: list[tuple[str, bool]] = []

    def noting(way: str, take: Callable[[], WorkerAcks | None]) -> Callable[[], WorkerAcks | None]:
        def noted() -> WorkerAcks | None:
            acks = take()
            told.extend((way, bool(result.failed)) for result in (acks.jobs if acks else {}).values())
            return acks

        return noted

    worker.take_acks, worker.take_step_acks = noting("asked", asked), noting("output", output)
    engine.run(Request("first", prompt(1, 31)))
    engine.assert_idle()
    assert set(told) == {("asked", False)}
    told.clear()
    worker._mover = Broken(worker._mover, "load")
    engine.run(Request("second", prompt(1, 31)))
    engine.assert_idle()
    assert told[0] == ("output", True)
    assert set(told[1:]) == {("asked", False)}, "what was lost is stored again"
    assert engine.wrong == 0
