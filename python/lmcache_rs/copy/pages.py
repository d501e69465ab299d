"""Where the pages of KV tensors lie in memory, and the plainest way to fill them."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lmcache_rs.copy.cpu import as_blocks

Numbers = npt.NDArray[np.uint32]


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


def load_plainly(
    pool: torch.Tensor, tensors: Sequence[torch.Tensor], blocks: int, rows: Numbers, targets: Numbers
) -> None:
    """Copy rows of `pool` [rows, stride], uint8 on the host, into the blocks `targets` of the KV tensors' `blocks`.

    By torch's own copies on its current stream. Slow: the rows go through pageable memory.
    """
    chosen, offset = torch.from_numpy(rows.astype(np.int64)), 0
    for number, tensor in enumerate(tensors):
        _, stride_bytes, page_bytes = page_of(number, as_blocks(tensor, blocks))
        pages = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        first = tensor.storage_offset() * tensor.element_size()
        pages.set_(tensor.untyped_storage(), first, (blocks, page_bytes), (stride_bytes, 1))
        data = pool[chosen, offset : offset + page_bytes]
        pages[torch.from_numpy(targets.astype(np.int64)).to(tensor.device)] = data.to(tensor.device)
        offset += page_bytes
