"""The tiers as Python sees them: conversions, errors, what is told. What they do is tested in Rust."""

from __future__ import annotations

import array
import gc
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_rs import _core, errors
from lmcache_rs._core import HostPool, Tier, TierQueue, tier_namespace

NAMESPACE = tier_namespace([("model", "m"), ("dtype", "float32")])
PASSWORD = "open sesame"
ROWS = 12

Told = dict[tuple[int, int], tuple[str | None, int | bytes]]


def u32(*numbers: int) -> array.array[int]:
    return array.array("I", numbers)


def keys(*names: int) -> bytes:
    return b"".join(bytes([name]) * 32 for name in names)


@pytest.fixture
def pool() -> HostPool:
    return HostPool(ROWS * 8192, 5000, 0, huge_pages=False)


@pytest.fixture
def data(pool: HostPool) -> np.ndarray[Any, Any]:
    data = np.from_dlpack(pool)
    data[:] = np.random.default_rng(1).integers(0, 256, data.shape, np.uint8)
    return data


def disk(path: Path, namespace: bytes = NAMESPACE, secret: bytes | None = None) -> Tier:
    return Tier.disk(namespace, 0, 1, secret, [(str(path), 1 << 30)])


def queue_of(tier: Tier) -> TierQueue:
    return TierQueue(tier, 2, 100, 100, 60.0)


def drained(queue: TierQueue) -> Told:
    assert queue.drain(60)
    ended: Told = {}
    for job, index, reason, value, seconds in queue.poll():
        assert seconds >= 0
        assert (job, index) not in ended
        assert isinstance(value, str) == (reason is not None)
        ended[job, index] = (reason, value)
    assert queue.poll() == []
    return ended


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.kv"))


def test_namespaces_differ_in_every_property_and_not_in_their_order() -> None:
    properties = [("a", "1"), ("b", "2")]
    others = [
        [],
        properties[:1],
        [("a", "1"), ("b", "3")],
        [("a", "1"), ("c", "2")],
        [("a1", ""), ("b", "2")],
    ]
    namespaces = {tier_namespace(other) for other in [properties, *others]}
    assert len(namespaces) == 1 + len(others)
    assert {len(namespace) for namespace in namespaces} == {32}
    assert tier_namespace(tuple(properties[::-1])) == tier_namespace(properties)


@pytest.mark.parametrize("secret", [None, b"secret"])
def test_what_was_stored_is_found_and_loaded(
    tmp_path: Path, pool: HostPool, data: np.ndarray[Any, Any], secret: bytes | None
) -> None:
    queue = queue_of(disk(tmp_path, secret=secret))
    # A chunk of three rows in no order, and one of one row.
    queue.store(1, pool, keys(1, 2), u32(0, 1), np.array([3, 1], np.uint32), u32(4, 5, 1, 0))
    assert drained(queue) == {(1, 0): (None, 3 * 8192), (1, 1): (None, 8192)}
    queue.find(2, keys(2, 3, 1))
    queue.find(2**64 - 1, b"")
    assert drained(queue) == {(2, 0): (None, b"\1\0\1"), (2**64 - 1, 0): (None, b"")}
    before = data.copy()
    queue.load(3, pool, keys(1, 2), u32(0, 1), u32(3, 1).tobytes(), u32(9, 7, 8, 11))
    queue.wait(60)
    assert drained(queue) == {(3, 0): (None, 3 * 8192), (3, 1): (None, 8192)}
    assert (data[[9, 7, 8, 11]] == before[[4, 5, 1, 0]]).all()
    untouched = [0, 1, 2, 3, 4, 5, 6, 10]
    assert (data[untouched] == before[untouched]).all()
    queue.store(4, pool, keys(1), u32(0), u32(3), u32(4, 5, 1))
    queue.store(5, pool, b"", u32(), u32(), u32())
    assert drained(queue) == {(4, 0): (None, 0)}
    assert queue.counters() == {
        "stored_chunks": 2,
        "stored_bytes": 4 * 8192,
        "present": 1,
        "loaded_chunks": 2,
        "loaded_bytes": 4 * 8192,
        "finds": 2,
    }
    assert queue.close()
    assert queue.close(0)


