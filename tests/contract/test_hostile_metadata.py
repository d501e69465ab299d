"""Metadata that is garbage reaches no memory but the pool and the KV, and no secret reaches a line or a number."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hooked_engine import API, VLLM_V1, HookedEngine, WorkerHooks, configured
from test_faults import prompt
from toy_engine import BLOCK, LAYERS, ROW_BYTES, Request

from lmcache_rs._core import HostPool
from lmcache_rs.connector import barrier, scheduler
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.orders import BrokenLoad, JobResult, LoadOrder, StepOrders, StoreOrder, WorkerAcks
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.worker import WorkerSide
from lmcache_rs.copy.cpu import CpuMover
from support import Soak

BLOCKS, ROWS, GUARD = 16, 16, 8
CANARY = "hunter2SECRET"


def numbers(source: random.Random, limit: int, count: int) -> Any:
    """Row or block numbers: right ones, ones that are out of range, and what is no list of numbers."""
    choice = source.randrange(12)
    if choice < 5:
        return np.array([source.randrange(limit) for _ in range(count)], np.uint32)
    if choice < 8:
        values = [
            source.choice((source.randrange(limit), limit, limit + 1, 2**31, 2**32 - 1)) for _ in range(count)
        ]
        return np.array(values, np.uint32)
    return source.choice(
        [
            None,
            -1,
            "rows",
            b"\xff" * (4 * count),
            b"123",
            [0] * count,
            np.full(count, -1, np.int64),
            np.full(count, np.nan),
            np.zeros((count, 2), np.uint32),
            np.arange(2 * count, dtype=np.uint32)[::2],
            np.zeros(0, np.uint32),
            memoryview(b"abcd"),
            {0: 1},
        ]
    )


def an_order(source: random.Random) -> Any:
    job = source.choice((source.randrange(2**20), -1, 2**64, 2**63, None, "job", 1.5))
    count = source.randrange(6)
    rows, blocks = numbers(source, ROWS, count), numbers(source, BLOCKS, count)
    choice = source.randrange(8)
    if choice < 3:
        return LoadOrder(
            job, "r", rows, blocks, source.random() < 0.5, source.random() < 0.5, source.random() < 0.5
        )
    if choice < 6:
        return StoreOrder(job, rows, blocks)
    if choice == 6:
        return BrokenLoad(job, "r", blocks, source.random() < 0.5)
    return source.choice((None, 5, "order", SimpleNamespace(), SimpleNamespace(job=job), object))


def some_orders(source: random.Random) -> Any:
    if source.random() < 0.05:
        return source.choice((None, 5, "orders", [], SimpleNamespace(loads=3)))
    parts = [[an_order(source) for _ in range(source.randrange(4))] for _ in range(3)]
    return StepOrders(*parts, joins=source.choice(([], [1], None, ["x"])), idle=source.random() < 0.3)


@contextmanager
def quiet() -> Iterator[None]:
    barrier.logger.disabled = True
    yield
    barrier.logger.disabled = False


@pytest.mark.soak
def test_garbage_orders_touch_nothing_else(soak: Soak) -> None:
    """The KV lies between guards; the pool's neighbour is the pool's own end, which Rust checks as well."""
    for seed in soak.rounds(400, "steps of garbage"):
        source = random.Random(seed)
        memory = [np.full((BLOCKS + 2 * GUARD, BLOCK), 0x5A5A, np.uint64) for _ in range(LAYERS)]
        pool = HostPool(ROWS * 4096, ROW_BYTES, 0)
        mover = CpuMover(pool, [layer[GUARD:-GUARD] for layer in memory], BLOCKS, 1)
        side = WorkerSide(Barrier(Counters().add), Pace(1))
        side.attach(mover, {f"layer.{i}": i for i in range(LAYERS)})
        hooks = WorkerHooks(side, None)  # type: ignore[arg-type]
        with quiet():
            for _ in range(6):
                hooks.begin_step(some_orders(source))
                hooks.before_forward(None)
                hooks.after_forward(None)
                received, failed = hooks.take_received()
                assert failed <= received
                hooks.take_bad_blocks()
                hooks.take_step_acks()
            hooks.hooks.handle_preemptions(source.choice((None, 5, "metadata", object())))
            hooks.hooks.shutdown()
        for layer in memory:
            assert (layer[:GUARD] == 0x5A5A).all()
            assert (layer[-GUARD:] == 0x5A5A).all()
        assert not np.from_dlpack(pool)[:, ROW_BYTES:].any(), "what lies between the rows"


def some_acks(source: random.Random) -> Any:
    results = [
        JobResult(1, 0, 5, 0.1),
        JobResult(-3, 9, -5, float("nan")),
        JobResult(10**30, 1, 0, 0.0),
        None,
        5,
        SimpleNamespace(ranks="x", failed=None, bytes=b"", seconds=[]),
    ]
    jobs = {
        source.choice((10**6 + source.randrange(9), -1, None, "x", 2.5)): source.choice(results)
        for _ in range(4)
    }
    rows = source.choice((None, None, None, 64, 10**30, 2**64, "x", 1.5))
    return source.choice((WorkerAcks(jobs, rows), WorkerAcks(jobs, rows), None, 5, WorkerAcks(None, None)))


@pytest.mark.soak
def test_garbage_answers_leave_the_engine_right(soak: Soak) -> None:
    """Answers of unknown jobs and of no shape at all, between those of an engine that works."""
    for seed in soak.rounds(150, "engines fed garbage"):
        source = random.Random(seed)
        engine = HookedEngine()
        with quiet():
            engine.run(Request("first", prompt(1, 50)))
            for i in range(5):
                answer = source.choice((API.WorkerMetadata(some_acks(source)), None, 5))
                output = SimpleNamespace(
                    kv_connector_worker_meta=answer,
                    finished_recving=source.choice((None, {"?"})),
                    invalid_block_ids=source.choice(({"?"}, set(), {2, 2**70})),
                )
                engine.scheduler.hooks.update_connector_output(source.choice((output, output, output, None)))
                engine.run(Request(f"r{i}", prompt(source.randrange(3), 40)))
            for _ in range(3 * 5):  # what fails again and again is given up
                engine.step()
            engine.assert_idle()
            engine.close()


def test_no_secret_in_lines_or_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    for logger in (barrier.logger, scheduler.logger, VLLM_V1.build.__globals__["logger"]):
        monkeypatch.setattr(logger, "handle", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(API, "make_tail_hash", lambda *_: lambda *_: None)
    monkeypatch.setattr(API, "make_block_hashes_repeatable", lambda: None)
    extra = {
        "lmcache.remote_url": f"redis://user:{CANARY}@host:6379",
        "lmcache.extra_config": {"password": CANARY, "redis_url": f"redis://:{CANARY}@h"},
        "lmcache.max_local_cpu_size": "1MiB",
    }
    connector = configured(extra, API.KVConnectorRole.SCHEDULER)
    assert connector._scheduler is not None
    request = Request(
        CANARY, [1, 2, 3], kv_transfer_params={"lmcache.tag.user": CANARY, "lmcache.skip_save": CANARY}
    )
    connector.on_new_request(request)
    connector._scheduler.frozen = True
    stats = connector.get_kv_connector_stats()
    connector.shutdown()
    assert any("remote_url" in line for line in lines)
    said = (
        " ".join(lines)
        + repr(connector._sides.config)
        + repr(stats)
        + repr(connector._sides.counters.totals())
    )
    assert CANARY not in said
