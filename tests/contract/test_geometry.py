"""Which models are served, and what is said of those that are not."""

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rs.connector.geometry import Declined, Geometry, inspect


class FullAttentionSpec:
    block_size, page_size_bytes = 16, 4096


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 100


class WideSpec(FullAttentionSpec):
    page_size_bytes = 8192


WideSpec.__name__ = "FullAttentionSpec"


class ReplayedSpec(SlidingWindowSpec):
    prefix_replay_tokens = 100


ReplayedSpec.__name__ = "SlidingWindowSpec"


class MambaSpec(FullAttentionSpec):
    pass


BOTH = (FullAttentionSpec(), SlidingWindowSpec())


def look(
    specs: tuple[Any, ...] = (FullAttentionSpec(),),
    device: str = "cpu",
    pool: int = 1 << 20,
    hashes: Any = None,
    speculative: Any = None,
    fails_requests: bool = True,
    **parallel: Any,
) -> Geometry | Declined:
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["a", "b"]) for spec in specs]
    cache = SimpleNamespace(kv_cache_groups=groups, num_blocks=10, hash_block_size=hashes)
    sizes = SimpleNamespace(world_size=2, **parallel)
    config = SimpleNamespace(parallel_config=sizes, speculative_config=speculative)
    return inspect(config, cache, device, pool, fails_requests=fails_requests)


def test_what_is_served() -> None:
    assert look() == Geometry(16, 8192, 128, ("a", "b"), 10, 2, "cpu", 2, drafts=False)
    assert look(device="cuda", speculative=object()) == Geometry(
        16, 8192, 128, ("a", "b"), 10, 2, "cuda", 2, drafts=True
    )


def test_several_cache_groups_share_a_slot() -> None:
    geometry = look((FullAttentionSpec(), SlidingWindowSpec(), SlidingWindowSpec()))
    assert isinstance(geometry, Geometry)
    assert geometry.windows == (0, 100, 100)
    assert (geometry.row_bytes, geometry.rows) == (8192, 128)
    assert (geometry.slot_bytes, geometry.slots) == (3 * 8192, 42)
    assert geometry.layer_names == ("a", "b") * 3


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
        ({"distributed_executor_backend": "external_launcher"}, "external_launcher", "torchrun"),
        ({"specs": ()}, "cache_groups", "none"),
        ({"specs": (FullAttentionSpec(), WideSpec())}, "cache_groups", "16 tokens in 8192 bytes"),
        ({"specs": (FullAttentionSpec(), MambaSpec())}, "cache_spec", "MambaSpec is not supported"),
        ({"specs": (ReplayedSpec(),)}, "cache_spec", "computes again"),
        ({"specs": (SlidingWindowSpec(),), "fails_requests": False}, "cache_groups", "from vLLM 0.30 on"),
        ({"specs": (FullAttentionSpec(),) * 2, "fails_requests": False}, "cache_groups", "from vLLM 0.30 on"),
        ({"specs": (SlidingWindowSpec(),), "device": "cuda", "cuda": True}, "cache_groups", "on GPUs yet"),
        ({"specs": BOTH, "fails_requests": False}, "cache_groups", "--disable-hybrid-kv-cache-manager"),
        ({"specs": BOTH, "device": "cuda"}, "cache_groups", "--disable-hybrid-kv-cache-manager"),
        ({"specs": (FullAttentionSpec(),) * 3, "pool": 16384}, "pool_too_small", "needs 24576"),
        ({"hashes": 8}, "hash_block_size", "block hashes of 8 tokens"),
    ],
)
def test_what_is_declined(options: dict[str, Any], reason: str, words: str) -> None:
    declined = look(**options)
    assert isinstance(declined, Declined)
    assert declined.reason == reason
    assert words in declined.message


def test_windows_alone_are_not_made_one_group() -> None:
    declined = look((SlidingWindowSpec(),), device="cuda")
    assert isinstance(declined, Declined)
    assert "--disable-hybrid" not in declined.message
