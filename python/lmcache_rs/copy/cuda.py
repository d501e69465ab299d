"""The mover for KV on an NVIDIA GPU: kernels gather into staging, one copy a stage crosses the bus, nobody waits."""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lmcache_rs._core import GpuMover, HostPool
from lmcache_rs.copy.cpu import as_blocks
from lmcache_rs.errors import DeviceError, LMCacheRsError
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

Numbers = npt.NDArray[np.uint32]
PinPolicy = Literal["require", "prefer", "off"]

STAGE_BYTES = 64 << 20
"""GPU memory of one staging buffer; there are four. About a millisecond of the bus."""

BACKGROUND_BYTES = 16 << 20
"""What a background copy puts on the bus at once: the small copies of the engine's own steps queue behind it."""

CLOSE_S_MAX = 5.0
"""Closing waits this long for copies in flight."""

FIRST_PIN_S_MAX = 30.0
"""With `pin: require`, the constructor waits this long for the first rows to be pinned."""


class CudaMover:
    """Copies whole blocks between pool rows and KV tensors on one GPU.

    Every page (one block of one tensor) is contiguous bytes; where pages lie is free. Loads and stores go in the
    background, loads first; `load_now` makes the current stream wait, on the GPU. With `fence_loads` background loads
    write blocks only after what the current stream was given before: for models whose steps still zero or use them.
    """

    def __init__(
        self,
        pool: HostPool,
        tensors: Sequence[torch.Tensor],
        blocks: int,
        *,
        pin: PinPolicy = "prefer",
        fence_loads: bool = False,
        stage_bytes: int = STAGE_BYTES,
        background_bytes: int = BACKGROUND_BYTES,
    ) -> None:
        self._pool = pool
        self._fence_loads = fence_loads
        self._device = common_device(tensors)
        layers = [page_of(number, as_blocks(tensor, blocks)) for number, tensor in enumerate(tensors)]
        self._pins = Pins(pool, pin, self._device.index)
        streams = [torch.cuda.Stream(self._device) for _ in range(4)]  # type: ignore[no-untyped-call]
        bytes_each = min(max(1, stage_bytes // pool.row_stride), pool.rows) * pool.row_stride
        staging = [torch.empty(bytes_each, dtype=torch.uint8, device=self._device) for _ in range(4)]
        buffers = [(buffer.data_ptr(), bytes_each) for buffer in staging]
        load_copy, load_scatter, store_gather, store_copy = (stream.cuda_stream for stream in streams)
        self._mover = GpuMover(
            pool,
            layers,
            blocks,
            self._device.index,
            (load_copy, load_scatter, store_gather, store_copy),
            buffers[:2],
            buffers[2:],
            background_bytes,
            keep=(tensors, streams, staging),
        )
        self._ended: list[tuple[int, int, float]] = []
        self._loads_now: deque[tuple[int, torch.cuda.Event, int, float]] = deque()
        self._closed = False

    @property
    def rows(self) -> int:
        """Rows of the pool."""
        return self._pool.rows

    def load_now(self, job: int, rows: Numbers, blocks: Numbers) -> None:
        """Load before what the current stream is given from now on. Returns at once; the GPU waits."""
        self._pins.check()
        began = time.perf_counter()
        moved = self._mover.load_now(rows, blocks, self._stream())
        # The current stream waits for the load, so an event on it says when the load has ended.
        ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ended.record(torch.cuda.current_stream(self._device))
        self._loads_now.append((job, ended, moved, began))

    def submit_load(self, job: int, rows: Numbers, blocks: Numbers) -> None:
        """Load in the background."""
        self._pins.check()
        self._mover.submit_load(job, rows, blocks, self._stream() if self._fence_loads else None)

    def store(self, job: int, rows: Numbers, blocks: Numbers) -> None:
        """Store in the background what the blocks hold after what the current stream was given before."""
        self._pins.check()
        self._mover.submit_store(job, rows, blocks, self._stream())

    def poll(self) -> list[tuple[int, int, float]]:
        """Jobs that ended since the last call: (job, bytes or -1, seconds)."""
        self._poll_loads_now()
        ended, self._ended = self._ended, []
        return ended if self._closed else ended + self._mover.poll()

    def _poll_loads_now(self) -> None:
        while self._loads_now and self._loads_now[0][1].query():  # type: ignore[no-untyped-call]
            job, _, moved, began = self._loads_now.popleft()
            self._ended.append((job, moved, time.perf_counter() - began))

    def close(self) -> bool:
        """End the copies and their thread; what ended until then can still be polled. Safe twice.

        Whether the GPU touches nothing any more.
        """
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
        if self._settled:
            return
        try:
            pool.pin(device)
        except LMCacheRsError as error:
            if self._required:
                raise
            self._settled = True
            logger.warning("the cache's memory is not pinned, copies are several times slower: %s", error)
        if self._required:
            self._wait_for_the_first()

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


def page_of(number: int, tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where the pages of a tensor [blocks, ...] lie: address of the first, bytes from one to the next, bytes of one."""
    inner = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
        if size != 1
    )
    dense = [math.prod(size for _, size in inner[:place]) for place in range(len(inner))]
    if [stride for stride, _ in inner] != dense:
        raise ValueError(
            f"KV tensor {number} of shape {tuple(tensor.shape)} has strides {tensor.stride()}: its blocks are not "
            f"contiguous memory, which the cache cannot move"
        )
    page_bytes = math.prod(tensor.shape[1:]) * tensor.element_size()
    stride_bytes = tensor.stride(0) * tensor.element_size() if tensor.shape[0] > 1 else page_bytes
    return tensor.data_ptr(), stride_bytes, page_bytes
