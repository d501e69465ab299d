"""Every hook answers its harmless default when all behind it fails, and repeated failures turn the cache off."""

import inspect
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hooked_engine import API, VLLM_V1, HookedEngine
from test_faults import a_panic, prompt
from toy_engine import Request

from lmcache_rs.connector import barrier, breaker
from lmcache_rs.connector.answers import Answers
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.breaker import Breaker
from lmcache_rs.connector.groups import Groups
from lmcache_rs.connector.orders import StepOrders, WorkerAcks
from lmcache_rs.connector.stats import Counters
from lmcache_rs.errors import ConfigError

BLOCKS = SimpleNamespace(get_block_ids=lambda: ([1, 2],))
ANSWER = SimpleNamespace(
    kv_connector_worker_meta=API.WorkerMetadata(WorkerAcks()), finished_recving={"r"}, invalid_block_ids={1}
)
NO_RESULTS = API.KVConnectorTransferResults(finished_recving=set(), failed_recving=set())
HOOKS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "bind_gpu_block_pool": ((None,), None),
    "build_connector_meta": ((None,), StepOrders()),
    "build_connector_worker_meta": ((), None),
    "get_block_ids_with_load_errors": ((), None),
    "get_finished": ((set(),), (None, None)),
    "get_kv_connector_stats": ((), None),
    "get_num_new_matched_tokens": ((Request("r", [1]), 0), (0, False)),
    "get_transfer_results": ((set(),), NO_RESULTS),
    "handle_preemptions": ((API.ConnectorMetadata(StepOrders()),), None),
    "has_pending_block_frees": ((), False),
    "has_pending_push_work": ((), False),
    "on_new_request": ((Request("r", [1]),), None),
    "register_kv_caches": (({},), None),
    "request_finished": ((Request("r", [1]), [1]), (False, None)),
    "request_finished_all_groups": ((Request("r", [1]), ([1],)), (False, None)),
    "reset_cache": ((), False),
    "shutdown": ((), None),
    "start_load_kv": ((None,), None),
    "unregister_kv_caches": ((), None),
    "update_connector_output": ((ANSWER,), None),
    "update_state_after_alloc": ((Request("r", [1]), BLOCKS, 1), None),
    "wait_for_layer_load": (("layer",), None),
    "wait_for_save": ((), None),
}
NOTHING_TO_FAIL = {
    "bind_connector_metadata",
    "build_kv_connector_stats",
    "build_prom_metrics",
    "clear_connector_metadata",
    "has_connector_metadata",
    "requires_piecewise_for_cudagraph",
    "requires_kv_delivery",
    "save_kv_layer",
    "set_xfer_handshake_metadata_pp_aware",
}


def test_a_wrong_value_is_found_while_vllm_reads_its_own_configuration() -> None:
    connector = VLLM_V1.LMCacheConnectorV1
    assert connector.requires_piecewise_for_cudagraph({"lmcache.chunk_size": 64}) is False
    with pytest.raises(ConfigError, match="chunk_size"):
        connector.requires_piecewise_for_cudagraph({"lmcache.chunk_size": "many"})


class AlwaysFails:
    def __init__(self, make: Callable[[], BaseException]) -> None:
        self._make = make
        self.answers = Answers()
        self.answers.bad_blocks = {7}
        self.groups = Groups(16)

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise self._make()

        return fail


def connector(make: Callable[[], BaseException], counters: Counters) -> Any:
    made = VLLM_V1.LMCacheConnectorV1.__new__(VLLM_V1.LMCacheConnectorV1)
    API.KVConnectorBase_V1.__init__(made, None, None, None)
    made._barrier = Barrier(counters.add)
    made._sides = made._scheduler = made._worker = AlwaysFails(make)
    made._orders, made._work, made._quiet = None, None, False
    made.bind_connector_metadata(API.ConnectorMetadata(StepOrders(joins=[1])))
    return made


def test_copies_have_ended_before_vllm_unmaps_its_kv() -> None:
    made, drained = connector(RuntimeError, Counters()), list[bool]()
    made._worker = SimpleNamespace(drain=lambda: drained.append(True))
    made.unregister_kv_caches()
    assert drained == [True]


