"""Files of weights for tests."""

import json
import os
import shutil
from pathlib import Path

TENSORS = {"a": 10, "layers.0.w": 9000, "layers.1.w": 20_000, "z": 0}


def write_weights(path: Path, tensors: dict[str, int] = TENSORS) -> None:
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(offset)))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def copied_elsewhere(model: Path, parent: Path) -> Path:
    """A copy of a model's folder at another place, of another time."""
    folder = parent / "elsewhere" / "named-otherwise"
    shutil.copytree(model, folder, copy_function=shutil.copyfile)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    return folder
