"""CUDA graphs wait for loads by layers, at the gates that were captured into them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_rig import BLOCKS, LAYOUTS, Rig, as_bytes, fill, u32

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

COUNT, TURNS = 8, 20
SLOW_CYCLES = 100_000_000


def large(dtype: Any) -> list[Any]:
    """A load of all blocks takes milliseconds."""
    return [torch.empty(BLOCKS, 1 << 19, dtype=dtype, device="cuda") for _ in range(5)]


class Forward:
    """A graph that reads some blocks of one layer after the other; `gated`: it waits at the gates."""

    def __init__(self, rig: Rig, gated: bool = True) -> None:
        self.rig = rig
        self.index = torch.zeros(COUNT, dtype=torch.int64, device="cuda")
        self.seen = [as_bytes(tensor)[self.index].clone() for tensor in rig.kv]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        assert not rig.mover.is_captured()
        with torch.cuda.graph(self.graph):
            assert rig.mover.is_captured()
            for layer, tensor in enumerate(rig.kv):
                if gated:
                    rig.mover.gate(layer)
                torch.index_select(as_bytes(tensor), 0, self.index, out=self.seen[layer])

    def read_loaded(self, rows: np.ndarray, blocks: np.ndarray) -> list[Any]:
        """Load into blocks that held something else, and replay beside that."""
        self.index.copy_(torch.from_numpy(blocks.astype(np.int64)))
        fill(self.rig.kv)
        torch.cuda.synchronize()
        self.rig.load_now(rows, blocks, by_layers=True)
        assert self.rig.mover.gate_load(self.rig.jobs)
        self.graph.replay()
        self.rig.wait(1)
        torch.cuda.synchronize()
        return self.seen


def store(rig: Rig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Some rows, the blocks stored in them, and what those held."""
    rows = u32(rng.choice(BLOCKS, COUNT, replace=False))
    blocks = u32(rng.choice(BLOCKS, COUNT, replace=False))
    stored = rig.content(blocks)
    rig.store(rows, blocks)
    rig.wait(1)
    return rows, blocks, stored


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def reads_what_is_loaded(forward: Forward, rng: np.random.Generator) -> bool:
    """Whether a replay beside a load of blocks that were just stored reads these."""
    fill(forward.rig.kv)
    rows, blocks, stored = store(forward.rig, rng)
    return equal(forward.read_loaded(rows, blocks), stored)


@pytest.mark.parametrize("layout", [*LAYOUTS, large])
def test_a_graph_waits_for_each_layer_of_each_load(layout: Any) -> None:
    forward = Forward(Rig(layout(torch.uint8)))
    rng = np.random.default_rng(1)
    for turn in range(TURNS):
        assert reads_what_is_loaded(forward, rng), turn
        # Nothing is waited for when nothing is loaded.
        forward.graph.replay()
        torch.cuda.synchronize()


def test_a_graph_without_gates_reads_what_was_there_before() -> None:
    """The control: in as many turns as above, loads are slow enough to be missed, also on a GPU that others use."""
    forward = Forward(Rig(large(torch.uint8)), gated=False)
    rng = np.random.default_rng(2)
    assert not all(reads_what_is_loaded(forward, rng) for _ in range(TURNS))


def test_gates_stay_as_they_are_while_an_earlier_replay_may_wait_at_them() -> None:
    rig = Rig(large(torch.uint8))
    rows, blocks, stored = store(rig, np.random.default_rng(3))
    fill(rig.kv)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW_CYCLES)
    rig.load_now(rows, blocks, by_layers=True)
    assert not rig.mover.gate_load(rig.jobs)
    rig.mover.join_load(rig.jobs)
    assert equal(rig.content(blocks), stored)


def test_a_load_beside_forwards_is_waited_for_by_the_next_replay_alone() -> None:
    """One is under way when the load is put behind the gates: it reads what was there, and is not held up."""
    rig = Rig(large(torch.uint8))
    forward = Forward(rig)
    rows, blocks, stored = store(rig, np.random.default_rng(4))
    forward.index.copy_(torch.from_numpy(blocks.astype(np.int64)))
    fill(rig.kv)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW_CYCLES)
    forward.graph.replay()
    rig.load(rows, blocks, by_layers=True)
    assert rig.mover.gate_load(rig.jobs)
    forward.graph.replay()
    rig.wait(1)
    torch.cuda.synchronize()
    assert equal(forward.seen, stored)


def test_a_replay_waits_for_what_was_recorded_before_it_was_launched() -> None:
    """What the gates rely on: CUDA takes an event as it is at the launch of a graph, not when the graph comes to it."""
    compute, other = torch.cuda.Stream(), torch.cuda.Stream()
    gate, graph, late = torch.cuda.Event(external=True), torch.cuda.CUDAGraph(), torch.cuda.Event()
    gate.record(other)
    value = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=compute):
        gate.wait()
        value += 1
    ends = []
    for again in (False, True):
        if again:
            with torch.cuda.stream(other):
                torch.cuda._sleep(20 * SLOW_CYCLES)
                late.record()
                gate.record()
        with torch.cuda.stream(compute):
            if not again:
                torch.cuda._sleep(SLOW_CYCLES)
            graph.replay()
            ends.append(torch.cuda.Event())
            ends[-1].record()
    ends[0].synchronize()
    assert not late.query(), "launched before"
    ends[1].synchronize()
    assert late.query(), "launched after"
