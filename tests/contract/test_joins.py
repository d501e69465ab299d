"""Forwards that could not be made to wait for a load, and ranks whose steps vLLM leaves early."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hooked_engine import API
from test_early_loads import engine_with_late_loads
from test_requests import prompt
from toy_engine import LAYERS, ROW_BYTES, Request

from lmcache_rs._core import HostPool
from lmcache_rs.connector import joins
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.orders import FAILED, LoadOrder, StepOrders, StoreOrder
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.worker import WorkerSide
from lmcache_rs.copy.cpu import CpuMover

ONE = np.array([1], np.uint32)


class Unjoinable(CpuMover):
    """A device that goes on with a load, and cannot make anybody wait for it."""

    def load_now(self, job: int, rows: Any, blocks: Any, by_layers: bool = False) -> None:
        """Not before `end`."""

    def join_load(self, job: int, layer: int | None = None) -> None:
        raise RuntimeError("injected")

    def end(self, job: int) -> None:
        self._ended.append((job, ROW_BYTES, 0.1))


def cpu_mover(make: type[CpuMover] = CpuMover) -> CpuMover:
    pool = HostPool(8 * 4096, ROW_BYTES, 0)
    return make(pool, [np.zeros((4, ROW_BYTES // LAYERS), np.uint8) for _ in range(LAYERS)], 4, 1)


def side(mover: CpuMover, **options: Any) -> WorkerSide:
    made = WorkerSide(Barrier(Counters().add), Pace(1), **options)
    made.attach(mover, {f"layer.{i}": i for i in range(LAYERS)})
    made.take_step_acks()
    return made


def step(worker: WorkerSide, orders: StepOrders) -> tuple[set[int], dict[int, Any]]:
    """Bad blocks and answers."""
    worker.begin_step(orders)
    worker.before_forward(orders)
    worker.after_forward(orders)
    worker.take_received()
    bad, acks = worker.take_bad_blocks(), worker.take_step_acks()
    return bad, acks.jobs if acks is not None else {}


def test_a_load_that_nobody_waited_for_is_answered_once_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joins, "SPOILED_S_MAX", 0.02)
    mover = cpu_mover(Unjoinable)
    worker = side(mover)
    load = LoadOrder(7, "r", ONE, ONE, asynchronous=False)
    assert step(worker, StepOrders(loads=[load])) == ({1}, {}), (
        "it may still write the block, and read its row"
    )
    assert step(worker, StepOrders()) == (set(), {})
    assert isinstance(mover, Unjoinable)
    mover.end(7)
    assert step(worker, StepOrders()) == ({1}, {7: FAILED})
    assert step(worker, StepOrders()) == (set(), {})
    assert worker.answers.none


def test_answers_do_not_depend_on_what_can_be_foretold() -> None:
    engine = engine_with_late_loads()
    engine.run(Request("first", prompt(1, 41)))
    engine.workers[0]._mover.settle_loads = lambda *_: 1 / 0
    repeat = Request("second", prompt(1, 41))
    engine.run(Request("other", prompt(9, 5), max_tokens=20), repeat)
    assert repeat.output == engine.done["first"].output
    assert engine.counters.totals()["errors:settle_loads"] > 0
    engine.assert_idle()


def test_a_rank_that_is_left_early_stores_when_it_is_asked_for_results() -> None:
    for is_left_early, failed in ((True, 0), (False, 1)):
        worker = side(cpu_mover(), is_left_early=is_left_early)
        worker.begin_step(StepOrders(stores=[StoreOrder(7, ONE, ONE)]))
        worker.take_received()
        _, jobs = step(worker, StepOrders())
        assert jobs[7].failed == failed


@pytest.mark.parametrize(
    ("rank", "drafts", "expected"), [(0, True, True), (1, True, True), (2, True, False), (0, False, False)]
)
def test_ranks_that_are_left_early_draft_no_tokens_of_a_model_that_does(
    rank: int, drafts: bool, expected: bool
) -> None:
    parallel = SimpleNamespace(pipeline_parallel_size=2, tensor_parallel_size=2, rank=rank)
    config = SimpleNamespace(parallel_config=parallel, speculative_config=object() if drafts else None)
    assert API.leaves_steps_early(config) is expected


def test_a_load_made_between_two_steps_is_not_waited_for_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mover = cpu_mover()
    mover.load_now(7, ONE, ONE)
    monkeypatch.setattr(mover, "_mover", None)
    mover.join_load(7)
    with pytest.raises(AttributeError):
        mover.join_load(8)
