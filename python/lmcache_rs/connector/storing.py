"""Which requests still have something to store, and their stores of each step."""

from typing import Any

from lmcache_rs.connector.groups import Groups
from lmcache_rs.connector.orders import StoreOrder
from lmcache_rs.connector.requests import Record, follow_tables
from lmcache_rs.connector.stores import StorePlanner, final_tokens


class Storing:
    """Follows the block tables of requests while they have something to store."""

    def __init__(self, planner: StorePlanner, groups: Groups, decode: bool) -> None:
        self._planner = planner
        self._groups = groups
        self._decode = decode
        self._records: dict[str, Record] = {}
        self._late: list[StoreOrder] = []

    def admit(self, record: Record) -> None:
        """The request has blocks from now on."""
        record.unscheduled = True
        if record.may_store:
            self._records[record.id] = record

    def drop(self, request_id: str) -> None:
        """The request is gone."""
        self._records.pop(request_id, None)

    def stop(self) -> None:
        """Store nothing of these requests until they are admitted again: their tables are not followed any more."""
        self._records.clear()

    @property
    def has_orders(self) -> bool:
        """Whether stores of ended requests wait to be ordered."""
        return bool(self._late)

    def take_late(self) -> list[StoreOrder]:
        """Stores of requests that ended since the last step."""
        late, self._late = self._late, []
        return late

    def plan(self, step: int, scheduled: Any, resting: bool, stores: list[StoreOrder]) -> None:
        """Add this step's stores to `stores`; none while `resting`."""
        if not self._records:
            return
        storing, counts = self._records, scheduled.num_scheduled_tokens
        computed = follow_tables(storing, scheduled, self._groups)
        for request_id, before in computed.items():
            record = storing[request_id]
            record.unscheduled = False
            after = before + counts.get(request_id, 0)
            order = None if resting else self._planner.plan(step, record, after)
            if order is not None:
                stores.append(order)
            # While it loads it may have to be computed, and stored, again.
            if self._planner.finished(record, after) and not record.loading:
                del storing[request_id]

    def finish(self, step: int, record: Record, block_ids: list[int]) -> None:
        """The request ended: store what it generated, if asked to, with the orders of `step`."""
        computed = record.id in self._records and not (record.loading or record.unscheduled)
        if not computed or not self._decode:
            return
        record.table = list(block_ids)
        # Ordered with the next step, which runs after the last one that computed anything of this request.
        order = self._planner.plan(step, record, final_tokens(record.request))
        if order is not None:
            self._late.append(order)
