"""Loads by layers: the forward waits for each layer, by its own calls or inside of the CUDA graph that it is.

It is made to wait one layer ahead: vLLM writes the new tokens of a layer before it asks for that layer, and in a block
that is partly loaded they come after the load.
"""

from collections.abc import Mapping

from lmcache_rs.connector.mover import Mover
from lmcache_rs.connector.orders import LoadOrder


class LayeredLoads:
    """Those of one step. `layers`: the number of each layer by its name. Two layers may share one."""

    def __init__(self, layers: Mapping[str, int]) -> None:
        self._layers = layers
        self._last = max(layers.values(), default=0)
        self._missing: list[tuple[LoadOrder, set[int]]] = []
        """Loads, and the layers of them that the forward has not waited for."""
        self._gated: list[int] = []
        self._captures = Captures(self._last)

    def begin(self, order: LoadOrder, asks: bool, mover: Mover) -> bool:
        """The step's forward is to wait for each layer; `asks`: it calls `before`, otherwise it is a captured one.

        False: it has to wait for the whole load now.
        """
        if not order.by_layers:
            return False
        if asks:
            mover.join_load(order.job, 0)
            self._missing.append((order, set(self._layers.values())))
        elif self._captures.complete and mover.gate_load(order.job):
            self._gated.append(order.job)
        else:
            return False
        return True

    def before(self, name: str, mover: Mover) -> None:
        """The forward reads this layer next, or the one that is captured will."""
        layer = self._layers.get(name)
        if layer is None:
            return
        if mover.is_captured():
            mover.gate(layer)
            self._captures.add(layer)
            return
        for order, missing in self._missing:
            mover.join_load(order.job, min(layer + 1, self._last))
            missing.discard(layer)

    def end(self, mover: Mover | None) -> list[tuple[LoadOrder, int]]:
        """The forward was submitted: loads of which it did not wait for every layer, and for how many it did not.

        What comes after the forward waits for all of every load.
        """
        gated, self._gated = self._gated, []
        if mover is not None:
            for job in gated:
                mover.join_load(job)
        missing, self._missing = self._missing, []
        return [(order, len(layers)) for order, layers in missing if layers]


class Captures:
    """Whether every CUDA graph that was captured waits for all layers, one after the other."""

    def __init__(self, last: int) -> None:
        self._last = self._at = last
        """The last layer, and where the captures are: there, between two of them."""
        self._any = self._odd = False

    def add(self, layer: int) -> None:
        """A capture has come to this layer."""
        follows = layer == (0 if self._at == self._last else self._at + 1)
        self._odd = self._odd or not (follows or layer == self._at)
        self._any, self._at = True, layer

    @property
    def complete(self) -> bool:
        """Not before there is one, and never again after one that went another way."""
        return self._any and not self._odd and self._at == self._last
