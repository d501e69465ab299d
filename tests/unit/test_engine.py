"""The engine API without vLLM: what is stored comes back, byte for byte, and nothing else does."""

import random
from typing import Any

import numpy as np
import pytest

from lmcache_rs import LMCacheEngine
from lmcache_rs.builder import LMCacheEngineBuilder
from lmcache_rs.config import load_config
from lmcache_rs.errors import ClosedError, InvalidArgumentError

BLOCK = 4


def caches(layers: int = 3, blocks: int = 32) -> list[np.ndarray[Any, Any]]:
    return [np.zeros((blocks, BLOCK, 2), np.float32) for _ in range(layers)]


def engine(kv: Any, size: str = "1MiB", **settings: Any) -> LMCacheEngine:
    extra = {f"lmcache.{k}": v for k, v in settings.items()} | {"lmcache.max_local_cpu_size": size}
    return LMCacheEngine(kv, BLOCK, load_config(extra, environ={}))


def tokens(seed: int, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(50_000) for _ in range(count)]


def fill(kv: Any, blocks: list[int], seed: int) -> list[Any]:
    generator = np.random.default_rng(seed)
    for layer in kv:
        layer[blocks] = generator.random(layer[blocks].shape, np.float32)
    return [layer[blocks].copy() for layer in kv]


@pytest.mark.parametrize("count", [1, 4, 5, 16, 31])
def test_round_trip(count: int) -> None:
    kv = caches()
    needed = -(-count // BLOCK)
    source, target = list(range(3, 3 + needed)), list(range(20, 20 + needed))[::-1]
    with engine(kv) as cache:
        want = fill(kv, source, 1)
        assert cache.lookup(tokens(1, count)) == 0
        assert cache.store(tokens(1, count), source) == count
        assert cache.store(tokens(1, count), source) == 0, "what is there is not stored again"
        fill(kv, source, 2)
        assert cache.retrieve(tokens(1, count), target) == count
        for layer, expected in zip(kv, want, strict=True):
            assert (layer[target] == expected).all()


def test_the_longest_prefix_ends_at_a_block() -> None:
    kv = caches()
    with engine(kv) as cache:
        fill(kv, [1, 2, 3], 1)
        cache.store(tokens(1, 10), [1, 2, 3])
        assert cache.lookup([*tokens(1, 10), 1]) == 8
        assert cache.lookup(tokens(1, 9)) == 8
        assert cache.lookup(tokens(1, 10)) == 10
        assert cache.lookup(tokens(1, 3)) == 0


def test_tails_salts_clear_and_freeze() -> None:
    kv = caches()
    with engine(kv, save_unfull_chunk=False) as cache:
        assert cache.store(tokens(1, 10), [1, 2, 3]) == 8
        assert cache.lookup(tokens(1, 10), salt=b"other") == 0
        cache.freeze()
        assert cache.is_frozen
        assert cache.store(tokens(2, 10), [4, 5, 6]) == 0
        assert cache.lookup(tokens(1, 10)) == 8
        assert cache.clear() == 2
        assert cache.lookup(tokens(1, 10)) == 0


def test_a_full_cache_evicts_the_end_of_what_was_used_least() -> None:
    kv = caches()
    with engine(kv, size="16KiB") as cache:  # four rows of 4 KiB
        cache.store(tokens(1, 12), [1, 2, 3])
        cache.store(tokens(2, 8), [4, 5])
        assert cache.lookup(tokens(1, 12)) == 8
        assert cache.lookup(tokens(2, 8)) == 8
        stats = cache.stats()
        assert (stats["rows"], stats["free"], stats["evictions"]) == (4, 0, 1)


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    kv = [torch.arange(32 * BLOCK * 2, dtype=torch.bfloat16).reshape(32, BLOCK, 2) for _ in range(2)]
    with engine(kv) as cache:
        want = [layer[[5, 6]].clone() for layer in kv]
        cache.store(tokens(1, 8), [5, 6])
        assert cache.retrieve(tokens(1, 8), [9, 8]) == 8
        assert all(torch.equal(layer[[9, 8]], expected) for layer, expected in zip(kv, want, strict=True))


def test_wrong_arguments_say_what_is_wrong() -> None:
    kv = caches()
    for size in (0, 1.5, None):
        with pytest.raises(InvalidArgumentError, match="block_size"):
            LMCacheEngine(kv, size)  # type: ignore[arg-type]
    with engine(kv) as cache:
        with pytest.raises(InvalidArgumentError, match="10 tokens need 3 blocks, got 2"):
            cache.store(tokens(1, 10), [1, 2])
        with pytest.raises(InvalidArgumentError):
            cache.store(tokens(1, 10), [1, 2, 99])
        for wrong in ([1.7], [-1], [2**32], ["1"]):
            with pytest.raises(
                InvalidArgumentError, match="tokens must be whole numbers from 0 to 4294967295"
            ):
                cache.lookup(wrong)  # type: ignore[arg-type]
        assert cache.lookup([]) == 0
        assert cache.lookup(tokens(1, 10)) == 0, "a store that failed stored nothing"
        assert cache.stats()["free"] == cache.stats()["rows"]
    calls = [
        lambda: cache.store(tokens(1, 10), [1, 2, 3]),
        lambda: cache.lookup(tokens(1, 10)),
        lambda: cache.retrieve(tokens(1, 10), [1, 2, 3]),
        cache.clear,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    cache.close()


def test_the_builder_makes_finds_and_ends_engines() -> None:
    config = load_config({"lmcache.max_local_cpu_size": "1MiB"}, environ={})
    made = LMCacheEngineBuilder.get_or_create("mine", config, caches(), BLOCK)
    try:
        assert LMCacheEngineBuilder.get_or_create("mine", config) is made
        assert LMCacheEngineBuilder.get("mine") is made
    finally:
        LMCacheEngineBuilder.destroy("mine")
    LMCacheEngineBuilder.destroy("mine")
    assert LMCacheEngineBuilder.get("mine") is None
