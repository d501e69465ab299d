"""The Rust core: index, host memory, copies and tiers. One call a batch; the GIL is released around the work.

Arrays of row, block and chunk numbers cross as native unsigned 32-bit integers: results are `bytes` (view them with
`numpy.frombuffer(x, numpy.uint32)`), arguments are any one-dimensional C-contiguous buffer of format "I"
(`numpy.uint32`, `array.array("I")`) or `bytes` of that layout.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, CapsuleType

# Before Python 3.12 an array is no `Buffer` to a type checker.
_Numbers: TypeAlias = Buffer | npt.NDArray[np.uint32]

__all__ = [
    "ClosedError",
    "Departure",
    "DeviceError",
    "GpuMover",
    "HostPool",
    "Index",
    "InternalError",
    "InvalidArgumentError",
    "KeySpace",
    "KvLayers",
    "LMCacheRsError",
    "Lease",
    "Match",
    "Mover",
    "OutOfMemoryError",
    "Reservation",
    "Tier",
    "TierError",
    "TierQueue",
    "__version__",
    "build_profile",
    "cuda_available",
    "hash_tokens",
    "pool_rows",
    "sha256_block_hashes",
    "tier_namespace",
]

__version__: str
build_profile: Literal["debug", "release"]

class LMCacheRsError(Exception):
    """Root of every error raised by lmcache_rs."""

class InvalidArgumentError(LMCacheRsError):
    """An argument is out of range or of the wrong shape."""

class OutOfMemoryError(LMCacheRsError):
    """The machine did not give the memory asked for."""

class ClosedError(LMCacheRsError):
    """The object was closed, or belongs to another process (after a fork)."""

class DeviceError(LMCacheRsError):
    """The GPU's driver refused a call, or there is none."""

class TierError(LMCacheRsError):
    """A place beyond RAM did not do what it was asked for."""

class InternalError(LMCacheRsError):
    """A bug in lmcache_rs: a panic or a broken invariant."""

def hash_tokens(root: bytes, tokens: _Numbers, block_size: int) -> tuple[list[bytes], bytes | None]:
    """Chain hashes of a token sequence, for engines that bring no block hashes of their own.

    `root` names everything but the tokens that decides their KV (model, adapter, salt). `tokens` are native
    unsigned 32-bit integers. Returns the 32-byte blake3 hash of the prefix ending at each full block, and that of
    the partial last block (None when the length is a multiple of `block_size`).
    """

def sha256_block_hashes(parent: bytes, tokens: list[int], block_size: int) -> list[bytes]:
    """The 32-byte hashes of the full blocks of `tokens`, each over the one before; `parent` comes before the first.

    Byte for byte those of vLLM's `hash_block_tokens` with its hash function `sha256` and without extra keys: SHA-256
    of `pickle.dumps((parent, (token, ...), None), protocol=5)`. What would be pickled in another form is an
    `InvalidArgumentError`: tokens that are not `int` itself or have more than 31 bits, blocks of more than 8,192
    tokens, a parent of more than 255 bytes.
    """

@final
class KeySpace:
    """Everything beside a block's hash that names its KV: two spaces never share a key."""

    def __new__(cls, algorithm: str, group: int = 0, tags: Sequence[tuple[str, str]] = ()) -> KeySpace: ...
    def key(self, block_hash: bytes) -> bytes:
        """The 32-byte key of a block hash: blake3 keyed with the digest of this space."""
    def chunk_keys(
        self, hashes: Sequence[bytes], tail: bytes | None, chunk_blocks: int, first_chunk: int = 0
    ) -> bytes:
        """The keys of a prompt's chunks from number `first_chunk` on, 32 bytes each, one after the other.

        A chunk is `chunk_blocks` consecutive full blocks of `hashes` (a list or tuple), and has the key of its last. If
        blocks are left over, or there is a `tail`, they are one more, shorter chunk, with the key of the tail, or else
        of the last block.
        """

