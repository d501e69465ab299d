"""`Config`: every honoured setting as a typed attribute. To add a honoured setting, add a field here."""

import logging
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, NamedTuple

from lmcache_rs.config import values as v
from lmcache_rs.config.keys import Key, Status

_TOKENS = v.tokens()


class Notice(NamedTuple):
    """A line for the log, to be written once at the start."""

    level: int
    text: str

    def log(self, logger: logging.Logger) -> None:
        """Write the line."""
        logger.log(self.level, "%s", self.text)


def _key(
    default: Any, kind: v.Kind, text: str, *, name: str = "", differs: str = "", ours: bool = False
) -> Any:
    """Declare a field that is a setting; `name` is the setting's where the field is called otherwise."""
    # A field does not know its own name yet: `honoured_keys` puts it in.
    key = Key(name, kind, default, Status.HONOURED, text, differs, ours)
    return field(default=default, metadata={"key": key})


@dataclass(frozen=True, repr=False)
class Config:
    """What the user asked for, validated. Immutable; shows no secret.

    A size is an attribute in bytes, `..._bytes`, of a setting called `..._size`, whose plain numbers are GiB.
    """

    chunk_size: int = _key(
        256,
        v.tokens(1),
        "Tokens in a chunk, the unit of disk and Redis objects. Hits in RAM end at any block.",
    )
    local_cpu: bool = _key(True, v.boolean(), "Keep KV in RAM. False keeps nothing there.")
    max_local_cpu_bytes: int = _key(5 * v.GIB, v.size(), "RAM for KV, per rank.", name="max_local_cpu_size")
    local_cpu_use_hugepages: bool = _key(
        True,
        v.boolean(),
        "Ask for huge pages; where there are none, ordinary pages are used.",
        differs="false, as its pages must be reserved by the administrator; ours need not be",
    )
    reserve_local_cpu_bytes: int = _key(
        0, v.size(zero=True), "RAM to leave free on this machine.", name="reserve_local_cpu_size"
    )
    save_decode_cache: bool = _key(False, v.boolean(), "Store generated tokens too, not only prompts.")
    save_unfull_chunk: bool = _key(
        True,
        v.boolean(),
        "Store the partial last block of a prompt, so that prompts are found to the token.",
        differs="false, so that prompts shorter than a chunk are never found",
    )
    discard_partial_chunks: bool = _key(False, v.boolean(), "True is the same as `save_unfull_chunk: false`.")
    cache_policy: str = _key(
        "LRU",
        v.choice("LRU", "LFU", "FIFO", "MRU"),
        "What leaves first when RAM is full. Only LRU in this version; for the others LRU is used.",
    )
    min_retrieve_tokens: int = _key(0, _TOKENS, "Hits of fewer tokens are computed, not loaded.")
    max_tokens_per_load: int = _key(0, _TOKENS, "The most tokens loaded for one request; 0 is no limit.")
    skip_last_n_tokens: int = _key(
        0, _TOKENS, "So many tokens at the end of a prompt are neither looked for nor stored."
    )
    enable_async_loading: bool = _key(
        True,
        v.boolean(),
        "Load while other requests go on. False loads between two steps, except for models with sliding windows or "
        "several kinds of attention, which always load so.",
        differs="false, so that each load holds every other request",
    )
    priority_limit: int | None = _key(
        None, v.optional(v.integer()), "Requests whose priority number is above this are not stored."
    )
    force_skip_save: bool = _key(
        False,
        v.boolean(),
        "Store nothing, from any request.",
        differs="false; and LMCache takes every value but the empty one for true, 0 as well",
    )
    lmcache_instance_id: str | None = _key(
        None, v.optional(v.text()), "A name for this engine in lines and metrics."
    )
    extra_config: dict[str, Any] = field(
        default_factory=dict,
        metadata={"key": Key("extra_config", v.mapping(), {}, Status.HONOURED, "More settings, see below.")},
    )

    kv_load_failure_policy: Literal["recompute", "fail", "keep"] = _key(
        "recompute",
        v.choice("recompute", "fail", "keep"),
        "A request whose load failed is computed, or fails; `keep` leaves vLLM's own setting as it is.",
        ours=True,
    )
    sync_load_max_bytes: int | None = _key(
        None,
        v.optional(v.size(zero=True)),
        "Loads of up to this size, or of a request that is alone, are made between two steps, which is quicker; "
        "0: none is; none: lmcache_rs chooses.",
        name="sync_load_max_size",
        ours=True,
    )
    copy_threads: int | None = _key(
        None,
        v.optional(v.integer(1, 256)),
        "Threads that copy KV on the CPU; none: lmcache_rs chooses.",
        ours=True,
    )
    pin: Literal["require", "prefer", "off"] = _key(
        "prefer",
        v.choice("require", "prefer", "off"),
        "Pin the RAM for copies with a GPU; `prefer` goes on without where the machine refuses, several times slower.",
        ours=True,
    )
    prefault_threads: int = _key(
        1,
        v.integer(0, 256),
        "Threads that touch the RAM after the start; 0 touches it on first use.",
        ours=True,
    )
    pending_timeout_ms: float = _key(
        20.0,
        v.number(0, 60_000),
        "How long a request waits for KV that is still being stored, before it takes what is there.",
        ours=True,
    )
    max_held_blocks_percent: float = _key(
        50.0,
        v.number(0, 100),
        "The share of vLLM's KV blocks that unfinished stores may keep after their requests have gone.",
        ours=True,
    )
    freeze: bool = _key(False, v.boolean(), "Serve hits and store nothing new.", ours=True)

    notices: tuple[Notice, ...] = ()

    @property
    def tails(self) -> bool:
        """Whether the partial last block of a prompt is stored and looked for."""
        return self.save_unfull_chunk and not self.discard_partial_chunks

    @property
    def stores(self) -> bool:
        """Whether anything may be stored at all."""
        return self.local_cpu and not self.force_skip_save and not self.freeze

    def describe(self) -> str:
        """Name the settings that are not at their default, on one line, without secrets."""
        parts = []
        for attribute, key in honoured_keys().items():
            value = getattr(self, attribute)
            if value != key.default:
                parts.append(f"{key.name}={_show(attribute, value)}")
        return ", ".join(parts) or "all settings at their defaults"

    def __repr__(self) -> str:
        return f"Config({self.describe()})"


def _show(attribute: str, value: Any) -> str:
    if attribute.endswith("_bytes") and isinstance(value, int):
        return v.size_words(value)
    if isinstance(value, dict):  # names only: any value may be a secret
        return "{" + ", ".join(v.shown(name) for name in sorted(value)) + "}"
    return v.shown(value)


@cache
def honoured_keys() -> dict[str, Key]:
    """Attribute -> setting, for every field of `Config` that is a setting."""
    found = {}
    for one in fields(Config):
        key: Key | None = one.metadata.get("key")
        if key is not None:
            found[one.name] = Key(
                key.name or one.name, key.kind, key.default, key.status, key.text, key.differs, key.ours
            )
    return found
