"""Who lets others go first that hold blocks for a load: vLLM would wait for those blocks before it asks about them."""

from collections.abc import Iterable

from lmcache_rs.connector.stats import Counters

TURNS_MAX = 10_000
"""So often at most a request is told to let others go first; loads end much sooner."""


class Turns:
    """Follows vLLM's queue of waiting requests.

    Blocks that were allocated for an asynchronous load are held from then until the request runs. Where vLLM's queue
    comes to a request that gets no blocks it goes no further, so a request that stands before holders and needs their
    blocks would wait for ever once nothing else runs. Two kinds stand there: those whose own load failed, which gave
    their blocks back and may need more of them now (a sliding window is loaded, but the prompt is computed), and on
    vLLM up to 0.31 also those that were told to ask again. They are told so until nobody holds blocks, and no
    asynchronous load begins meanwhile.
    """

    def __init__(self, counters: Counters, holders_go_first: bool) -> None:
        self._counters = counters
        self._holders_go_first = holders_go_first
        """Whether vLLM moves requests that hold no blocks behind those that do, when they are told to ask again."""
        self._holders: set[str] = set()
        self._early: set[str] = set()
        """They may stand before holders."""
        self._due: dict[str, int] = {}
        """Those of them that have their answer but for the holders, and how often they were told to wait."""

    def answer(self, request_id: str, tokens: int | None, asynchronous: bool) -> int | None:
        """`tokens`, or None where the request must let others go first."""
        if request_id in self._holders:  # nobody is asked about a request that holds blocks: its load failed
            self._holders.discard(request_id)
            self._early.add(request_id)
        if tokens is not None and self._must_wait(request_id, asynchronous):
            self._counters.add("waits_for_holders")
            tokens = None
        if tokens is None and not self._holders_go_first:
            self._early.add(request_id)
        return tokens

    def admit(self, request_id: str, asynchronous: bool) -> None:
        """Blocks were allocated; `asynchronous`: maybe for a load beside other requests' steps."""
        self.withdraw(request_id)
        if asynchronous:
            self._holders.add(request_id)

    def run(self, request_ids: Iterable[str]) -> None:
        """These requests are scheduled."""
        if self._holders:
            self._holders.difference_update(request_ids)

    def withdraw(self, request_id: str) -> None:
        """The request is gone; what it still holds comes back by itself."""
        self._holders.discard(request_id)
        self._early.discard(request_id)
        self._due.pop(request_id, None)

    def _must_wait(self, request_id: str, asynchronous: bool) -> bool:
        turns = self._due.get(request_id, 0)
        if request_id in self._early and self._holders and turns < TURNS_MAX:
            self._due[request_id] = turns + 1
            return True
        return asynchronous and bool(self._due) and request_id not in self._due
