"""What keeps requests apart beside their tokens, whatever vLLM's block hashes say of it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_rs._core import KeySpace
from lmcache_rs.connector.identity import Adapters, UnnameableError, adapter_identity, identity


def adapter(path: Path | str, name: str = "a", number: int = 1, load_inplace: bool = False) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(path), load_inplace=load_inplace)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path / "adapter"


def key(salt: Any = None, lora: Any = None, **options: Any) -> bytes:
    request = SimpleNamespace(cache_salt=salt, lora_request=lora)
    return KeySpace("sha256", 0, identity(request, options, Adapters())).key(b"hash")


def test_nothing_to_say_of_most_requests() -> None:
    assert identity(SimpleNamespace(cache_salt=None, lora_request=None), {}, Adapters()) == []
    assert identity(SimpleNamespace(), {"lmcache.skip_save": True}, Adapters()) == []


def test_each_field_alone_makes_another_space(folder: Path) -> None:
    keys = [
        key(),
        key(salt="a"),
        key(salt="b"),
        key(lora=adapter(folder)),
        key(lora=adapter(folder, name="b")),
        key(lora=adapter(folder, number=2)),
        key(lora=adapter(folder.parent)),
        key(salt="a", lora=adapter(folder)),
        key(**{"lmcache.tag.x": "a"}),
        key(**{"lmcache.tag.x": "b"}),
        key(**{"lmcache.tag.y": "a"}),
        key(**{"lmcache.tag.x": "a", "lmcache.tag.y": "a"}),
        key(salt="a", **{"lmcache.tag.x": "a"}),
        # A tag that is called as a salt is named is no salt.
        key(**{"lmcache.tag.salt": "a"}),
        key(**{"lmcache.tag.": "a"}),
    ]
    assert len(set(keys)) == len(keys)


def test_an_adapter_with_other_files_under_the_same_name_and_path(folder: Path) -> None:
    before = adapter_identity(adapter(folder))
    assert adapter_identity(adapter(folder)) == before
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"other w")
    os.utime(weights, ns=(1, 1))
    changed = adapter_identity(adapter(folder))
    assert changed != before
    (folder / "added").write_bytes(b"")
    assert adapter_identity(adapter(folder)) not in (before, changed)


def test_an_adapter_whose_files_are_elsewhere_is_not_served_when_it_may_change(tmp_path: Path) -> None:
    assert "org/name" in adapter_identity(adapter("org/name"))
    for path in ("org/name", tmp_path / "none", "a\0b"):
        with pytest.raises(UnnameableError, match="adapter_files"):
            adapter_identity(adapter(path, load_inplace=True))


@pytest.mark.parametrize("options", [{"lmcache.tag.x": "\ud800"}, {"lmcache.tag.\udfff": 1}])
def test_what_is_no_text_is_not_served(options: dict[str, Any]) -> None:
    with pytest.raises(UnnameableError, match="not_text"):
        key(**options)
    with pytest.raises(UnnameableError, match="not_text"):
        key(salt="\ud800")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(st.characters(), max_size=4).map("lmcache.tag.".__add__), JSON, max_size=3))
def test_whatever_users_send_is_named_or_refused(options: dict[str, Any]) -> None:
    try:
        named = identity(SimpleNamespace(), options, Adapters())
    except UnnameableError:
        return
    KeySpace("sha256", 0, named)


def test_an_adapter_that_changes_under_its_number_is_not_named(tmp_path: Path) -> None:
    adapters = Adapters()
    folder, other = tmp_path / "one", tmp_path / "other"
    for path in (folder, other):
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(b"12")
    first = adapters.identify(adapter(folder))
    assert adapters.identify(adapter(folder)) == first
    # vLLM goes on with what it has loaded under this number.
    with pytest.raises(UnnameableError, match="adapter_changed"):
        adapters.identify(adapter(other))
    (folder / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(UnnameableError, match="adapter_changed"):
        adapters.identify(adapter(folder))
    loaded_anew = adapters.identify(adapter(folder, load_inplace=True))
    assert loaded_anew != first
    assert adapters.identify(adapter(folder)) == loaded_anew
