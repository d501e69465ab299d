"""Where LMCache keeps `LMCacheEngineBuilder` and `LMCacheEngine`."""

import importlib
from typing import Any

from lmcache_rs.builder import LMCacheEngineBuilder

__all__ = ["LMCacheEngine", "LMCacheEngineBuilder"]  # noqa: F822 - the first comes from __getattr__


def __getattr__(name: str) -> Any:
    if name == "LMCacheEngine":
        return importlib.import_module("lmcache_rs.engine").LMCacheEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
