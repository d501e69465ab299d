"""The engine's only worker as its scheduler side sees it, where both live in one process."""

from typing import Protocol

from lmcache_rs.connector.orders import StepOrders, WorkerAcks


class Nearby(Protocol):
    """What the scheduler side asks of it between two steps."""

    def take_acks(self) -> WorkerAcks | None:
        """Its answers, but for failed loads: of those vLLM hears by a step's output, which may come two steps late."""

    def drain(self) -> None:
        """Wait, for a bounded time, until no copy is in flight."""

    def start_loads(self, orders: StepOrders) -> None:
        """Begin loads as soon as they are ordered, and what a planned step fetches, before its inputs are prepared."""
