"""A rank's part of what is fetched from the slower tiers and written to them: bytes between its pool and the media."""

from collections.abc import Callable, Mapping

from lmcache_rs._core import HostPool
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.orders import JobResult, StepOrders, TierOrder
from lmcache_rs.connector.tiers import CLOSE_S_MAX, OpenTier
from lmcache_rs.connector.troubles import Troubles


class TierWorker:
    """Hands orders to the tiers' queues and keeps what becomes of each chunk. Waits for nothing but at its end."""

    def __init__(
        self, pool: HostPool | None, open_tiers: Callable[[bytes], Mapping[str, OpenTier]], barrier: Barrier
    ) -> None:
        """`open_tiers`: opens this rank's tiers for a namespace, which the first orders bring."""
        self._pool = pool
        self._open_tiers = open_tiers
        self._barrier = barrier
        self._tiers: Mapping[str, OpenTier] | None = None
        self._begun: set[int] = set()
        """Orders of this step, and of those to come, that were begun or have failed."""
        self._results: dict[int, JobResult] = {}
        self._troubles = Troubles("Loading or writing KV")

    def start(self, orders: StepOrders) -> None:
        """Begin a step's orders. Idempotent."""
        if self._tiers is None and orders.namespace:
            self._tiers = {}
            try:
                self._tiers = self._open_tiers(orders.namespace)
            except BaseException as error:
                self._barrier.report("open_tiers", error)
        for order in orders.fetches:
            self._start(order, is_fetch=True)
        for order in orders.writes:
            self._start(order, is_fetch=False)

    def leave(self, orders: StepOrders) -> None:
        """The step is over: what no hook of it has begun has failed."""
        for order in (*orders.fetches, *orders.writes):
            if order.job not in self._begun:
                self._fail(order)
            self._begun.discard(order.job)

    def take_results(self) -> dict[int, JobResult]:
        """Chunks that ended since the last call, by job."""
        for name, tier in self._open.items():
            try:
                for job, index, refusal, value, seconds in tier.queue.poll():
                    self._troubles.note(name, refusal, value)
                    moved = value if isinstance(value, int) else 0
                    self._results[job + index] = JobResult(1, int(refusal is not None), moved, seconds)
            except BaseException as error:
                self._barrier.report("tier_poll", error)
        results, self._results = self._results, {}
        return results

    @property
    def absent(self) -> bool:
        """Whether there are no tiers, so that nothing comes from them."""
        return not (self._tiers or self._results)

    def counters(self) -> dict[str, float]:
        """What the tiers refused since the start, by tier and reason."""
        return {
            f"tier_refusals:{name}:{what.replace('_refused:', ':')}": count
            for name, tier in self._open.items()
            for what, count in tier.queue.counters().items()
            if "_refused:" in what
        }

    def close(self) -> None:
        """End the tiers' threads; what was not written by then is not written."""
        for tier in self._open.values():
            tier.queue.close(CLOSE_S_MAX)

    @property
    def _open(self) -> Mapping[str, OpenTier]:
        return self._tiers or {}

    def _start(self, order: TierOrder, is_fetch: bool) -> None:
        if order.job in self._begun:
            return
        self._begun.add(order.job)
        try:
            tier = self._open.get(order.tier)
            if tier is None or self._pool is None:
                raise RuntimeError(f"this rank has no tier {order.tier!r}")
            submit = tier.queue.load if is_fetch else tier.queue.store
            submit(order.job, self._pool, order.keys, order.positions, order.counts, order.rows)
        except BaseException as error:
            self._barrier.report("tier", error)
            self._fail(order)

    def _fail(self, order: TierOrder) -> None:
        self._results |= {job: JobResult(1, 1, 0, 0.0) for job in order.jobs}
