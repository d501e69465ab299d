"""What a row is for this model: its bytes, its tokens, its layers; or why the model is not served."""

from dataclasses import dataclass
from typing import Any

from lmcache_rs._core import pool_rows

SERVED_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")
"""KV cache specs whose block depends on the prefix alone and is never dropped or changed in place by vLLM."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one model's KV on one rank."""

    block_size: int
    """Tokens in a block, so in a row."""
    row_bytes: int
    """Bytes of one block in all layers."""
    rows: int
    """Rows that the host pool has by configuration; a rank may get fewer."""
    layer_names: tuple[str, ...]
    gpu_blocks: int
    """Blocks in vLLM's pool."""
    ranks: int
    """Workers of this engine: each holds its own part of a row."""
    device: str
    """What vLLM's KV lies on: "cpu" or "cuda"."""
    ranks_on_host: int
    """Workers that share this machine's memory, those of other data-parallel engines included."""
    drafts: bool = False
    """Steps may write KV after their forward: a speculative model drafts tokens."""


@dataclass(frozen=True, slots=True)
class Declined:
    """Why this engine runs without the cache; `reason` is the metric's label."""

    reason: str
    message: str


def inspect(vllm_config: Any, kv_cache_config: Any, device_type: str, pool_bytes: int) -> Geometry | Declined:
    """Read the geometry from vLLM's configuration, or say what is not supported. `pool_bytes`: 0 is no RAM tier."""
    parallel = vllm_config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    if not pool_bytes:
        return Declined("local_cpu", "local_cpu is off, and no other tier is supported yet")
    if device_type not in ("cpu", "cuda"):
        return Declined("device", f"KV on {device_type!r} is not supported yet")
    contexts = (
        getattr(parallel, "decode_context_parallel_size", 1),
        getattr(parallel, "prefill_context_parallel_size", 1),
    )
    if max(contexts) > 1:
        return Declined("context_parallel", "context parallelism is not supported")
    if len(groups) != 1:
        return Declined(
            "cache_groups", f"{len(groups)} KV cache groups (a hybrid model) are not supported yet"
        )
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ not in SERVED_SPECS:
        return Declined("cache_spec", f"KV of kind {type(spec).__name__} is not supported yet")
    hash_block_size = getattr(kv_cache_config, "hash_block_size", None)
    if hash_block_size not in (None, spec.block_size):
        return Declined(
            "hash_block_size", f"block hashes of {hash_block_size} tokens for blocks of {spec.block_size}"
        )
    names = tuple(groups[0].layer_names)
    row_bytes = spec.page_size_bytes * len(names)
    rows = pool_rows(pool_bytes, row_bytes)
    if rows == 0:
        message = f"max_local_cpu_size is {pool_bytes} bytes, one block of KV needs {row_bytes}: raise it"
        return Declined("pool_too_small", message)
    return Geometry(
        block_size=spec.block_size,
        row_bytes=row_bytes,
        rows=rows,
        layer_names=names,
        gpu_blocks=kv_cache_config.num_blocks,
        ranks=parallel.world_size,
        device=device_type,
        ranks_on_host=parallel.world_size * getattr(parallel, "data_parallel_size_local", 1),
        drafts=getattr(vllm_config, "speculative_config", None) is not None,
    )
