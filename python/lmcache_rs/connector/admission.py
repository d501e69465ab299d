"""From vLLM's allocation to a load order: what was offered and allocated is ordered, or told as a failed load."""

from dataclasses import dataclass

import numpy as np

from lmcache_rs.connector.ledger import Ledger
from lmcache_rs.connector.lookup import Lookup
from lmcache_rs.connector.orders import BrokenLoad, LoadOrder
from lmcache_rs.connector.requests import Plan, Record
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.stores import NULL_BLOCK


@dataclass(frozen=True, slots=True)
class Offer:
    """What vLLM was last answered for a request: it may allocate blocks for it, and then it must be kept."""

    record: Record
    num_computed: int
    asynchronous: bool


class Admission:
    """Holds offers until vLLM takes them up, and the loads that came of them until the step is ordered."""

    def __init__(self, lookup: Lookup, ledger: Ledger, block_size: int, counters: Counters) -> None:
        self._lookup = lookup
        self._ledger = ledger
        self._block_size = block_size
        self._counters = counters
        self._offers: dict[str, Offer] = {}
        self._loads: list[LoadOrder] = []
        self._broken: list[BrokenLoad] = []

    def offer(self, record: Record, num_computed: int, asynchronous: bool) -> None:
        """VLLM is about to be told that tokens beyond `num_computed` can be loaded."""
        self._offers[record.id] = Offer(record, num_computed, asynchronous)

    def withdraw(self, request_id: str) -> None:
        """VLLM asks again, or the request is gone."""
        self._offers.pop(request_id, None)

    def admit(self, step: int, record: Record, block_ids: list[int], tokens: int) -> None:
        """Order the load of `tokens` tokens into the request's new blocks; 0: nothing is loaded."""
        plan = record.plan
        try:
            self._lookup.admit(record)
            if tokens:
                if plan is None:
                    raise LookupError(f"{tokens} tokens are to be loaded that were not offered")
                first, end = plan.num_computed // self._block_size, plan.num_computed + tokens
                last = -(-end // self._block_size)
                self._order(step, record, plan, first, block_ids[first:last], end)
        finally:
            if plan is not None and not record.loading and plan.lease is not None:
                plan.lease.release()

    def break_promise(self, step: int, request_id: str, block_ids: list[int], tokens: int) -> None:
        """Have a load fail that was promised and could not be ordered. Does nothing when none is open."""
        offer = self._offers.pop(request_id, None)
        if offer is None or not tokens:
            return
        blocks = np.array(block_ids[offer.num_computed // self._block_size :], dtype=np.uint32)
        end = offer.num_computed + tokens
        self._broken.append(self._ledger.open_broken(step, offer.record, blocks, end, offer.asynchronous))

    def take(self) -> tuple[list[LoadOrder], list[BrokenLoad]]:
        """Loads to be ordered with this step, and promises that are broken."""
        taken = self._loads, self._broken
        self._loads, self._broken = [], []
        return taken

    def _order(
        self, step: int, record: Record, plan: Plan, first: int, block_ids: list[int], end_tokens: int
    ) -> None:
        lease = plan.lease
        count = len(block_ids)
        rows = np.frombuffer(lease.rows(first), dtype=np.uint32)[:count] if lease is not None else ()
        if lease is None or len(rows) != count:
            raise LookupError(f"{count} blocks were promised, {len(rows)} rows are there")
        blocks = np.array(block_ids, dtype=np.uint32)
        real = blocks != NULL_BLOCK
        pair = (np.ascontiguousarray(rows[real]), blocks[real])
        order = self._ledger.open_load(step, record, lease, first, pair, end_tokens, plan.asynchronous)
        self._offers.pop(record.id, None)
        self._loads.append(order)
