"""How many of a request's tokens the cache can provide, asked by vLLM until the request is admitted."""

import time
from collections.abc import Callable
from typing import Any

from lmcache_rs._core import Index, Match
from lmcache_rs.connector.chunks import Chain
from lmcache_rs.connector.coming import Coming, release_rows
from lmcache_rs.connector.requests import Plan, Record
from lmcache_rs.connector.rules import LookupRules
from lmcache_rs.connector.stats import Counters
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

TailHash = Callable[[Any, int], bytes | None]
"""(request, start) -> hash of the partial block of its tokens from `start` on; None when it cannot be named."""

WAITING_LEASES_SHARE_MAX = 0.5
"""Share of the pool that requests not yet admitted may keep from leaving; beyond it a hit only counts as recent."""

FAILED_LOADS_MAX = 2
"""After so many failed loads a request is computed, whatever the index says.

After the first one its loads hold the step: for one beside other steps vLLM (0.26 to 0.33) wants the blocks of the
failed one twice, perhaps more than it has.
"""


class Lookup:
    """Answers vLLM's question, and keeps what was promised from leaving until the request is admitted."""

    def __init__(
        self,
        index: Index,
        block_size: int,
        slot_bytes: int,
        rules: LookupRules,
        counters: Counters,
        tail_hash: TailHash,
    ) -> None:
        self._index = index
        self._block_size = block_size
        self._slot_bytes = slot_bytes
        self._rules = rules
        self._counters = counters
        self._tail_hash = tail_hash
        self._waiting_rows = 0

    def answer(
        self, record: Record, num_computed: int, alone: bool, loads_beside: bool
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond `num_computed` (None: ask again), and whether asynchronously.

        Asked every step while the request waits: the same question costs nothing and changes nothing. `alone`: no
        other request could run meanwhile, so holding the step costs nobody anything. `loads_beside`: another load is on
        its way, and what holds the step would wait behind it.
        """
        if not record.reads:
            return 0, False
        if record.loading:
            # Preempted before every rank said how its load ended: what failed must not be offered again.
            return 0, False
        plan = self._current(record, num_computed)
        if plan is None or plan.coming is not None:
            self.forget(record)
            plan = record.plan = self._plan(record, num_computed, self._index.epoch, alone, loads_beside)
        if plan.tokens is None:
            record.plan = None
        return plan.tokens, plan.asynchronous

    def answer_coming(
        self, record: Record, num_computed: int, join: Callable[[Record, int], Coming | None]
    ) -> tuple[int | None, bool]:
        """Tokens beyond `num_computed` of which the last are on their way from a slower tier; None: ask again.

        `join`: guards what is coming from a block on.
        """
        plan = self._current(record, num_computed)
        if plan is None or plan.coming is None:
            self.forget(record)
            plan = record.plan = self._plan_coming(record, num_computed, join)
        return (plan.tokens, True) if plan is not None else (None, False)

    def _current(self, record: Record, num_computed: int) -> Plan | None:
        """The answer to the last question, if this is the same."""
        plan, asked = record.plan, (num_computed, record.request.num_tokens, self._index.epoch)
        same = plan is not None and (plan.num_computed, plan.num_tokens, plan.epoch) == asked
        return plan if same else None

    def decline(self, record: Record, num_computed: int, reason: str) -> None:
        """Offer nothing, and keep nothing for the request."""
        self.forget(record)
        self._note(record, 0, num_computed, reason)

    def forget(self, record: Record) -> None:
        """Drop the answer and what it kept."""
        plan, record.plan = record.plan, None
        if plan is not None:
            self._waiting_rows -= plan.lease_rows
            release_rows(plan)

    def admit(self, record: Record) -> None:
        """The request is admitted with its answer: the plan is the caller's now, with a lease if it found anything."""
        plan, record.plan = record.plan, None
        if plan is None:
            return
        self._waiting_rows -= plan.lease_rows
        if plan.tokens and plan.lease is None:
            # Nothing left since the answer: rows leave only when a step's stores are planned, after this.
            plan.lease = self._match(record).lease()

    def tail(self, record: Record, start: int) -> bytes | None:
        """Hash of the request's partial block from token `start` on, computed once a length."""
        num_tokens: int = record.request.num_tokens
        if record.tail is None or record.tail[0] != num_tokens:
            tail = self._tail_hash(record.request, start)
            if tail is None:
                return None
            record.tail = (num_tokens, tail)
        return record.tail[1]

    def chain(self, record: Record) -> Chain:
        """What of the request's prompt is stored and looked for."""
        request, rules = record.request, self._rules
        prompt: int = request.num_prompt_tokens
        start = prompt - prompt % self._block_size
        tail = None
        if rules.tails and not rules.skip_last_tokens and start < prompt:
            # Once tokens were generated vLLM's request no longer tells it.
            known = record.tail if record.tail is not None and record.tail[0] == prompt else None
            tail = known[1] if known else self.tail(record, start) if request.num_tokens == prompt else None
        end = max(0, prompt - rules.skip_last_tokens) // self._block_size
        return Chain(request.block_hashes[:end], tail)

    def _match(self, record: Record) -> Match:
        request, size = record.request, self._block_size
        hashes = request.block_hashes
        end = request.num_tokens - self._rules.skip_last_tokens
        if record.offer_below is not None:
            end = min(end, record.offer_below - 1)
        if end < request.num_tokens:
            return self._index.match(record.space, hashes[: max(0, end) // size])
        start = len(hashes) * size
        tail = self.tail(record, start) if self._rules.tails and start < end else None
        return self._index.match(record.space, hashes, tail)

    def _plan(self, record: Record, num_computed: int, epoch: int, alone: bool, loads_beside: bool) -> Plan:
        request, size = record.request, self._block_size
        nothing = Plan(num_computed, request.num_tokens, epoch, 0)
        if record.failures >= FAILED_LOADS_MAX or (record.failures and not self._rules.may_hold_step):
            self._note(record, 0, num_computed, "load_failed")
            return nothing
        match = self._match(record)
        total = request.num_tokens if match.tail else match.blocks * size
        if self._rules.max_tokens and total - num_computed > self._rules.max_tokens:
            total = num_computed + self._rules.max_tokens // size * size
        if match.pending and total + size > num_computed and self._wait(record):
            return Plan(num_computed, request.num_tokens, epoch, None)
        # One token is always computed; a load of that token's block alone would be for nothing.
        hit = min(total, request.num_tokens - 1)
        need = max(0, hit - num_computed)
        reason = self._why_not(record, match, need)
        self._note(record, hit, num_computed, reason)
        if reason is not None:
            return nothing
        asynchronous, load_slots = self._holds_nobody(total, num_computed, alone, loads_beside)
        asynchronous = asynchronous and not record.failures
        if asynchronous and not self._rules.asynchronous_only:
            # VLLM computes the last token all the same. Where it drops blocks out of the window of the token after
            # that one, it would drop one that the last token still needs.
            need = total - num_computed
        by_layers = self._comes_by_layers(num_computed, load_slots)
        plan = Plan(num_computed, request.num_tokens, epoch, need, asynchronous, by_layers)
        self._keep(plan, match)
        return plan

    def _plan_coming(
        self, record: Record, num_computed: int, join: Callable[[Record, int], Coming | None]
    ) -> Plan | None:
        request, rules = record.request, self._rules
        waits = not rules.asynchronous or rules.max_tokens or record.failures or record.loading
        if waits or not record.reads:
            return None
        match = self._match(record)
        coming = join(record, match.blocks) if match.blocks and not match.tail else None
        if coming is None:
            return None
        end = min(coming.tokens, request.num_tokens - 1) if rules.asynchronous_only else coming.tokens
        need = end - num_computed
        if need < max(1, rules.min_tokens):
            coming.release()
            return None
        plan = Plan(num_computed, request.num_tokens, self._index.epoch, need, True, coming=coming)
        self._note(record, min(end, request.num_tokens - 1), num_computed, None)
        self._keep(plan, match)
        return plan

    def _holds_nobody(
        self, total: int, num_computed: int, alone: bool, loads_beside: bool
    ) -> tuple[bool, int]:
        """Whether to load what leads to `total` tokens beside the steps of other requests; the slots read."""
        rules, size = self._rules, self._block_size
        slots = -(-total // size) - num_computed // size
        limit = 0 if loads_beside else rules.sync_bytes_max
        beside = rules.asynchronous and slots * self._slot_bytes > limit and not (alone and limit)
        return rules.asynchronous_only or beside, slots

    def _comes_by_layers(self, num_computed: int, slots: int) -> bool:
        """Whether a load is worth it, and fills its blocks from their first token on."""
        least = self._rules.layered_bytes_min
        if least is None or self._rules.asynchronous_only:
            return False
        return slots * self._slot_bytes >= least and num_computed % self._block_size == 0

    def _why_not(self, record: Record, match: Match, need: int) -> str | None:
        if need >= max(1, self._rules.min_tokens):
            return None
        if need > 0:
            return "below_min_retrieve_tokens"
        if record.failures:
            return "load_failed"
        return "in_gpu" if match.blocks or match.tail else "not_found"

    def _keep(self, plan: Plan, match: Match) -> None:
        rows = match.blocks + match.tail
        if self._waiting_rows + rows > self._index.rows * WAITING_LEASES_SHARE_MAX:
            self._counters.add("leases_refused")
            return
        plan.lease = match.lease()
        plan.lease_rows = rows if plan.lease is not None else 0
        self._waiting_rows += plan.lease_rows

    def _wait(self, record: Record) -> bool:
        """Whether to ask again for rows still being stored; at most `pending_s_max` a request."""
        now = time.monotonic()
        if record.pending_since is None:
            record.pending_since = now
        if now - record.pending_since < self._rules.pending_s_max:
            return True
        self._counters.add("pending_timeouts")
        return False

    def _note(self, record: Record, hit: int, num_computed: int, reason: str | None) -> None:
        """Log and count a request's first answer; later ones (it still waits, or was preempted) are not news."""
        if record.logged:
            return
        record.logged = True
        request = record.request
        need = max(0, hit - num_computed)
        counters = self._counters
        counters.add("lookups")
        counters.add("lookup_tokens", request.num_tokens)
        counters.add("lookup_hits", hit)
        counters.add("gpu_hit_tokens", num_computed)
        if reason is None:
            counters.add("hit_tokens", need)
        else:
            counters.add(f"misses:{reason}")
        if reason == "below_min_retrieve_tokens":
            logger.info(
                "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, "
                "but need to load: %d < min_retrieve %d, skip retrieve",
                record.user_id,
                request.num_tokens,
                hit,
                need,
                self._rules.min_tokens,
            )
            return
        logger.info(
            "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d",
            record.user_id,
            request.num_tokens,
            hit,
            need,
        )
