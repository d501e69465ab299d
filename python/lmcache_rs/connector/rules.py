"""What the configuration and vLLM's role for this engine say about loads and stores."""

from dataclasses import dataclass

from lmcache_rs.config import Config
from lmcache_rs.connector.geometry import Geometry

SYNC_LOAD_BYTES = {"cpu": 256 << 20, "cuda": 32 << 20}
"""Loads up to this size hold the step by default.

On the CPU about 10 ms at memory speed, where an asynchronous load costs its request 10 ms or more of extra steps, and a
decode step takes longer than that. On a GPU about half a millisecond of the bus.
"""

LAYERED_LOAD_BYTES_MIN = {"cpu": None, "cuda": 64 << 20}
"""Loads from this size on come layer by layer, and most of the forward that reads them runs beside them.

That saves 5 of the 43 ms of a load of 1.4 GB, 0.5 of 13 for one of 147 MB, on an H100: the forward takes 7. Smaller
ones have nothing to hide it behind.
"""


@dataclass(frozen=True, slots=True)
class Roles:
    """What `kv_role` allows: a consumer never stores, a producer never loads."""

    may_store: bool
    may_load: bool


@dataclass(frozen=True, slots=True)
class LookupRules:
    """What the configuration says about hits."""

    tails: bool
    asynchronous: bool
    asynchronous_only: bool
    """Whether no load may hold the step, because vLLM could not take back a failed one."""
    sync_bytes_max: int
    """Loads up to this many bytes hold the step, and all loads of a request that is alone; 0: none ever does."""
    layered_bytes_min: int | None
    """Loads come by layers from this size on; None: never."""
    min_tokens: int
    max_tokens: int
    """The most tokens loaded for a request at once; 0: no limit."""
    skip_last_tokens: int
    pending_s_max: float

    @property
    def may_hold_step(self) -> bool:
        """Whether any load may hold the step."""
        return not self.asynchronous_only and (self.sync_bytes_max > 0 or not self.asynchronous)


@dataclass(frozen=True, slots=True)
class TieringRules:
    """What the configuration says about slower tiers."""

    chunk_size: int
    write_through: bool
    wait_s_max: float
    """A request waits so long for what is fetched for it."""
    min_tokens: int


def lookup_rules(config: Config, geometry: Geometry) -> LookupRules:
    """The rules of this configuration for KV of this geometry."""
    device, sync_bytes = geometry.device, config.sync_load_max_bytes
    return LookupRules(
        tails=config.tails,
        asynchronous=config.enable_async_loading,
        asynchronous_only=not geometry.groups.plain,
        sync_bytes_max=SYNC_LOAD_BYTES[device] if sync_bytes is None else sync_bytes,
        # A drafter may read its layers after vLLM was told how the step's loads ended.
        layered_bytes_min=None if geometry.drafts else LAYERED_LOAD_BYTES_MIN[device],
        min_tokens=config.min_retrieve_tokens,
        max_tokens=config.max_tokens_per_load,
        skip_last_tokens=config.skip_last_n_tokens,
        pending_s_max=config.pending_timeout_ms / 1e3,
    )


def tiering_rules(config: Config) -> TieringRules:
    """The rules of this configuration."""
    return TieringRules(
        chunk_size=config.chunk_size,
        write_through=config.write_policy == "through",
        wait_s_max=config.blocking_timeout_secs,
        min_tokens=config.min_retrieve_tokens,
    )
