"""What goes wrong around slower tiers stays where it was, and ends: searches, fetches that stop half-way, resets."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_tiering import PROMPT, Searched, Stalled, settings, until
from toy_engine import Request, ToyEngine

from lmcache_rs.connector import resets, tiering
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.resets import Resets

OTHER = [7, *PROMPT[1:]]


class Tier:
    """A tier of which only resets are looked at; `during` is called in each, and may fail."""

    def __init__(self) -> None:
        self.resets = 0
        self.during: Callable[[], None] = lambda: None

    def reset(self) -> None:
        self.during()
        self.resets += 1


class Failing(Stalled):
    """A queue whose calls fail."""

    def find(self, *_: Any) -> None:
        raise RuntimeError("injected")

    def poll(self) -> list[Any]:
        raise RuntimeError("injected")


class Answering(Searched):
    """A worker's queue that answers each chunk when it is told to, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[tuple[int, int]] = []
        self.answers: list[tuple[int, int, str | None, int, float]] = []

    def load(self, job: int, pool: Any, keys: bytes, positions: Any, counts: Any, rows: Any) -> None:
        self.chunks += [(job, index) for index in range(len(counts))]

    def store(self, job: int, pool: Any, keys: bytes, positions: Any, counts: Any, rows: Any) -> None:
        self.load(job, pool, keys, positions, counts, rows)

    def answer(self, number: int, refusal: str | None = None) -> None:
        job, index = self.chunks[number]
        self.answers.append((job, index, refusal, 1, 0.001))

    def poll(self) -> list[Any]:
        answers, self.answers = self.answers, []
        return answers


def engine(
    searched: Mapping[str, Stalled], worker: Stalled, tier: Any = None, rows: int = 64, **more: Any
) -> ToyEngine:
    def tiers(rank: int, searching: bool) -> Mapping[str, Any]:
        return {
            name: SimpleNamespace(
                queue=queue if searching else worker, tier=tier or Tier(), may_load=True, may_store=True
            )
            for name, queue in searched.items()
        }

    return ToyEngine(rows=rows, extra=settings(Path("/nowhere"), **more), open_tiers=tiers)


def test_an_unanswered_search_is_not_kept_once_its_request_is_gone() -> None:
    one, request = engine({"slow": Stalled()}, Stalled()), Request("a", PROMPT)
    one.add(request)
    tiering = one.scheduler._tiering
    assert tiering._searches
    one.abort(request)
    assert not tiering._searches
    one.run(Request("b", PROMPT))
    assert not tiering._searches


@pytest.mark.parametrize("name", ["a first", "z last"])
def test_a_tier_that_fails_does_not_take_the_others_along(name: str) -> None:
    worker = Answering()
    one = engine({name: Failing(), "m": Searched()}, worker)
    one.add(Request("a", PROMPT))
    until(one, lambda: len(worker.chunks) == 4)
    assert one.counters.totals()["errors:tier_search"]


def test_a_request_that_reads_no_cache_is_neither_searched_for_nor_kept_waiting() -> None:
    queue = Searched()
    one, request = engine({"slow": queue}, Stalled()), Request("a", PROMPT, skip_reading_prefix_cache=True)
    one.add(request)
    assert not one.scheduler._tiering._wanted
    one.step()
    assert request.output or request in one.running


def test_a_frozen_engine_writes_nothing() -> None:
    worker = Stalled()
    one = engine({"slow": Stalled()}, worker, write_policy="reuse", blocking_timeout_secs=0)
    one.run(Request("a", PROMPT))
    one.scheduler.frozen = True
    one.run(Request("b", PROMPT))
    assert "store" not in worker.calls
    one.scheduler.frozen = False
    one.run(Request("c", PROMPT))
    assert "store" in worker.calls


def test_a_fetch_that_fails_ends_nobody_elses_wait() -> None:
    worker = Answering()
    one = engine({"slow": Searched()}, worker)
    first, second = one.add(Request("a", PROMPT)), one.add(Request("b", OTHER))
    until(one, lambda: len(worker.chunks) == 8)
    worker.answer(0, "absent")
    until(one, lambda: first not in one.waiting)
    assert second in one.waiting, "its chunks are still on their way"


