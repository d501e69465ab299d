"""What a row is for this model: its bytes, its tokens, its layers; or why the model is not served."""

from dataclasses import dataclass
from typing import Any

from lmcache_rs._core import pool_rows
from lmcache_rs.connector.groups import Groups

SERVED_SPECS = ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec")
"""KV cache specs whose block depends on the prefix alone and is never changed in place by vLLM."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one model's KV on one rank."""

    block_size: int
    """Tokens in a block, so in a row."""
    row_bytes: int
    """Bytes of one block in all layers of a cache group; groups that have fewer layers use less of it."""
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
    micro_batches: bool = False
    """Steps may compute each layer several times, for a part of their tokens each."""
    windows: tuple[int, ...] = (0,)
    """Of each cache group: the tokens that its attention sees; 0: all."""

    @property
    def groups(self) -> Groups:
        """The cache groups, each of which has a row in a slot."""
        return Groups(self.block_size, self.windows)

    def chunk_blocks(self, chunk_size: int) -> int:
        """Blocks in a chunk of `chunk_size` tokens: the unit of disk and Redis."""
        return max(1, chunk_size // self.block_size)

    @property
    def slots(self) -> int:
        """Blocks of tokens that the host pool has room for."""
        return self.rows // len(self.windows)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one block of tokens on one rank."""
        return self.row_bytes * len(self.windows)


@dataclass(frozen=True, slots=True)
class Declined:
    """Why this engine runs without the cache; `reason` is the metric's label."""

    reason: str
    message: str


def inspect(
    vllm_config: Any, kv_cache_config: Any, device_type: str, pool_bytes: int, *, fails_requests: bool
) -> Geometry | Declined:
    """Read the geometry from vLLM's configuration, or say what is not supported.

    `pool_bytes`: 0 is no RAM tier. `fails_requests`: this vLLM can be told which request's load failed, not only which
    blocks.
    """
    parallel = vllm_config.parallel_config
    declined = _decline_machine(parallel, device_type, pool_bytes) or _decline_model(
        kv_cache_config, device_type, fails_requests
    )
    if declined is not None:
        return declined
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec
    row_bytes = spec.page_size_bytes * max(len(group.layer_names) for group in groups)
    rows = pool_rows(pool_bytes, row_bytes)
    if rows < len(groups):
        message = f"max_local_cpu_size is {pool_bytes} bytes, one block of KV needs {row_bytes * len(groups)}: raise it"
        return Declined("pool_too_small", message)
    return Geometry(
        block_size=spec.block_size,
        row_bytes=row_bytes,
        rows=rows,
        layer_names=tuple(name for group in groups for name in group.layer_names),
        gpu_blocks=kv_cache_config.num_blocks,
        ranks=parallel.world_size,
        device=device_type,
        ranks_on_host=parallel.world_size * getattr(parallel, "data_parallel_size_local", 1),
        drafts=getattr(vllm_config, "speculative_config", None) is not None,
        micro_batches=bool(getattr(parallel, "use_ubatching", False)),
        windows=tuple(map(_window, groups)),
    )


def _decline_machine(parallel: Any, device_type: str, pool_bytes: int) -> Declined | None:
    """Why no model is served here, if so."""
    if not pool_bytes:
        return Declined("local_cpu", "local_cpu is off, and there is neither disk nor Redis")
    if device_type not in ("cpu", "cuda"):
        return Declined("device", f"KV on {device_type!r} is not supported yet")
    contexts = (
        getattr(parallel, "decode_context_parallel_size", 1),
        getattr(parallel, "prefill_context_parallel_size", 1),
    )
    if max(contexts) > 1:
        return Declined("context_parallel", "context parallelism is not supported")
    if (
        parallel.world_size > 1
        and getattr(parallel, "distributed_executor_backend", "") == "external_launcher"
    ):
        # Each rank has a scheduler of its own, which hears of its own worker only: they would come to disagree.
        return Declined(
            "external_launcher", "several ranks under external_launcher (torchrun) are not supported"
        )
    return None


def _decline_model(kv_cache_config: Any, device_type: str, fails_requests: bool) -> Declined | None:
    """Why this model's KV is not served, if so."""
    groups = kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    for spec in specs:
        if type(spec).__name__ not in SERVED_SPECS:
            return Declined("cache_spec", f"KV of kind {type(spec).__name__} is not supported yet")
    if not specs or any(
        (spec.block_size, spec.page_size_bytes) != (specs[0].block_size, specs[0].page_size_bytes)
        for spec in specs
    ):
        sizes = ", ".join(f"{spec.block_size} tokens in {spec.page_size_bytes} bytes" for spec in specs)
        return Declined(
            "cache_groups", f"KV cache groups of these blocks are not supported: {sizes or 'none'}"
        )
    if any(getattr(spec, "prefix_replay_tokens", 0) for spec in specs):
        return Declined("cache_spec", "KV that vLLM computes again after a hit is not supported")
    hash_block_size = getattr(kv_cache_config, "hash_block_size", None)
    if hash_block_size not in (None, specs[0].block_size):
        message = f"block hashes of {hash_block_size} tokens for blocks of {specs[0].block_size}"
        return Declined("hash_block_size", message)
    windows = tuple(map(_window, groups))
    if not Groups(specs[0].block_size, windows).plain:
        kind = f"{len(groups)} KV cache group(s), windows of {list(windows)} tokens,"
        remedy = "; with --disable-hybrid-kv-cache-manager vLLM makes one group of them, and that is served"
        if 0 not in windows or not any(windows):
            remedy = ""  # It makes one group of windows only where some layers see all tokens.
        if not fails_requests:
            # Blocks that leave the window cannot be computed again from the middle of the prompt, as vLLM would.
            return Declined("cache_groups", f"{kind} are supported from vLLM 0.30 on{remedy}")
        if device_type != "cpu":
            return Declined("cache_groups", f"{kind} are not supported on GPUs yet{remedy}")
    return None


def _window(group: Any) -> int:
    spec = group.kv_cache_spec
    return int(spec.sliding_window) if type(spec).__name__ == "SlidingWindowSpec" else 0
