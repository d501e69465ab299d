"""Keeps KV cache that vLLM would throw away, in RAM, and puts it back when a prefix returns."""

import importlib
from typing import Any

from lmcache_rs._core import __version__

__all__ = ["LMCacheEngine", "__version__"]


def __getattr__(name: str) -> Any:
    # On demand: importing the package must stay cheap, for every process that vLLM starts.
    if name == "LMCacheEngine":
        return importlib.import_module("lmcache_rs.engine").LMCacheEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