@final
class Index:
    """Which blocks are held, in which row, in what order they may leave. Thread-safe; holds no memory of the pool.

    Every key has one row. A row is reserved (being written), visible (can be found) or leaving. A row is visible only
    when its parent is, so presence is monotone along a prefix. Least recently used leaves leave first; leased rows and
    their ancestors stay.
    """

    def __new__(cls, rows: int) -> Index: ...
    @property
    def rows(self) -> int:
        """Rows in use: as constructed, or shrunk."""
    @property
    def epoch(self) -> int:
        """Changes whenever something becomes visible, is removed or stops being in flight."""
    def match(self, space: KeySpace, hashes: Sequence[bytes], tail: bytes | None = None) -> Match:
        """The longest visible prefix of `hashes` (a list or tuple), then of `tail` when all of `hashes` is visible.

        Counts as a use of what it finds. O(log n) look-ups.
        """
    def reserve(self, space: KeySpace, hashes: Sequence[bytes], tail: bytes | None = None) -> Reservation:
        """Give a row to each key of the chain `hashes` (+ `tail`) that is neither visible nor in flight.

        Evicts what it needs, never an ancestor of what it reserves. When rows run out the rest of the chain is
        dropped and counted.
        """
    def take_unsaved(
        self, space: KeySpace, hashes: Sequence[bytes], tail: bytes | None, chunk_blocks: int
    ) -> Departure | None:
        """The chunks of a chain that are visible and not marked as saved, marked from now on, under one lease. None
        when there are none.

        A chunk is the rows of a chain whose positions divided by `chunk_blocks` are the same; it was saved if its last
        row is marked, and all its rows are marked when it is taken. Taken are whole chunks of the visible prefix, and
        the shorter one at the end if all of `hashes`, and `tail` if given, is visible. Not a use. O(rows of the
        prefix).
        """
    def take_coldest(self, chunk_blocks: int, rows_max: int, chunks_max: int) -> list[Departure]:
        """Chunks not marked as saved among the rows that would leave first, marked from now on, each prefix's under its
        lease; at most `chunks_max` in all.

        Looks at the `rows_max` coldest entries of the list. Of each row there that could leave and is not marked it
        takes the chunk that ends with it, which may be a shorter one, and the chunks before it up to one that was
        saved. Not a use.
        """
    def clear(self) -> int:
        """Forget everything; rows that are leased or being written are freed when that ends. Returns rows forgotten."""
    def shrink(self, rows: int) -> int:
        """Use rows below `rows` only, from now on. Returns rows forgotten. Growing is ignored."""
    def stats(self) -> dict[str, int]:
        """Gauges and counters.

        Gauges (rows): rows, free, visible, reserved, leaving, leases. Counters since construction: lookups (calls of
        match), hits (those that found something), committed, aborted, evictions, unsaved_evictions (those of rows that
        are not marked as saved), removed (rows discarded, cleared or beyond a smaller limit), dropped (keys that found
        no row), mismatches (calls that name a key which is held under another parent: nothing is found, and nothing
        reserved from there on).
        """

@final
class Match:
    """What `Index.match` found."""

    @property
    def blocks(self) -> int:
        """Full blocks found, from the start."""
    @property
    def tail(self) -> bool:
        """Whether the tail was found as well."""
    @property
    def pending(self) -> bool:
        """Whether the next block (or the tail) is in flight: asking again later may find more."""
    def lease(self) -> Lease | None:
        """Keep what was found from leaving, until the lease is released. None when nothing was found, or when it left
        since. Each call makes another lease."""

@final
class Lease:
    """A guard over a matched prefix: its rows neither leave nor change. Dropping it releases it."""

    def __len__(self) -> int:
        """Rows under the lease: full blocks, plus one for a tail. 0 once it is released."""
    def rows(self, first: int = 0) -> bytes:
        """Rows of blocks `first` to the end, in prefix order, as unsigned 32-bit integers. Raises ClosedError once the
        lease is released: the rows may hold anything then."""
    def discard(self, first: int) -> int:
        """Remove the row at position `first`, what follows, and every other descendant, from the index (their
        content is bad). Returns rows removed. The lease itself stays until released; after that, ClosedError."""
    def release(self) -> None:
        """Idempotent."""

@final
class Reservation:
    """Rows being written. Dropping it aborts it."""

    @property
    def first(self) -> int:
        """Position in the chain of the first row reserved here: what was there already, a tail included, comes
        before."""
    @property
    def rows(self) -> bytes:
        """The rows reserved, in chain order, as unsigned 32-bit integers; a reserved tail is the last."""
    @property
    def tail(self) -> bool:
        """Whether the last row is the tail's."""
    @property
    def dropped(self) -> int:
        """Keys of the chain that found no row."""
    def __len__(self) -> int: ...
    def commit(self, saved: bool = False) -> int:
        """The bytes are there: make the rows visible, each as soon as its parent is. `saved`: they came from a slower
        tier, which has them still. Returns rows that were still wanted (others were removed meanwhile and are freed).
        Another commit or abort does nothing and returns 0."""
    def abort(self) -> int:
        """The bytes are not there: forget the rows and all that was reserved on top. Returns rows forgotten."""
    def discard(self) -> int:
        """Remove these rows and all descendants, also after commit (their content turned out to be bad). Returns rows
        removed. Before commit or abort the rows stay this reservation's, and are not reused until then."""