def test_what_is_not_there_is_refused_and_counted(tmp_path: Path, pool: HostPool) -> None:
    queue = TierQueue(disk(tmp_path), 1, 100, 100, 60.0)
    queue.load(1, pool, keys(1, 2), u32(0, 1), u32(1, 1), u32(0, 1))
    queue.find(2, keys(1))
    assert drained(queue) == {(1, 0): ("absent", ""), (1, 1): ("prefix_broken", ""), (2, 0): (None, b"\0")}
    full = TierQueue(disk(tmp_path), 1, 0, 0, 60.0)
    full.store(1, pool, keys(1), u32(0), u32(1), u32(0))
    full.load(2, pool, keys(1), u32(0), u32(1), u32(0))
    full.find(3, keys(1))
    refused = "queue_full"
    assert drained(full) == {(n, 0): (refused, "") for n in (1, 2, 3)}
    counters = {name: count for name, count in queue.counters().items() if count}
    assert counters == {"load_refused:absent": 1, "load_refused:prefix_broken": 1, "finds": 1}
    counters = {name: count for name, count in full.counters().items() if count}
    assert counters == {f"{what}_refused:queue_full": 1 for what in ("store", "load", "find")}


@pytest.mark.usefixtures("data")
def test_a_flipped_byte_is_refused(tmp_path: Path, pool: HostPool) -> None:
    queue = queue_of(disk(tmp_path))
    queue.store(1, pool, keys(1), u32(0), u32(2), u32(0, 1))
    drained(queue)
    (file,) = files(tmp_path)
    value = bytearray(file.read_bytes())
    value[-4000] ^= 1
    file.write_bytes(value)
    queue.load(2, pool, keys(1), u32(0), u32(2), u32(2, 3))
    assert drained(queue) == {(2, 0): ("corrupt", str(file))}
    assert queue.counters()["load_refused:corrupt"] == 1
    assert queue.counters()["loaded_chunks"] == 0


def test_another_namespace_or_secret_finds_nothing(tmp_path: Path, pool: HostPool) -> None:
    queue = queue_of(disk(tmp_path))
    queue.store(1, pool, keys(1), u32(0), u32(1), u32(0))
    drained(queue)
    for other in (disk(tmp_path, tier_namespace([])), disk(tmp_path, secret=b"s")):
        queue = queue_of(other)
        queue.load(1, pool, keys(1), u32(0), u32(1), u32(0))
        ((reason, _),) = drained(queue).values()
        assert reason is not None
    both = queue_of(Tier.disk(NAMESPACE, 1, 2, None, [(str(tmp_path), 1 << 30)]))
    both.find(1, keys(1))
    assert drained(both) == {(1, 0): (None, b"\0")}


def test_a_reset_forgets(tmp_path: Path, pool: HostPool) -> None:
    tier = disk(tmp_path)
    queue = queue_of(tier)
    queue.store(1, pool, keys(1), u32(0), u32(1), u32(0))
    drained(queue)
    assert len(files(tmp_path)) == 1
    tier.reset()
    queue.find(2, keys(1))
    queue.load(3, pool, keys(1), u32(0), u32(1), u32(0))
    ended = drained(queue)
    assert ended[2, 0] == (None, b"\0")
    assert ended[3, 0][0] == "absent"


def test_a_reset_that_fails_says_why(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_bytes(b"")
    with pytest.raises(errors.TierError, match=r"io_error.*file"):
        disk(in_the_way).reset()
    assert issubclass(_core.TierError, errors.LMCacheRsError)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"keys": keys(1, 2)[:-1]}, "63 bytes are no whole number of keys"),
        ({"keys": keys(1)}, "1 keys, 2 positions, 2 counts"),
        ({"positions": u32(0)}, "2 keys, 1 positions, 2 counts"),
        ({"counts": u32(2)}, "2 keys, 2 positions, 1 counts"),
        ({"rows": u32(0)}, "counts of 2 rows in all, and 1 rows"),
        ({"rows": u32(0, 1, 2)}, "counts of 2 rows in all, and 3 rows"),
        ({"counts": u32(2**32 - 1, 3)}, "counts of 4294967298 rows"),
        ({"counts": u32(2, 0)}, "at least one row"),
        ({"rows": u32(0, ROWS)}, f"row {ROWS}: the pool has {ROWS}"),
        ({"rows": b"12345"}, "5 bytes are no whole number"),
        ({"positions": [0, 1]}, "numpy.uint32.*list"),
        ({"job": -1}, "-1 is outside"),
        ({"job": 2**64}, "is outside"),
    ],
)
def test_wrong_chunks_are_refused_as_a_whole(
    tmp_path: Path, pool: HostPool, change: dict[str, Any], part: str
) -> None:
    queue = queue_of(disk(tmp_path))
    right = {"job": 1, "pool": pool, "keys": keys(1, 2), "positions": u32(0, 1)}
    arguments = right | {"counts": u32(1, 1), "rows": u32(0, 1)} | change
    for call in (queue.store, queue.load):
        with pytest.raises(_core.InvalidArgumentError, match=part):
            call(**arguments)
    assert drained(queue) == {}
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda tier: Tier.disk(NAMESPACE[1:], 0, 1, None, [("/x", 1)]), "namespace has 31 bytes"),
        (lambda tier: Tier.disk(NAMESPACE, 2, 2, None, [("/x", 1)]), "rank 2 of 2"),
        (lambda tier: Tier.disk(NAMESPACE, 0, 1, None, []), "at least one directory"),
        (lambda tier: Tier.disk(NAMESPACE, 0, 1, None, [("/x", -1)]), "-1 is outside"),
        (lambda tier: Tier.redis(NAMESPACE, 0, 1, None, "redis://h", "", None, -1.0), "timeout_s"),
        (lambda tier: TierQueue(tier, 0, 1, 1, 1.0), "threads"),
        (lambda tier: TierQueue(tier, 1, 1, 1, float("nan")), "seconds"),
        (lambda tier: queue_of(tier).find(1, b"short"), "5 bytes are no whole number of keys"),
    ],
)
def test_other_wrong_arguments_are_refused(tmp_path: Path, make: Callable[[Tier], object], part: str) -> None:
    with pytest.raises(_core.InvalidArgumentError, match=part):
        make(disk(tmp_path))


