"""The parts of the GPU's mover that need no GPU: where pages of KV lie, and what the pin policy does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lmcache_rs._core import HostPool

torch = pytest.importorskip("torch")

from lmcache_rs.copy.cpu import CpuMover, as_blocks  # noqa: E402
from lmcache_rs.copy.cuda import PROGRESS_THREAD, Pins, common_device  # noqa: E402
from lmcache_rs.copy.pages import load_plainly, page_of  # noqa: E402
from lmcache_rs.errors import DeviceError  # noqa: E402


def page_bytes_by_element(tensor: Any, block: int) -> set[int]:
    """Addresses of all bytes of a block, element by element."""
    size = tensor.element_size()
    offsets = {0}
    for count, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True):
        offsets = {offset + index * stride for offset in offsets for index in range(count)}
    first = tensor.data_ptr() + block * tensor.stride(0) * size
    return {first + offset * size + byte for offset in offsets for byte in range(size)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float32])
def test_pages_are_the_bytes_of_their_block(dtype: Any) -> None:
    backing = torch.zeros(6 * 3 * 2 * 4 * 5, dtype=dtype)
    layer_outer = backing.view(3, 6, 2, 4, 5)
    block_outer = backing.view(6, 3, 2, 4, 5)
    tensors = [
        layer_outer[1],
        block_outer[:, 2],
        layer_outer[1].permute(0, 2, 1, 3),
        block_outer[:, 0].permute(0, 3, 1, 2),
        torch.zeros(6, 8, 5, dtype=dtype)[:, :4],
        torch.zeros(6, 16, 1, 9, dtype=dtype),
        torch.zeros(6, 7, dtype=dtype)[2:3],
        as_blocks(torch.zeros(12, 4, 5, dtype=dtype), 6),
    ]
    for tensor in tensors:
        address, stride, page = page_of(0, tensor)
        for block in range(tensor.shape[0]):
            first = address + block * stride
            assert page_bytes_by_element(tensor, block) == set(range(first, first + page))


def test_the_plain_way_fills_the_same_bytes_as_the_cpus_mover() -> None:
    source = torch.Generator().manual_seed(1)

    def tensors() -> list[Any]:
        backing = torch.zeros(6 * 3 * 2 * 4 * 5, dtype=torch.bfloat16)
        block_outer = torch.zeros(6, 2, 4, 5)
        return [
            backing.view(3, 6, 2, 4, 5)[1],
            block_outer[:, 0],
            block_outer[:, 1].permute(0, 2, 1),
            torch.zeros(12, 16, dtype=torch.uint8),
        ]

    plain, moved = tensors(), tensors()
    row_bytes = sum(t.numel() * t.element_size() // 6 for t in plain)
    pool = HostPool(8 * 4096, row_bytes)
    view = torch.from_dlpack(pool)
    view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=source))
    rows, blocks = np.array([5, 0, 7], np.uint32), np.array([1, 4, 2], np.uint32)
    load_plainly(view, plain, 6, rows, blocks)
    CpuMover(pool, moved, 6, 1).load_now(1, rows, blocks)
    for one, other in zip(plain, moved, strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    assert any(bool(tensor.view(torch.uint8).any()) for tensor in plain[:1])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 8, 5)[:, :, :3],
        torch.zeros(4, 8, 5)[:, ::2],
        torch.zeros(2, 4, 8, 5).permute(1, 0, 2, 3),
        torch.zeros(4, 1, 5).expand(4, 8, 5),
    ],
)
def test_blocks_with_holes_are_refused(tensor: Any) -> None:
    with pytest.raises(ValueError, match=r"KV tensor 3 of shape .* not contiguous"):
        page_of(3, tensor)


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['cpu'\]"):
        common_device([torch.zeros(1)])
    with pytest.raises(ValueError, match=r"\['cpu', 'meta'\]"):
        common_device([torch.zeros(1), torch.zeros(1, device="meta")])


class StubPool:
    """A pool whose pinning goes as a test wants it."""

    size_bytes = 100

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.pinned_bytes = 0
        self.pin_error: str | None = None
        self.devices: list[int] = []

    def pin(self, device: int) -> None:
        self.devices.append(device)
        if self.refusal:
            raise DeviceError(self.refusal)


@pytest.fixture
def pins() -> Iterator[Callable[[StubPool, str], Pins]]:
    """Makes them, and has them tell no more in the end."""
    made = []

    def make(pool: StubPool, policy: str) -> Pins:
        made.append(Pins(pool, policy, 3))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()
    while progress_threads():
        time.sleep(0.001)


def progress_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == PROGRESS_THREAD]


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("lmcache_rs"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_off_pins_nothing(pins: Any, warnings_of: Any) -> None:
    pool = StubPool("no driver")
    pins(pool, "off").check()
    assert (pool.devices, warnings_of()) == ([], [])


def test_prefer_says_once_what_failed_and_goes_on(pins: Any, warnings_of: Any) -> None:
    pins(StubPool("no driver"), "prefer").check()
    pool = StubPool()
    preferred = pins(pool, "prefer")
    preferred.check()
    pool.pinned_bytes, pool.pin_error = 40, "ulimit -l"
    preferred.check()
    preferred.check()
    first, second = warnings_of()
    assert "no driver" in first
    assert all(part in second for part in ("40 of 100", "ulimit -l"))
    assert pool.devices == [3]


def test_progress_is_told_while_there_is_some(pins: Any) -> None:
    with pytest.raises(DeviceError):
        pins(StubPool("no driver"), "require")
    pins(StubPool("no driver"), "prefer")
    pins(StubPool(), "off")
    assert not progress_threads()
    pins(StubPool(), "prefer")
    assert progress_threads()


def test_require_raises_at_once_or_from_then_on(pins: Any) -> None:
    with pytest.raises(DeviceError, match="no driver"):
        pins(StubPool("no driver"), "require")
    pool = StubPool()
    pool.pin_error = "ulimit -l"
    with pytest.raises(DeviceError, match=r"0 of 100.*ulimit -l"):
        pins(pool, "require")
    pool.pinned_bytes, pool.pin_error = 40, None
    required = pins(pool, "require")
    required.check()
    pool.pin_error = "ulimit -l"
    for _ in range(2):
        with pytest.raises(DeviceError, match="40 of 100"):
            required.check()
