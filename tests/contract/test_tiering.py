"""The toy engine over a disk tier: what was written is fetched by another engine, and never anything else."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_engine import Request, ToyEngine

from lmcache_rs.config import load_config
from lmcache_rs.connector.tiers import OpenTier, open_tiers

NAMESPACE = bytes(32)

PROMPT = list(range(50))
"""12 blocks of 4 tokens and a tail of 2: with chunks of 16 tokens three whole ones and a short one."""

WAIT_S = 30.0

ADAPTER = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path="org/a")


def settings(disk: Path, **more: Any) -> dict[str, Any]:
    return {
        "lmcache.chunk_size": 16,
        "lmcache.local_disk": str(disk),
        "lmcache.max_local_disk_size": 1,
        "lmcache.write_policy": "through",
        **{f"lmcache.{name}": value for name, value in more.items()},
    }


def engine(disk: Path, *, ranks: int = 1, rows: int = 64, **more: Any) -> ToyEngine:
    extra = settings(disk, **more)

    def tiers(rank: int, searching: bool) -> Mapping[str, OpenTier]:
        config = load_config(extra, environ={})
        return open_tiers(config, rank, ranks, NAMESPACE, searching=searching)

    return ToyEngine(ranks=ranks, rows=rows, extra=extra, open_tiers=tiers)


def until(engine: ToyEngine, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        engine.step()
        time.sleep(1e-3)
        assert time.monotonic() < deadline, engine.counters.totals()


def written(engine: ToyEngine) -> float:
    return engine.counters.totals().get("written_chunks:disk", 0)


def assert_idle(engine: ToyEngine) -> None:
    until(
        engine,
        lambda: not (engine.scheduler._tiering._writes.busy or engine.scheduler._tiering._fetches._jobs),
    )
    engine.assert_idle()


def fill(disk: Path, prompt: list[int] = PROMPT, chunks: int = 4, **more: Any) -> ToyEngine:
    """An engine that has computed and written the prompt."""
    one = engine(disk, **more)
    one.run(Request("fill", prompt))
    until(one, lambda: written(one) == chunks)
    return one


def found(request: Request) -> int:
    """Tokens that the request did not compute: a load beside the steps brings its last block whole, and is told so."""
    return min(request.cached_tokens, len(request.prompt) - 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_engine_finds_what_was_written(tmp_path: Path, ranks: int) -> None:
    fill(tmp_path, ranks=ranks)
    other = engine(tmp_path, ranks=ranks)
    request = Request("a", PROMPT)
    other.run(request)
    assert found(request) == len(PROMPT) - 1
    totals = other.counters.totals()
    assert totals["fetched_chunks:disk"] == 4
    assert other.wrong == 0
    # It is in RAM now, and known to be on disk.
    again = Request("b", PROMPT)
    other.run(again)
    assert found(again) == len(PROMPT) - 1
    assert other.wrong == 0
    assert other.counters.totals()["fetched_chunks:disk"] == 4
    assert not other.counters.totals().get("written_chunks:disk")
    assert other.scheduler.index.stats()["leases"] == 0


def files(disk: Path) -> list[Path]:
    return sorted(disk.rglob("*.kv"))


def ask(disk: Path, prompt: list[int] = PROMPT, **more: Any) -> tuple[ToyEngine, Request]:
    """Another engine that is asked for the prompt."""
    other, request = engine(disk, **more), Request("ask", prompt)
    other.run(request)
    assert other.wrong == 0
    return other, request


def test_by_default_what_is_seen_again_is_written(tmp_path: Path) -> None:
    one = engine(tmp_path, write_policy="reuse")
    one.run(Request("a", PROMPT))
    assert_idle(one)
    assert not files(tmp_path)
    one.run(Request("b", PROMPT))
    until(one, lambda: written(one) == 4)
    one.run(Request("c", PROMPT))
    assert_idle(one)
    assert written(one) == 4, "what is there is not written again"


def test_what_is_about_to_leave_ram_is_written(tmp_path: Path) -> None:
    one = engine(tmp_path, rows=40, write_policy="reuse")
    for number in range(6):
        one.run(Request(f"r{number}", [100 * number + i for i in range(48)]))
        until(one, lambda: not one.scheduler._tiering._writes.busy)
    assert written(one) >= 5, "half of what was computed did not fit"
    _, request = ask(tmp_path, list(range(48)))
    assert found(request) == 47


def test_what_is_damaged_on_disk_is_computed(tmp_path: Path) -> None:
    fill(tmp_path)
    sizes = {path: path.stat().st_size for path in files(tmp_path)}
    for path in sizes:
        with path.open("r+b") as file:
            file.seek(4096 + 5)
            file.write(b"\xff")
    other, request = ask(tmp_path)
    assert request.cached_tokens == 0
    assert request.output
    assert_idle(other)
    assert other.counters.totals()["failed_fetches:disk"] == 4


def test_a_hole_ends_what_is_found(tmp_path: Path) -> None:
    fill(tmp_path, PROMPT[:32], chunks=2)
    first_two = files(tmp_path)
    fill(tmp_path, chunks=2)
    for path in files(tmp_path):
        if path not in first_two:
            path.unlink()
    other, request = ask(tmp_path)
    assert request.cached_tokens == 32
    assert_idle(other)


def test_a_part_that_one_rank_lacks_is_a_miss(tmp_path: Path) -> None:
    fill(tmp_path, ranks=2)
    for path in files(tmp_path):
        if path.stem.endswith("-1"):
            path.unlink()
    other, request = ask(tmp_path, ranks=2)
    assert request.cached_tokens == 0
    assert not other.counters.totals().get("fetched_chunks:disk")


def test_a_chunk_that_is_half_in_ram_is_fetched_beside_it(tmp_path: Path) -> None:
    fill(tmp_path)
    other = engine(tmp_path, write_policy="reuse")
    other.run(Request("half", [*PROMPT[:24], 999]))
    request = Request("ask", PROMPT)
    other.run(request)
    assert found(request) == len(PROMPT) - 1
    assert other.wrong == 0
    assert_idle(other)


def test_two_requests_of_one_prompt_fetch_it_once(tmp_path: Path) -> None:
    fill(tmp_path)
    other = engine(tmp_path)
    requests = [Request("a", PROMPT), Request("b", PROMPT), Request("c", [*PROMPT, *range(7)])]
    other.run(*requests)
    assert [found(request) for request in requests[:2]] == [49, 49]
    assert requests[2].cached_tokens >= 48
    assert other.counters.totals()["fetched_chunks:disk"] == 4
    assert_idle(other)


def test_an_aborted_request_leaves_nothing_behind(tmp_path: Path) -> None:
    fill(tmp_path)
    other = engine(tmp_path)
    for number in range(20):
        request = other.add(Request(f"r{number}", PROMPT))
        for _ in range(number % 5):
            other.step()
        if request.request_id not in other.done:
            other.abort(request)
    fetches, index = other.scheduler._tiering._fetches, other.scheduler.index
    # What a late fetch left to be computed is stored, and that may still be under way.
    until(other, lambda: not (fetches._jobs or index.stats()["reserved"]))
    other.loading.clear()
    assert fetches._rows == 0


def test_a_reset_reaches_the_disk(tmp_path: Path) -> None:
    one = fill(tmp_path)
    rows, complete = one.scheduler.clear()
    assert (rows, complete) == (13, True)
    _, request = ask(tmp_path, write_policy="reuse")
    assert request.cached_tokens == 0
    one.run(Request("again", PROMPT))
    until(one, lambda: written(one) == 8)
    assert found(ask(tmp_path)[1]) == 49


def test_what_is_being_written_while_all_is_forgotten_is_not_found(tmp_path: Path) -> None:
    one = engine(tmp_path)
    one.run(Request("fill", PROMPT))
    # Ordered, perhaps written, not acknowledged.
    one.scheduler.clear()
    until(one, lambda: not one.scheduler._tiering._resets.due)
    assert ask(tmp_path, write_policy="reuse")[1].cached_tokens == 0


@pytest.mark.parametrize(
    "more", [{"retrieve_locations": "LocalCPUBackend"}, {"store_location": "LocalCPUBackend"}]
)
def test_a_tier_may_be_written_to_or_searched_only(tmp_path: Path, more: dict[str, Any]) -> None:
    if "store_location" in more:
        one = engine(tmp_path, **more)
        one.run(Request("a", PROMPT))
        assert_idle(one)
        assert not files(tmp_path)
    fill(tmp_path)
    other, request = ask(tmp_path, **more)
    assert found(request) == (0 if "retrieve_locations" in more else 49)
    assert_idle(other)


NAMED = [SimpleNamespace(identifier="my-image-1")]
NAMED_LIKE_MD5 = [SimpleNamespace(identifier="0af9" * 8)]


@pytest.mark.parametrize(
    "media", [{"lora_request": ADAPTER}, {"mm_features": NAMED}, {"mm_features": NAMED_LIKE_MD5}]
)
@pytest.mark.parametrize("write_policy", ["reuse", "through"])
def test_kv_of_a_private_identity_stays_in_ram(
    tmp_path: Path, media: dict[str, Any], write_policy: str
) -> None:
    one = engine(tmp_path, rows=16, write_policy=write_policy)
    for number in range(4):
        request = Request(f"r{number}", [number // 2, *PROMPT[1:]])
        for name, value in media.items():
            setattr(request, name, value)
        one.run(request)
    assert found(request) == 49
    assert_idle(one)
    assert one.scheduler.index.stats()["evictions"] > 0
    assert not files(tmp_path)
    assert "tier_lookups" not in one.counters.totals(), "nor is it looked for elsewhere"


def test_media_that_vllm_has_hashed_are_written(tmp_path: Path) -> None:
    one, request = engine(tmp_path), Request("a", PROMPT)
    request.mm_features = [SimpleNamespace(identifier=f"adapter:{'0af9' * 16}")]  # type: ignore[attr-defined]
    one.run(request)
    until(one, lambda: written(one) == 4)


def test_requests_that_may_not_store_are_not_written(tmp_path: Path) -> None:
    one = engine(tmp_path, priority_limit=1)
    one.run(Request("a", PROMPT, priority=5))
    assert_idle(one)
    assert not files(tmp_path)


def test_a_request_that_may_not_store_writes_nothing_that_it_sees_again(tmp_path: Path) -> None:
    one = engine(tmp_path, write_policy="reuse", priority_limit=1)
    one.run(Request("a", PROMPT))
    again = Request("b", PROMPT, priority=5)
    one.run(again)
    assert found(again) == 49
    assert_idle(one)
    assert not files(tmp_path)


class Stalled:
    """A tier's queue that takes everything and answers nothing."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def find(self, *_: Any) -> None:
        self.calls.append("find")

    def load(self, *_: Any) -> None:
        self.calls.append("load")

    def store(self, *_: Any) -> None:
        self.calls.append("store")

    def poll(self) -> list[Any]:
        return []

    def counters(self) -> dict[str, int]:
        return {}

    def close(self, timeout_s: float) -> bool:
        return False


