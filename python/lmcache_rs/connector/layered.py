"""Loads by layers of one step, and the layers of them that the forward has not waited for."""

from collections.abc import Iterator, Mapping

from lmcache_rs.connector.orders import LoadOrder


class LayeredLoads:
    """`layers`: the number of each layer by its name. Two layers may share one."""

    def __init__(self, layers: Mapping[str, int]) -> None:
        self._layers = layers
        self._missing: list[tuple[LoadOrder, set[int]]] = []

    def add(self, order: LoadOrder) -> None:
        """The step's forward has to wait for every layer of this load."""
        self._missing.append((order, set(self._layers.values())))

    def waited_for(self, name: str) -> Iterator[tuple[int, int]]:
        """The forward waits for this layer: the job and the number of the layer in each load."""
        layer = self._layers.get(name)
        if layer is None:
            return
        for order, missing in self._missing:
            yield order.job, layer
            missing.discard(layer)

    def take_unfinished(self) -> list[tuple[LoadOrder, int]]:
        """The forward was submitted: loads of which it did not wait for every layer, and for how many it did not."""
        missing, self._missing = self._missing, []
        return [(order, len(layers)) for order, layers in missing if layers]
