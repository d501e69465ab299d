"""What the scheduler side knows of one request, from its arrival to its end."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcache_rs._core import KeySpace, Lease
from lmcache_rs.connector.coming import Coming
from lmcache_rs.connector.groups import Groups

_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


@dataclass(slots=True)
class Plan:
    """An answer given to vLLM, and what it was based on: the same question gets the same answer for free."""

    num_computed: int
    num_tokens: int
    epoch: int
    tokens: int | None
    """Tokens offered beyond `num_computed`; None: ask again."""
    asynchronous: bool = False
    by_layers: bool = False
    """The forward may begin while the load's last layers are on their way."""
    lease: Lease | None = None
    lease_rows: int = 0
    coming: Coming | None = None
    """What follows the leased rows and is still on its way."""


@dataclass(slots=True)
class Record:
    """One request. `request` is vLLM's own object: its hashes and tokens grow by themselves."""

    request: Any
    space: KeySpace
    may_load: bool
    may_store: bool
    private: bool = False
    """Its KV stays in RAM: its identity is one of this process only."""
    plan: Plan | None = None
    table: list[int] = field(default_factory=list)
    """Block ids by position, of each cache group, as of the last step in which the request was scheduled."""
    gap: bool = False
    """Blocks left the request before they were stored: what comes after them cannot be found."""
    tail: tuple[int, bytes] | None = None
    """(number of tokens, hash) of the partial last block, computed once."""
    tail_stored: bool = False
    loading: bool = False
    unscheduled: bool = False
    """It was given blocks and was not scheduled since. vLLM counts tokens that an asynchronous load, ours or that of
    another connector under MultiConnector, is to bring, and may not."""
    failures: int = 0
    offer_below: int | None = None
    """After a failed load: the next answer must end before this many tokens."""
    pending_since: float | None = None
    logged: bool = False

    @property
    def id(self) -> str:
        """VLLM's internal request id."""
        request_id: str = self.request.request_id
        return request_id

    @property
    def reads(self) -> bool:
        """Whether anything may be loaded for it: vLLM wants all of some requests computed."""
        return self.may_load and not getattr(self.request, "skip_reading_prefix_cache", False)

    @property
    def user_id(self) -> str:
        """The id as the user knows it: without the eight hexadecimal digits that vLLM appends."""
        return _RANDOM_SUFFIX.sub("", self.id)


def request_options(request: Any) -> Mapping[str, Any]:
    """The `lmcache.*` entries of a request's `kv_transfer_params`; empty when it has none."""
    params = getattr(request, "kv_transfer_params", None)
    if not isinstance(params, Mapping):
        return {}
    return {k: v for k, v in params.items() if isinstance(k, str) and k.startswith("lmcache.")}


def follow_tables(storing: dict[str, Record], scheduled: Any, groups: Groups) -> dict[str, int]:
    """Bring the block tables of `storing` up to this step. Returns tokens computed before it, by request.

    A new request comes with its whole table, a resumed one too; a running one with what was added.
    """
    computed: dict[str, int] = {}
    for new in scheduled.scheduled_new_reqs:
        record = storing.get(new.req_id)
        if record is not None:
            record.table, record.gap = groups.table(new.block_ids), False
            computed[new.req_id] = new.num_computed_tokens
    cached = scheduled.scheduled_cached_reqs
    for i, request_id in enumerate(cached.req_ids):
        record = storing.get(request_id)
        if record is None:
            continue
        added = cached.new_block_ids[i]
        if request_id in cached.resumed_req_ids:
            record.table, record.gap = groups.table(added) if added is not None else [], False
        elif added is not None:
            groups.extend(record.table, added)
        computed[request_id] = cached.num_computed_tokens[i]
    for request_id, tokens in computed.items():
        groups.forget_out_of_window(storing[request_id].table, tokens)
    return computed
