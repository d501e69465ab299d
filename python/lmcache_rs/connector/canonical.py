"""Objects of a configuration as text that is the same in every process."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

TEXT_CHARACTERS_MAX = 200
"""Longer texts are replaced by their digest."""

# Of Hugging Face's configurations, and sizes of caches.
_VOLATILE = {"_name_or_path", "_commit_hash", "transformers_version", "limit_per_prompt", "skip_mm_profiling"}
_VOLATILE |= {"mm_processor_cache_gb", "mm_processor_cache_type", "mm_shm_cache_max_object_size_mb"}


class UnsayableError(ValueError):
    """A value that has no text of its own."""


def plain(value: Any, without: Iterable[str] = ()) -> Any:
    """`value` as JSON can write it, the same in every process; named fields of it and of nothing inside left out.

    Raises `UnsayableError` for what says of itself only where it is in memory.
    """
    skip = {*without, *_VOLATILE}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if is_dataclass(value) and not isinstance(value, type):
        inside = {one.name: getattr(value, one.name, None) for one in fields(value)}
        return {"": type(value).__name__} | plain(inside, skip)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if k not in skip}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(text(plain(one)) for one in value)
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    words = repr(value)
    if " at 0x" in words:  # an address: what it is cannot be said
        raise UnsayableError(f"a {type(value).__qualname__} has no name")
    return words


def text(value: Any) -> str:
    """What `plain` gave as text: JSON, or its digest where that is long."""
    words = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return words if len(words) <= TEXT_CHARACTERS_MAX else hashlib.blake2b(words.encode()).hexdigest()
