"""The scheduler side: decides what is loaded and stored, in vLLM's scheduler process, on its main thread."""

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from lmcache_rs._core import Index
from lmcache_rs.config import Config
from lmcache_rs.connector.admission import Admission
from lmcache_rs.connector.barrier import Barrier, guard, is_survivable
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.holds import HeldBlocks
from lmcache_rs.connector.identity import Spaces, UnnameableError, is_private
from lmcache_rs.connector.late import LateAcks
from lmcache_rs.connector.ledger import Ledger
from lmcache_rs.connector.lookup import Lookup, TailHash
from lmcache_rs.connector.nearby import Nearby
from lmcache_rs.connector.orders import PlanningError, StepOrders, WorkerAcks
from lmcache_rs.connector.requests import Record, request_options
from lmcache_rs.connector.rules import Roles, lookup_rules, tiering_rules
from lmcache_rs.connector.stats import Counters, pool_gauges
from lmcache_rs.connector.stores import StorePlanner, StoreRules
from lmcache_rs.connector.storing import Storing
from lmcache_rs.connector.tiering import Tiering
from lmcache_rs.connector.tiers import OpenTier
from lmcache_rs.connector.turns import Turns
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


class SchedulerSide:
    """Owns the index. Every method is called by vLLM's scheduler thread; none waits but for a reset, bounded."""

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        roles: Roles,
        hash_algorithm: str,
        tail_hash: TailHash,
        counters: Counters,
        barrier: Barrier,
        tiers: Mapping[str, OpenTier] | None = None,
        namespace: bytes = b"",
        holders_go_first: bool = True,
        others_load: bool = False,
    ) -> None:
        """`others_load`: under MultiConnector blocks may be held for another connector's load."""
        self._barrier = barrier
        self._geometry, self.ranks = geometry, geometry.ranks
        self._config = config
        self._roles = roles
        self.counters = counters
        self.groups = groups = geometry.groups
        self.index = Index(geometry.slots)
        self.frozen = config.freeze
        rules = lookup_rules(config, geometry)
        self._held = HeldBlocks(config.max_held_blocks_percent / 100)
        self._ledger = Ledger(self.index, self._held, geometry, counters, barrier, ids := itertools.count(1))
        self._lookup = Lookup(
            self.index, geometry.block_size, geometry.slot_bytes, rules, counters, tail_hash
        )
        self._admission = Admission(self._lookup, self._ledger, groups)
        self._turns, self._others_load = Turns(counters, holders_go_first), others_load
        stored = StoreRules(config.save_decode_cache, config.tails, config.skip_last_n_tokens)
        planner = StorePlanner(self.index, groups, stored, self._held, self._ledger, self._lookup, counters)
        self._storing = Storing(planner, groups, config.save_decode_cache)
        self._tiering = Tiering(
            self.index,
            geometry,
            self._lookup,
            tiers or {},
            namespace,
            tiering_rules(config),
            counters,
            barrier,
            ids,
        )
        self._ledger.on_stored = self._tiering.stored
        self._spaces = Spaces(hash_algorithm)
        self._records: dict[str, Record] = {}
        self._late_acks = LateAcks(self.acknowledge)
        self._step, self._closed = 0, False
        self.worker_nearby: Nearby | None = None

    def bind_block_pool(self, pool: Any) -> None:
        """Take vLLM's block pool; stores need it to keep their source blocks."""
        self._held.bind(pool, self._before_reset)

    @guard(lambda: None)
    def _before_reset(self) -> None:
        """VLLM resets its block pool, and may unmap KV after that: nothing may hold blocks, nor copy."""
        self._ledger.void_stores()
        if self.worker_nearby is not None:
            self.worker_nearby.drain()
            self._ask_nearby()

    def add_request(self, request: Any) -> Record:
        """A request arrived: look it up at once, so that what it will need counts as recently used."""
        options, space, nameable = request_options(request), self._spaces.plain, True
        try:
            space = self._spaces.of(request, options)
        except UnnameableError as error:
            nameable = False
            self.counters.add(f"misses:{error.reason}")
        limit = self._config.priority_limit
        wanted = not options.get("lmcache.skip_save", False) and (limit is None or request.priority <= limit)
        record = Record(
            request=request,
            space=space,
            may_load=self._roles.may_load and nameable,
            private=is_private(request),
            may_store=self._roles.may_store and nameable and wanted and not self._config.force_skip_save,
        )
        self._records[record.id] = record
        if nameable and not self._resting():
            self._tiering.arrived(record, self.frozen)
        return record

    def matched_tokens(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        """See `Lookup.answer`; None also when others must go first (`Turns`)."""
        self._admission.withdraw(request.request_id)
        tokens, asynchronous = self._answer(request, num_computed)
        tokens = self._turns.answer(request.request_id, tokens, asynchronous)
        if tokens:
            self._admission.offer(self._records[request.request_id], num_computed, asynchronous)
        return tokens, asynchronous

    def _answer(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        if self._closed:
            return 0, False
        self._ask_nearby()
        record = self._records.get(request.request_id) or self.add_request(request)
        if self._barrier.is_off():
            self._lookup.decline(record, num_computed, "turned_off")
            return 0, False
        self._tiering.poll()
        if self._tiering.waits(record):
            return self._lookup.answer_coming(record, num_computed, self._tiering.join)
        return self._lookup.answer(record, num_computed, len(self._records) == 1, self._ledger.loads_beside)

    def admit(self, request: Any, block_ids: list[int], tokens: int) -> None:
        """Blocks were allocated for `tokens` tokens of the last answer; 0: nothing of it is loaded.

        When this fails, `break_promise` must follow.
        """
        record = self._records.get(request.request_id) or self.add_request(request)
        self._storing.admit(record)
        self._tiering.forget(record)
        loads_beside = bool(tokens and record.plan and record.plan.asynchronous)
        self._turns.admit(record.id, loads_beside or self._others_load)
        load = self._admission.admit(self._step, record, block_ids, tokens)
        if self.worker_nearby is not None and load is not None and load.asynchronous:
            self.worker_nearby.start_loads(StepOrders([load]))

    def break_promise(self, request_id: str, block_ids: list[int], tokens: int) -> None:
        """What vLLM allocated blocks for and is not ordered ends as a failed load."""
        self._admission.break_promise(self._step, request_id, block_ids, tokens)

    def take_orders(self) -> StepOrders:
        """What is ordered whatever else this step brings: promised loads above all."""
        joins = self._ledger.take_joins()
        loads, broken = self._admission.take()
        return StepOrders(loads, self._storing.take_late(), broken, joins)

    def rescue_orders(self) -> StepOrders:
        """The orders of a step that could not be planned at all."""
        self._storing.stop()
        return self.take_orders()

    def plan_step(self, scheduled: Any) -> StepOrders:
        """The orders of this step. When planning fails, every promised load is reported as failed instead."""
        self._step += 1
        orders = self.take_orders()
        late = len(orders.stores)
        try:
            orders.idle = not scheduled.num_scheduled_tokens
            self._turns.run(scheduled.num_scheduled_tokens)
            self._ledger.orphan(scheduled.preempted_req_ids or ())
            self._ask_nearby()
            resting = self.frozen or self._resting()
            self._tiering.plan_step(scheduled.num_scheduled_tokens, orders, resting)
            if self.worker_nearby is not None and not orders.empty:
                self.worker_nearby.start_loads(orders)
            self._storing.plan(self._step, scheduled, resting, orders.stores)
        except BaseException as error:
            if not is_survivable(error):
                raise
            # Loads and late stores are ordered already; what was planned here is taken back.
            planned = orders.stores[late:]
            del orders.stores[late:]
            self._storing.stop()
            self._ledger.undo(planned)
            self.counters.add("dropped_stores:planning")
            raise PlanningError(orders) from error
        return orders

    def _resting(self) -> bool:
        """Whether nothing is looked up or stored: closed, or turned off for a while."""
        return self._closed or self._barrier.is_off()

    def finish_request(self, request: Any, block_ids: list[int]) -> None:
        """The request ended; its blocks are freed after this. Stores what it generated, if asked to."""
        if (record := self._records.get(request.request_id)) is None:
            return
        try:
            if not (self.frozen or self._resting()):
                self._storing.finish(self._step + 1, record, block_ids)
        finally:
            self.drop_request(record.id)

    def drop_request(self, request_id: str) -> None:
        """Forget the request, and what was kept or offered for it. Loads and stores in flight end by themselves."""
        self._storing.drop(request_id)
        self._admission.withdraw(request_id)
        self._turns.withdraw(request_id)
        if (record := self._records.pop(request_id, None)) is not None:
            with ExitStack() as parts:  # one that fails holds up no other
                parts.callback(self._tiering.forget, record)
                parts.callback(self._ledger.orphan, [record.id])
                parts.callback(self._lookup.forget, record)

    def acknowledge(self, acks: WorkerAcks) -> None:
        """The workers' answers of one step."""
        self._tiering.acknowledge(acks)
        self._ledger.acknowledge(acks)

    def acknowledge_later(self, acks: WorkerAcks) -> None:
        """Take these answers with the next step: the hook that brought them failed."""
        self._late_acks.keep(acks)

    def spoiled(self, blocks: set[int]) -> None:
        """VLLM was told, by whichever connector, that these blocks hold no right KV: nothing of them is kept."""
        self._ledger.void_reading(blocks)

    def received(self, request_ids: Iterable[str]) -> None:
        """VLLM was told that these requests' loads have ended."""
        self._ledger.received(request_ids)

    def _ask_nearby(self) -> None:
        """Blocks that come back with an answer may be needed at once."""
        if self.worker_nearby is not None and (acks := self.worker_nearby.take_acks()) is not None:
            self._late_acks.keep(acks)
        self._late_acks.retry()

    def has_work(self) -> bool:
        """Whether steps are needed although no request is left."""
        return self._storing.has_orders or self._tiering.needs_steps or self._ledger.busy

    def frees_blocks_soon(self) -> bool:
        """Whether blocks that no request needs any more will come back soon, or have just now."""
        due = self._ledger.holds_orphans
        self._ask_nearby()
        return due or self._ledger.holds_orphans

    def clear(self) -> tuple[int, bool]:
        """Forget all that is stored or offered. Returns rows forgotten, and whether each slower tier has forgotten too.

        Until it has it is not used. When RAM cannot be cleared nothing is found any more: the weights may be others.
        """
        try:
            rows = self._forget()
        finally:
            complete = self._tiering.clear(self._ask_nearby if self.worker_nearby is not None else None)
        return rows, complete

    def _forget(self) -> int:
        try:
            for record in self._records.values():
                self._lookup.forget(record)
            self._storing.stop()  # What runs on computes from KV of before.
            self._ledger.void_stores()
            return self.index.clear()
        except BaseException:
            self.shut()
            raise

    def shut(self) -> None:
        """Find, store and write nothing from now on, whatever is in the index and whatever ends."""
        self._closed, self._ledger.on_stored = True, lambda job: None

    def take_counters(self) -> dict[str, float]:
        """Counts since the last call, with what the pool holds now."""
        stats = self.index.stats()
        self.counters.set("evictions", stats["evictions"])
        if self._tiering.writes_any:
            self.counters.set("unsaved_evictions", stats["unsaved_evictions"])
        return self.counters.take() | pool_gauges(stats, self._geometry.slot_bytes)

    def close(self) -> None:
        """Nothing is found or stored from now on; what was promised still ends. Slower tiers keep what they have."""
        if not self._closed:
            self._forget()
            self.shut()
        self._tiering.close()
