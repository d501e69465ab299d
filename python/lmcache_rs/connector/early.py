"""Asynchronous loads are told to vLLM shortly before they end, so that the step that reads them is planned by then."""

from collections.abc import Callable

from lmcache_rs.connector.answers import Answers
from lmcache_rs.connector.mover import Mover
from lmcache_rs.connector.orders import LoadOrder
from lmcache_rs.connector.pace import Pace
from lmcache_rs.connector.pieces import Pieces


class EarlyEnds:
    """Finds the loads that will have ended before vLLM can use their blocks; it is made to join them then."""

    def __init__(
        self, pace: Pace, pieces: Pieces, answers: Answers, report: Callable[[str, BaseException], None]
    ) -> None:
        """`report`: told why nothing can be foretold, which holds up no answer."""
        self._report = report
        self._pace = pace
        self._pieces = pieces
        self._answers = answers

    def tell(self, mover: Mover | None, gated: bool) -> None:
        """Tell of them. `gated`: loads by layers end while the forward that reads them runs."""
        if mover is None or not self._answers.asynchronous or not (lead := self._pace.lead()):
            return
        layered = lead + (self._pace.step_seconds() if gated else 0.0)
        try:
            settled = mover.settle_loads(lead, layered)
        except BaseException as error:
            self._report("settle_loads", error)
            return
        for job in self._pieces.settled(settled):
            order = self._answers.load(job)
            if isinstance(order, LoadOrder) and order.asynchronous and order.held:
                self._answers.tell_early(order)
