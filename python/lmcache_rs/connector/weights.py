"""A digest of a model's files that is equal for equal files wherever they lie, read in bounded time."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILES_MAX = 4096
"""Files in a model's folder, all together."""
TENSORS_MAX = 250_000
"""Tensors in a model's files; the largest models of 2026 have 100,000."""
HEADER_BYTES_MAX = 100_000_000
"""Of a safetensors file, as its own readers have it."""
TEXT_BYTES_MAX = 64 * 2**20
"""Of a configuration or source file."""
PIECE_BYTES = 4096
"""What is read of a tensor, out of its middle, or of the middles of its parts if it is large."""
PART_BYTES = 16 * 2**20
"""What is large, and how large a part is."""
PARTS_MAX = 64
"""Of one tensor."""
PIECES = 256
"""Pieces that are read of a file whose tensors are not known, from its beginning to its end."""
SECONDS_MAX = 60.0
READERS = 8
"""Threads: reading pieces is waiting, most of all on a network's file system."""

# In the order in which vLLM takes them: the first kind that is there is the model's.
_KINDS = (("*.safetensors",), ("*.bin", "*.pt", "*.pth", "*.gguf"))
# What may differ, or be there on one machine only, without changing KV.
_NO_CONFIGURATION = (
    "tokenizer",
    "generation_config",
    "special_tokens",
    "added_tokens",
    "vocab",
    "chat_template",
)


class UnreadableError(Exception):
    """The files cannot be named; the text says why."""


def digest(place: Path) -> str:
    """Name the weights, configuration and code in a folder, or one file.

    Of a safetensors file: its size, header and pieces of every tensor, so neither path nor time: a copy has the same
    digest, and training any tensor changes it. (Who changes some single values by hand and leaves size and header as
    they are may not be seen.) Of others: size, time of the last change and pieces. Raises `UnreadableError`.
    """
    deadline = time.monotonic() + SECONDS_MAX
    try:
        files = [(place.name, place)] if place.is_file() else _files(place)
        weights = {name for name, _ in files if not _is_text(name)}
        if not weights:
            raise UnreadableError("there are no files of weights")
        tensors = _Budget(TENSORS_MAX)
        total = hashlib.blake2b()
        with ThreadPoolExecutor(READERS) as readers:
            jobs = [readers.submit(_digest_file, path, deadline, tensors) for _, path in files]
            try:
                for (name, _), job in zip(files, jobs, strict=True):
                    total.update(f"{len(name)}:{name}:{job.result()};".encode())
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                raise
    except (OSError, ValueError, TypeError, RecursionError) as error:  # all but the first: odd headers
        raise UnreadableError(f"{type(error).__name__} in reading them") from None
    return total.hexdigest()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Those that may change KV, by their name in the folder."""
    found: list[tuple[str, Path]] = []
    seen = 0
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            seen += 1
            if seen > FILES_MAX:
                raise UnreadableError(f"there are more than {FILES_MAX} files")
            path = Path(parent, name)
            found.append((path.relative_to(folder).as_posix(), path))
    kind = next((kind for kind in _KINDS if any(_matches(path, kind) for _, path in found)), ())
    texts = [(name, path) for name, path in found if _is_text(name)]
    return sorted([*texts, *((name, path) for name, path in found if _matches(path, kind))])


def _matches(path: Path, kind: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in kind)


def _is_text(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.endswith((".json", ".py")) and not base.startswith(_NO_CONFIGURATION)


def _raise(error: OSError) -> None:
    raise error


class _Budget:
    """How many tensors may still be read, by all threads together; a few too many do no harm."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise UnreadableError(f"there are more than {TENSORS_MAX} tensors")


def _digest_file(path: Path, deadline: float, tensors: _Budget) -> str:
    state = hashlib.blake2b()
    with open(path, "rb", buffering=0) as file:
        number, status = file.fileno(), os.fstat(file.fileno())
        size = status.st_size
        state.update(f"{size};".encode())
        if _is_text(path.name):
            if size > TEXT_BYTES_MAX:
                raise UnreadableError(f"{path.name} has more than {TEXT_BYTES_MAX} bytes")
            state.update(_read(number, 0, size))
            return state.hexdigest()
        if path.name.endswith(".safetensors"):
            pieces = _tensor_pieces(number, size, state.update, tensors)
        else:
            state.update(f"{status.st_mtime_ns};".encode())
            pieces = _even_pieces(size)
        for offset, length in pieces:
            if time.monotonic() > deadline:
                raise UnreadableError(f"reading pieces of them takes more than {SECONDS_MAX:g} seconds")
            state.update(_read(number, offset, length))
    return state.hexdigest()


def _tensor_pieces(
    number: int, size: int, note: Callable[[bytes], object], tensors: _Budget
) -> Iterator[tuple[int, int]]:
    """Note the header, and say where the pieces of each tensor are.

    The format: 8 bytes, the header's length; the header, JSON, with `data_offsets` of each tensor from its own end on.
    """
    length = int.from_bytes(_read(number, 0, 8), "little")
    if length > min(HEADER_BYTES_MAX, size - 8):
        raise ValueError("a header that is longer than its file or than allowed")
    text = _read(number, 8, length)
    note(text)
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("a header that is no mapping")
    header.pop("__metadata__", None)
    tensors.take(len(header))
    places = sorted(
        (int(begin), int(end)) for begin, end in (one["data_offsets"] for one in _mappings(header))
    )
    for begin, end in places:
        if not 0 <= begin <= end:
            raise ValueError("a tensor that ends before it begins")
        parts = min(PARTS_MAX, 1 + (end - begin) // PART_BYTES)
        size_read = min(PIECE_BYTES, end - begin)
        for part in range(parts):
            middle = begin + (end - begin) * (2 * part + 1) // (2 * parts)
            yield 8 + length + middle - size_read // 2, size_read


def _mappings(header: dict[str, object]) -> Iterator[dict[str, list[int]]]:
    for one in header.values():
        if not isinstance(one, dict) or "data_offsets" not in one:
            raise ValueError("a header without offsets")
        yield one


def _even_pieces(size: int) -> Iterator[tuple[int, int]]:
    length = min(PIECE_BYTES, size)
    for number in range(PIECES):
        yield (size - length) * number // (PIECES - 1), length


def _read(number: int, offset: int, length: int) -> bytes:
    """Exactly so many bytes."""
    parts = []
    while length:
        part = os.pread(number, length, offset)
        if not part:
            raise ValueError("a file that is shorter than its header says")
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)
