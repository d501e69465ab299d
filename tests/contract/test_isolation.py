"""Requests that must not share KV find nothing of each other, and cost the same whether or not there is something."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hooked_engine import HookedEngine
from test_faults import prompt
from toy_engine import Request


def request_of(name: str, tokens: list[int], **identity: Any) -> Request:
    request = Request(name, tokens, kv_transfer_params=identity.pop("params", None))
    for field, value in identity.items():
        setattr(request, field, value)
    return request


def adapter(name: str, number: int, path: Path) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(path))


@pytest.mark.parametrize("count", [3, 31, 32])
def test_identities_are_kept_apart_although_the_block_hashes_are_equal(count: int, tmp_path: Path) -> None:
    """The toy's hashes know neither salts nor adapters; 3 tokens are less than a block, and only a tail."""
    identities: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"lora_request": adapter("a", 1, tmp_path)},
        {"lora_request": adapter("b", 2, tmp_path)},
        {"lora_request": adapter("a", 3, tmp_path)},
        {"lora_request": adapter("a", 4, tmp_path / "other")},
        {"params": {"lmcache.tag.user": "a"}},
        {"params": {"lmcache.tag.user": "b"}},
        {"params": {"lmcache.tag.salt": "a"}},
    ]
    engine = HookedEngine(rows=256)
    for i, identity in enumerate(identities):
        first = request_of(f"first{i}", prompt(1, count), **dict(identity))
        engine.run(first)
        assert first.cached_tokens == 0, identity
    for i, identity in enumerate(identities):
        again = request_of(f"again{i}", prompt(1, count), **dict(identity))
        engine.run(again)
        assert again.cached_tokens == count - 1, identity
    engine.assert_idle()


def test_an_adapter_that_was_loaded_anew_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"old")
    engine = HookedEngine()
    engine.run(request_of("first", prompt(1, 31), lora_request=adapter("a", 1, tmp_path)))
    (tmp_path / "weights").write_bytes(b"newer")
    second = request_of("second", prompt(1, 31), lora_request=adapter("a", 1, tmp_path))
    engine.run(second)
    assert second.cached_tokens == 0
    engine.assert_idle()


def test_a_request_that_cannot_be_named_is_computed_and_not_stored() -> None:
    engine = HookedEngine()
    for i in range(12):
        request = request_of(f"r{i}", prompt(1, 31), params={"lmcache.tag.user": "\ud800"})
        engine.run(request)
        assert request.cached_tokens == 0
    counts = engine.counters.totals()
    assert counts == {"misses:not_text": 12}, "no error: users must not turn the cache off for others"
    assert engine.scheduler.index.stats()["visible"] == 0
    engine.assert_idle()


@pytest.mark.parametrize(
    "value", [None, 5, "text", ["lmcache.tag.x"], {"lmcache.skip_save": float("nan")}, {5: 6}]
)
def test_parameters_of_any_shape_are_survived(value: Any) -> None:
    engine = HookedEngine()
    request = request_of("r", prompt(1, 31), params=value)
    engine.run(request)
    assert not [name for name in engine.counters.totals() if name.startswith("errors")]
    engine.assert_idle()


def test_a_miss_beside_a_tenants_stored_prompt_costs_what_any_miss_costs() -> None:
    """Equal prompts under another salt: the same calls, the same counts, the same answer as for an unknown prompt."""
    seen = []
    for stored in (prompt(1, 200), prompt(2, 200)):
        engine = HookedEngine(rows=256, blocks=256)
        engine.run(request_of("first", stored, cache_salt="a"))
        before = engine.scheduler.index.stats(), engine.counters.totals()
        second = request_of("second", prompt(1, 200), cache_salt="b")
        answer = (engine.add(second), engine.scheduler.matched_tokens(second, 0))[1]
        after = engine.scheduler.index.stats(), engine.counters.totals()
        changes = [
            {k: v - old.get(k, 0) for k, v in new.items()} for old, new in zip(before, after, strict=True)
        ]
        seen.append((answer, changes))
    assert seen[0] == seen[1]
    assert seen[0][0] == (0, False)
