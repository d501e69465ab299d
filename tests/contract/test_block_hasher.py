"""Block hashes are vLLM's own, whoever computes them, and whatever is asked of the one in Rust."""

import hashlib
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from hooked_engine import API

from lmcache_rs.connector import block_hashes
from lmcache_rs.connector.block_hashes import BlockHasher

SIZE = 4
ROOT = b"root"


class Vllm:
    """vLLM's hasher, as far as it matters: a request's `extra` are the keys of those of its tokens that have any."""

    def __init__(self, version: int = 1) -> None:
        self.version = version
        self.calls = 0

    def extra_keys(self, request: Any, start: int, end: int, _: int) -> tuple[Any, int]:
        return tuple(key for at, key in request.extra.items() if start <= at < end) or None, 0

    def __call__(self, request: Any) -> list[bytes]:
        self.calls += 1
        hashes: list[bytes] = list(request.block_hashes)
        known = len(hashes)
        for start in range(known * SIZE, request.num_tokens - SIZE + 1, SIZE):
            tokens = tuple(request.all_token_ids[start : start + SIZE])
            extra, _ = self.extra_keys(request, start, start + SIZE, 0)
            block = (hashes[-1] if hashes else ROOT, tokens, extra)
            hashes.append(hashlib.sha256(pickle.dumps(block, protocol=5) + bytes(self.version - 1)).digest())
        return hashes[known:]


def hasher(own: Any) -> BlockHasher:
    utils = SimpleNamespace(generate_block_hash_extra_keys=Vllm().extra_keys, NONE_HASH=ROOT)
    return BlockHasher(own, SIZE, utils)


def request(tokens: Any, extra: dict[int, str] | None = None, known: int = 0) -> Any:
    made = SimpleNamespace(
        all_token_ids=list(tokens),
        num_tokens=len(list(tokens)),
        extra=extra or {},
        block_hashes=[],
        prompt_embeds=None,
    )
    made.block_hashes = Vllm()(made)[:known]
    return made


ASKED = {
    "nothing": request(range(3)),
    "one block": request(range(4)),
    "many": request(range(1000)),
    "more of one": request(range(50), known=7),
    "nothing new": request(range(31), known=7),
    "extra keys at the beginning": request(range(40), {0: "salt"}),
    "extra keys in between": request(range(40), {17: "image"}),
    "extra keys at the end": request(range(40), {39: "image"}),
    "extra keys behind the last block": request(range(42), {41: "image"}),
    "extra keys before what is new": request(range(40), {2: "image"}, known=5),
    "a token of another kind": request([1, 2, 3, True, 5, 6, 7, 8]),
    "a large token": request([1, 2, 3, 2**40]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_hashes_are_those_of_vllm(asked: str) -> None:
    own = Vllm()
    ours = hasher(own)
    assert ours(ASKED[asked]) == own(ASKED[asked])
    assert ours(request(range(100))) == own(request(range(100)))
    assert ours.is_believed
    own.calls = 0
    right = Vllm()(ASKED[asked])
    assert ours(ASKED[asked]) == right
    left_to_vllm = asked.startswith(("extra keys at", "extra keys in", "a "))
    assert own.calls == left_to_vllm


def test_embeddings_are_left_to_vllm() -> None:
    own = Vllm()
    ours = hasher(own)
    embedded = request(range(40))
    embedded.prompt_embeds = object()
    assert ours(embedded) == Vllm()(embedded)
    assert own.calls == 1
    assert ours.is_believed is None


def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(block_hashes.logger, "handle", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(block_hashes.logger, "level", logging.INFO)
    return lines


def test_another_way_of_hashing_is_seen_at_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = warnings_of(monkeypatch)
    own = Vllm(version=2)
    ours = hasher(own)
    for length in (100, 100, 8):
        assert ours(request(range(length))) == own(request(range(length)))
    assert ours.is_believed is False
    assert lines == ["vLLM hashes the blocks of its prompts itself: its hashes are made in another way"]


def test_what_fails_is_left_to_vllm_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = warnings_of(monkeypatch)
    own = Vllm()
    ours = BlockHasher(own, SIZE, SimpleNamespace(generate_block_hash_extra_keys=lambda *_: 1 // 0))
    for _ in range(3):
        assert ours(request(range(9))) == Vllm()(request(range(9)))
    assert ours.is_believed is False
    assert len(lines) == 1
    assert "ZeroDivisionError" in lines[0]


def test_what_fails_in_vllm_fails_as_ever() -> None:
    def own(_: Any) -> list[bytes]:
        raise ValueError("vLLM's own")

    with pytest.raises(ValueError, match="vLLM's own"):
        hasher(own)(request(range(9)))


class Engine(SimpleNamespace):
    """The module `vllm.v1.engine.core`, and what it imports for block hashes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = Vllm()
        super().__init__(get_request_block_hasher=lambda *_, **__: own, own=own)
        self.theirs = self.get_request_block_hasher
        utils = SimpleNamespace(generate_block_hash_extra_keys=own.extra_keys, NONE_HASH=ROOT)
        for name, module in {
            "vllm": SimpleNamespace(),
            "vllm.utils": SimpleNamespace(),
            "vllm.utils.hashing": SimpleNamespace(sha256="sha256"),
            "vllm.v1": SimpleNamespace(),
            "vllm.v1.core": SimpleNamespace(kv_cache_utils=utils),
            "vllm.v1.core.kv_cache_utils": utils,
            "vllm.v1.engine.core": self,
        }.items():
            monkeypatch.setitem(API.sys.modules, name, module)


def test_the_engine_being_built_gets_ours_and_the_next_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    API.hash_blocks_in_rust()
    ours = engine.get_request_block_hasher(SIZE, "sha256")
    assert isinstance(ours, BlockHasher)
    assert ours(request(range(9))) == Vllm()(request(range(9)))
    assert ours.is_believed
    assert engine.get_request_block_hasher is engine.theirs


ASKED_FOR: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "tokens to look ahead": ((SIZE, "sha256", 5), {}),
    "what nobody knows": ((SIZE, "sha256", 0, 1), {}),
    "anything by its name": ((SIZE, "sha256"), {"ahead": 0}),
    "one argument alone": ((SIZE,), {}),
    "another hash function": ((SIZE, "xxhash"), {}),
}


@pytest.mark.parametrize("asked_for", ASKED_FOR)
def test_any_other_hasher_is_vllms(asked_for: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0.33 on hashes may cover tokens behind their block, for drafters."""
    engine = Engine(monkeypatch)
    arguments, named = ASKED_FOR[asked_for]
    API.hash_blocks_in_rust()
    assert engine.get_request_block_hasher(*arguments, **named) is engine.own
    assert engine.get_request_block_hasher is engine.theirs
    API.hash_blocks_in_rust()
    assert isinstance(engine.get_request_block_hasher(SIZE, "sha256", 0), BlockHasher)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.v1.engine.core", "get_request_block_hasher"),
        ("vllm.v1.core", "kv_cache_utils"),
        ("vllm.utils.hashing", "sha256"),
        ("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys"),
    ],
)
def test_nothing_happens_where_vllm_lacks_anything(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(monkeypatch)
    delattr(API.sys.modules[module], name)
    API.hash_blocks_in_rust()
    assert getattr(engine, "get_request_block_hasher", engine.theirs) is engine.theirs


def test_nothing_happens_where_no_engine_is_being_built(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    monkeypatch.delitem(API.sys.modules, "vllm.v1.engine.core")
    API.hash_blocks_in_rust()
    assert engine.get_request_block_hasher is engine.theirs
