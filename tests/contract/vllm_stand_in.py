"""vLLM's connector base classes, as far as ours uses them, so that its hooks run without vLLM."""

import importlib
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch


class KVConnectorBase:
    """vLLM 0.32's KVConnectorBase_V1: keeps the metadata of the step that runs."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._connector_metadata: Any = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._connector_metadata = metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def has_connector_metadata(self) -> bool:
        return self._connector_metadata is not None

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata


class Role(Enum):
    SCHEDULER = 0
    WORKER = 1


@dataclass
class TransferResults:
    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


@dataclass
class Stats:
    data: dict[str, Any] = field(default_factory=dict)


class PromMetrics:
    def __init__(self, *_: Any) -> None:
        pass


def load_connector() -> Any:
    """The module `lmcache_rs.connector.vllm_v1` over these classes, which `sys.modules` does not have afterwards."""
    base = "vllm.distributed.kv_transfer.kv_connector.v1."
    stand_ins = {
        base + "base": {
            "KVConnectorBase_V1": KVConnectorBase,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorRole": Role,
            "KVConnectorTransferResults": TransferResults,
            "KVConnectorWorkerMetadata": type("KVConnectorWorkerMetadata", (), {}),
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        base + "metrics": {"KVConnectorPromMetrics": PromMetrics, "KVConnectorStats": Stats},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_rocm=lambda: False, device_type="cpu")},
        "vllm.v1.metrics.cache_hit_source": {"CacheHitSource": SimpleNamespace(HOST="host")},
    }
    modules: dict[str, ModuleType] = {}
    for name, content in stand_ins.items():
        for end in [i for i, letter in enumerate(name) if letter == "."] + [len(name)]:
            modules.setdefault(name[:end], ModuleType(name[:end]))
        vars(modules[name]).update(content)
    package = importlib.import_module("lmcache_rs.connector")
    before = dict(vars(package))
    ours = [
        f"lmcache_rs.connector.{name}" for name in ("vllm_api", "metrics", "namespace", "sides", "vllm_v1")
    ]
    with patch.dict(sys.modules, modules):
        for name in ours:
            sys.modules.pop(name, None)
            vars(package).pop(name.rpartition(".")[2], None)  # another test may have imported it with vLLM
        module = importlib.import_module("lmcache_rs.connector.vllm_v1")
        # Whatever else of ours came with it is the same with and without vLLM, and must not be loaded twice.
        rest = {n: m for n, m in sys.modules.items() if n.startswith("lmcache_rs") and n not in ours}
    sys.modules.update(rest)
    for name in ours:
        vars(package).pop(name.rpartition(".")[2], None)
    vars(package).update(before)
    return module