@final
class Departure:
    """Chunks of one prefix on their way to a slower tier, in prefix order and as `TierQueue.store` takes them, and the
    lease on their rows. Dropping it releases it."""

    @property
    def keys(self) -> bytes:
        """32 bytes a chunk: the key of its last row."""
    @property
    def positions(self) -> bytes:
        """Chunks before each in its prefix, as unsigned 32-bit integers."""
    @property
    def counts(self) -> bytes:
        """Rows of each, as unsigned 32-bit integers."""
    @property
    def rows(self) -> bytes:
        """Rows of all, one chunk's after the other, as unsigned 32-bit integers. Once it is released they may hold
        anything."""
    def __len__(self) -> int:
        """Chunks."""
    def release(self, saved: bool = True) -> None:
        """The rows may leave and change again. No use: they keep their place among those that leave. Idempotent.

        `saved=False`: no tier has taken the chunks, so they are given away again when they are asked for.
        """

def pool_rows(size_bytes: int, row_bytes: int) -> int:
    """Rows of `row_bytes` that a `HostPool` of `size_bytes` has; 0 when it would hold none."""

@final
class HostPool:
    """The host memory that rows live in: one private mapping of `rows * row_stride` bytes.

    `row_bytes` is rounded up to a multiple of 4,096 (`row_stride`), the number of rows is the largest that fits
    `size_bytes`. Pages are touched in the background by `prefault_threads` threads (0: on first use).
    Exported by DLPack as uint8 [rows, row_stride] on the CPU; the mapping lives as long as any consumer.
    """

    def __new__(
        cls, size_bytes: int, row_bytes: int, prefault_threads: int = 1, huge_pages: bool = True
    ) -> HostPool: ...
    @property
    def rows(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def row_stride(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def prefaulted_bytes(self) -> int: ...
    @property
    def prefault_error(self) -> str | None:
        """Why touching runs with fewer threads than asked for, if it does. The pool works nevertheless."""
    def wait_prefaulted(self, timeout_s: float) -> bool:
        """Wait until every page was touched; False when `timeout_s` seconds passed first, or when no thread is
        touching (any more)."""
    def pin(self, device: int) -> None:
        """Start to pin the memory in the background, in the primary context of GPU `device` and for all GPUs, piece by
        piece from the beginning. Returns in microseconds once that context exists. Raises DeviceError when there is no
        driver or no such GPU. Again is harmless. Unpinned by itself before the memory goes."""
    @property
    def pinned_bytes(self) -> int:
        """All bytes below are pinned: rows that end there or before. Only ever grows."""
    @property
    def pin_error(self) -> str | None:
        """Why pinning ended early, with the remedy, if it did. What is pinned stays so; the rest works, slowly."""
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class KvLayers:
    """The engine's KV tensors on the CPU, one a layer, taken in by DLPack and kept alive.

    Each tensor is [blocks, ...] with the same number of blocks, and each block of a layer is contiguous (the distance
    between blocks is free). A block's bytes in a row are those of the layers one after the other, in the given order.
    """

    def __new__(cls, tensors: Sequence[Any]) -> KvLayers: ...
    @property
    def layers(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def page_bytes(self) -> list[int]:
        """Bytes of one block in each layer."""
    @property
    def row_bytes(self) -> int:
        """Bytes of one block in all layers."""

@final
class Mover:
    """Copies whole blocks between pool rows and KV tensors with `threads` threads of its own.

    Rows and blocks are given in pairs: the i-th row goes with the i-th block. A block that is named twice in one load
    has no defined result.
    """

    def __new__(cls, pool: HostPool, layers: KvLayers, threads: int = 1) -> Mover: ...
    def copy(self, direction: Literal["store", "load"], rows: _Numbers, blocks: _Numbers) -> int:
        """Copy now, the calling thread working too. Returns bytes copied. A wrong argument copies nothing."""
    def submit(self, direction: Literal["store", "load"], job: int, rows: _Numbers, blocks: _Numbers) -> None:
        """Copy in the background. Loads go before stores that were not begun."""
    def poll(self) -> list[tuple[int, int, float]]:
        """Jobs ended since the last call: (job, bytes copied or -1 when it failed, seconds from submission to end)."""
    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when `timeout_s` seconds passed first."""
    def close(self, timeout_s: float = 5.0) -> bool:
        """Drain and end the threads. Later calls raise ClosedError. Idempotent."""

def cuda_available() -> bool:
    """Whether libcuda can be found. Initialises nothing, so that a process that asks can still fork workers."""

@final
class GpuMover:
    """Copies whole blocks between pool rows and KV tensors on GPU `device`, submitted by a thread of its own.

    `layers` are (address of block 0, bytes from block to block, bytes of a block), in the order of their bytes in a
    row, all with `blocks` blocks. Addresses and sizes are multiples of 4; of 16, for speed. `streams` are handles of
    ((load copy, load copy), load scatter, store gather, (store copy, store copy)), the pairs used in turn; 0 and
    streams that wait for it make copies wait for compute. Staging buffers are (address, bytes), used in turn, one row
    stride or more each; a stage fills one at most. A load by layers comes in parts, stores may be cut into such, at
    most as many as `load_parts` and `store_parts` name, with these shares of the bytes. All of it, and the KV, must
    live until `close` returned True, or for ever: `keep` is an object that sees to it, given up only then. Rows and
    blocks are given in pairs and belong to the job until it ended; stores of other parts may have the same.

    When the driver fails, jobs end with -1 only once nothing of them runs any more. Where that cannot be seen the mover
    gives up: that job is never told of, jobs not submitted to the GPU end with -1, later calls raise DeviceError.
    """

    def __new__(
        cls,
        pool: HostPool,
        layers: Sequence[tuple[int, int, int]],
        blocks: int,
        device: int,
        streams: tuple[tuple[int, int], int, int, tuple[int, int]],
        load_staging: Sequence[tuple[int, int]],
        store_staging: Sequence[tuple[int, int]],
        load_parts: Sequence[int],
        store_parts: Sequence[int],
        keep: Any = None,
    ) -> GpuMover: ...
    @property
    def load_parts(self) -> list[int]:
        """The first layer of each part of a load by layers."""
    @property
    def store_parts(self) -> list[int]:
        """The first layer of each part that can be stored for itself."""
    def submit_load(
        self, job: int, rows: _Numbers, blocks: _Numbers, stream: int | None = None, by_layers: bool = False
    ) -> None:
        """Load in the background, before stores that were not begun. With `stream`, blocks are written after everything
        submitted to it until now. `by_layers`: the first layers of all blocks come first."""
    def join_load(self, job: int, stream: int, layer: int | None = None) -> None:
        """Have what is left of a load submitted to the GPU, and `stream` wait for it there: for all of it, or for layer
        number `layer` if it is a load by layers. Nothing is waited for when the load has ended, or is not known. A load
        that failed has ended when this returns, and `poll` tells so."""
    def settle_loads(self, limit_s: float, by_layers_s: float) -> list[int]:
        """Loads that will have ended in `limit_s` seconds, those by layers in `by_layers_s`, if they go on at the speed
        they had so far, or at first at that of the load before. What is left of them is submitted, so that nothing but
        the GPU itself can fail them any more."""
    def submit_store(
        self, job: int, rows: _Numbers, blocks: _Numbers, stream: int, part: int | None = None
    ) -> None:
        """Store in the background what the blocks hold after everything submitted to `stream` until now, or of it the
        layers of part number `part`. Waits, for a minute at most, until its rows are pinned, if they will be."""
    def poll(self) -> list[tuple[int, int, float]]:
        """Jobs ended since the last call: (job, bytes copied or -1 when it failed, seconds from submission to end)."""
    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when `timeout_s` seconds passed first."""
    def close(self, timeout_s: float = 5.0) -> bool:
        """Drain, give up what was not submitted to the GPU by then, and end the thread. False: the GPU may still be at
        work on rows, blocks and staging. Later calls raise ClosedError. Idempotent."""

def tier_namespace(properties: Sequence[tuple[str, str]]) -> bytes:
    """The 32-byte digest of everything that changes the bytes of KV (name and value, in any order): what is stored
    under one namespace is never found under another."""

@final
class Tier:
    """A place beyond RAM that holds chunks: directories or a Redis. Makes no connection and touches no directory by
    itself; `docs/format.md` has every byte.

    It stores and loads the values of `rank`; a chunk is found when the values of all `ranks` are there. `namespace`
    comes from `tier_namespace`. With a `secret` values carry a MAC by it, and those that were forged are refused;
    without, a checksum that finds accidents. Wrong arguments raise InvalidArgumentError, without URL and secret.
    """

    @staticmethod
    def disk(
        namespace: bytes,
        rank: int,
        ranks: int,
        secret: bytes | None,
        directories: Sequence[tuple[str, int]],
        direct: bool = True,
        io_uring: bool = True,
    ) -> Tier:
        """One file a value. `directories` are (path, quota in bytes for all namespaces and processes); each key belongs
        to one of them. `direct`: past the page cache, `io_uring`: by io_uring, both where the system allows it."""
    @staticmethod
    def redis(
        namespace: bytes,
        rank: int,
        ranks: int,
        secret: bytes | None,
        url: str,
        prefix: str,
        ttl_s: float | None,
        timeout_s: float,
    ) -> Tier:
        """Values in the Redis at `url` (redis, resp, valkey, rediss, unix, redis-sentinel or redis-cluster), `prefix`
        in front of every name, for `ttl_s` seconds (None: until Redis evicts them). One operation on one chunk takes
        `timeout_s` seconds at most."""
    def check(self) -> None:
        """Reach it, and make its directories. Raises TierError with the reason and its cause if that fails. Blocks."""
    def reset(self) -> None:
        """Forget every value of the namespace, of all ranks and for all processes. Raises TierError with the reason and
        its cause when that failed; this process finds nothing here then until it was done. Blocks."""

@final
class TierQueue:
    """Stores, loads and searches of a tier, in the background, by `threads` threads.

    `stores_max` chunks may wait to be stored, `loads_max` to be loaded, and as many searches; what is more ends at
    once, refused. So does what was not begun `wait_s` seconds after its submission. Where there is more than one
    thread, stores leave one of them to searches and loads. Dropping it closes it.

    Chunks are given as their `keys` (32 bytes each, one after the other), their `positions` (chunks before them in
    their prefix: those further from the beginning leave first), their `counts` of rows, and the `rows` of `pool` that
    hold them, all chunks' one after the other. Until a chunk ended its rows must stay, and for a store not change.
    """

    def __new__(
        cls, tier: Tier, threads: int, stores_max: int, loads_max: int, wait_s: float
    ) -> TierQueue: ...
    def store(
        self,
        job: int,
        pool: HostPool,
        keys: bytes,
        positions: _Numbers,
        counts: _Numbers,
        rows: _Numbers,
    ) -> None:
        """Store chunks, each by itself. Wrong lengths or rows raise InvalidArgumentError, and nothing is stored."""
    def load(
        self,
        job: int,
        pool: HostPool,
        keys: bytes,
        positions: _Numbers,
        counts: _Numbers,
        rows: _Numbers,
    ) -> None:
        """Load chunks of one prefix, in its order, into rows that nobody else uses, before all stores. Once a chunk is
        refused, those that were not begun are too. The rows of a refused chunk hold anything. Raises as `store`."""
    def find(self, job: int, keys: bytes) -> None:
        """Search for chunks, before all loads. They may be gone, or be refused, when they are loaded."""
    def poll(self) -> list[tuple[int, int, str | None, int | bytes | str, float]]:
        """What ended since the last call, each once: (job, chunk's number in its job, None or the reason of the
        refusal, value, seconds from submission to end). The value is the bytes moved, 0 when the chunk was there
        already; that of a search is a byte of 0 or 1 for each key; that of what was refused is its cause, "" where the
        reason says all.

        Reasons: absent, truncated, corrupt, foreign, newer, io_error, no_space, quota, denied, locked, paused (failed
        a moment ago), queue_full, in_flight (the same key is being stored), late, prefix_broken (an earlier chunk of
        the load was refused), closed, internal.
        """
    def counters(self) -> dict[str, int]:
        """Since construction: stored_chunks, stored_bytes, present (stores of what was there), loaded_chunks,
        loaded_bytes, finds (searches answered), and store_refused:REASON, load_refused:REASON and find_refused:REASON
        for each reason that there was."""
    def wait(self, timeout_s: float) -> None:
        """Wait until something ended that was not polled, or nothing is to do, or `timeout_s` seconds passed."""
    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is to do; False when `timeout_s` seconds passed first."""
    def close(self, timeout_s: float = 5.0) -> bool:
        """Take no more, wait for the rest, refuse what was not begun in time, end the threads. False when some thread
        hangs in its medium: it keeps its rows mapped. Later calls but `counters` raise ClosedError. Idempotent."""
