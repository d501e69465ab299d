"""Opens the slower tiers that the configuration names: for the scheduler side to search, for a worker to move bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

from lmcache_rs._core import Tier, TierQueue
from lmcache_rs.config import Config
from lmcache_rs.config import values as v
from lmcache_rs.config.remote import shown
from lmcache_rs.config.tiers import TierUse

FIND_S_MAX = 0.25
"""A search that a tier has not answered by then found nothing there."""

FIND_THREADS = 2

CHUNKS_WAITING_MAX = 4096
"""Chunks that wait in a queue to be loaded, and as many to be stored; more are refused."""

CLOSE_S_MAX = 5.0
"""Writes that were begun are waited for so long when the engine ends."""


@dataclass(frozen=True, slots=True)
class OpenTier:
    """A tier at work."""

    tier: Tier
    queue: TierQueue
    may_load: bool = True
    may_store: bool = True


def open_tiers(
    config: Config, rank: int, ranks: int, namespace: bytes, *, searching: bool = False
) -> Mapping[str, OpenTier]:
    """The tiers by name, the quickest first. `searching`: only to be searched, by the scheduler side."""
    secret = config.tier_secret.encode() if config.tier_secret else None
    timeout = min(FIND_S_MAX, config.blocking_timeout_secs) if searching else config.blocking_timeout_secs
    threads = FIND_THREADS if searching else config.tier_threads

    def opened(tier: Tier, use: TierUse) -> OpenTier:
        queue = TierQueue(tier, threads, CHUNKS_WAITING_MAX, CHUNKS_WAITING_MAX, timeout)
        return OpenTier(tier, queue, use.loads, use.stores)

    tiers: dict[str, OpenTier] = {}
    if config.disk is not None:
        share = config.max_local_disk_bytes // len(config.local_disk)
        directories = [(path, share) for path in config.local_disk]
        disk = Tier.disk(namespace, rank, ranks, secret, directories, config.local_disk_direct)
        tiers["disk"] = opened(disk, config.disk)
    if config.redis is not None and config.remote_url is not None:
        prefix, ttl = config.redis_key_prefix, config.redis_ttl_secs
        redis = Tier.redis(namespace, rank, ranks, secret, config.remote_url, prefix, ttl, timeout)
        tiers["redis"] = opened(redis, config.redis)
    return tiers


def describe(config: Config, tiers: Mapping[str, OpenTier]) -> str:
    """Name each tier, where it is and what it is not used for, without secrets."""
    parts = []
    for name, tier in tiers.items():
        limits = (
            "" if tier.may_store and tier.may_load else " (only read)" if tier.may_load else " (only written)"
        )
        size = f" ({v.size_words(config.max_local_disk_bytes)})" if name == "disk" else ""
        parts.append(f"{place(config, name)}{size}{limits}")
    return "; ".join(parts)


def place(config: Config, name: str) -> str:
    """Name a tier and where it is, without secrets."""
    return f"{name} at {', '.join(config.local_disk) if name == 'disk' else shown(config.remote_url or '')}"
