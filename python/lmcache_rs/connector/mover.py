"""What the worker side asks of a device: copies between pool rows and KV blocks."""

from collections.abc import Sequence
from typing import Protocol

from lmcache_rs.connector.orders import Numbers

SPOILED_S_MAX = 5.0
"""A load whose layers the forward did not wait for is waited for at most this long."""

DRAIN_S_MAX = 5.0
"""Before vLLM takes its KV back, copies in flight are waited for at most this long."""


class Mover(Protocol):
    """Copies between pool rows and KV blocks; `lmcache_rs.copy` has one for each kind of device."""

    @property
    def rows(self) -> int:
        """Rows of the pool."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a block, which a row holds."""

    def load_now(self, job: int, rows: Numbers, blocks: Numbers, by_layers: bool = False) -> None:
        """Begin a load that the next forward reads, which joins it before it does."""

    def submit_load(self, job: int, rows: Numbers, blocks: Numbers, by_layers: bool = False) -> None:
        """Load beside whatever runs."""

    def join_load(self, job: int, layer: int | None = None) -> None:
        """What is computed from now on comes after the load, or after its layer, whichever way the device does it."""

    def is_captured(self) -> bool:
        """Whether what the calling thread computes now is not run but captured, to be replayed in later forwards."""

    def gate(self, layer: int) -> None:
        """In a capture, between the use of this layer and of the next one: replays wait here for gated loads."""

    def gate_load(self, job: int) -> bool:
        """Have the replay that comes next wait for a load by layers at its gates; False: the load must be joined."""

    def rescue(self, rows: Numbers, blocks: Numbers) -> bool:
        """Load before the next forward what `load_now` failed to, however slowly; False: there is no other way."""

    def settle_loads(self, seconds: float, by_layers_seconds: float) -> list[int]:
        """Loads that will have ended in so many seconds, if they go on as they did, and will not fail any more.

        `by_layers_seconds`: for those that the forward waits for by layers.
        """

    @property
    def store_parts(self) -> Sequence[int]:
        """The first layer of each part of the layers that `store` takes; empty: it takes none."""

    def store(self, job: int, rows: Numbers, blocks: Numbers, part: int | None = None) -> None:
        """Store the blocks, or a part of their layers, as they are after what the step has computed so far."""

    def drain(self, seconds: float) -> bool:
        """Wait until no copy is in flight; False when that took longer."""

    def poll(self) -> list[tuple[int, int, float]]:
        """Jobs that ended, nothing touching their rows or blocks any more: (job, bytes or -1, s)."""

    def close(self) -> bool:
        """End in bounded time. Whether nothing touches KV or rows afterwards; what ended can still be polled."""
