"""What `LMCacheEngineBuilder.get(ENGINE_NAME)` returns in a process where vLLM's engine lives."""

from collections.abc import Mapping

from lmcache_rs import builder
from lmcache_rs.builder import LMCacheEngineBuilder
from lmcache_rs.connector.scheduler import SchedulerSide
from lmcache_rs.connector.worker import WorkerSide
from lmcache_rs.integration.vllm.utils import ENGINE_NAME


class EngineHandle:
    """Controls the connector's sides that live in this process: with one process both, else one of them."""

    def __init__(self) -> None:
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None

    @classmethod
    def join(cls, scheduler: SchedulerSide | None, worker: WorkerSide | None) -> "EngineHandle":
        """Add a side to this process's handle, making and registering it if there is none."""
        handle: EngineHandle | None = LMCacheEngineBuilder.get(ENGINE_NAME)
        if not isinstance(handle, cls):
            handle = cls()
            builder.register(ENGINE_NAME, handle)
        handle._scheduler = scheduler or handle._scheduler
        handle._worker = worker or handle._worker
        return handle

    def leave(self, scheduler: SchedulerSide | None, worker: WorkerSide | None) -> None:
        """A side ends; the last one unregisters the handle."""
        if self._scheduler is scheduler:
            self._scheduler = None
        if self._worker is worker:
            self._worker = None
        if self._scheduler is None and self._worker is None:
            builder.unregister(ENGINE_NAME, self)

    def clear(self) -> int:
        """Forget all stored KV. Returns rows forgotten; 0 where the index lives in another process."""
        return self._scheduler.clear()[0] if self._scheduler is not None else 0

    def freeze(self, frozen: bool = True) -> None:
        """Stop storing (hits are still served), or start again."""
        if self._scheduler is not None:
            self._scheduler.frozen = frozen

    @property
    def is_frozen(self) -> bool:
        """Whether nothing is stored."""
        return self._scheduler is not None and self._scheduler.frozen

    def stats(self) -> Mapping[str, float]:
        """The index's gauges and counters, and the connector's (which win where both have a name), since the start."""
        refusals = self._worker.tiers.counters() if self._worker is not None else {}
        if self._scheduler is None:
            return refusals
        return {**refusals, **self._scheduler.index.stats(), **self._scheduler.counters.totals()}

    def close(self) -> None:
        """End the cache in this process: vLLM goes on without it."""
        scheduler, worker = self._scheduler, self._worker
        if scheduler is not None:
            scheduler.close()
        if worker is not None:
            worker.close()
