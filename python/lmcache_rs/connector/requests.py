"""What the scheduler side knows of one request, from its arrival to its end."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcache_rs._core import KeySpace, Lease

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
    lease: Lease | None = None
    lease_rows: int = 0


@dataclass(slots=True)
class Record:
    """One request. `request` is vLLM's own object: its hashes and tokens grow by themselves."""

    request: Any
    space: KeySpace
    may_load: bool
    may_store: bool
    plan: Plan | None = None
    table: list[int] = field(default_factory=list)
    """Block ids by position, of each cache group, as of the last step in which the request was scheduled."""
    gap: bool = False
    """Blocks left the request before they were stored: what comes after them cannot be found."""
    tail: tuple[int, bytes] | None = None
    """(number of tokens, hash) of the partial last block, computed once."""
    tail_stored: bool = False
    loading: bool = False
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
    def user_id(self) -> str:
        """The id as the user knows it: without the eight hexadecimal digits that vLLM appends."""
        return _RANDOM_SUFFIX.sub("", self.id)

    def drop_plan(self) -> int:
        """Forget the answer; returns the rows whose lease ended."""
        plan, self.plan = self.plan, None
        if plan is None or plan.lease is None:
            return 0
        plan.lease.release()
        return plan.lease_rows


def request_options(request: Any) -> Mapping[str, Any]:
    """The `lmcache.*` entries of a request's `kv_transfer_params`; empty when it has none."""
    params = getattr(request, "kv_transfer_params", None)
    if not isinstance(params, Mapping):
        return {}
    return {k: v for k, v in params.items() if isinstance(k, str) and k.startswith("lmcache.")}
