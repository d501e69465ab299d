"""From vLLM's allocation to a load order: what was offered and allocated is ordered, or told as a failed load."""

from dataclasses import dataclass

import numpy as np

from lmcache_rs.connector.coming import release_rows
from lmcache_rs.connector.groups import NULL_BLOCK, Groups
from lmcache_rs.connector.ledger import Ledger
from lmcache_rs.connector.lookup import Lookup
from lmcache_rs.connector.orders import BrokenLoad, LoadOrder, Numbers
from lmcache_rs.connector.requests import Plan, Record


@dataclass(frozen=True, slots=True)
class Offer:
    """What vLLM was last answered for a request: it may allocate blocks for it, and then it must be kept."""

    record: Record
    num_computed: int
    asynchronous: bool


class Admission:
    """Holds offers until vLLM takes them up, and the loads that came of them until the step is ordered."""

    def __init__(self, lookup: Lookup, ledger: Ledger, groups: Groups) -> None:
        self._lookup = lookup
        self._ledger = ledger
        self._groups = groups
        self._offers: dict[str, Offer] = {}
        self._loads: list[LoadOrder] = []
        self._broken: list[BrokenLoad] = []

    def offer(self, record: Record, num_computed: int, asynchronous: bool) -> None:
        """VLLM is about to be told that tokens beyond `num_computed` can be loaded."""
        self._offers[record.id] = Offer(record, num_computed, asynchronous)

    def withdraw(self, request_id: str) -> None:
        """VLLM asks again, or the request is gone."""
        self._offers.pop(request_id, None)

    def admit(self, step: int, record: Record, block_ids: list[int], tokens: int) -> LoadOrder | None:
        """Order the load of `tokens` tokens into the request's new blocks; 0: nothing is loaded, None."""
        plan = record.plan
        order = None
        try:
            self._lookup.admit(record)
            if tokens:
                if plan is None:
                    raise LookupError(f"{tokens} tokens are to be loaded that were not offered")
                order = self._order(step, record, plan, block_ids, plan.num_computed + tokens)
            return order
        except BaseException:
            self._lookup.forget(record)
            raise
        finally:
            if plan is not None and order is None:
                release_rows(plan)

    def break_promise(self, step: int, request_id: str, block_ids: list[int], tokens: int) -> None:
        """Have a load fail that was promised and could not be ordered. Does nothing when none is open."""
        offer = self._offers.pop(request_id, None)
        if offer is None or not tokens:
            return
        first = offer.num_computed // self._groups.block_size * len(self._groups)
        blocks = np.array(block_ids[first:], dtype=np.uint32)
        end = offer.num_computed + tokens
        self._broken.append(self._ledger.open_broken(step, offer.record, blocks, end, offer.asynchronous))

    def take(self) -> tuple[list[LoadOrder], list[BrokenLoad]]:
        """Loads to be ordered with this step, and promises that are broken."""
        taken = self._loads, self._broken
        self._loads, self._broken = [], []
        return taken

    def _order(
        self, step: int, record: Record, plan: Plan, block_ids: list[int], end_tokens: int
    ) -> LoadOrder:
        first = plan.num_computed // self._groups.block_size
        blocks = self._groups.to_load(block_ids, first, end_tokens)
        rows = self._groups.rows(_slots(plan, first))[: len(blocks)]
        if plan.lease is None or len(rows) != len(blocks):
            raise LookupError(f"{len(blocks)} blocks were promised, {len(rows)} rows are there")
        real = blocks != NULL_BLOCK
        pair = (np.ascontiguousarray(rows[real]), blocks[real])
        order = self._ledger.open_load(step, record, plan, first, pair, end_tokens)
        self._offers.pop(record.id, None)
        self._loads.append(order)
        return order


def _slots(plan: Plan, first: int) -> Numbers:
    """The slots from block `first` on: those that are leased, then those that are filled meanwhile."""
    leased = np.frombuffer(plan.lease.rows(first) if plan.lease is not None else b"", dtype=np.uint32)
    if plan.coming is None:
        return leased
    return np.concatenate([leased[: max(0, plan.coming.first - first)], plan.coming.slots(first)])
