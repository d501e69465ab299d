"""The index as Python sees it: conversions, errors, threads. What it does is tested in Rust."""

import array
import gc
import hashlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lmcache_rs import _core
from lmcache_rs._core import Index, KeySpace, hash_tokens

SPACE = KeySpace("sha256", tags=[("user", "a")])
TAIL = b"the tail"


def prompt(name: object, blocks: int) -> list[bytes]:
    return [hashlib.sha256(f"{name} {block}".encode()).digest() for block in range(blocks)]


def rows_of(data: bytes) -> list[int]:
    return list(memoryview(data).cast("I"))


def store(index: Index, hashes: Sequence[bytes], tail: bytes | None = None) -> list[int]:
    reservation = index.reserve(SPACE, hashes, tail)
    assert reservation.commit() == len(reservation)
    return rows_of(reservation.rows)


def test_key_spaces_differ_in_every_field_and_not_in_the_order_of_tags() -> None:
    tags = [("a", "1"), ("b", "2")]
    spaces = [
        KeySpace("sha256"),
        KeySpace("sha256", 1),
        KeySpace("xxhash"),
        KeySpace("sha256", tags=tags),
        KeySpace("sha256", tags=(("a", "1"), ("b", "3"))),
    ]
    keys = {space.key(b"hash") for space in spaces}
    assert len(keys) == len(spaces)
    assert all(len(key) == 32 for key in keys)
    assert KeySpace("sha256", 0, tags[::-1]).key(b"hash") == spaces[3].key(b"hash")


@pytest.mark.parametrize(
    ("blocks", "tail", "first", "ends"),
    [
        (0, False, 0, []),
        (0, True, 0, ["tail"]),
        (3, False, 0, [2]),
        (3, True, 0, [2, "tail"]),
        (7, False, 0, [2, 5, 6]),
        (8, True, 0, [2, 5, "tail"]),
        (7, True, 1, [5, "tail"]),
        (7, False, 2, [6]),
        (7, True, 3, []),
        (600, False, 100, [3 * chunk + 2 for chunk in range(100, 200)]),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple])
def test_chunks_have_the_keys_of_their_ends(
    kind: Callable[[list[bytes]], Sequence[bytes]], blocks: int, tail: bool, first: int, ends: list[object]
) -> None:
    hashes = prompt("a", blocks)
    keys = b"".join(SPACE.key(TAIL if end == "tail" else hashes[end]) for end in ends)  # type: ignore[index]
    assert SPACE.chunk_keys(kind(hashes), TAIL if tail else None, 3, first) == keys
    if first == 0:
        assert SPACE.chunk_keys(kind(hashes), TAIL if tail else None, 3) == keys


def test_wrong_chunks_are_refused() -> None:
    for wrong in ({"chunk_blocks": 0}, {"first_chunk": -1}, {"chunk_blocks": 2**32}, {"hashes": ["text"]}):
        arguments: dict[str, object] = {"hashes": [b""], "tail": None, "chunk_blocks": 1} | wrong
        with pytest.raises(_core.InvalidArgumentError):
            SPACE.chunk_keys(**arguments)  # type: ignore[arg-type]
    assert SPACE.chunk_keys([b""], None, 2**32 - 1, 2**63) == b""


def test_tokens_hash_alike_from_any_buffer() -> None:
    tokens = [1, 2, 3, 4, 2**32 - 1]
    blocks, tail = hash_tokens(b"model", array.array("I", tokens), 2)
    assert (len(blocks), len(blocks[0]), len(tail or b"")) == (2, 32, 32)
    assert hash_tokens(b"model", np.array(tokens, np.uint32), 2) == (blocks, tail)
    assert hash_tokens(b"model", np.array(tokens, np.uint32).tobytes(), 2) == (blocks, tail)
    assert hash_tokens(b"model", array.array("I", tokens[:4]), 2) == (blocks, None)
    assert hash_tokens(b"", array.array("I"), 2) == ([], None)


