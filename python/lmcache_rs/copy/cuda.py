"""The mover for KV on an NVIDIA GPU: kernels gather into staging, one copy a stage crosses the bus, nobody waits."""

import threading
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lmcache_rs._core import GpuMover, HostPool
from lmcache_rs.copy.cpu import as_blocks
from lmcache_rs.copy.gates import Gates
from lmcache_rs.copy.pages import load_plainly, page_of
from lmcache_rs.errors import DeviceError, LMCacheRsError
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

Numbers = npt.NDArray[np.uint32]
PinPolicy = Literal["require", "prefer", "off"]

STAGE_BYTES = 32 << 20
"""GPU memory of one staging buffer; there are four. What a copy puts on the bus at once: small copies of the engine's
own steps wait for it, 0.6 ms.

A quarter of it would cost 3 % of the bus.
"""

LOAD_PARTS = (4, 4, 4, 3, 1)
"""In such parts, by their shares of the bytes, comes a load by layers.

What is computed with the last part comes after the load: with a small one a prompt of 10,000 tokens alone takes 1.4 ms
less than with four equal parts.
"""

STORE_PARTS = (1,) * 12
"""In so many parts go stores by layers: the last one has crossed the bus before a long forward ends."""

CLOSE_S_MAX = 5.0
"""Closing waits this long for copies in flight."""

TELL_EVERY_S = 5.0
"""How often the progress of pinning is told, which takes some seconds for 16 GiB."""

PROGRESS_THREAD = "lmcache-pin-progress"

FIRST_PIN_S_MAX = 30.0
"""With `pin: require`, the constructor waits this long for the first rows to be pinned."""


