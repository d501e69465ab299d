"""Block hashes from Rust are those that vLLM computes in Python."""

import hashlib
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_rs._core import InvalidArgumentError, sha256_block_hashes


def python_block_hashes(parent: bytes, tokens: list[int], block_size: int) -> list[bytes]:
    """As in vLLM: vllm/v1/core/kv_cache_utils.py, vllm/utils/hashing.py."""
    hashes: list[bytes] = []
    for end in range(block_size, len(tokens) + 1, block_size):
        block = (hashes[-1] if hashes else parent, tuple(tokens[end - block_size : end]), None)
        hashes.append(hashlib.sha256(pickle.dumps(block, protocol=pickle.HIGHEST_PROTOCOL)).digest())
    return hashes


TOKENS = st.one_of(
    *(st.integers(edge - 2, edge + 1) for edge in (2, 256, 65536)), st.integers(2**31 - 3, 2**31 - 1)
)


@given(st.binary(max_size=255), st.lists(TOKENS, max_size=40), st.integers(1, 20))
def test_block_hashes_are_those_of_vllm(parent: bytes, tokens: list[int], block_size: int) -> None:
    assert sha256_block_hashes(parent, tokens, block_size) == python_block_hashes(parent, tokens, block_size)


@pytest.mark.parametrize(("blocks", "block_size"), [(700, 16), (2, 8192)])
def test_long_chains_and_blocks_are_hashed_like_short_ones(blocks: int, block_size: int) -> None:
    tokens = [(i * 7919) % 200_000 for i in range(blocks * block_size + 5)]
    assert sha256_block_hashes(b"root", tokens, block_size) == python_block_hashes(
        b"root", tokens, block_size
    )


class Token(int):
    """Pickled by its class."""


@pytest.mark.parametrize(
    "token", [-1, 2**31, 2**32, 2**70, True, Token(5), np.int64(5), 5.0, None], ids=lambda token: repr(token)
)
def test_what_would_be_pickled_otherwise_is_not_hashed(token: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="token"):
        sha256_block_hashes(b"", [1, 2, 3, token], 4)


def test_arguments_are_checked() -> None:
    for block_size in (0, -1, 8193, 2**70):
        with pytest.raises(InvalidArgumentError, match=r"block_size|outside"):
            sha256_block_hashes(b"", [1], block_size)
    with pytest.raises(InvalidArgumentError, match="parent"):
        sha256_block_hashes(bytes(256), [1], 1)