def test_a_fetch_that_stops_half_way_gives_its_rows_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was reserved is ordered: only an answer gives rows back."""
    worker = Answering()
    one = engine({"slow": Searched()}, worker)
    fetches = one.scheduler._tiering._fetches
    reserve = fetches._reserve

    def failing(fetch: Any, number: int) -> Any:
        if number == 2:
            raise RuntimeError("injected")
        return reserve(fetch, number)

    monkeypatch.setattr(fetches, "_reserve", failing)
    one.add(Request("a", PROMPT))
    with pytest.raises(RuntimeError, match="injected"):
        one.step()
    until(one, lambda: len(worker.chunks) == 2)
    worker.answer(0, "absent")
    worker.answer(1, "absent")
    until(one, lambda: not fetches._jobs)
    until(one, lambda: not one.waiting and not one.running)
    assert one.scheduler.index.stats()["reserved"] == fetches._rows == 0


def test_a_closed_engine_goes_on_without_its_searches() -> None:
    queue = Stalled()
    one = engine({"slow": queue}, Stalled())
    request = one.add(Request("a", PROMPT))
    one.scheduler.close()
    queue.poll = Failing().poll  # type: ignore[method-assign]
    until(one, lambda: bool(request.output))
    assert not [name for name in one.counters.totals() if name.startswith("errors")]


def test_tiers_are_reset_when_ram_cannot_be() -> None:
    """And what is being stored meanwhile, as nobody could void it, is not written after that."""
    tier, worker = Tier(), Stalled()
    one = engine({"slow": Stalled()}, worker, tier, blocking_timeout_secs=0)
    one.scheduler._ledger.void_stores = fail  # type: ignore[method-assign]
    acknowledge, kept = one.scheduler.acknowledge, list[Any]()
    one.scheduler.acknowledge = kept.append  # type: ignore[method-assign]
    one.run(Request("a", PROMPT))
    with pytest.raises(RuntimeError, match="injected"):
        one.scheduler.clear()
    assert tier.resets == 1
    for acks in kept:
        acknowledge(acks)
    one.step()
    assert one.counters.totals()["stores"]
    assert "store" not in worker.calls


def fail() -> None:
    raise RuntimeError("injected")


def test_an_idle_engine_resets_again_what_was_being_written() -> None:
    tier, worker = Tier(), Answering()
    one = engine({"slow": Stalled()}, worker, tier, blocking_timeout_secs=0)
    one.run(Request("a", PROMPT))
    until(one, lambda: len(worker.chunks) == 4)
    assert not one.scheduler.clear()[1], "what is written now may be found by others"
    assert tier.resets == 1
    for number in range(4):
        assert one.scheduler.has_work(), "the answers come with a step's output"
        one.step()
        assert tier.resets == 1
        worker.answer(number)
    until(one, lambda: not one.scheduler._tiering._resets.due)
    assert tier.resets == 2
    assert not one.scheduler.has_work()
    assert one.scheduler.clear()[1]


@pytest.mark.parametrize("ends", [True, False])
def test_a_reset_waits_for_what_a_worker_nearby_is_writing(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, worker = Tier(), Answering()
    one = engine({"slow": Stalled()}, worker, tier, blocking_timeout_secs=0)
    one.scheduler.worker_nearby = one.workers[0]
    one.run(Request("a", PROMPT))
    until(one, lambda: len(worker.chunks) == 4)
    looks = []

    def look(_seconds: float) -> None:
        looks.append(tier.resets)
        if ends and len(looks) <= 4:
            worker.answer(len(looks) - 1)

    monkeypatch.setattr(tiering, "sleep", look)
    assert one.scheduler.clear()[1] == ends
    assert tier.resets == 1
    assert looks == [0] * (4 if ends else tiering.LAST_WRITES_LOOKS)


def test_a_write_that_never_ends_does_not_keep_an_idle_engine_busy_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = engine({"slow": Stalled()}, Stalled(), blocking_timeout_secs=0)
    one.run(Request("a", PROMPT))
    one.scheduler.clear()
    one.step()
    assert one.scheduler.has_work()
    monkeypatch.setattr("lmcache_rs.connector.tiering.STEPPING_S_MAX", 0.0)
    assert not one.scheduler.has_work()
    assert one.scheduler._tiering._resets.due


def test_a_tier_that_cannot_be_reset_is_tried_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when no request comes."""
    monkeypatch.setattr(resets, "RETRY_EVERY_S", 0.001)
    tier, worker = Tier(), Stalled()
    failures = iter([True] * 5)

    def fail() -> None:
        if next(failures, False):
            raise ConnectionError("injected")

    tier.during = fail
    one = engine({"slow": Searched()}, worker, tier)
    assert not one.scheduler.clear()[1]
    assert one.scheduler.has_work()
    one.step()
    assert worker.calls == []
    until_not(lambda: one.scheduler._tiering._resets.due)
    assert tier.resets == 1


def test_a_reset_that_comes_while_another_is_tried_again_stays_due() -> None:
    """The thread's reset may be the older one: what it did says nothing of what is due now."""
    tier = Tier()
    all_resets = Resets([tier], Barrier(lambda name: None))  # type: ignore[list-item]
    at_work, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        if threading.current_thread() is not threading.main_thread():
            at_work.set()
            go_on.wait(30)

    assert not all_resets.reset(again=True)
    tier.during = slow
    all_resets.retry()
    assert at_work.wait(30)
    assert not all_resets.reset(again=True)
    go_on.set()
    until_not(lambda: all_resets.retrying)
    assert all_resets.due
    all_resets.retry()
    until_not(lambda: all_resets.due)


def until_not(what: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(30_000):
        if not what():
            return
        pause.wait(0.001)
    raise AssertionError("it does not end")
