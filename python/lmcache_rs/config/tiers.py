"""The settings of the tiers beyond RAM: disk and Redis."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lmcache_rs.config import values as v
from lmcache_rs.config.keys import setting
from lmcache_rs.config.remote import REMOTE_URL

_RAM, _DISK, _REMOTE = "LocalCPUBackend", "LocalDiskBackend", "RemoteBackend"  # LMCache's names of the tiers
_LOCATION = v.choice(_RAM, _DISK, _REMOTE)
_WAIT_SECS_MAX = 86_400
_PREFIX_CHARACTERS_MAX = 200
TIER_THREADS_MAX = 64


class TierUse(NamedTuple):
    """What a configured tier is for."""

    loads: bool
    """KV is looked for there."""
    stores: bool
    """KV is written there, by requests that store at all."""


def _directories() -> v.Kind:
    """Make the kind for one directory or several, as absolute paths without repetitions.

    As LMCache: text with commas is several, each may have `file://` in front, and what follows that is the path.
    """

    def parse(value: Any) -> tuple[str, ...]:
        if value is False:
            return ()
        items = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
        paths = dict.fromkeys(map(_absolute, items))
        paths.pop("", None)
        return tuple(paths)

    return v.Kind("list: directory", parse)


def _absolute(item: Any) -> str:
    path = item.strip().removeprefix("file://") if isinstance(item, str) else None
    if path == "":
        return ""
    if (
        path is None
        or path.lower() in {"true", "false"}
        or "://" in path
        or "\0" in path
        or not v.is_text(path)
    ):
        raise ValueError("must be directories: '/mnt/a,/mnt/b', each also as file:///mnt/a; none is no disk")
    try:
        return os.path.abspath(os.path.expanduser(path))
    except OSError:  # the working directory is gone
        raise ValueError("must be absolute paths, as there is no working directory") from None


@dataclass(frozen=True, repr=False)
class TierSettings:
    """What the user asked for of disk and Redis."""

    local_disk: tuple[str, ...] = setting(
        (),
        v.optional(_directories(), ()),
        "Keep KV on disk too, in this directory or, each key in one of them, in these; paths that are not absolute "
        "begin in vLLM's working directory, `~` is the user's home. Needs `max_local_disk_size`.",
    )
    max_local_disk_bytes: int = setting(
        0,
        v.size(zero=True),
        "Disk for KV: of all ranks and engines together, an equal part in each directory (LMCache's is for each "
        "rank). 0: nothing is kept on disk.",
        name="max_local_disk_size",
    )
    remote_url: str | None = setting(
        None, v.optional(REMOTE_URL), "Keep KV in the Redis at this address too; the forms are below."
    )
    blocking_timeout_secs: float = setting(
        10.0,
        v.number(0, _WAIT_SECS_MAX),
        "The most that a load waits for disk or Redis, in seconds; then the KV is computed. Lookups wait for 0.25 s.",
    )
    retrieve_locations: tuple[str, ...] | None = setting(
        None,
        v.optional(v.tuple_of(_LOCATION)),
        "Where KV is looked for: `LocalCPUBackend` (RAM, through which everything passes, so it is always one), "
        "`LocalDiskBackend`, `RemoteBackend` (Redis); none: everywhere.",
    )
    store_location: str | None = setting(
        None,
        v.optional(_LOCATION),
        "The only one of these to which KV is written; none: all. RAM is written to in any case.",
    )
    write_policy: Literal["reuse", "through"] = setting(
        "reuse",
        v.choice("reuse", "through"),
        "`reuse`: a chunk goes to disk or Redis when it is seen a second time or is about to leave RAM; `through` "
        "writes every chunk at once, as LMCache does.",
        ours=True,
    )
    tier_secret: str | None = setting(
        None,
        v.optional(v.secret()),
        "Seal what is on disk and in Redis with a MAC of this secret: who does not have it can remove KV, not forge "
        "it. All engines that share KV need the same.",
        ours=True,
    )
    tier_threads: int = setting(
        4,
        v.integer(1, TIER_THREADS_MAX),
        "Threads a rank that load from and write to disk and Redis.",
        ours=True,
    )
    local_disk_direct: bool = setting(
        True,
        v.boolean(),
        "Read and write past the page cache (O_DIRECT) where the file system allows it.",
        ours=True,
    )
    redis_key_prefix: str = setting(
        "", v.text(_PREFIX_CHARACTERS_MAX), "In front of all names in Redis.", ours=True
    )
    redis_ttl_secs: float | None = setting(
        None,
        v.optional(v.number(1, 1_000_000_000)),
        "How long KV stays in Redis after it was written, in seconds; none: until Redis evicts it.",
        ours=True,
    )

    @property
    def disk(self) -> TierUse | None:
        """What the disk tier is for; None: there is none."""
        return self._use(_DISK) if self.local_disk and self.max_local_disk_bytes else None

    @property
    def redis(self) -> TierUse | None:
        """What the Redis tier is for; None: there is none."""
        return self._use(_REMOTE) if self.remote_url is not None else None

    def _use(self, location: str) -> TierUse | None:
        loads = self.retrieve_locations is None or location in self.retrieve_locations
        stores = self.store_location in (None, location)
        return TierUse(loads, stores) if loads or stores else None


def without_effect(chosen: Mapping[str, Any], has_disk: bool, has_redis: bool) -> Iterator[str]:
    """Say which of the `chosen` settings ask something of a tier that is not there."""
    there = {name for name, is_there in ((_DISK, has_disk), (_REMOTE, has_redis)) if is_there}
    if (location := chosen.get("store_location")) not in (None, _RAM, *there):
        yield f"store_location is {location}, and there is none: KV is kept in RAM alone"
    beyond = {*(chosen.get("retrieve_locations") or ())} - {_RAM}
    if beyond and there and not beyond & there:
        yield f"retrieve_locations leaves out {' and '.join(sorted(there))}: nothing is looked for beyond RAM"
    needs = {"redis_ttl_secs": has_redis, "redis_key_prefix": has_redis, "tier_secret": bool(there)}
    for name, is_met in needs.items():
        if chosen.get(name) and not is_met:
            place = "neither disk nor Redis is" if name == "tier_secret" else "remote_url is not"
            yield f"{name} is set and {place}: it has no effect"
