"""Prints the keys of one prompt under each identity, made by vLLM's own requests and hashes: name, then keys.

python identity_keys.py TOKENS
"""

import json
import sys
from typing import Any

import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from lmcache_rs._core import KeySpace
from lmcache_rs.connector.block_hashes import BlockHasher
from lmcache_rs.connector.identity import Adapters, identity
from lmcache_rs.connector.requests import request_options
from lmcache_rs.connector.vllm_api import make_block_hashes_repeatable, make_tail_hash

BLOCK = 16


def image(name: str, offset: int = 1) -> Any:
    place = PlaceholderRange(offset=offset, length=4)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=place)


def lora(name: str, number: int = 1, path: str = "/none/a") -> Any:
    return LoRARequest(name, number, path)


def embeds(seed: int, count: int) -> Any:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def identities(count: int) -> dict[str, dict[str, Any]]:
    """Every field that decides KV or keeps it apart, with two values where it has any."""
    return {
        "plain": {},
        "salt a": {"cache_salt": "a"},
        "salt b": {"cache_salt": "b"},
        "adapter a": {"lora_request": lora("a")},
        "adapter b": {"lora_request": lora("b")},
        "adapter a, number 2": {"lora_request": lora("a", 2)},
        "adapter a, other path": {"lora_request": lora("a", 1, "/none/b")},
        "adapter a, salt a": {"lora_request": lora("a"), "cache_salt": "a"},
        "image a": {"mm_features": [image("a")]},
        "image b": {"mm_features": [image("b")]},
        "image a further on": {"mm_features": [image("a", 2)]},
        "embeddings 1": {"prompt_embeds": embeds(1, count)},
        "embeddings 2": {"prompt_embeds": embeds(2, count)},
        "tag x=a": {"tags": {"lmcache.tag.x": "a"}},
        "tag x=b": {"tags": {"lmcache.tag.x": "b"}},
        "tag y=a": {"tags": {"lmcache.tag.y": "a"}},
        "another first token": {"first": 8},
        "another last token": {"last": 8},
    }


def compare(own: Any, ours: Any) -> None:
    """The same request hashed by vLLM and by us, its prompt and what comes after it."""
    for token in range(2 * BLOCK + 1):
        if own.block_hashes != ours.block_hashes:
            raise RuntimeError(f"after {token} tokens the hashes differ")
        for request in (own, ours):
            request.append_output_token_ids([token])


def keys(count: int, first: int = 7, last: int = 7, tags: Any = None, **fields: Any) -> list[str]:
    tokens = [first] + [5] * (count - 2) + [last]
    hash_function = get_hash_fn_by_name("sha256")
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": tags} if tags else None)
    own = kv_cache_utils.get_request_block_hasher(BLOCK, hash_function)
    ours = BlockHasher(own, BLOCK, kv_cache_utils)
    ours.is_believed = True
    request, hashed_by_us = (
        Request(
            request_id="r",
            prompt_token_ids=tokens,
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=hasher,
            **fields,
        )
        for hasher in (own, ours)
    )
    space = KeySpace("sha256", 0, identity(request, request_options(request), Adapters()))
    tail = make_tail_hash("sha256", BLOCK)(request, len(request.block_hashes) * BLOCK)
    hashes = [*request.block_hashes, *([tail] if tail is not None else [])]
    compare(request, hashed_by_us)
    return [space.key(block_hash).hex() for block_hash in hashes]


if __name__ == "__main__":
    tokens = int(sys.argv[1])
    make_block_hashes_repeatable()
    kv_cache_utils.init_none_hash(get_hash_fn_by_name("sha256"))
    found = {name: keys(tokens, **fields) for name, fields in identities(tokens).items()}
    again = {name: keys(tokens, **fields) for name, fields in identities(tokens).items()}
    sys.stdout.write(f"KEYS {json.dumps([found, again])}\n")
