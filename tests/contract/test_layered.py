"""Loads by layers: the forward waits one layer ahead, and a captured one only if every capture waits for all layers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lmcache_rs.config import Config
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.layered import Captures, LayeredLoads
from lmcache_rs.connector.orders import LoadOrder
from lmcache_rs.connector.rules import lookup_rules

NAMES = {"a": 0, "b": 1, "c": 2, "shares c": 2}


class Waits:
    """A mover that notes what it is told to wait for."""

    def __init__(self, gates: bool = True) -> None:
        self.gates = gates
        self.said: list[Any] = []

    def gate(self, layer: int) -> None:
        self.said.append(("gate", layer))

    def gate_load(self, job: int) -> bool:
        self.said.append(("gated", job))
        return self.gates

    def join_load(self, job: int, layer: int | None = None) -> None:
        self.said.append((job, layer))


def order(job: int, by_layers: bool = True) -> LoadOrder:
    return LoadOrder(job, f"r{job}", np.zeros(1, np.uint32), np.zeros(1, np.uint32), False, True, by_layers)


def captured(mover: Waits, *names: str) -> LayeredLoads:
    loads = LayeredLoads(NAMES)
    for name in names:
        loads.capture(name, mover)
    return loads


@pytest.mark.parametrize(
    ("layers", "complete"),
    [
        ([], False),
        ([0, 1, 2], True),
        ([0, 0, 1, 1, 2, 2], True),
        ([0, 1, 2, 0, 1, 2], True),
        ([0, 1], False),
        ([1, 2], False),
        ([2], False),
        ([0, 2], False),
        ([0, 1, 0, 1, 2], False),
        ([0, 1, 2, 1, 2], False),
        ([0, 1, 2, 0, 2, 0, 1, 2], False),
    ],
)
def test_captures_that_wait_for_all_layers(layers: list[int], complete: bool) -> None:
    captures = Captures(2)
    for layer in layers:
        captures.add(layer)
    assert captures.complete == complete


def test_a_forward_that_asks_waits_one_layer_ahead() -> None:
    mover, loads = Waits(), LayeredLoads(NAMES)
    assert loads.begin(order(7), True, mover)
    for name in ("a", "b", "unknown", "c", "shares c"):
        loads.before(name, mover)
    assert mover.said == [(7, 0), (7, 1), (7, 2), (7, 2), (7, 2)]
    assert loads.end(mover) == []
    assert loads.begin(order(8), True, mover)
    loads.before("a", mover)
    assert [(order.job, missing) for order, missing in loads.end(mover)] == [(8, 2)]
    assert loads.end(mover) == []


def test_a_captured_forward_waits_at_its_gates() -> None:
    mover = Waits()
    loads = captured(mover, *NAMES)
    assert mover.said == [("gate", 0), ("gate", 1), ("gate", 2), ("gate", 2)]
    mover.said.clear()
    assert loads.begin(order(7), False, mover)
    assert mover.said == [("gated", 7)]
    assert loads.end(mover) == [], "it need not ask"
    assert mover.said == [("gated", 7), (7, None)], "what follows waits for all of it"


def test_a_forward_that_was_to_be_captured_and_asks_waits_all_the_same() -> None:
    mover = Waits()
    loads = captured(mover, *NAMES)
    assert loads.begin(order(7), False, mover)
    mover.said.clear()
    loads.before("a", mover)
    loads.before("b", mover)
    assert mover.said == [(7, 1), (7, 2)]
    assert loads.end(mover) == []


@pytest.mark.parametrize(
    ("names", "by_layers", "gates"),
    [
        ((), True, True),
        (("a", "b"), True, True),
        (("a", "b", "c"), False, True),
        (("a", "b", "c"), True, False),
    ],
)
def test_a_captured_forward_that_cannot_wait_by_layers(names: Any, by_layers: bool, gates: bool) -> None:
    mover = Waits(gates)
    loads = captured(mover, *names)
    assert not loads.begin(order(7, by_layers), False, mover)
    mover.said.clear()
    assert not loads.end(mover)
    assert not mover.said


def test_a_model_with_a_drafter_loads_nothing_by_layers() -> None:
    """VLLM 0.33's second runner asks for the drafter's layers after it was told how the step's loads ended."""
    geometry = Geometry(16, 4096, 10, ("l0", "draft"), 100, 1, "cuda", 1)
    assert lookup_rules(Config(), geometry).layered_bytes_min is not None
    assert lookup_rules(Config(), replace(geometry, drafts=True)).layered_bytes_min is None


@pytest.mark.parametrize("asks", [False, True])
def test_a_load_that_goes_by_pieces_is_waited_for_whole(asks: bool) -> None:
    mover = Waits()
    load = order(7)
    load.pieces = [(8, 1)]
    assert not captured(mover, *NAMES).begin(load, asks, mover), "its copies have other names"
