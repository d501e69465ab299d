"""The cache without vLLM: store and retrieve the KV of token sequences, for tests, benches and other engines."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache_rs._core import (
    ClosedError,
    HostPool,
    Index,
    InvalidArgumentError,
    KeySpace,
    KvLayers,
    Lease,
    Mover,
    hash_tokens,
)
from lmcache_rs.config import Config, load_config
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Blocks = Sequence[int] | npt.NDArray[np.integer[Any]]


class LMCacheEngine:
    """Keeps blocks of the given KV tensors in host memory, by the tokens they were computed from.

    `kv_caches` has one CPU tensor a layer (torch or numpy, anything with `__dlpack__`), each `[blocks, ...]` with every
    block contiguous; a block holds the KV of `block_size` tokens. They are read and written in place. `config` gives
    the size of the host memory and whether partial last blocks are kept (default: `load_config()`); there are no slower
    tiers. Tokens are whole numbers from 0 to 2**32 - 1, else InvalidArgumentError is raised.

    Not thread-safe beyond the safety of each call; blocks may not be written while a call reads them.
    """

    def __init__(self, kv_caches: Sequence[Any], block_size: int, config: Config | None = None) -> None:
        self._config = config if config is not None else load_config()
        if not isinstance(block_size, int) or block_size < 1:
            raise InvalidArgumentError(f"block_size must be a whole number, 1 or more, got {block_size!r}")
        for notice in self._config.notices:
            notice.log(logger)
        if self._config.disk or self._config.redis:
            logger.warning("LMCacheEngine keeps KV in RAM only: disk and Redis are for vLLM")
        self._block_size = block_size
        layers = KvLayers(kv_caches)
        self._pool = HostPool(
            self._config.max_local_cpu_bytes,
            layers.row_bytes,
            self._config.prefault_threads,
            self._config.local_cpu_use_hugepages,
        )
        self._index = Index(self._pool.rows)
        self._mover = Mover(self._pool, layers, self._config.copy_threads or 1)
        self._space = KeySpace("blake3")
        self._frozen = self._config.freeze
        self._closed = False

    def store(self, tokens: TokenIds, blocks: Blocks, salt: bytes = b"") -> int:
        """Keep the KV of `tokens`, which lies in `blocks` (one block for each started `block_size` tokens).

        `salt` names everything but the tokens that decides the KV: model, adapter, tenant. What is kept already is not
        copied again. Returns the number of tokens newly stored; fewer than asked when the memory is full of leased KV.
        """
        if self._frozen:
            return 0
        ids, numbers = self._checked(tokens, blocks)
        hashes, tail = self._hashes(ids, salt)
        reservation = self._index.reserve(self._space, hashes, tail)
        count, first = len(reservation), reservation.first
        if not count:
            return 0
        try:
            self._mover.copy("store", reservation.rows, numbers[first : first + count])
        except BaseException:
            reservation.abort()
            raise
        reservation.commit()
        end = len(ids) if reservation.tail else (first + count) * self._block_size
        return end - first * self._block_size

    def retrieve(self, tokens: TokenIds, blocks: Blocks, salt: bytes = b"") -> int:
        """Copy the longest stored prefix of `tokens` into `blocks`. Returns the number of tokens in it.

        The result ends at a block's end, or at the end of `tokens`.
        """
        ids, numbers = self._checked(tokens, blocks)
        found, lease = self._match(ids, salt)
        if lease is None:
            return 0
        try:
            self._mover.copy("load", lease.rows(), numbers[: len(lease)])
        finally:
            lease.release()
        return found

    def lookup(self, tokens: TokenIds, salt: bytes = b"") -> int:
        """Tokens that `retrieve` would bring; counts as a use of them."""
        found, lease = self._match(_numbers(tokens, "tokens"), salt)
        if lease is not None:
            lease.release()
        return found

    def clear(self) -> int:
        """Forget everything. Returns the number of blocks forgotten."""
        self._require_open()
        return self._index.clear()

    def freeze(self, frozen: bool = True) -> None:
        """Store nothing from now on (what is there can be retrieved), or store again."""
        self._frozen = frozen

    @property
    def is_frozen(self) -> bool:
        """Whether nothing is stored."""
        return self._frozen

    def stats(self) -> dict[str, int]:
        """The index's gauges and counters, and the pool's `size_bytes`, `row_bytes` and `prefaulted_bytes`."""
        pool = self._pool
        return {
            **self._index.stats(),
            "size_bytes": pool.size_bytes,
            "row_bytes": pool.row_bytes,
            "prefaulted_bytes": pool.prefaulted_bytes,
        }

    def close(self) -> None:
        """End the copy threads; later calls raise `ClosedError`. Safe twice."""
        self._closed = True
        self._mover.close()

    def __enter__(self) -> "LMCacheEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _match(self, ids: npt.NDArray[np.uint32], salt: bytes) -> tuple[int, Lease | None]:
        hashes, tail = self._hashes(ids, salt)
        match = self._index.match(self._space, hashes, tail)
        return len(ids) if match.tail else match.blocks * self._block_size, match.lease()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("this engine was closed")

    def _hashes(self, ids: npt.NDArray[np.uint32], salt: bytes) -> tuple[list[bytes], bytes | None]:
        self._require_open()
        hashes, tail = hash_tokens(salt, ids, self._block_size)
        return hashes, tail if self._config.tails else None

    def _checked(
        self, tokens: TokenIds, blocks: Blocks
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        ids, numbers = _numbers(tokens, "tokens"), _numbers(blocks, "blocks")
        needed = -(-len(ids) // self._block_size)
        if numbers.ndim != 1 or len(numbers) < needed:
            raise InvalidArgumentError(f"{len(ids)} tokens need {needed} blocks, got {numbers.size}")
        return ids, numbers


def _numbers(values: TokenIds | Blocks, name: str) -> npt.NDArray[np.uint32]:
    numbers = np.asarray(values)
    limit = np.iinfo(np.uint32).max
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > limit):
        raise InvalidArgumentError(f"{name} must be whole numbers from 0 to {limit}")
    return np.ascontiguousarray(numbers, dtype=np.uint32)
