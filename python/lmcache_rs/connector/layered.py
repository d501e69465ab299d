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
        self._loads: list[tuple[LoadOrder, set[int] | None]] = []
        """Loads, and the layers of each that the forward has not asked for; None: it need not, it waits at gates."""
        self._captures = Captures(self._last)

    @property
    def gated(self) -> bool:
        """Whether every forward that was captured waits for each layer."""
        return self._captures.complete

    @property
    def waited_for(self) -> bool:
        """Whether a forward waits for layers, or has."""
        return bool(self._loads)

    def begin(self, order: LoadOrder, asks: bool, mover: Mover) -> bool:
        """The step's forward is to wait for each layer; `asks`: it calls `before`, otherwise it is a captured one.

        False: it has to wait for the whole load now.
        """
        if not order.by_layers or order.pieces:
            return False
        if asks:
            mover.join_load(order.job, 0)
        elif not (self._captures.complete and mover.gate_load(order.job)):
            return False
        self._loads.append((order, set(self._layers.values()) if asks else None))
        return True

    def before(self, name: str, mover: Mover) -> None:
        """The forward reads this layer next."""
        layer = self._layers.get(name)
        if layer is None:
            return
        for order, missing in self._loads:
            mover.join_load(order.job, min(layer + 1, self._last))
            if missing is not None:
                missing.discard(layer)

    def capture(self, name: str, mover: Mover) -> None:
        """The forward that is being captured reads this layer next."""
        layer = self._layers.get(name)
        if layer is not None:
            mover.gate(layer)
            self._captures.add(layer)

    def end(self, mover: Mover | None) -> list[tuple[LoadOrder, int]]:
        """The forward was submitted: loads of which it did not ask for every layer, and for how many it did not.

        What comes after the forward waits for all of every load.
        """
        loads, self._loads = self._loads, []
        for order, missing in loads:
            if missing is None and mover is not None:
                mover.join_load(order.job)
        return [(order, len(missing)) for order, missing in loads if missing]


class Captures:
    """Whether every CUDA graph that was captured waits for all layers, one after the other."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._at = -1
        """Where the captures are: at no layer yet, at the last one between two of them."""
        self._odd = False

    def add(self, layer: int) -> None:
        """A capture has come to this layer."""
        follows = layer == (self._at + 1) % (self._last + 1)
        self._odd = self._odd or not (follows or layer == self._at)
        self._at = layer

    @property
    def complete(self) -> bool:
        """Not before there is one, and never again after one that went another way."""
        return not self._odd and self._at == self._last
