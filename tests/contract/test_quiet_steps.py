"""Steps that order nothing: hooks return at once, unless something of other steps is left to end or to tell."""

import time
from typing import Any

import numpy as np
import pytest
from hooked_engine import API, WorkerHooks
from toy_engine import LAYERS, ROW_BYTES

from lmcache_rs._core import HostPool
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.orders import FAILED, JobResult, LoadOrder, StepOrders, StoreOrder, WorkerAcks
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.worker import WorkerSide
from lmcache_rs.copy.cpu import CpuMover

ONE = np.array([1], np.uint32)
ENDS_S_MAX = 10.0


@pytest.fixture
def worker() -> WorkerHooks:
    pool = HostPool(8 * 4096, ROW_BYTES, 0)
    kv = [np.zeros((4, ROW_BYTES // LAYERS), np.uint8) for _ in range(LAYERS)]
    side = WorkerSide(Barrier(Counters().add), Pace(1))
    side.attach(CpuMover(pool, kv, 4, 1), {f"layer.{i}": i for i in range(LAYERS)})
    assert side.take_step_acks() == WorkerAcks({}, pool.rows)
    return WorkerHooks(side, None)  # type: ignore[arg-type]


def quiet_step(
    worker: WorkerHooks, orders: StepOrders, before_forward: bool = True
) -> tuple[Any, set[int], Any]:
    """Received requests, bad blocks and acknowledgements."""
    if before_forward:
        worker.begin_step(orders)
    else:  # a step without a forward, of vLLM's first model runner
        worker.hooks.bind_connector_metadata(API.ConnectorMetadata(orders))
    worker.before_forward(orders)
    worker.after_forward(orders)
    received, _ = worker.take_received()
    bad = worker.take_bad_blocks()
    return received, bad, worker.take_step_acks()


def test_the_worker_is_asked_nothing_in_a_quiet_step(worker: WorkerHooks) -> None:
    side = worker.hooks._worker
    asked = []
    for name in ("before_forward", "after_forward", "end_step", "take_received", "take_bad_blocks"):
        setattr(side, name, lambda *_, name=name: asked.append(name))
    assert quiet_step(worker, StepOrders()) == (set(), set(), None)
    assert asked == []


def test_what_a_worker_counts_is_told_in_a_quiet_step_and_once(worker: WorkerHooks) -> None:
    worker.hooks._sides.counters.add("errors:poll")
    told = []
    for _ in range(2):
        orders = StepOrders()
        worker.begin_step(orders)
        told.append(worker.hooks.get_kv_connector_stats())
    assert told[0].data == {"errors:poll": 1}
    assert told[1] is None


def test_a_load_that_ends_later_is_told_in_a_step_that_orders_nothing(worker: WorkerHooks) -> None:
    load = LoadOrder(7, "r", ONE, ONE, asynchronous=True)
    received, _, acks = quiet_step(worker, StepOrders(loads=[load]))
    told, jobs = set(received), dict(acks.jobs) if acks else {}
    deadline = time.monotonic() + ENDS_S_MAX
    while not (told and jobs):
        assert time.monotonic() < deadline
        received, _, acks = quiet_step(worker, StepOrders())
        told |= received
        jobs |= acks.jobs if acks else {}
    assert told == {"r"}
    assert not jobs[7].failed


@pytest.mark.parametrize("begun", [True, False])
def test_a_store_that_no_hook_began_fails_in_the_next_step(begun: bool, worker: WorkerHooks) -> None:
    worker.begin_step(StepOrders(stores=[StoreOrder(7, ONE, ONE)]))
    _, _, acks = quiet_step(worker, StepOrders(), begun)
    assert acks.jobs == {7: FAILED}


def test_layers_that_no_forward_waited_for_are_told_as_bad_in_the_next_step(worker: WorkerHooks) -> None:
    order = LoadOrder(7, "r", ONE, ONE, asynchronous=False, by_layers=True)
    side: Any = worker.hooks._worker
    side.before_forward(StepOrders(loads=[order]), by_layers=True)
    side._poll()
    acks = side.take_step_acks()
    assert isinstance(acks.jobs[7], JobResult)
    assert not acks.jobs[7].failed
    _, bad, acks = quiet_step(worker, StepOrders())
    assert bad == {1}
    assert acks.jobs == {7: FAILED}
