"""The engines and connectors that live in this process, by instance id, and how they are ended."""

import importlib
import os
import threading
from typing import Any, Protocol

from lmcache_rs.errors import InvalidArgumentError
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


class Closeable(Protocol):
    """What can be registered: anything that ends with `close`."""

    def close(self) -> Any:
        """Let go of memory and threads."""


class _Registry:
    """Engines made here, with their configuration, and handles that others registered."""

    def __init__(self) -> None:
        # Re-entrant: an engine may register itself while `get_or_create` makes it.
        self.lock = threading.RLock()
        self.engines: dict[str, tuple[Closeable, Any]] = {}
        self.handles: dict[str, list[Closeable]] = {}


_registry = _Registry()


def _forget_after_fork() -> None:
    """Start anew in a forked child: nothing there is its to close, and the lock may be held for ever."""
    global _registry
    _registry = _Registry()


os.register_at_fork(after_in_child=_forget_after_fork)


def register(instance_id: str, handle: Closeable) -> None:
    """Have `destroy(instance_id)` close `handle`. One id may have several: a scheduler's and a worker's."""
    with _registry.lock:
        handles = _registry.handles.setdefault(instance_id, [])
        if not any(known is handle for known in handles):
            handles.append(handle)


def unregister(instance_id: str, handle: Closeable) -> None:
    """Forget `handle`, which is closed or closes itself. Does nothing when it is not registered."""
    with _registry.lock:
        left = [known for known in _registry.handles.get(instance_id, []) if known is not handle]
        if left:
            _registry.handles[instance_id] = left
        else:
            _registry.handles.pop(instance_id, None)


class LMCacheEngineBuilder:
    """LMCache's way to make, find and end an engine by name. Thread-safe."""

    @classmethod
    def get_or_create(cls, instance_id: str, config: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the engine of that name; make it with `LMCacheEngine(*args, config=config, **kwargs)` at first.

        Raises InvalidArgumentError when it exists with another configuration.
        """
        with _registry.lock:
            known = _registry.engines.get(instance_id)
            if known is None:
                logger.info("Creating LMCacheEngine instance %s", instance_id)
                engine_class = importlib.import_module("lmcache_rs.engine").LMCacheEngine
                known = _registry.engines[instance_id] = (
                    engine_class(*args, config=config, **kwargs),
                    config,
                )
            elif known[1] != config:
                raise InvalidArgumentError(
                    f"instance {instance_id} exists with another configuration; destroy it first"
                )
            return known[0]

    @classmethod
    def get(cls, instance_id: str) -> Any:
        """Return the engine of that name, or what a connector registered for it; None without either."""
        with _registry.lock:
            if instance_id in _registry.engines:
                return _registry.engines[instance_id][0]
            return next(iter(_registry.handles.get(instance_id, [])), None)

    @classmethod
    def destroy(cls, instance_id: str) -> None:
        """Close and forget all that has this name in this process. Never raises; may be called again."""
        with _registry.lock:
            closing = _registry.handles.pop(instance_id, [])
            engine = _registry.engines.pop(instance_id, None)
        if engine is not None:
            closing.insert(0, engine[0])
        if not closing:
            logger.info(
                "No engine named %s lives in this process; vLLM's own processes clean up by themselves",
                instance_id,
            )
            return
        logger.info("Destroying LMCacheEngine instance: %s", instance_id)
        # Outside the lock: closing takes a while. Newest first: they may build on older ones.
        for handle in reversed(closing):
            try:
                handle.close()
            except Exception as error:
                logger.error("Error closing cache engine: %s: %s", type(error).__name__, error)
        logger.info("LMCacheEngine instance %s destroyed", instance_id)