@pytest.mark.parametrize("copies", ["loads", "stores", "joins"])
def test_hooks_of_layers_are_called_in_steps_that_copy_and_in_captures(copies: str) -> None:
    made = connector(RuntimeError, Counters())
    made.bind_connector_metadata(API.ConnectorMetadata(StepOrders()))
    assert not made.has_connector_metadata(), "a step with nothing to do"
    made.bind_connector_metadata(API.ConnectorMetadata(StepOrders(**{copies: [1]})))
    assert made.has_connector_metadata()
    made.clear_connector_metadata()
    assert not made.has_connector_metadata(), "a worker that cannot tell"
    for captured in (True, False):
        made._worker = SimpleNamespace(is_captured=lambda captured=captured: captured)
        assert made.has_connector_metadata() == captured
        assert made._orders is None


def test_a_layer_is_waited_for_in_a_step_and_gated_in_a_capture() -> None:
    made, said = connector(RuntimeError, Counters()), list[tuple[str, str]]()
    made._worker = SimpleNamespace(
        before_layer=lambda name: said.append(("step", name)),
        capture_layer=lambda name: said.append(("capture", name)),
    )
    made.wait_for_layer_load("a")
    made.clear_connector_metadata()
    made.wait_for_layer_load("b")
    assert said == [("step", "a"), ("capture", "b")]


def test_every_hook_is_in_the_table() -> None:
    ours = (VLLM_V1.LMCacheConnectorV1, VLLM_V1.Reporting)
    public = {name for part in ours for name in vars(part) if not name.startswith("_")}
    assert public == set(HOOKS) | NOTHING_TO_FAIL


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [RuntimeError, a_panic])
def test_a_hook_behind_which_all_fails(hook: str, make: Callable[[], BaseException]) -> None:
    counters = Counters()
    made = connector(make, counters)
    arguments, expected = HOOKS[hook]
    answer = getattr(made, hook)(*arguments)
    if hook == "build_connector_meta":
        answer = answer.orders
    if hook == "get_block_ids_with_load_errors":
        expected = {7}
    assert answer == expected
    assert any(name.startswith("errors:") for name in counters.totals())
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt):
            getattr(connector(interrupt, counters), hook)(*arguments)


def test_a_cause_is_logged_once_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(barrier.logger, "handle", records.append)
    counters = Counters()
    made = connector(lambda: RuntimeError("the cause"), counters)
    for _ in range(3):
        made.wait_for_save()
    assert counters.totals() == {"errors:wait_for_save": 3}
    (record,) = records
    assert "wait_for_save failed" in record.getMessage()
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the cause"


def test_an_error_without_words_is_survived() -> None:
    class WordlessError(Exception):
        def __repr__(self) -> str:
            raise RuntimeError

    made = connector(WordlessError, Counters())
    assert made.wait_for_save() is None


def test_arguments_stay_those_that_vllm_looks_for() -> None:
    base = inspect.signature(VLLM_V1.LMCacheConnectorV1.update_state_after_alloc)
    assert list(base.parameters) == ["self", "request", "blocks", "num_external_tokens"]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_breaker_opens_within_its_window_only() -> None:
    clock, counters = Clock(), Counters()
    one = Breaker(counters.add, clock)
    for _ in range(3 * breaker.FAILURES_MAX):
        clock.now += breaker.WINDOW_S / (breaker.FAILURES_MAX - 2)
        one.note_failure()
    assert not one.is_off()
    for _ in range(breaker.FAILURES_MAX):
        one.note_failure()
    assert one.is_off()
    for _ in range(breaker.FAILURES_MAX):
        one.note_failure()
    clock.now += breaker.OFF_S - 1
    assert one.is_off(), "what fails meanwhile does not count"
    clock.now += 2
    assert not one.is_off()
    one.note_failure()
    assert not one.is_off(), "a clean slate"
    assert counters.totals() == {"turned_off": 1}