@pytest.mark.parametrize(
    "tokens",
    [b"12345", np.zeros(3, np.int64), np.zeros((2, 2), np.uint32), np.zeros(6, np.uint32)[::2], [1, 2]],
)
def test_other_tokens_are_refused(tokens: object) -> None:
    with pytest.raises(_core.InvalidArgumentError, match="tokens"):
        hash_tokens(b"", tokens, 2)  # type: ignore[arg-type]


def test_arguments_are_checked() -> None:
    with pytest.raises(_core.InvalidArgumentError, match="block_size"):
        hash_tokens(b"", b"", 0)
    for rows in (0, 2**32):
        with pytest.raises(_core.InvalidArgumentError, match="rows"):
            Index(rows)
    index = Index(4)
    with pytest.raises(_core.InvalidArgumentError, match="list nor a tuple"):
        index.match(SPACE, iter([b""]))  # type: ignore[arg-type]
    for call in (index.match, index.reserve):
        with pytest.raises(_core.InvalidArgumentError, match=r"hashes\[0\] is not bytes"):
            call(SPACE, ["text", b""])  # type: ignore[list-item]
    many = [*prompt("x", 99), 1]
    with pytest.raises(_core.InvalidArgumentError, match=r"hashes\[99\] is not bytes"):
        Index(200).reserve(SPACE, many)  # type: ignore[arg-type]
    assert issubclass(_core.InvalidArgumentError, _core.LMCacheRsError)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("blocks", [3, 300])
def test_what_was_stored_is_found(kind: Callable[[list[bytes]], Sequence[bytes]], blocks: int) -> None:
    index = Index(400)
    hashes = kind(prompt("a", blocks))
    reservation = index.reserve(SPACE, hashes)
    assert (reservation.first, len(reservation)) == (0, blocks)
    assert (reservation.tail, reservation.dropped) == (False, 0)
    found = index.match(SPACE, hashes)
    assert (found.blocks, found.pending, found.lease()) == (0, True, None)
    epoch = index.epoch
    assert (reservation.commit(), reservation.commit(), reservation.abort()) == (blocks, 0, 0)
    assert index.epoch != epoch
    found = index.match(SPACE, hashes)
    assert (found.blocks, found.tail, found.pending) == (blocks, False, False)
    assert index.match(KeySpace("other"), hashes).blocks == 0
    lease = found.lease()
    assert lease is not None
    assert (len(lease), lease.rows(), lease.rows(blocks)) == (blocks, reservation.rows, b"")
    assert rows_of(lease.rows(blocks - 1)) == [blocks - 1]
    lease.release()
    lease.release()
    assert len(lease) == 0
    with pytest.raises(_core.ClosedError):
        lease.rows()
    with pytest.raises(_core.ClosedError):
        lease.discard(0)


def test_a_tail_follows_the_whole_chain_only() -> None:
    index = Index(8)
    hashes = prompt("a", 3)
    reservation = index.reserve(SPACE, hashes, TAIL)
    assert (len(reservation), reservation.tail) == (4, True)
    reservation.commit()
    found = index.match(SPACE, hashes, TAIL)
    assert (found.blocks, found.tail) == (3, True)
    lease = found.lease()
    assert lease is not None
    assert (len(lease), rows_of(lease.rows(3))) == (4, [3])
    found = index.match(SPACE, hashes, b"another")
    assert (found.blocks, found.tail, found.pending) == (3, False, False)
    assert not index.match(SPACE, [*hashes, b"more"], TAIL).tail
    full = index.reserve(SPACE, prompt("b", 4), TAIL + b"2")
    assert (len(full), full.tail, full.dropped) == (4, False, 1)
    full.abort()
    again = index.reserve(SPACE, hashes, TAIL)
    assert (again.first, len(again), again.tail, again.dropped) == (4, 0, False, 0)


def test_a_tail_may_be_all_there_is() -> None:
    index = Index(8)
    pending = index.reserve(SPACE, [], TAIL)
    assert (len(pending), pending.tail, pending.first) == (1, True, 0)
    assert index.match(SPACE, (), TAIL).pending
    pending.commit()
    found = index.match(SPACE, (), TAIL)
    assert (found.blocks, found.tail) == (0, True)


