"""vLLM's plugin hook: makes "LMCacheConnectorV1" mean our connector, where no real LMCache is installed."""

import importlib.util
import os

from lmcache_rs.log import init_logger

logger = init_logger(__name__)

OPT_OUT = "LMCACHE_RS_DISABLE_PLUGIN"
OVERRIDE = "LMCACHE_RS_OVERRIDE_LMCACHE"

_CONNECTORS = ("LMCacheConnectorV1", "LMCacheRsConnector")
_MODULE = "lmcache_rs.connector.vllm_v1"


def register() -> None:
    """Called by vLLM in each of its processes, before any connector is looked up. Idempotent; touches no device.

    `LMCACHE_RS_DISABLE_PLUGIN=1` turns it off. With a real LMCache installed its own connector keeps the name, unless
    `LMCACHE_RS_OVERRIDE_LMCACHE=1`; "LMCacheRsConnector" is ours always.
    """
    if _is_set(OPT_OUT):
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in _CONNECTORS:
        if name == "LMCacheConnectorV1" and real_lmcache_installed() and not _is_set(OVERRIDE):
            logger.warning(
                "A real LMCache is installed and keeps the name LMCacheConnectorV1; lmcache_rs is LMCacheRsConnector "
                "(%s=1 gives it both)",
                OVERRIDE,
            )
            continue
        KVConnectorFactory._registry.pop(name, None)
        KVConnectorFactory.register_connector(name, _MODULE, name)


def real_lmcache_installed() -> bool:
    """Whether `import lmcache` would find LMCache itself: not our compat distribution, nor a folder of that name."""
    spec = importlib.util.find_spec("lmcache")
    return spec is not None and spec.origin is not None and not hasattr(spec.loader, "is_lmcache_rs")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
