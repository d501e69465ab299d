"""Which models are served, and what is said of those that are not."""

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rs.connector.geometry import Declined, Geometry, inspect


class FullAttentionSpec:
    block_size, page_size_bytes = 16, 4096


class SlidingWindowSpec(FullAttentionSpec):
    pass


def look(
    specs: tuple[Any, ...] = (FullAttentionSpec(),),
    device: str = "cpu",
    pool: int = 1 << 20,
    hashes: Any = None,
    speculative: Any = None,
    **sizes: int,
) -> Geometry | Declined:
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["a", "b"]) for spec in specs]
    cache = SimpleNamespace(kv_cache_groups=groups, num_blocks=10, hash_block_size=hashes)
    parallel = SimpleNamespace(world_size=2, **sizes)
    config = SimpleNamespace(parallel_config=parallel, speculative_config=speculative)
    return inspect(config, cache, device, pool)


def test_what_is_served() -> None:
    assert look() == Geometry(16, 8192, 128, ("a", "b"), 10, 2, "cpu", 2, drafts=False)
    assert look(device="cuda", speculative=object()) == Geometry(
        16, 8192, 128, ("a", "b"), 10, 2, "cuda", 2, drafts=True
    )


def test_engines_of_one_host_share_its_memory() -> None:
    geometry = look(data_parallel_size_local=3)
    assert isinstance(geometry, Geometry)
    assert (geometry.ranks, geometry.ranks_on_host) == (2, 6)


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"pool": 0}, "local_cpu", "local_cpu is off"),
        ({"pool": 8191}, "pool_too_small", "one block of KV needs 8192"),
        ({"device": "rocm"}, "device", "'rocm' is not supported"),
        ({"decode_context_parallel_size": 2}, "context_parallel", "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context_parallel", "context parallelism"),
        ({"specs": (FullAttentionSpec(), SlidingWindowSpec())}, "cache_groups", "2 KV cache groups"),
        ({"specs": ()}, "cache_groups", "0 KV cache groups"),
        ({"specs": (SlidingWindowSpec(),)}, "cache_spec", "SlidingWindowSpec is not supported"),
        ({"hashes": 8}, "hash_block_size", "block hashes of 8 tokens"),
    ],
)
def test_what_is_declined(options: dict[str, Any], reason: str, words: str) -> None:
    declined = look(**options)
    assert isinstance(declined, Declined)
    assert declined.reason == reason
    assert words in declined.message
