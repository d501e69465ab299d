"""Which blocks of a request are stored after a step: those whose tokens are final and that are not held yet."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_rs._core import Index, Reservation
from lmcache_rs.connector.groups import NULL_BLOCK, Groups
from lmcache_rs.connector.holds import HeldBlocks
from lmcache_rs.connector.ledger import Ledger
from lmcache_rs.connector.lookup import Lookup
from lmcache_rs.connector.orders import StoreOrder
from lmcache_rs.connector.requests import Record
from lmcache_rs.connector.stats import Counters
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


@dataclass(frozen=True, slots=True)
class StoreRules:
    """What the configuration says about storing."""

    decode: bool
    """Store generated tokens too, not only the prompt."""
    tails: bool
    """Store the prompt's partial last block."""
    skip_last_tokens: int
    """Tokens at the prompt's end that are not stored."""


class StorePlanner:
    """Plans the stores of one step."""

    def __init__(
        self,
        index: Index,
        groups: Groups,
        rules: StoreRules,
        held: HeldBlocks,
        ledger: Ledger,
        lookup: Lookup,
        counters: Counters,
    ) -> None:
        self._index = index
        self._groups = groups
        self._block_size = groups.block_size
        self._rules = rules
        self._held = held
        self._ledger = ledger
        self._lookup = lookup
        self._counters = counters

    def plan(self, step: int, record: Record, computed: int) -> StoreOrder | None:
        """Store what of the request's first `computed` tokens is final and missing.

        The whole prefix is offered each time: what was dropped or evicted since is still on the GPU, and is stored
        again. `computed` may count unverified draft tokens; the request's own tokens never do.
        """
        request, size = record.request, self._block_size
        end = request.num_tokens if self._rules.decode else request.num_prompt_tokens
        final = max(0, min(computed, end - self._rules.skip_last_tokens))
        full = min(final // size, len(request.block_hashes), len(record.table) // len(self._groups))
        if self._has_gap(record, full):
            return None
        tail = self._tail(record, computed)
        reservation = self._reserve(record, full, tail)
        if not len(reservation):
            return None
        try:
            order = self._order(step, record, reservation, final)
        except BaseException:
            reservation.abort()
            raise
        if order is not None and reservation.tail:
            record.tail_stored = True
        return order

    def finished(self, record: Record, computed: int) -> bool:
        """Whether nothing of the request is left to store while it runs on."""
        return record.gap or (not self._rules.decode and computed >= record.request.num_prompt_tokens)

    def _tail(self, record: Record, computed: int) -> bytes | None:
        """The prompt's partial last block, once all of it is computed, while no generated token has a hash yet."""
        request, size = record.request, self._block_size
        prompt = request.num_prompt_tokens
        start = prompt - prompt % size
        tails = self._rules.tails and not self._rules.skip_last_tokens
        wanted = tails and not record.tail_stored and start < prompt <= computed
        positions = len(record.table) // len(self._groups)
        if not wanted or request.num_tokens != prompt or start // size >= positions:
            return None
        return self._lookup.tail(record, start)

    def _has_gap(self, record: Record, full: int) -> bool:
        """Whether blocks are missing in the index that vLLM has taken from the request: nothing can follow them.

        Told before rows are reserved, for which others would have to leave.
        """
        gone = min(self._groups.incomplete(record.table), full)
        if gone and not record.gap:
            match = self._index.match(record.space, record.request.block_hashes[:gone])
            # What is in flight is on its way; whether all of it is, the reservation will tell.
            record.gap = match.blocks < gone and not match.pending
            if record.gap:
                self._counters.add("dropped_blocks:out_of_window", full - match.blocks)
        return record.gap

    def _reserve(self, record: Record, full: int, tail: bytes | None) -> Reservation:
        hashes = record.request.block_hashes[:full]
        reservation = self._index.reserve(record.space, hashes, tail)
        room = self._held.room // len(self._groups)
        if len(reservation) > room:
            # vLLM's pool is small or much is in flight: the start of what is missing, the rest is dropped.
            keep = reservation.first + room
            reservation.abort()
            self._counters.add("dropped_blocks:held_limit", full - keep)
            reservation = self._index.reserve(record.space, hashes[:keep])
        if reservation.dropped:
            self._counters.add("dropped_blocks:pool_full", reservation.dropped)
        return reservation

    def _order(self, step: int, record: Record, reservation: Reservation, final: int) -> StoreOrder | None:
        first, count, size = reservation.first, len(reservation), self._block_size
        groups = len(self._groups)
        blocks = np.array(record.table[first * groups : (first + count) * groups], dtype=np.uint32)
        if len(blocks) != count * groups or (blocks == NULL_BLOCK).any():
            reservation.abort()
            self._counters.add("dropped_blocks:no_block", count)
            return None
        end = record.request.num_prompt_tokens if reservation.tail else (first + count) * size
        tokens = end - first * size
        rows = self._groups.rows(np.frombuffer(reservation.rows, dtype=np.uint32))
        order = self._ledger.open_store(step, record, reservation, rows, blocks, tokens)
        logger.info("Storing KV cache for %d out of %d tokens for request %s", tokens, final, record.user_id)
        return order


def final_tokens(request: Any) -> int:
    """Tokens of an ended request whose KV was computed and is final: the last sampled one has none."""
    return min(int(request.num_computed_tokens), int(request.num_tokens) - 1)
