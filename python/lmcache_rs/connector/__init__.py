"""The vLLM connector; the only package of lmcache_rs that imports vllm, and only when a class is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_rs.connector.vllm_v1 import LMCacheConnectorV1, LMCacheRsConnector

__all__ = ["LMCacheConnectorV1", "LMCacheRsConnector"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lmcache_rs.connector import vllm_v1

        return getattr(vllm_v1, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