class Searched(Stalled):
    """One that has all it is asked for, and never loads it."""

    def __init__(self) -> None:
        super().__init__()
        self._jobs: list[tuple[int, int]] = []

    def find(self, job: int, keys: bytes) -> None:
        self._jobs.append((job, len(keys) // 32))

    def poll(self) -> list[Any]:
        jobs, self._jobs = self._jobs, []
        return [(job, 0, None, b"\1" * count, 0.001) for job, count in jobs]


def stalled_engine(searched: Stalled, worker: Stalled, **more: Any) -> ToyEngine:
    def tiers(rank: int, searching: bool) -> Mapping[str, Any]:
        return {
            "slow": SimpleNamespace(
                queue=searched if searching else worker, tier=None, may_load=True, may_store=True
            )
        }

    return ToyEngine(rows=64, extra=settings(Path("/nowhere"), **more), open_tiers=tiers)


def test_a_search_that_is_not_answered_is_a_miss(tmp_path: Path) -> None:
    one, request = stalled_engine(Stalled(), Stalled()), Request("a", PROMPT)
    one.run(request)
    assert request.output
    assert request.cached_tokens == 0
    assert one.counters.totals()["search_timeouts"] == 1
    until(one, lambda: not one.scheduler._tiering._wanted)


def test_a_load_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    worker = Stalled()
    one, request = stalled_engine(Searched(), worker, blocking_timeout_secs=0.2), Request("a", PROMPT)
    one.run(request)
    assert request.output
    assert request.cached_tokens == 0
    assert one.wrong == 0
    assert worker.calls[0] == "load"
    assert one.counters.totals()["fetch_timeouts"] == 1
    # Its rows stay out of use: the tier may write to them at any time.
    assert one.scheduler.index.stats()["reserved"] == 13


def test_writes_that_do_not_end_keep_a_quarter_of_the_pool_at_most(tmp_path: Path) -> None:
    worker = Stalled()
    one = stalled_engine(Stalled(), worker, blocking_timeout_secs=0)
    for number in range(12):
        one.run(Request(f"r{number}", [100 * number + i for i in range(48)]))
    assert "store" in worker.calls
    assert one.scheduler._tiering._writes._slots <= 64 / 4 + 12
    assert one.scheduler.index.stats()["evictions"] > 0
