"""A forward comes after the loads that bring what it reads: after all of each, or after each of its layers."""

import time
from collections.abc import Callable, Mapping, Sequence

from lmcache_rs.connector.answers import Answers
from lmcache_rs.connector.layered import LayeredLoads
from lmcache_rs.connector.mover import SPOILED_S_MAX, Mover
from lmcache_rs.connector.orders import LoadOrder
from lmcache_rs.connector.pieces import Pieces


class Joins:
    """Makes forwards wait for a worker's loads, and sees to those for which they could not be made to."""

    def __init__(
        self,
        pieces: Pieces,
        answers: Answers,
        report: Callable[[str, BaseException], None],
        poll: Callable[[], bool],
    ) -> None:
        """`poll` takes in what ended, and tells whether that could be found out."""
        self._pieces, self._answers = pieces, answers
        self._report, self._poll = report, poll
        self.layered = LayeredLoads({})

    def attach(self, layers: Mapping[str, int]) -> None:
        """Take the layers' numbers."""
        self.layered = LayeredLoads(layers)

    def wait_for(self, job: int, asks: bool, mover: Mover) -> None:
        """Have the next forward wait for a load that has not ended: layer by layer if that can be, else for all of it.

        `asks`: that forward asks for each layer.
        """
        if not isinstance(order := self._answers.load(job), LoadOrder):
            return
        try:
            if not self.layered.begin(order, asks, mover):
                self._pieces.join(job, mover)
        except BaseException as error:
            self._spoil(order, error)

    def rescue(self, orders: Sequence[LoadOrder], mover: Mover) -> None:
        """Load in another way what has failed: with overlapping steps vLLM keeps a token that it computes meanwhile."""
        for order in orders:
            if order.asynchronous or not self._answers.has_failed(order):
                continue
            try:
                if mover.rescue(order.rows, order.blocks):
                    self._answers.rescued(order)
            except BaseException as error:
                self._report("rescue", error)

    def settle(self, mover: Mover | None) -> None:
        """The forward was submitted. Loads of which it did not wait for every layer have failed."""
        for order, missing in self.layered.end(mover):
            self._spoil(order, RuntimeError(f"{missing} layers of it were not waited for"))

    def _spoil(self, order: LoadOrder, error: BaseException) -> None:
        """A forward may read what a load has not brought: it fails, but not before it has ended, if it ever does."""
        self._report("load", error)
        deadline = time.monotonic() + SPOILED_S_MAX
        while self._answers.load(order.job) is not None and time.monotonic() < deadline and self._poll():
            time.sleep(0.001)
        self._answers.spoil(order)