def test_dropped_objects_let_go() -> None:
    index = Index(8)
    index.reserve(SPACE, prompt("a", 8))
    assert index.stats()["free"] == 8
    store(index, prompt("a", 8))
    lease = index.match(SPACE, prompt("a", 8)).lease()
    assert index.stats()["leases"] == 1
    assert len(index.reserve(SPACE, prompt("b", 8))) == 0
    del lease
    assert index.stats()["leases"] == 0
    assert len(index.reserve(SPACE, prompt("b", 8))) == 8


def test_bad_content_is_removed() -> None:
    index = Index(8)
    hashes = prompt("a", 6)
    reservation = index.reserve(SPACE, hashes)
    reservation.commit()
    lease = index.match(SPACE, hashes[:5]).lease()
    assert lease is not None
    assert (lease.discard(4), lease.discard(4), lease.discard(99)) == (2, 0, 0)
    assert index.match(SPACE, hashes).blocks == 4
    assert len(lease) == 5
    assert (reservation.discard(), reservation.discard()) == (4, 0)
    assert index.match(SPACE, hashes).blocks == 0
    lease.release()
    assert index.stats()["free"] == 8


def test_clear_and_shrink() -> None:
    index = Index(8)
    store(index, prompt("a", 6))
    assert (index.shrink(9), index.shrink(4), index.shrink(6)) == (0, 2, 0)
    assert index.match(SPACE, prompt("a", 6)).blocks == 4
    assert (index.clear(), index.clear()) == (4, 0)
    stats = index.stats()
    assert (stats["rows"], stats["free"]) == (4, 4)


def test_stats_name_everything() -> None:
    index = Index(4)
    store(index, prompt("a", 3))
    index.match(SPACE, prompt("a", 3))
    index.match(SPACE, prompt("b", 3))
    store(index, prompt("c", 5))
    index.reserve(SPACE, prompt("a", 1)).abort()
    index.clear()
    assert index.stats() == {
        "rows": 4,
        "free": 4,
        "visible": 0,
        "reserved": 0,
        "leaving": 0,
        "leases": 0,
        "lookups": 2,
        "hits": 1,
        "committed": 7,
        "aborted": 1,
        "evictions": 4,
        "unsaved_evictions": 4,
        "removed": 3,
        "dropped": 1,
        "mismatches": 0,
    }


def departing(departure: _core.Departure | None) -> tuple[bytes, list[int], list[int], list[int]]:
    assert departure is not None
    assert len(departure) == len(departure.keys) // 32
    return (departure.keys, *map(rows_of, (departure.positions, departure.counts, departure.rows)))


@pytest.mark.parametrize("blocks", [6, 300])
def test_unsaved_chunks_are_taken_once(blocks: int) -> None:
    index = Index(2 * blocks)
    hashes = prompt("a", blocks)
    rows = store(index, hashes)
    # The visible prefix ends within a chunk, which is not the chain's end.
    assert index.take_unsaved(SPACE, [*hashes[:2], b"another"], None, 3) is None
    taken = index.take_unsaved(SPACE, hashes[:5], None, 3)
    assert departing(taken) == (SPACE.chunk_keys(hashes[:5], None, 3), [0, 1], [3, 2], rows[:5])
    assert index.take_unsaved(SPACE, hashes[:5], None, 3) is None
    rows += store(index, hashes, TAIL)
    rest = index.take_unsaved(SPACE, tuple(hashes), TAIL, 3)
    chunks = blocks // 3
    assert departing(rest) == (
        SPACE.chunk_keys(hashes, TAIL, 3, 1),
        list(range(1, chunks + 1)),
        [3] * (chunks - 1) + [1],
        rows[3:],
    )
    assert index.stats()["leases"] == 2


def test_chunks_that_no_tier_has_taken_are_taken_again() -> None:
    index = Index(6)
    hashes = prompt("a", 5)
    store(index, hashes)
    taken = index.take_unsaved(SPACE, hashes, None, 2)
    assert taken is not None
    assert len(taken) == 3
    taken.release(saved=False)
    again = index.take_unsaved(SPACE, hashes, None, 2)
    assert departing(again) == departing(taken)
    again.release()
    again.release(saved=False)  # too late: it was given back as saved
    assert index.take_unsaved(SPACE, hashes, None, 2) is None


