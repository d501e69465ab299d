"""Loads told to vLLM as ended shortly before they are: readers wait for the rest, and nobody else gets the blocks."""

from dataclasses import replace
from typing import Any

import pytest
from test_requests import ASYNC, prompt
from toy_engine import BLOCK, LAYERS, Request, ToyEngine

from lmcache_rs.connector.pace import Pace
from lmcache_rs.copy.cpu import CpuMover


class LateMover(CpuMover):
    """A device whose loads take some polls, and that always says that they end soon: who joins one gets it at once."""

    POLLS = 6

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._late: dict[int, tuple[int, Any, Any]] = {}
        self.joined = 0
        self.limits: set[tuple[float, float]] = set()
        self.by_layers: list[bool] = []
        self.fail = False

    def submit_load(self, job: int, rows: Any, blocks: Any, by_layers: bool = False) -> None:
        self._late[job] = (self.POLLS, rows, blocks)
        self.by_layers.append(by_layers)

    def join_load(self, job: int, layer: int | None = None) -> None:
        self.joined += job in self._late
        self._load(job)

    def settle_loads(self, seconds: float, by_layers_seconds: float) -> list[int]:
        self.limits.add((seconds, by_layers_seconds))
        return list(self._late) if seconds > 0 else []

    def gate(self, layer: int) -> None:
        """Every capture waits."""

    def poll(self) -> list[tuple[int, int, float]]:
        for job, (polls, rows, blocks) in list(self._late.items()):
            self._late[job] = (polls - 1, rows, blocks)
            if not polls:
                self._load(job)
        return super().poll()

    def _load(self, job: int) -> None:
        late = self._late.pop(job, None)
        if late is None:
            return
        if self.fail:
            self._ended.append((job, -1, 0.0))  # it is told of all the same
            raise RuntimeError("injected")
        super().load_now(job, *late[1:])


class Soon(Pace):
    """Steps are regular."""

    def step_seconds(self) -> float:
        return 0.25

    def lead(self) -> float:
        return 1.0


def engine_with_late_loads(**options: Any) -> ToyEngine:
    engine = ToyEngine(extra=ASYNC, make_mover=LateMover, **options)
    for worker in engine.workers:
        worker._early._pace = Soon(1)
    return engine


def until_received(engine: ToyEngine, request: Request) -> None:
    engine.add(request)
    engine.step()
    assert request in engine.running
    assert engine.workers[0]._mover._late, "the load has ended already"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_computes_with_a_load_that_has_not_ended(ranks: int) -> None:
    engine = engine_with_late_loads(ranks=ranks)
    engine.run(Request("first", prompt(1, 41)))
    other = Request("other", prompt(9, 5), max_tokens=8)
    repeat = Request("second", prompt(1, 41), max_tokens=4)
    engine.run(other, repeat)
    assert sum(worker._mover.joined for worker in engine.workers) == ranks
    assert (repeat.cached_tokens, repeat.output[:1]) == (41, engine.done["first"].output)
    engine.assert_idle()


@pytest.mark.parametrize("reset", [False, True])
def test_blocks_of_an_aborted_request_wait_for_the_load(reset: bool) -> None:
    engine = engine_with_late_loads(blocks=16)
    engine.run(Request("first", prompt(1, 10 * BLOCK)))
    repeat = Request("second", prompt(1, 10 * BLOCK))
    until_received(engine, repeat)
    free = len(engine.pool.free)
    engine.abort(repeat)
    if reset:
        engine.scheduler.clear()
    assert len(engine.pool.free) <= free + 1, "blocks are free that a load still writes"
    engine.run(*(Request(f"r{i}", prompt(10 + i, 3 * BLOCK)) for i in range(4)))
    engine.assert_idle()


def test_a_load_that_fails_after_it_was_told_is_computed_again() -> None:
    engine = engine_with_late_loads()
    engine.run(Request("first", prompt(1, 41)))
    engine.workers[0]._mover.fail = True
    repeat = Request("second", prompt(1, 41))
    engine.run(Request("other", prompt(9, 5), max_tokens=8), repeat)
    assert repeat.output == engine.done["first"].output
    engine.assert_idle()
    assert engine.counters.take()["failed_loads"] == 1


def test_the_pace_is_that_of_the_last_steps_but_for_a_long_one_and_one_begun_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace, clock = Pace(3), iter([0.0, 9.0, 9.5, 10.0, 10.75, 11.0])
    monkeypatch.setattr("lmcache_rs.connector.pace.time.perf_counter", lambda: next(clock))
    leads = []
    for _ in range(6):
        pace.step()
        leads.append(pace.lead())
    assert leads == [0, 0, 0, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("captured", [0, LAYERS - 1, LAYERS])
def test_loads_come_by_layers_and_are_told_a_step_earlier_if_every_forward_waits_for_layers(
    captured: int,
) -> None:
    engine = engine_with_late_loads()
    lookup, mover = engine.scheduler._lookup, engine.workers[0]._mover
    lookup._rules = replace(lookup._rules, layered_bytes_min=1)
    for layer in range(captured):
        engine.workers[0].capture_layer(f"layer.{layer}")
    engine.run(Request("first", prompt(1, 41)))
    engine.run(Request("other", prompt(9, 5), max_tokens=8), Request("second", prompt(1, 41)))
    assert mover.limits == {(1.0, 1.25 if captured == LAYERS else 1.0)}
    assert mover.by_layers == [captured == LAYERS], "without, they come by rows"
    engine.assert_idle()


@pytest.mark.parametrize("asked", [LAYERS, LAYERS - 1])
def test_a_load_by_layers_counts_only_if_every_layer_was_waited_for(asked: int) -> None:
    engine = ToyEngine()
    engine.run(Request("first", prompt(1, 41)))
    worker = engine.workers[0]
    before, after = worker.before_forward, worker.after_forward

    def before_forward(orders: Any) -> None:
        for order in orders.loads:
            order.by_layers = True
        before(orders, by_layers=True)
        for name in list(worker._joins.layered._layers)[:asked]:
            worker.before_layer(name)

    worker.before_forward = before_forward  # type: ignore[method-assign]
    worker.after_forward = after  # type: ignore[method-assign]
    repeat = Request("second", prompt(1, 41))
    engine.run(repeat)
    engine.assert_idle()
    assert repeat.output == engine.done["first"].output
    counts = engine.counters.take()
    assert counts.get("failed_loads", 0) == (asked < LAYERS)
    assert counts.get("errors:load", 0) == (asked < LAYERS)
