"""Under vLLM's MultiConnector: nothing is kept, and no block written, that another connector may spoil."""

from types import SimpleNamespace
from typing import Any

import pytest
from hooked_engine import API, VLLM_V1, HookedEngine, configured
from test_faults import prompt
from toy_engine import Request


def test_what_is_computed_on_another_connectors_failed_load_is_not_kept() -> None:
    """VLLM takes a prefix from one child and has all of them store it."""
    engine = HookedEngine()
    request = engine.add(Request("first", prompt(1, 12), max_tokens=2))
    assert engine.scheduler.matched_tokens(request, 0) == (0, False)
    request.table = engine.pool.allocate(3)
    engine.scheduler.admit(request, list(request.table), 0)
    new = SimpleNamespace(req_id="first", block_ids=(list(request.table),), num_computed_tokens=8)
    cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
    orders = engine.scheduler.plan_step(
        SimpleNamespace(
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={"first": 4},
            preempted_req_ids=None,
        )
    )
    assert orders.stores
    (worker,) = engine.workers
    worker.begin_step(orders)
    worker.after_forward(orders)
    worker.take_received()
    assert worker.take_bad_blocks() == set()
    engine.scheduler.output(API.WorkerMetadata(worker.take_step_acks()), None, request.table[:2])
    assert engine.scheduler.index.stats()["visible"] == 0
    assert engine.counters.totals()["dropped_stores:void"] == 1


def test_what_another_connector_was_to_load_and_did_not_is_not_kept() -> None:
    """VLLM counts a request's tokens when it promises them, also where it is aborted or fails before they come."""
    engine = HookedEngine(extra={"lmcache.save_decode_cache": True})
    request = engine.add(Request("first", prompt(1, 12), max_tokens=2))
    assert engine.scheduler.matched_tokens(request, 0) == (0, False)
    request.table = engine.pool.allocate(3)
    engine.scheduler.admit(request, list(request.table), 0)
    request.num_computed_tokens = 12
    engine.scheduler.finish_request(request, list(request.table))
    assert not engine.scheduler.has_work()
    assert engine.scheduler.index.stats()["reserved"] == 0


def test_a_request_goes_first_that_holds_blocks_for_another_connectors_load() -> None:
    engine = HookedEngine(nearby=False)
    side = engine.scheduler.side
    side._others_load = True
    request = engine.add(Request("first", prompt(1, 12), max_tokens=2))
    engine.scheduler.admit(request, engine.pool.allocate(3), 0)
    side._turns._early.add("other")
    other = engine.add(Request("other", prompt(2, 12)))
    assert engine.scheduler.matched_tokens(other, 0) == (None, False)
    side._turns.run(["first"])
    assert engine.scheduler.matched_tokens(other, 0) == (0, False)


class MultiConnector:
    """Hands its KV to its child, as vLLM's does; known by its name."""

    def __init__(self, child: Any) -> None:
        self.child = child

    def register_kv_caches(self, kv_caches: Any) -> None:
        self.child.register_kv_caches(kv_caches)


def test_under_multi_connector_loads_wait_for_running_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other child may be a producer: vLLM gives the blocks of such away while a step still writes them."""
    fences: list[bool] = []
    stand_ins = {
        "distinct": lambda *_: ([], {}),
        "make_pool": lambda *_: object(),
        "make_mover": lambda *_, fence_loads: fences.append(fence_loads),
        "TierWorker": lambda *_: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setitem(VLLM_V1.build.__globals__, name, stand_in)
    connector = configured({}, API.KVConnectorRole.WORKER)
    connector.register_kv_caches({})
    MultiConnector(connector).register_kv_caches({})
    connector.shutdown()
    assert fences == [False, True]
