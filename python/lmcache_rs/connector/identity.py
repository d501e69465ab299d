"""What keeps a request's KV apart beside its tokens: named in its key space, or the request is declined."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TAG_PREFIX = "lmcache.tag."

ADAPTER_FILES_MAX = 256
"""An adapter's folder with more entries is none that we know."""


class UnnameableError(ValueError):
    """The request's identity cannot be named; `reason` is the metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def identity(request: Any, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for the request's `KeySpace`; empty for most.

    vLLM's block hashes hold salt and adapter too, but up to 0.30 without saying which is which (a salt that is an
    adapter's name is taken for it), and the adapter by name alone: others may come under the same one. `options` are
    the request's own, so whoever sent it may have put anything there. Raises `UnnameableError`.
    """
    named = [(f"tag {k[len(TAG_PREFIX) :]}", str(v)) for k, v in options.items() if k.startswith(TAG_PREFIX)]
    if salt := getattr(request, "cache_salt", None):
        named.append(("salt", str(salt)))
    if (adapter := getattr(request, "lora_request", None)) is not None:
        named.append(("adapter", adapter_identity(adapter)))
    try:
        for name, value in named:
            (name + value).encode()
    except UnicodeEncodeError:  # JSON can write halves of characters, which are no text
        raise UnnameableError("not_text") from None
    return named


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