class CudaMover:
    """Copies whole blocks between pool rows and KV tensors on one GPU.

    Every page (one block of one tensor) is contiguous bytes; where pages lie is free. Loads and stores go in the
    background, loads first; `join_load` makes the current stream wait for one, on the GPU. With `fence_loads` all loads
    write blocks only after what the current stream was given before: for models whose steps still zero or use them.
    `stores_by_layers`: for models whose steps compute each layer once.
    """

    def __init__(
        self,
        pool: HostPool,
        tensors: Sequence[torch.Tensor],
        blocks: int,
        *,
        pin: PinPolicy = "prefer",
        fence_loads: bool = False,
        stores_by_layers: bool = True,
        stage_bytes: int = STAGE_BYTES,
    ) -> None:
        self._pool = pool
        self._fence_loads = fence_loads
        self._tensors, self._blocks = tensors, blocks
        self._device = common_device(tensors)
        layers = [page_of(number, as_blocks(tensor, blocks)) for number, tensor in enumerate(tensors)]
        self._pins = Pins(pool, pin, self._device.index)
        streams = [torch.cuda.Stream(self._device) for _ in range(6)]  # type: ignore[no-untyped-call]
        bytes_each = min(max(1, stage_bytes // pool.row_stride), pool.rows) * pool.row_stride
        staging = [torch.empty(bytes_each, dtype=torch.uint8, device=self._device) for _ in range(4)]
        buffers = [(buffer.data_ptr(), bytes_each) for buffer in staging]
        handles = [stream.cuda_stream for stream in streams]
        self._mover = GpuMover(
            pool,
            layers,
            blocks,
            self._device.index,
            ((handles[0], handles[1]), handles[2], handles[3], (handles[4], handles[5])),
            buffers[:2],
            buffers[2:],
            LOAD_PARTS,
            STORE_PARTS,
            keep=(tensors, streams, staging),
        )
        self._gates = Gates(self._mover.load_parts, self._device)
        self.store_parts = tuple(self._mover.store_parts) if stores_by_layers else ()
        """The first layer of each part that `store` takes."""
        self._ended: list[tuple[int, int, float]] = []
        self._closed = False

    @property
    def rows(self) -> int:
        """Rows of the pool."""
        return self._pool.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a block."""
        return self._pool.row_bytes

    def load_now(self, job: int, rows: Numbers, blocks: Numbers, by_layers: bool = False) -> None:
        """Load in the background what the next forward reads, after what the current stream was given before."""
        self._pins.check()
        self._gates.fenced()
        self._mover.submit_load(job, rows, blocks, self._stream(), by_layers)

    def submit_load(self, job: int, rows: Numbers, blocks: Numbers, by_layers: bool = False) -> None:
        """Load in the background."""
        if self._fence_loads:
            self.load_now(job, rows, blocks, by_layers)
        else:
            self._pins.check()
            self._mover.submit_load(job, rows, blocks, None, by_layers)

    def join_load(self, job: int, layer: int | None = None) -> None:
        """Have the current stream wait for a load, or for one layer of a load by layers. Returns at once."""
        self._mover.join_load(job, self._stream(), layer)

    def is_captured(self) -> bool:
        """Whether the current stream captures a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def gate(self, layer: int) -> None:
        """Have the graph that is captured wait here for the part of a gated load that begins after this layer."""
        self._gates.wait(layer)

    def gate_load(self, job: int) -> bool:
        """Have the graph that is replayed next wait for a load by layers, at its gates; for the first part before."""
        if not self._gates.set(lambda stream, layer: self._mover.join_load(job, stream, layer)):
            return False
        self.join_load(job, 0)
        return True

    def rescue(self, rows: Numbers, blocks: Numbers) -> bool:
        """Load by torch's own copies, while the GPU does nothing else."""
        torch.cuda.synchronize(self._device)
        load_plainly(torch.utils.dlpack.from_dlpack(self._pool), self._tensors, self._blocks, rows, blocks)
        torch.cuda.synchronize(self._device)
        return True

    def settle_loads(self, seconds: float, by_layers_seconds: float) -> list[int]:
        """Loads that will have ended in so many seconds, if they go on as they did, and cannot fail any more."""
        return self._mover.settle_loads(seconds, by_layers_seconds)

    def store(self, job: int, rows: Numbers, blocks: Numbers, part: int | None = None) -> None:
        """Store in the background what the blocks, or some layers, hold after what the current stream was given."""
        self._pins.check()
        self._mover.submit_store(job, rows, blocks, self._stream(), part)

    def drain(self, seconds: float) -> bool:
        """Wait until no copy is in flight; False when that took longer."""
        return self._mover.drain(seconds)

    def poll(self) -> list[tuple[int, int, float]]:
        """Jobs that ended since the last call: (job, bytes or -1, seconds)."""
        ended, self._ended = self._ended, []
        return ended if self._closed else ended + self._mover.poll()

    def close(self) -> bool:
        """End the copies and their thread; what ended until then can still be polled. Safe twice.

        Whether the GPU touches nothing any more.
        """
        self._pins.close()
        if self._closed:
            return self._mover.close(0)
        try:
            self._mover.drain(CLOSE_S_MAX)
        except DeviceError as error:
            logger.warning("copies with the GPU failed before they were closed: %s", error)
        self._ended += self._mover.poll()
        self._closed = True
        # The first call gives up what was not submitted and says so; a second one tells whether the rest has ended.
        ended = self._mover.close(0) or self._mover.close(0)
        if not ended:
            logger.warning(
                "the GPU did not end its copies in %.0f s: their memory is never freed", CLOSE_S_MAX
            )
        return ended

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)


class Pins:
    """Pins the pool as the policy says, and tells of failures, once."""

    def __init__(self, pool: HostPool, policy: PinPolicy, device: int) -> None:
        self._pool = pool
        self._required = policy == "require"
        self._settled = policy == "off"
        self._began = time.monotonic()
        self._closed = threading.Event()
        if self._settled:
            return
        try:
            pool.pin(device)
        except LMCacheRsError as error:
            if self._required:
                raise
            self._settled = True
            logger.warning("the cache's memory is not pinned, copies are several times slower: %s", error)
            return
        if self._required:
            self._wait_for_the_first()
        threading.Thread(target=self._tell, name=PROGRESS_THREAD, daemon=True).start()

    def close(self) -> None:
        """Tell no more."""
        self._closed.set()

    def _tell(self) -> None:
        pool = self._pool
        while not self._closed.wait(TELL_EVERY_S):
            pinned = pool.pinned_bytes
            if pool.pin_error is not None or pinned == pool.size_bytes:
                return
            logger.info("Host pool: %.1f of %.1f GiB are pinned", pinned / 2**30, pool.size_bytes / 2**30)

    def check(self) -> None:
        """Look whether pinning failed: a warning, or with `require` a DeviceError, each time."""
        if self._settled:
            return
        error = self._pool.pin_error
        if error is None:
            self._settled = self._pool.pinned_bytes == self._pool.size_bytes
            if self._settled:
                logger.info(
                    "Host pool: all of it is pinned, %.1f s after its start", time.monotonic() - self._began
                )
            return
        message = f"pinned {self._pool.pinned_bytes} of {self._pool.size_bytes} bytes of the cache's memory: {error}"
        if self._required:
            raise DeviceError(message)
        self._settled = True
        logger.warning("%s. Copies with the rest are several times slower", message)

    def _wait_for_the_first(self) -> None:
        deadline = time.monotonic() + FIRST_PIN_S_MAX
        while not self._pool.pinned_bytes:
            self.check()
            if time.monotonic() > deadline:
                raise DeviceError(f"no byte of the cache's memory was pinned in {FIRST_PIN_S_MAX:.0f} s")
            time.sleep(0.001)


def common_device(tensors: Sequence[torch.Tensor]) -> torch.device:
    """The one GPU that all KV tensors are on."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise ValueError(f"KV tensors are on {sorted(map(str, devices))}: they must be on one GPU")
    return devices.pop()