@pytest.mark.parametrize("extra", [{}, {"lmcache.sync_load_max_size": 0}])
def test_a_cache_that_fails_turns_itself_off_and_on_again(extra: dict[str, Any]) -> None:
    engine = HookedEngine(extra=extra, rows=256)
    clock = engine.scheduler._barrier._breaker._clock = Clock()
    engine.run(Request("first", prompt(1, 50)))
    mover = engine.workers[0].side._mover
    tried = []
    engine.workers[0].side._mover = SimpleNamespace(
        load_now=lambda *job: tried.append(job) or 1 / 0,
        submit_load=lambda *job: tried.append(job) or 1 / 0,
        store=mover.store,
        join_load=mover.join_load,
        settle_loads=mover.settle_loads,
        poll=mover.poll,
        rows=mover.rows,
    )
    for i in range(20):
        engine.run(Request(f"again{i}", prompt(1, 50)), Request(f"beside{i}", prompt(100 + i, 9)))
    counts = engine.counters.totals()
    assert counts["turned_off"] == 1
    # Both requests of a round that begins before the last failure count; none is tried after it.
    assert len(tried) == counts["failed_loads"] == breaker.FAILURES_MAX
    assert counts["misses:turned_off"] >= 2
    stored = engine.scheduler.index.stats()["visible"]
    engine.run(Request("new", prompt(7, 30)))
    assert engine.scheduler.index.stats()["visible"] == stored, "nothing is stored meanwhile"
    engine.assert_idle()
    engine.workers[0].side._mover = mover
    clock.now += breaker.OFF_S + 1
    engine.run(Request("new again", prompt(7, 30)))
    found = Request("found", prompt(7, 30))
    engine.run(found)
    assert found.cached_tokens >= 29
    engine.assert_idle()


def test_what_was_promised_before_is_still_loaded() -> None:
    engine = HookedEngine(extra={"lmcache.sync_load_max_size": 0})
    engine.run(Request("first", prompt(1, 50)))
    worker = engine.workers[0]
    poll, worker.side._mover.poll = worker.side._mover.poll, list  # the load's end is not seen yet
    request = engine.add(Request("second", prompt(1, 50)))
    engine.add(Request("beside", prompt(2, 8), max_tokens=4))
    engine.step()
    assert request.request_id in engine.loading
    for _ in range(breaker.FAILURES_MAX):
        engine.scheduler._barrier.note_failure()
    assert engine.scheduler.matched_tokens(Request("third", prompt(1, 50)), 0) == (0, False)
    worker.side._mover.poll = poll
    engine.run()
    assert request.cached_tokens == 50
    engine.scheduler.finish_request(Request("third", []), [])
    engine.assert_idle()


def test_requests_that_ran_while_the_cache_was_off_are_stored_right() -> None:
    """Their block tables are followed meanwhile: one that missed a step would name wrong blocks."""
    engine = HookedEngine(extra={"lmcache.save_decode_cache": True})
    clock = engine.scheduler._barrier._breaker._clock = Clock()
    engine.add(Request("long", prompt(1, 9), max_tokens=40))
    for step in range(60):
        if step == 4:
            for _ in range(breaker.FAILURES_MAX):
                engine.scheduler._barrier.note_failure()
        if step == 20:
            clock.now += breaker.OFF_S + 1
        engine.step()
    engine.assert_idle()
    tokens = engine.done["long"].all_token_ids
    again = Request("again", [*tokens, *prompt(3, 5)])
    engine.run(again)
    assert again.cached_tokens == (len(tokens) - 1) // 4 * 4
    engine.assert_idle()


def test_without_vllms_block_pool_nothing_is_stored() -> None:
    engine = HookedEngine()
    engine.scheduler.side._held._pool = None
    engine.run(Request("first", prompt(1, 50)), Request("second", prompt(1, 50)))
    assert engine.scheduler.index.stats()["visible"] == 0
    engine.assert_idle()


def test_a_rank_without_memory_leaves_the_engine_without_cache() -> None:
    engine = HookedEngine(ranks=2)
    engine.workers[1].side.attach(None, {})
    for i in range(3):
        request = Request(f"r{i}", prompt(1, 50))
        engine.run(request)
        assert request.cached_tokens == 0
    assert engine.scheduler.index.rows == 0
    engine.assert_idle()


def test_a_reset_that_fails_ends_the_cache() -> None:
    """VLLM resets its caches when the model gets other weights: KV of the old ones must not be found."""
    engine = HookedEngine()
    engine.run(Request("first", prompt(1, 50)))
    engine.scheduler.side._ledger.void_stores = lambda: 1 / 0
    assert engine.scheduler.hooks.reset_cache() is False
    again = Request("again", prompt(1, 50))
    engine.run(again)
    assert again.cached_tokens == 0
    engine.assert_idle()


def test_reset_forgets_everything() -> None:
    engine = HookedEngine()
    engine.run(Request("first", prompt(1, 50)))
    assert engine.scheduler.hooks.reset_cache() is True
    again = Request("again", prompt(1, 50))
    engine.run(again)
    assert again.cached_tokens == 0
