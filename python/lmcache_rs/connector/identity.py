"""What keeps a request's KV apart beside its tokens: named in its key space, or the request is declined."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmcache_rs._core import KeySpace

TAG_PREFIX = "lmcache.tag."

ADAPTER_FILES_MAX = 256
"""An adapter's folder with more entries is none that we know."""

ADAPTERS_MAX = 65_536
"""Adapters that one engine remembers; requests with others are not cached."""


_DIGEST = re.compile(r"(.*:)?([0-9a-f]{64}|[0-9a-f]{128})", re.DOTALL)
"""vLLM's own hashes of media: blake3, SHA-256 or SHA-512."""


class UnnameableError(ValueError):
    """The request's identity cannot be named; `reason` is the metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_private(request: Any) -> bool:
    """Whether the request's identity may mean something else in another process, or after a restart.

    That of an adapter is its path and its files' times, and media may have names of their user instead of vLLM's hash
    of their content.
    """
    if getattr(request, "lora_request", None) is not None:
        return True
    media = getattr(request, "mm_features", None) or ()
    return not all(_DIGEST.fullmatch(str(item.identifier)) for item in media)


class Adapters:
    """What each adapter's number stood for when it was first seen.

    vLLM loads an adapter once and then goes by its number, whatever a later request's path or the files say, unless
    that request has it loaded anew.
    """

    def __init__(self) -> None:
        self._identities: dict[int, str] = {}

    def identify(self, adapter: Any) -> str:
        """As `adapter_identity`. Raises `UnnameableError` too when it cannot be known what vLLM has loaded."""
        number, identity = adapter.lora_int_id, adapter_identity(adapter)
        if getattr(adapter, "load_inplace", False):
            self._identities[number] = identity
        elif number not in self._identities and len(self._identities) >= ADAPTERS_MAX:
            raise UnnameableError("too_many_adapters")
        elif self._identities.setdefault(number, identity) != identity:
            raise UnnameableError("adapter_changed")
        return identity


def identity(request: Any, options: Mapping[str, Any], adapters: Adapters) -> list[tuple[str, str]]:
    """Names and values for the request's `KeySpace`; empty for most.

    vLLM's block hashes hold salt and adapter too, but up to 0.30 without saying which is which (a salt that is an
    adapter's name is taken for it), and the adapter by name alone: others may come under the same one. `options` are
    the request's own, so whoever sent it may have put anything there. Raises `UnnameableError`.
    """
    named = [(f"tag {k[len(TAG_PREFIX) :]}", str(v)) for k, v in options.items() if k.startswith(TAG_PREFIX)]
    if salt := getattr(request, "cache_salt", None):
        named.append(("salt", str(salt)))
    if (adapter := getattr(request, "lora_request", None)) is not None:
        named.append(("adapter", adapters.identify(adapter)))
    try:
        for name, value in named:
            (name + value).encode()
    except UnicodeEncodeError:  # JSON can write halves of characters, which are no text
        raise UnnameableError("not_text") from None
    return named


class Spaces:
    """The key space of each request."""

    def __init__(self, hash_algorithm: str) -> None:
        self._hash_algorithm, self._adapters = hash_algorithm, Adapters()
        self.plain = KeySpace(hash_algorithm)
        """That of a request of which nothing but its tokens decides its KV."""

    def of(self, request: Any, options: Mapping[str, Any]) -> KeySpace:
        """See `identity`, also for `options` and what is raised."""
        named = identity(request, options, self._adapters)
        return KeySpace(self._hash_algorithm, 0, named) if named else self.plain


def adapter_identity(adapter: Any) -> str:
    """Name, number, path of a LoRA adapter, and the names, sizes and times of its files.

    The files, since an adapter can be loaded anew under its old name, number and path. Raises `UnnameableError` when
    it is to be loaded anew and its files are not here to be looked at.
    """
    path = str(adapter.lora_path)
    files = _files(path)
    if files is None and getattr(adapter, "load_inplace", False):
        raise UnnameableError("adapter_files")
    return repr((adapter.lora_name, adapter.lora_int_id, path, files))


def _files(path: str) -> list[tuple[str, int, int]] | None:
    found = []
    try:
        with os.scandir(Path(path)) as entries:
            for entry in entries:
                status = entry.stat()
                found.append((entry.name, status.st_size, status.st_mtime_ns))
                if len(found) > ADAPTER_FILES_MAX:
                    return None
    except (OSError, ValueError):  # a name on a hub; ValueError: a path with a null character
        return None
    return sorted(found)
