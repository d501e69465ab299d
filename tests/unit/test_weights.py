"""A model's files have the same digest wherever they lie, and another one for whatever differs in them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from weight_files import TENSORS, copied_elsewhere, flip, write_weights

from lmcache_rs.connector import weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here") / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_weights(folder / "model-1.safetensors")
    write_weights(folder / "model-2.safetensors", {"b": 5000})
    return folder


@pytest.fixture
def other(model: Path, tmp_path: Path) -> Path:
    return copied_elsewhere(model, tmp_path)


def test_a_copy_elsewhere_is_the_same(model: Path, other: Path) -> None:
    assert weights.digest(other) == weights.digest(model)


@pytest.mark.parametrize("tensor", ["a", "layers.0.w", "layers.1.w"])
def test_any_tensor_that_differs_counts(model: Path, other: Path, tensor: str) -> None:
    path = other / "model-1.safetensors"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for one, size in TENSORS.items():
        if one == tensor:
            break
        begin += size
    flip(path, begin + TENSORS[tensor] // 2)
    assert weights.digest(other) != weights.digest(model)


def add(text: str, file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).parent.mkdir(exist_ok=True) or (folder / file).write_text(text)  # type: ignore[func-returns-value,return-value]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write_weights(folder / "model-2.safetensors", {"c": 5000}),
        lambda folder: write_weights(folder / "model-2.safetensors", {"b": 5001}),
        lambda folder: write_weights(folder / "model-3.safetensors"),
        lambda folder: (folder / "model-2.safetensors").unlink(),
        lambda folder: (folder / "model-1.safetensors").rename(folder / "model-0.safetensors"),
        add("{}", "quantize_config.json"),
        add("{}", "preprocessor_config.json"),
        add("x = 1", "modeling.py"),
        add('{"model_type": "llama"}', "config.json"),
        lambda folder: (folder / "sub").mkdir() or write_weights(folder / "sub" / "model.safetensors"),
    ],
)
def test_other_files_count(model: Path, other: Path, change: Callable[[Path], None]) -> None:
    change(other)
    assert weights.digest(other) != weights.digest(model)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "x.bin"]
)
def test_files_that_do_not_change_kv_do_not_count(model: Path, other: Path, file: str) -> None:
    (other / file).write_text("{}")
    assert weights.digest(other) == weights.digest(model)


def test_large_tensors_count_in_each_of_their_parts(tmp_path: Path) -> None:
    path, size = tmp_path / "m.safetensors", 3 * weights.PART_BYTES
    header = json.dumps({"w": {"data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    digests = [weights.digest(path)]
    for part in range(4):
        with open(path, "r+b") as file:
            file.seek(8 + len(header) + size * (2 * part + 1) // 8)
            file.write(b"x")
        digests.append(weights.digest(path))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("suffix", ["bin", "pt", "gguf"])
def test_files_without_a_header_count_by_size_time_and_pieces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    digests = []

    def note(content: bytes, mtime: int = 1) -> None:
        path.write_bytes(content)
        os.utime(path, (mtime, mtime))
        digests.append(weights.digest(tmp_path))

    content = bytes(10 * 2**20)
    note(content)
    note(content, mtime=2)
    note(content[:-1])
    for offset in (0, 5 * 2**20, len(content) - 1):
        piece = bytearray(content)
        piece[offset - offset % (2**20) : offset + 2**20] = bytes([1]) * (2**20)
        note(bytes(piece[: len(content)]))
    note(b"")
    assert len(set(digests)) == len(digests)
    assert weights.digest(path) == digests[-1]  # a file by itself, as of GGUF


HEADERS = {
    "short": b"\0",
    "long": (2**40).to_bytes(8, "little") + b"{}",
    "no json": (2).to_bytes(8, "little") + b"{{",
    "no mapping": (2).to_bytes(8, "little") + b"[]",
    "no offsets": (8).to_bytes(8, "little") + b'{"a":{}}',
    "bad offsets": (32).to_bytes(8, "little") + b'{"a":{"data_offsets":[0,"x",1]}}',
    "odd offsets": (24).to_bytes(8, "little") + b'{"a":{"data_offsets":7}}',
    "backwards": (28).to_bytes(8, "little") + b'{"a":{"data_offsets":[9,1]}}',
    "beyond": (31).to_bytes(8, "little") + b'{"a":{"data_offsets":[90,9999]}}',
    "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_are_none_are_unreadable(tmp_path: Path, header: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(HEADERS[header])
    with pytest.raises(weights.UnreadableError):
        weights.digest(tmp_path)


@pytest.mark.parametrize(
    ("limit", "value"), [("FILES_MAX", 2), ("TENSORS_MAX", 4), ("SECONDS_MAX", -1.0), ("TEXT_BYTES_MAX", 1)]
)
def test_reading_is_bounded(model: Path, limit: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, limit, value)
    with pytest.raises(weights.UnreadableError, match=f"{value:g}|more than"):
        weights.digest(model)


def test_a_folder_without_weights_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(weights.UnreadableError, match="no files of weights"):
        weights.digest(tmp_path)


def test_the_order_of_a_folder_does_not_count(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights.digest(model)
    walked = [(parent, folders, names[::-1]) for parent, folders, names in os.walk(model)]
    monkeypatch.setattr(os, "walk", lambda *_, **__: walked)
    assert weights.digest(model) == before