def test_a_closed_queue_says_so(tmp_path: Path) -> None:
    queue = queue_of(disk(tmp_path))
    assert queue.close(60)
    for call in (lambda: queue.find(1, keys(1)), queue.poll, lambda: queue.drain(1), lambda: queue.wait(1)):
        with pytest.raises(_core.ClosedError):
            call()
    assert queue.counters()["finds"] == 0


def test_a_check_makes_the_directories_or_says_why_not(tmp_path: Path) -> None:
    disk(tmp_path / "new").check()
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.TierError, match=r"io_error \(.*file/lmcache_rs-1.*Not a directory"):
        disk(tmp_path / "file").check()


def redis(url: str) -> Tier:
    return Tier.redis(NAMESPACE, 0, 1, b"secret", url, "test:", None, 0.2)


def test_a_redis_that_is_not_there_costs_misses(pool: HostPool) -> None:
    with socket.socket() as nobody:
        # Bound, and not listening: connections are refused.
        nobody.bind(("127.0.0.1", 0))
        tier = redis(f"redis://me:{PASSWORD}@127.0.0.1:{nobody.getsockname()[1]}/1")
        queue = queue_of(tier)
        queue.find(1, keys(1, 2))
        queue.load(2, pool, keys(1), u32(0), u32(1), u32(0))
        queue.store(3, pool, keys(1), u32(0), u32(1), u32(0))
        ended = drained(queue)
        assert set(ended) == {(1, 0), (2, 0), (3, 0)}
        assert {reason for reason, _ in ended.values()} <= {"io_error", "late", "paused"}
        assert "127.0.0.1:" in ended[1, 0][1]
        with pytest.raises(errors.TierError, match=r"Connection refused|late|paused"):
            redis(f"redis://127.0.0.1:{nobody.getsockname()[1]}").check()
        with pytest.raises(errors.TierError) as raised:
            tier.reset()
    words = f"{raised.value!r} {raised.value} {tier!r} {queue!r} {queue.counters()}"
    assert not any(word in words for word in (*PASSWORD.split(), "secret"))


def test_a_redis_that_does_not_answer_is_given_up(pool: HostPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        queue = queue_of(redis(f"redis://127.0.0.1:{silent.getsockname()[1]}"))
        queue.find(1, keys(1, 2))
        queue.load(2, pool, keys(1), u32(0), u32(1), u32(0))
        assert all(reason is not None for reason, _ in drained(queue).values())


@pytest.mark.parametrize(
    "url",
    ["http://{}@host", "redis://:{}", "redis://me:{}@host:port", "redis://:{}?x@host", "{}", "unix://{}@"],
)
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(_core.InvalidArgumentError, match="URL of the Redis") as raised:
        redis(url.format(PASSWORD))
    assert not any(word in str(raised.value) for word in PASSWORD.split())


def test_queues_are_dropped_and_used_by_many_threads(tmp_path: Path, pool: HostPool) -> None:
    tier = disk(tmp_path)
    failures: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for turn in range(5):
                queue = queue_of(tier)
                queue.store(turn, pool, keys(name), u32(0), u32(1), u32(name))
                queue.find(turn + 100, keys(name))
                cycle: list[object] = [queue]
                cycle.append(cycle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures
    gc.collect()
    queue = queue_of(tier)
    queue.find(1, keys(0, 1, 2, 3))
    assert drained(queue) == {(1, 0): (None, b"\1\1\1\1")}
