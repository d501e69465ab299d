"""Stores by layers: each part holds what its layers computed, all parts are one store, and what is missing fails it."""

from typing import Any

import numpy as np
import pytest
from toy_engine import BLOCK, LAYERS, Request, ToyEngine

from lmcache_rs._core import HostPool
from lmcache_rs.connector import stored_layers
from lmcache_rs.connector.copies import FIRST_COPY, Copies
from lmcache_rs.connector.orders import StoreOrder
from lmcache_rs.connector.stored_layers import StoredLayers
from lmcache_rs.copy.cpu import CpuMover

PROMPT = list(range(40))
PAGE = BLOCK * 8
BLOCKS_MIN = 32
ROW_BYTES = stored_layers.BYTES_MIN // BLOCKS_MIN


class PartsMover(CpuMover):
    """Stores each layer for itself, at once. `done` tells of the order."""

    def __init__(self, pool: HostPool, tensors: Any, blocks: int, threads: int) -> None:
        super().__init__(pool, tensors, blocks, threads)
        self._memory = np.from_dlpack(pool)
        self._kv = tensors
        self.done: list[int | str] = []
        self.refused: int | None = None
        self.failing: int | None = None

    @property
    def store_parts(self) -> tuple[int, ...]:
        return tuple(range(LAYERS))

    def store(self, job: int, rows: Any, blocks: Any, part: int | None = None) -> None:
        if part is None:
            super().store(job, rows, blocks)
            self.done.append("whole")
            return
        assert job >= FIRST_COPY
        if part == self.refused:
            raise RuntimeError("injected")
        self._memory[rows, part * PAGE : (part + 1) * PAGE] = self._kv[part][blocks].view(np.uint8)
        self._ended.append((job, -1 if part == self.failing else PAGE * len(rows), 0.0))
        self.done.append(part)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ToyEngine:
    monkeypatch.setattr(stored_layers, "BYTES_MIN", 3 * LAYERS * PAGE)
    return ToyEngine(make_mover=PartsMover)


def is_found(engine: ToyEngine) -> bool:
    """Whether the prompt is found, and right."""
    repeat = Request("repeat", PROMPT)
    engine.run(repeat)
    engine.assert_idle()
    return repeat.cached_tokens == len(PROMPT) - 1


def test_parts_are_stored_while_the_rest_is_computed_and_found_as_one(engine: ToyEngine) -> None:
    engine.run(Request("first", PROMPT))
    mover: Any = engine.workers[0]._mover
    # Chunks of 16, 16 and 8 tokens: the last one's two blocks are too few.
    assert mover.done == [0, 1, 0, 1, "whole"]
    assert is_found(engine)
    assert "dropped_stores:failed" not in engine.counters.take()


def test_a_part_comes_before_the_next_layer_is_computed(engine: ToyEngine) -> None:
    mover: Any = engine.workers[0]._mover
    after, seen = engine.workers[0].after_layer, []

    def after_layer(orders: Any, name: str) -> None:
        before = len(mover.done)
        after(orders, name)
        seen.append((name, mover.done[before:]))

    engine.workers[0].after_layer = after_layer  # type: ignore[method-assign]
    engine.run(Request("first", PROMPT[:16]))
    assert seen[:LAYERS] == [("layer.0", [0]), ("layer.1", [1])]


@pytest.mark.parametrize("told", [0, 1])
def test_layers_that_the_forward_did_not_tell_of_are_stored_after_it(told: int, engine: ToyEngine) -> None:
    worker = engine.workers[0]
    after = worker.after_layer
    name = f"layer.{told}"
    worker.after_layer = lambda orders, layer: after(orders, layer) if layer == name else None  # type: ignore[method-assign]
    engine.run(Request("first", PROMPT))
    mover: Any = worker._mover
    assert mover.done == [told, 1 - told] * 2 + ["whole"]
    assert is_found(engine)


@pytest.mark.parametrize("how", ["refused", "failing"])
@pytest.mark.parametrize("part", range(LAYERS))
def test_a_store_fails_with_any_of_its_parts(how: str, part: int, engine: ToyEngine) -> None:
    setattr(engine.workers[0]._mover, how, part)
    engine.run(Request("first", PROMPT))
    counts = engine.counters.take()
    assert counts["dropped_stores:failed"] == 3, "each step tries again what is missing"
    assert not is_found(engine)


def test_a_store_whose_step_did_not_end_fails(engine: ToyEngine) -> None:
    worker = engine.workers[0]
    after = worker.after_forward
    worker.after_forward = lambda orders: None  # type: ignore[method-assign]
    engine.add(Request("first", PROMPT))
    engine.step()
    worker.after_forward = after  # type: ignore[method-assign]
    engine.run()
    assert engine.counters.take()["dropped_stores:failed"] == 1
    mover: Any = worker._mover
    assert mover.done == [0, 1] * 3, "and is made up for"
    assert is_found(engine)


def test_closing_ends_what_was_begun(engine: ToyEngine) -> None:
    worker = engine.workers[0]
    worker.after_forward = lambda orders: None  # type: ignore[method-assign]
    engine.add(Request("first", PROMPT))
    engine.step()
    worker.close()
    acks = worker.take_acks()
    assert acks is not None
    assert [result.failed for result in acks.jobs.values()] == [1]


def test_a_layer_told_of_after_the_step_was_stored_changes_nothing(engine: ToyEngine) -> None:
    worker = engine.workers[0]
    after_layer, after_forward = worker.after_layer, worker.after_forward

    def late(orders: Any) -> None:
        after_forward(orders)
        after_layer(orders, "layer.0")

    worker.after_layer, worker.after_forward = lambda orders, name: None, late  # type: ignore[method-assign]
    engine.run(Request("first", PROMPT))
    mover: Any = worker._mover
    assert mover.done == ["whole"] * 3
    assert is_found(engine)
    assert not engine.counters.take().get("errors:save_kv_layer")


class Taken:
    """A mover that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, list[int]]] = []

    def store(self, job: int, rows: Any, blocks: Any, part: int) -> None:
        self.parts.append((part, blocks.tolist()))


def test_a_part_waits_for_all_of_its_layers_and_for_all_that_share_a_tensor() -> None:
    names = {"a": 0, "b": 1, "c": 2, "shared": 2}
    copies, mover = Copies(), Taken()
    stored = StoredLayers(names, (0, 2), ROW_BYTES, copies, lambda *_: None)
    numbers = np.arange(BLOCKS_MIN, dtype=np.uint32)
    one, other = StoreOrder(1, numbers[1:], numbers[1:]), StoreOrder(2, numbers[:1], numbers[:1] + 100)
    assert not stored.takes([one])
    assert stored.takes([one, other])
    stored.begin([one, other])
    seen = []
    for name in ("b", "b", "unknown", "a", "c", "a", "shared", "c"):
        stored.computed(name, mover)  # type: ignore[arg-type]
        seen.append([part for part, _ in mover.parts])
    assert seen == [[], [], [], [0], [0], [0], [0, 1], [0, 1]]
    assert [blocks for _, blocks in mover.parts] == [[*range(1, BLOCKS_MIN), 100]] * 2
    stored.end(mover)  # type: ignore[arg-type]
    stored.computed("a", mover)  # type: ignore[arg-type]
    assert len(mover.parts) == 2, "the step is over"
    assert list(copies.whole([(FIRST_COPY, 64, 0.0)])) == []
    ends = copies.whole([(FIRST_COPY + 1, 64, 0.0)])
    assert [(job, moved) for job, moved, _ in ends] == [(1, 124), (2, 4)]
