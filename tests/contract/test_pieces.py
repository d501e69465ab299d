"""A load of what is still being fetched: chunk by chunk, cut where one does not come, and never of other bytes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_tiering import NAMESPACE, PROMPT, assert_idle, fill, found, settings, until
from toy_engine import BLOCK, ROW_BYTES, Request, ToyEngine

from held_queue import HeldQueue
from lmcache_rs.config import load_config
from lmcache_rs.connector import pieces
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.copies import CUT, FIRST_COPY, Copied, Copies
from lmcache_rs.connector.orders import DONE, FAILED, LoadOrder, StepOrders
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.pieces import Pieces
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.tiers import OpenTier, open_tiers
from lmcache_rs.connector.worker import WorkerSide

CHUNKS = 4
"""Of the prompt."""


class Held(HeldQueue):
    """Chunk number `refused` of each load is not there."""

    def __init__(self, queue: Any, refused: int | None) -> None:
        super().__init__(queue, may_tell=1)
        self._refused = refused

    def tell(self, end: Any) -> Any:
        job, index, *_, seconds = end
        return (job, index, "absent", 0, seconds) if index == self._refused else end


class Slow:
    """An engine that fetches from a filled disk no more chunks than it is let, of the prompt's four."""

    def __init__(
        self, folder: Path, ranks: int = 1, blocks: int = 200, refused: int | None = None, **more: Any
    ) -> None:
        """`refused`: of the last rank."""
        fill(folder, ranks=ranks)
        extra = settings(folder, **more)
        self.queues: list[Held] = []

        def tiers(rank: int, searching: bool) -> Mapping[str, OpenTier]:
            config = load_config(extra, environ={})
            opened = open_tiers(config, rank, ranks, NAMESPACE, searching=searching)
            if searching:
                return opened
            self.queues.append(Held(opened["disk"].queue, refused if rank == ranks - 1 else None))
            return {"disk": replace(opened["disk"], queue=self.queues[-1])}

        self.engine = ToyEngine(ranks=ranks, rows=64, blocks=blocks, extra=extra, open_tiers=tiers)
        self.request = self.engine.add(Request("ask", PROMPT))

    def let(self, chunks: int) -> None:
        for queue in self.queues:
            queue.may_tell += chunks

    def total(self, name: str) -> float:
        return self.engine.counters.totals().get(name, 0)

    @property
    def loaded_tokens(self) -> float:
        """Of loads that did not fail."""
        return self.total("load_bytes") / len(self.queues) / (ROW_BYTES // BLOCK)

    def begin(self) -> None:
        until(self.engine, lambda: self.total("loads_as_fetched") == 1)

    def wait(self) -> None:
        """Go on for a while with no more than the first chunk."""
        until(self.engine, lambda: len(self.queues) > 0)
        for _ in range(20):
            self.engine.step()

    def end(self) -> None:
        self.engine.run()
        assert self.request.output
        assert self.engine.wrong == 0
        self.let(CHUNKS)
        assert_idle(self.engine)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_begins_when_the_first_chunk_is_there(tmp_path: Path, ranks: int) -> None:
    slow = Slow(tmp_path, ranks)
    slow.begin()
    assert slow.total("fetched_chunks:disk") == 1
    for _ in range(20):
        slow.engine.step()
    assert not slow.request.output, "the rest has not come"
    for chunks in (1, 2):
        slow.let(chunks)
        slow.engine.step()
    slow.end()
    assert found(slow.request) == len(PROMPT) - 1
    assert slow.total("loads") == 1
    assert slow.total("fetched_chunks:disk") == 4


def test_others_find_what_was_loaded_as_it_came(tmp_path: Path) -> None:
    slow = Slow(tmp_path)
    slow.begin()
    other = slow.engine.add(Request("other", [*PROMPT[:40], 999]))
    slow.let(3)
    slow.end()
    assert other.output
    assert other.cached_tokens >= 32
    assert slow.total("fetched_chunks:disk") == 4, "each once"


def test_a_chunk_that_does_not_come_cuts_the_load(tmp_path: Path) -> None:
    slow = Slow(tmp_path, refused=2)
    slow.begin()
    slow.let(3)
    slow.end()
    assert slow.loaded_tokens == 32, "what came is found"
    assert slow.total("cut_loads") == 1
    assert slow.total("failed_loads") == 0, "nothing is wrong with the copies"


def test_a_chunk_that_one_rank_lacks_cuts_the_load(tmp_path: Path) -> None:
    slow = Slow(tmp_path, ranks=2, refused=1)
    slow.begin()
    slow.let(3)
    slow.end()
    assert slow.loaded_tokens == 16
    assert slow.total("cut_loads") == 1


def test_what_is_late_is_not_waited_for(tmp_path: Path) -> None:
    slow = Slow(tmp_path, blocking_timeout_secs=1)
    slow.begin()
    slow.end()
    assert slow.loaded_tokens == 16
    assert slow.total("cut_loads") == 1


def test_an_aborted_request_frees_its_rows_when_its_load_has_ended(tmp_path: Path) -> None:
    slow = Slow(tmp_path)
    slow.begin()
    slow.engine.abort(slow.request)
    slow.let(3)
    until(slow.engine, lambda: slow.total("loads") == 1)
    slow.engine.loading.clear()
    assert slow.engine.scheduler._tiering._fetches._lent == 0
    assert slow.engine.scheduler.index.stats()["reserved"] == 0


def test_forgetting_everything_meanwhile_gives_no_row_away_that_is_read(tmp_path: Path) -> None:
    slow = Slow(tmp_path)
    slow.begin()
    slow.engine.scheduler.clear()
    assert slow.engine.scheduler.index.stats()["leaving"] == 13
    slow.let(3)
    slow.end()
    assert slow.total("loads") == 1, "its rows stayed until then"
    assert slow.engine.scheduler.index.stats()["leaving"] == 0


def test_draining_begins_no_copy_of_what_has_not_come(tmp_path: Path) -> None:
    """As vLLM may take its KV away after it."""
    slow = Slow(tmp_path)
    slow.begin()
    slow.engine.step()
    slow.engine.workers[0].drain()
    slow.let(3)
    slow.end()
    assert slow.total("cut_loads") == 1
    assert slow.total("failed_loads") == 0


def test_few_blocks_are_lent_to_what_has_not_come(tmp_path: Path) -> None:
    slow = Slow(tmp_path, blocks=40)
    slow.wait()
    slow.let(3)
    slow.end()
    assert slow.total("loads_as_fetched") == 0, "13 blocks are more than a quarter of 40"
    assert found(slow.request) == len(PROMPT) - 1


def test_without_asynchronous_loads_all_is_waited_for(tmp_path: Path) -> None:
    slow = Slow(tmp_path, enable_async_loading=False)
    slow.wait()
    slow.let(3)
    slow.end()
    assert slow.total("loads_as_fetched") == 0
    assert found(slow.request) == len(PROMPT) - 1


class Loads:
    """A mover that only notes what it is to load."""

    rows, row_bytes, store_parts = 8, 8, ()

    def __init__(self) -> None:
        self.loads: dict[int, list[int]] = {}
        self.refuses = False

    def submit_load(self, job: int, rows: Any, blocks: Any, by_layers: bool = False) -> None:
        if self.refuses:
            raise RuntimeError("injected")
        self.loads[job] = rows.tolist()


def order(*chunks: tuple[int, int], ready: int = 2, wait_s: float = 60.0) -> LoadOrder:
    rows = np.arange(ready + sum(count for _, count in chunks), dtype=np.uint32)
    return LoadOrder(7, "r", rows, rows + 100, asynchronous=True, held=True, pieces=chunks, wait_s=wait_s)


@pytest.fixture
def rig() -> SimpleNamespace:
    errors: list[str] = []
    made = Pieces(Copies(), lambda what, error: errors.append(what))
    return SimpleNamespace(pieces=made, mover=Loads(), errors=errors)


def test_each_chunk_is_copied_when_it_is_there(rig: SimpleNamespace) -> None:
    rig.pieces.submit(order((11, 3), (12, 1)), rig.mover)
    assert list(rig.mover.loads.values()) == [[0, 1]]
    rig.pieces.fetched({12: DONE}, rig.mover)
    rig.pieces.fetched({}, rig.mover)
    assert list(rig.mover.loads.values()) == [[0, 1], [5]]
    assert list(rig.pieces.settled(rig.mover.loads)) == [], "a chunk has not come"
    first, second = rig.mover.loads
    assert list(rig.pieces.whole([(first, 20, 0.1), (3, 1, 0.1)])) == [(3, 1, 0.1)]
    rig.pieces.fetched({11: DONE}, rig.mover)
    third = max(rig.mover.loads)
    assert rig.mover.loads[third] == [2, 3, 4]
    assert list(rig.pieces.settled([second])) == []
    assert set(rig.pieces.settled([second, third, 3])) == {7, 3}
    ((job, moved, _),) = rig.pieces.whole([(second, 10, 0.1), (third, 30, 0.1)])
    assert (job, moved) == (7, 60)


def test_a_result_that_came_before_the_order_counts(
    rig: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.pieces.fetched({11: DONE, 12: FAILED}, rig.mover)
    rig.pieces.submit(order((11, 1), (12, 1), (13, 1)), rig.mover)
    assert list(rig.mover.loads.values()) == [[0, 1], [2]]
    monkeypatch.setattr(pieces, "RESULTS_KEPT", 10)
    for job in range(100, 150):
        rig.pieces.fetched({job: DONE}, rig.mover)
    assert len(rig.pieces._results) == 10
    ended = list(rig.pieces.whole([(name, 1, 0.1) for name in rig.mover.loads]))
    assert [(job, moved) for job, moved, _ in ended] == [(7, CUT)]


def test_a_result_counts_that_came_while_the_worker_had_nothing_to_do() -> None:
    results = [{}, {11: DONE}]
    tiers: Any = SimpleNamespace(
        take_results=lambda: results.pop() if results else {}, start=lambda orders: None
    )
    mover: Any = Loads()
    mover.poll = list
    side = WorkerSide(Barrier(Counters().add), Pace(1))
    side.attach(mover, {}, tiers)
    side.take_received()
    side.start_loads(StepOrders([order((11, 1), (12, 1))]))
    assert list(mover.loads.values()) == [[0, 1], [2]]


@pytest.mark.parametrize("fails", [(False, True), (True, False), (False, False)])
def test_a_load_is_not_cut_if_anything_else_failed_too(fails: tuple[bool, bool]) -> None:
    copied = Copied({7: 2})
    copied.fail(cut=True)
    copied.fail(cut=True)
    assert copied.cut
    other = Copied({7: 2})
    for cut in fails:
        other.fail(cut)
    assert other.failed
    assert not other.cut


@pytest.mark.parametrize("why", ["given up", "too late", "refused", "failed"])
def test_a_load_fails_once_nothing_is_copied_for_it_any_more(why: str, rig: SimpleNamespace) -> None:
    rig.pieces.submit(order((11, 1), (12, 1), wait_s=0.0 if why == "too late" else 60.0), rig.mover)
    if why == "given up":
        rig.pieces.give_up()
    rig.mover.refuses = why == "refused"
    (first,) = rig.mover.loads
    assert first >= FIRST_COPY
    rig.pieces.fetched({11: FAILED if why == "failed" else DONE, 12: DONE}, rig.mover)
    assert rig.errors == ["load"] * (why == "refused")
    assert list(rig.mover.loads) == [first]
    assert list(rig.pieces.whole([])) == [], "the first copy has not ended"
    ((job, moved, _),) = rig.pieces.whole([(first, 20, 0.1)])
    assert (job, moved) == (7, -1 if why == "refused" else CUT)
    assert not rig.pieces._loads
    assert not rig.pieces._copies.is_copy(first)
