"""`Config`: every honoured setting as a typed attribute. To add a honoured setting, add a field here."""

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

from lmcache_rs.config import values as v
from lmcache_rs.config.keys import Key, Notice, Status, setting
from lmcache_rs.config.tiers import TierSettings

_TOKENS = v.tokens()


@dataclass(frozen=True, repr=False)
class Config(TierSettings):
    """What the user asked for, validated. Immutable; shows no secret.

    A size is an attribute in bytes, `..._bytes`, of a setting called `..._size`, whose plain numbers are GiB.
    """

    chunk_size: int = setting(
        256,
        v.tokens(1),
        "Tokens in a chunk, the unit of disk and Redis objects, rounded down to whole blocks of vLLM's. Hits in RAM "
        "end at any block.",
    )
    local_cpu: bool = setting(
        True, v.boolean(), "Keep KV in RAM. With a disk or Redis it is kept there in any case, on its way."
    )
    max_local_cpu_bytes: int = setting(
        5 * v.GIB,
        v.size(),
        "RAM for KV, each rank's: with two ranks it is taken twice.",
        name="max_local_cpu_size",
    )
    local_cpu_use_hugepages: bool = setting(
        True,
        v.boolean(),
        "Ask for huge pages; where there are none, ordinary pages are used.",
        differs="false, as its pages must be reserved by the administrator; ours need not be",
    )
    reserve_local_cpu_bytes: int = setting(
        0, v.size(zero=True), "RAM to leave free on this machine.", name="reserve_local_cpu_size"
    )
    save_decode_cache: bool = setting(False, v.boolean(), "Store generated tokens too, not only prompts.")
    save_unfull_chunk: bool = setting(
        True,
        v.boolean(),
        "Store the partial last block of a prompt, so that prompts are found to the token.",
        differs="false, so that prompts shorter than a chunk are never found",
    )
    discard_partial_chunks: bool = setting(
        False, v.boolean(), "True is the same as `save_unfull_chunk: false`."
    )
    cache_policy: str = setting(
        "LRU",
        v.choice("LRU", "LFU", "FIFO", "MRU"),
        "What leaves first when RAM is full. Only LRU in this version; for the others LRU is used.",
    )
    min_retrieve_tokens: int = setting(0, _TOKENS, "Hits of fewer tokens are computed, not loaded.")
    max_tokens_per_load: int = setting(0, _TOKENS, "The most tokens loaded for one request; 0 is no limit.")
    skip_last_n_tokens: int = setting(
        0, _TOKENS, "So many tokens at the end of a prompt are neither looked for nor stored."
    )
    enable_async_loading: bool = setting(
        True,
        v.boolean(),
        "Load while other requests go on. False loads between two steps, except for models with sliding windows or "
        "several kinds of attention, which always load so.",
        differs="false, so that each load holds every other request",
    )
    priority_limit: int | None = setting(
        None, v.optional(v.integer()), "Requests whose priority number is above this are not stored."
    )
    force_skip_save: bool = setting(
        False,
        v.boolean(),
        "Store nothing, from any request.",
        differs="false; and LMCache takes every value but the empty one for true, 0 as well",
    )
    extra_config: dict[str, Any] = field(
        default_factory=dict,
        metadata={"key": Key("extra_config", v.mapping(), {}, Status.HONOURED, "More settings, see below.")},
    )

    kv_load_failure_policy: Literal["recompute", "fail", "keep"] = setting(
        "recompute",
        v.choice("recompute", "fail", "keep"),
        "A request whose load failed is computed, or fails; `keep` leaves vLLM's own setting as it is.",
        ours=True,
    )
    sync_load_max_bytes: int | None = setting(
        None,
        v.optional(v.size(zero=True)),
        "Loads of up to this size, or of a request that is alone, are made between two steps, which is quicker; "
        "0: none is; none: 256 MiB on the CPU, 32 MiB on a GPU.",
        name="sync_load_max_size",
        ours=True,
    )
    copy_threads: int | None = setting(
        None,
        v.optional(v.integer(1, 256)),
        "Threads that copy KV on the CPU; none: one for two cores, 4 at most.",
        ours=True,
    )
    pin: Literal["require", "prefer", "off"] = setting(
        "prefer",
        v.choice("require", "prefer", "off"),
        "Pin the RAM for copies with a GPU; `prefer` goes on without where the machine refuses, several times slower.",
        ours=True,
    )
    prefault_threads: int = setting(
        1,
        v.integer(0, 256),
        "Threads that touch the RAM after the start; 0 touches it on first use. One touches what is pinned.",
        ours=True,
    )
    pending_timeout_ms: float = setting(
        20.0,
        v.number(0, 60_000),
        "How long a request waits for KV that is still being stored, before it takes what is there.",
        ours=True,
    )
    max_held_blocks_percent: float = setting(
        50.0,
        v.number(0, 100),
        "The share of vLLM's KV blocks that unfinished stores may keep after their requests have gone.",
        ours=True,
    )
    freeze: bool = setting(False, v.boolean(), "Serve hits and store nothing new.", ours=True)

    notices: tuple[Notice, ...] = ()

    @property
    def tails(self) -> bool:
        """Whether the partial last block of a prompt is stored and looked for."""
        return self.save_unfull_chunk and not self.discard_partial_chunks

    def describe(self) -> str:
        """Name the settings that are not at their default, on one line, without secrets."""
        parts = []
        for attribute, key in honoured_keys().items():
            value = getattr(self, attribute)
            if value != key.default:
                parts.append(f"{key.name}={_show(attribute, key.kind, value)}")
        return ", ".join(parts) or "all settings at their defaults"

    def __repr__(self) -> str:
        return f"Config({self.describe()})"


def _show(attribute: str, kind: v.Kind, value: Any) -> str:
    if attribute.endswith("_bytes") and isinstance(value, int):
        return v.size_words(value)
    if isinstance(value, dict):  # names only: any value may be a secret
        return "{" + ", ".join(v.shown(name) for name in sorted(value)) + "}"
    if kind.secret:
        return f"{scheme}://***" if (scheme := v.scheme(value)) else "***"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(v.shown, value)) + "]"
    return v.shown(value)


@cache
def honoured_keys() -> dict[str, Key]:
    """Attribute -> setting, for every field of `Config` that is a setting."""
    found = {}
    own = [one for one in fields(Config) if one.name not in TierSettings.__dataclass_fields__]
    for one in (*own, *fields(TierSettings)):
        key: Key | None = one.metadata.get("key")
        if key is not None:
            found[one.name] = Key(
                key.name or one.name, key.kind, key.default, key.status, key.text, key.differs, key.ours
            )
    return found
