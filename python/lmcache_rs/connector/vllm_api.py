"""Everything taken from vLLM, and what differs between its versions."""

import os
import platform
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import FrameType
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.platforms import current_platform

from lmcache_rs.connector.block_hashes import BlockHasher, RequestHasher
from lmcache_rs.connector.orders import StepOrders, WorkerAcks

try:  # since 0.30: a failed asynchronous load is reported by request, before by block ids
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError:
    KVConnectorTransferResults = None  # type: ignore[assignment,misc]

try:  # since 0.32
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:
    CacheHitSource = None  # type: ignore[assignment,misc]

__all__ = [
    "CacheHitSource",
    "ConnectorMetadata",
    "KVConnectorBase_V1",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorTransferResults",
    "SupportsHMA",
    "WorkerMetadata",
    "device_identity",
    "device_type",
    "hash_blocks_in_rust",
    "holders_go_first",
    "inside_multi_connector",
    "leaves_steps_early",
    "make_block_hashes_repeatable",
    "make_tail_hash",
    "software_versions",
    "steps_ahead",
    "waits_for_layers",
]


class ConnectorMetadata(KVConnectorMetadata):
    """Carries a step's orders from the scheduler to the workers."""

    def __init__(self, orders: StepOrders) -> None:
        self.orders = orders


class WorkerMetadata(KVConnectorWorkerMetadata):
    """Carries the workers' answers to the scheduler."""

    def __init__(self, acks: WorkerAcks) -> None:
        self.acks = acks

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerMetadata":
        """Add another rank's answer."""
        if isinstance(other, WorkerMetadata):
            self.acks.merge(other.acks)
        return self


def device_type() -> str:
    """Where vLLM keeps its KV: "cpu", "cuda", ...; "rocm" for AMD GPUs, whose torch calls itself cuda."""
    return "rocm" if current_platform.is_rocm() else str(current_platform.device_type)


def device_identity() -> str:
    """The kind of device as far as vLLM lays KV out for it: a GPU's capability, a CPU's instruction sets."""
    kind = device_type()
    if kind != "cpu":
        return f"{kind} {current_platform.get_device_capability()}"
    import torch

    # vLLM packs KV for AMX tiles or vectors of some width, where the machine has them.
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx={amx}"


def software_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of vLLM, of its plugins (any may bring models and layers) and of `names`, as far as they are there."""
    import vllm

    found = {"vllm": vllm.__version__}
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        for entry in entry_points(group=group):
            if entry.dist is not None and entry.name != "lmcache_rs":  # ours does neither
                found[entry.dist.name] = entry.dist.version
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def steps_ahead(vllm_config: Any) -> int:
    """Steps that vLLM's GPU does from the end of a step's submission until the first one that can use what it told.

    Its own; with overlapping steps also the next one, which is planned already, and one planned before its output is
    read.
    """
    return 3 if getattr(vllm_config.scheduler_config, "async_scheduling", False) else 1


def leaves_steps_early(vllm_config: Any) -> bool:
    """Whether vLLM calls no hook of a step on this rank after it has asked for results.

    Its first model runner saves where tokens are drafted, in the last pipeline stage, and forgets the others.
    """
    parallel = vllm_config.parallel_config
    stages = getattr(parallel, "pipeline_parallel_size", 1)
    stage = parallel.rank // getattr(parallel, "tensor_parallel_size", 1) % stages
    return stage < stages - 1 and getattr(vllm_config, "speculative_config", None) is not None


def waits_for_layers(forward_context: Any) -> bool:
    """Whether the forward to come calls `wait_for_layer_load` for every layer: not from inside of a CUDA graph."""
    if getattr(forward_context, "attn_metadata", None) is None:
        return False
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    return getattr(mode, "name", None) in {"NONE", "PIECEWISE"}


def holders_go_first() -> bool:
    """Whether vLLM asks about requests that hold blocks before all that hold none (since 0.32)."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return hasattr(Scheduler, "_holds_kv_blocks")


def make_tail_hash(hash_algorithm: str, block_size: int) -> Callable[[Any, int], bytes | None]:
    """The hash that vLLM would give to a request's partial last block, were it a full one.

    It covers the parent block, the tokens and everything else that decides their KV (LoRA, salt, images, embeddings),
    by vLLM's own functions; where those are missing there are no tails.
    """
    try:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens
    except ImportError:
        return lambda _request, _start: None
    hash_function = get_hash_fn_by_name(hash_algorithm)

    def tail_hash(request: Any, start: int) -> bytes | None:
        end = request.num_tokens
        full = start // block_size
        if not 0 < end - start < block_size or len(request.block_hashes) != full:
            return None
        parent = request.block_hashes[-1] if full else None
        extra, _ = generate_block_hash_extra_keys(request, start, end, 0)
        return bytes(hash_block_tokens(hash_function, parent, request.all_token_ids[start:end], extra))

    return tail_hash


def make_block_hashes_repeatable() -> None:
    """Have vLLM up to 0.28 root its block hashes at a fixed value instead of a random one.

    Later versions do so themselves. vLLM reads the seed after its scheduler has made the connector.
    """
    from vllm.v1.core import kv_cache_utils

    if not hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED"):
        os.environ.setdefault("PYTHONHASHSEED", "0")


def hash_blocks_in_rust() -> None:
    """Have the engine that is being built hash its requests' blocks by `BlockHasher`, where it would by SHA-256.

    vLLM's engine makes its hasher after its scheduler has made the connector, by a function that it has imported; that
    is replaced for one call. Where any of this is otherwise, nothing happens.
    """
    engine = sys.modules.get("vllm.v1.engine.core")
    try:
        from vllm.utils.hashing import sha256
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys  # noqa: F401 - `BlockHasher` calls it

        make_own = engine.get_request_block_hasher  # type: ignore[union-attr]
    except (ImportError, AttributeError):
        return

    def make(*arguments: Any, **named: Any) -> RequestHasher:
        engine.get_request_block_hasher = make_own  # type: ignore[union-attr]
        own: RequestHasher = make_own(*arguments, **named)
        block_size, hash_function, *others = arguments if len(arguments) > 1 else (0, None)
        # Whatever else a version asks for (0.33: tokens to look ahead) is off when it is 0.
        if hash_function is not sha256 or any(others) or named:
            return own
        return BlockHasher(own, block_size, kv_cache_utils)

    engine.get_request_block_hasher = make  # type: ignore[union-attr]


def inside_multi_connector() -> bool:
    """Whether the connector being constructed is a child of vLLM's MultiConnector.

    The configuration a child gets is a copy that does not say so; the caller's frame does.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "MultiConnector":
            return True
        frame = frame.f_back
    return False