def test_a_departure_keeps_its_rows_until_it_is_released() -> None:
    index = Index(4)
    store(index, prompt("a", 4))
    taken = index.take_unsaved(SPACE, prompt("a", 4), None, 2)
    assert len(index.reserve(SPACE, prompt("b", 4))) == 0
    assert taken is not None
    taken.release()
    taken.release()
    assert index.stats()["leases"] == 0
    assert len(index.reserve(SPACE, prompt("b", 4))) == 4
    store(index, prompt("c", 4))
    again = index.take_unsaved(SPACE, prompt("c", 4), None, 4)
    assert index.stats()["leases"] == 1
    del again
    assert index.stats()["leases"] == 0
    assert index.stats()["unsaved_evictions"] == 0


def test_the_coldest_chunks_are_taken_first_and_stay_the_coldest() -> None:
    index = Index(12)
    old, new = prompt("old", 5), prompt("new", 4)
    rows = store(index, old)
    store(index, new)
    loaded = index.reserve(SPACE, prompt("loaded", 2))
    assert loaded.commit(saved=True) == 2
    assert index.take_coldest(2, 10, 0) == []
    (first,) = index.take_coldest(2, 1, 2)
    assert departing(first) == (SPACE.chunk_keys(old, None, 2, 1), [1, 2], [2, 1], rows[2:])
    # Those of the old prefix are on their way, those of the last came from where these go.
    (second,) = index.take_coldest(2, 10, 10)
    assert departing(second)[0] == SPACE.chunk_keys(new, None, 2)
    first.release()
    second.release()
    # One row is free.
    assert len(index.reserve(SPACE, prompt("more", 6))) == 6
    assert index.match(SPACE, old).blocks == 0
    assert index.match(SPACE, new).blocks == 4
    stats = index.stats()
    assert (stats["evictions"], stats["unsaved_evictions"]) == (5, 2)


def test_rows_are_marked_for_one_life_only() -> None:
    index = Index(2)
    reservation = index.reserve(SPACE, prompt("a", 2))
    reservation.commit(True)
    assert index.take_unsaved(SPACE, prompt("a", 2), None, 1) is None
    index.clear()
    store(index, prompt("a", 2))
    taken = index.take_unsaved(SPACE, prompt("a", 2), None, 1)
    assert departing(taken)[1] == [0, 1]


def test_wrong_ways_to_take_chunks() -> None:
    index = Index(2)
    with pytest.raises(_core.InvalidArgumentError, match="chunk_blocks is 0"):
        index.take_unsaved(SPACE, [], None, 0)
    for arguments in ((0, 1, 1), (1, -1, 1), (1, 1, -1)):
        with pytest.raises(_core.InvalidArgumentError):
            index.take_coldest(*arguments)
    store(index, prompt("a", 2))
    assert index.take_unsaved(SPACE, prompt("a", 2)[1:], None, 1) is None
    assert index.stats()["mismatches"] == 1


def test_a_contradicting_chain_finds_nothing() -> None:
    index = Index(8)
    hashes = prompt("a", 4)
    store(index, hashes)
    assert index.match(SPACE, hashes[1:]).blocks == 0
    assert len(index.reserve(SPACE, hashes[1:])) == 0
    assert index.stats()["mismatches"] == 2
    assert index.match(SPACE, hashes).blocks == 4


def test_threads_with_and_without_the_gil_get_along() -> None:
    """Detached reservations, attached matches and the garbage collector dropping leases, all on one lock."""
    index = Index(512)
    failures: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for turn in range(150):
                hashes = prompt((name + turn) % 6, 40 if turn % 2 else 400)
                reservation = index.reserve(SPACE, hashes)
                if turn % 5:
                    reservation.commit()
                found = index.match(SPACE, hashes)
                lease = found.lease()
                if lease is not None:
                    assert len(lease.rows()) == 4 * found.blocks
                    cycle: list[object] = [lease]
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
    stats = index.stats()
    assert (stats["leases"], stats["leaving"], stats["reserved"]) == (0, 0, 0)
    assert stats["free"] + stats["visible"] == 512
