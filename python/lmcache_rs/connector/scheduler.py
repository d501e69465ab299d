"""The scheduler side: decides what is loaded and stored, in vLLM's scheduler process, on its main thread."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lmcache_rs._core import Index, KeySpace
from lmcache_rs.config import Config
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.holds import HeldBlocks
from lmcache_rs.connector.ledger import Ledger
from lmcache_rs.connector.lookup import Lookup, TailHash
from lmcache_rs.connector.nearby import Nearby
from lmcache_rs.connector.orders import BrokenLoad, LoadOrder, StepOrders, StoreOrder, WorkerAcks
from lmcache_rs.connector.requests import Plan, Record, follow_tables, request_options
from lmcache_rs.connector.rules import Roles, lookup_rules
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.stores import NULL_BLOCK, StorePlanner, StoreRules, final_tokens
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

TAG_PREFIX = "lmcache.tag."


class SchedulerSide:
    """Owns the index. Every method is called by vLLM's scheduler thread; none of them waits."""

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        roles: Roles,
        hash_algorithm: str,
        tail_hash: TailHash,
        counters: Counters,
    ) -> None:
        self._geometry = geometry
        self.ranks = geometry.ranks
        self._config = config
        self._roles = roles
        self._hash_algorithm = hash_algorithm
        self.counters = counters
        self.index = Index(geometry.rows)
        self.frozen = config.freeze
        rules = lookup_rules(config, geometry.device, roles)
        size = geometry.block_size
        self._held = HeldBlocks(config.max_held_blocks_percent / 100)
        self._ledger = Ledger(self.index, self._held, geometry.ranks, counters)
        self._lookup = Lookup(self.index, size, geometry.row_bytes, rules, counters, tail_hash)
        self._planner = StorePlanner(
            self.index,
            size,
            StoreRules(config.save_decode_cache, config.tails, config.skip_last_n_tokens),
            self._held,
            self._ledger,
            self._lookup,
            counters,
        )
        self._space = KeySpace(hash_algorithm)
        self._records: dict[str, Record] = {}
        self._storing: dict[str, Record] = {}
        self._loads: list[LoadOrder] = []
        self._broken: list[BrokenLoad] = []
        self._late_stores: list[StoreOrder] = []
        self._step = 0
        self._closed = False
        self.worker_nearby: Nearby | None = None

    def bind_block_pool(self, pool: Any) -> None:
        """Take vLLM's block pool; stores need it to keep their source blocks."""
        self._held.bind(pool, self._before_reset)

    def _before_reset(self) -> None:
        """VLLM resets its block pool, and may unmap KV after that: nothing may hold blocks, nor copy."""
        self._ledger.void_stores()
        if self.worker_nearby is not None:
            self.worker_nearby.drain()
            self._ask_nearby()

    def add_request(self, request: Any) -> Record:
        """A request arrived: look it up at once, so that what it will need counts as recently used."""
        options = request_options(request)
        tags = [(k[len(TAG_PREFIX) :], str(v)) for k, v in options.items() if k.startswith(TAG_PREFIX)]
        limit = self._config.priority_limit
        wanted = not options.get("lmcache.skip_save", False) and (limit is None or request.priority <= limit)
        record = Record(
            request=request,
            space=KeySpace(self._hash_algorithm, 0, tags) if tags else self._space,
            may_store=self._roles.may_store and wanted and not self._config.force_skip_save,
        )
        self._records[record.id] = record
        if self._roles.may_load and not self._closed:
            self.index.match(record.space, request.block_hashes)
        return record

    def matched_tokens(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        """See `Lookup.answer`."""
        if self._closed:
            return 0, False
        self._ask_nearby()
        record = self._records.get(request.request_id) or self.add_request(request)
        alone, beside = len(self._records) == 1, self._ledger.loads_beside
        return self._lookup.answer(record, num_computed, alone, beside)

    def admit(self, request: Any, block_ids: list[int], tokens: int) -> None:
        """Blocks were allocated for `tokens` tokens of the last answer; 0: nothing of it is loaded."""
        record = self._records.get(request.request_id) or self.add_request(request)
        if record.may_store:
            self._storing[record.id] = record
        plan = record.plan
        record.awaits_load = tokens > 0 and plan is not None and plan.asynchronous
        first, last = 0, len(block_ids)
        ordered = False
        try:
            self._lookup.admit(record)
            if plan is None or not tokens:
                if tokens:
                    raise LookupError(f"{tokens} tokens are to be loaded that were not offered")
                return
            size = self._geometry.block_size
            first, last = plan.num_computed // size, -(-(plan.num_computed + tokens) // size)
            self._order_load(record, plan, first, block_ids[first:last], plan.num_computed + tokens)
            ordered = True
        except Exception:
            if tokens:
                # They are promised: a load that cannot be ordered ends as a failed one.
                self._promise_broken(record, plan, block_ids[first:last], tokens)
            raise
        finally:
            if plan is not None and not ordered and plan.lease is not None:
                plan.lease.release()

    def _order_load(
        self, record: Record, plan: Plan, first: int, block_ids: list[int], end_tokens: int
    ) -> None:
        lease = plan.lease
        count = len(block_ids)
        rows = np.frombuffer(lease.rows(first), dtype=np.uint32)[:count] if lease is not None else ()
        if lease is None or len(rows) != count:
            raise LookupError(f"{count} blocks were promised, {len(rows)} rows are there")
        blocks = np.array(block_ids, dtype=np.uint32)
        real = blocks != NULL_BLOCK
        pair = (np.ascontiguousarray(rows[real]), blocks[real])
        self._loads.append(
            self._ledger.open_load(
                self._step, record, lease, first, pair, end_tokens, plan.asynchronous, plan.by_layers
            )
        )

    def _promise_broken(self, record: Record, plan: Plan | None, block_ids: list[int], tokens: int) -> None:
        end_tokens = tokens + (plan.num_computed if plan is not None else 0)
        asynchronous = plan is not None and plan.asynchronous
        job = self._ledger.open_broken(self._step, record, block_ids, end_tokens, asynchronous)
        self._broken.append(BrokenLoad(job, record.id, tuple(block_ids), asynchronous))

    def plan_step(self, scheduled: Any) -> StepOrders:
        """The orders of this step. When planning fails, every promised load is reported as failed instead."""
        self._step += 1
        orders = StepOrders(self._loads, self._late_stores, self._broken, self._ledger.take_joins())
        self._loads, self._late_stores, self._broken = [], [], []
        late = len(orders.stores)
        try:
            orders.idle = not scheduled.num_scheduled_tokens
            if self.worker_nearby is not None:
                self._ask_nearby()
                self.worker_nearby.start_loads(orders)
            if self._storing:
                self._plan_stores(scheduled, orders.stores)
        except Exception as error:
            # Loads and late stores are ordered already; what was planned here is taken back.
            self._ledger.undo(orders.stores[late:])
            del orders.stores[late:]
            # Until they are admitted again: their tables are not followed any more.
            self._storing.clear()
            self.counters.add("dropped_stores:planning")
            raise PlanningError(orders) from error
        return orders

    def _plan_stores(self, scheduled: Any, stores: list[StoreOrder]) -> None:
        storing, counts = self._storing, scheduled.num_scheduled_tokens
        computed = follow_tables(storing, scheduled)
        for request_id, before in computed.items():
            record = storing[request_id]
            record.awaits_load = False
            after = before + counts.get(request_id, 0)
            order = None if self.frozen or self._closed else self._planner.plan(self._step, record, after)
            if order is not None:
                stores.append(order)
            # While it loads it may have to be computed, and stored, again.
            if self._planner.finished(record, after) and not record.loading:
                del storing[request_id]

    def finish_request(self, request: Any, block_ids: list[int]) -> None:
        """The request ended; its blocks are freed after this. Stores what it generated, if asked to."""
        record = self._records.pop(request.request_id, None)
        if record is None:
            return
        self._lookup.forget(record)
        storing = self._storing.pop(record.id, None) is not None
        computed = storing and not (record.loading or record.awaits_load)
        if computed and self._config.save_decode_cache and not (self.frozen or self._closed):
            record.table = list(block_ids)
            # Ordered with the next step, which runs after the last one that computed anything of this request.
            order = self._planner.plan(self._step + 1, record, final_tokens(request))
            if order is not None:
                self._late_stores.append(order)
        self._ledger.orphan(record)

    def acknowledge(self, acks: WorkerAcks) -> None:
        """The workers' answers of one step."""
        self._ledger.acknowledge(acks)

    def received(self, request_ids: Iterable[str]) -> None:
        """VLLM was told that these requests' loads have ended."""
        self._ledger.received(request_ids)

    def _ask_nearby(self) -> None:
        """Blocks that come back with an answer may be needed at once."""
        acks = self.worker_nearby.take_acks() if self.worker_nearby is not None else None
        if acks is not None:
            self.acknowledge(acks)

    def has_work(self) -> bool:
        """Whether steps are needed although no request is left."""
        return bool(self._late_stores) or self._ledger.busy

    def frees_blocks_soon(self) -> bool:
        """Whether held blocks will come back without a preemption."""
        return self._ledger.holds_blocks

    def clear(self) -> int:
        """Forget everything that is stored, and every answer given but not used. Returns rows forgotten."""
        for record in self._records.values():
            self._lookup.forget(record)
        self._ledger.void_stores()
        return self.index.clear()

    def take_counters(self) -> dict[str, float]:
        """Counts since the last call, if any, with what the pool holds now."""
        stats = self.index.stats()
        self.counters.set("evictions", stats["evictions"])
        news = self.counters.take()
        if news:
            used, row_bytes = stats["rows"] - stats["free"], self._geometry.row_bytes
            news |= {"pool_rows": stats["rows"], "pool_used_rows": used}
            news |= {"pool_bytes": stats["rows"] * row_bytes, "pool_used_bytes": used * row_bytes}
        return news

    def close(self) -> None:
        """Nothing is found or stored from now on; what was promised still ends."""
        if not self._closed:
            self.clear()
            self._closed = True


class PlanningError(Exception):
    """Stores could not be planned; `orders` has what must be ordered all the same."""

    def __init__(self, orders: StepOrders) -> None:
        super().__init__("planning the step's stores failed")
        self.orders = orders
