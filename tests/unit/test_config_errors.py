"""A wrong value stops the start with key, place and remedy."""

from pathlib import Path

import pytest

from lmcache_rs import errors
from lmcache_rs.config import ConfigError, load_config


def error(extra=None, **variables) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(extra, {f"LMCACHE_{name.upper()}": value for name, value in variables.items()})
    return str(caught.value)


def file_error(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    message = error(config_file=str(path))
    assert message.startswith(f"{path}: ") or f"(in {path})" in message
    return message.replace(str(path), "c.yaml")


def test_config_error_is_in_the_tree():
    assert issubclass(ConfigError, errors.LMCacheRsError)
    assert ConfigError is errors.ConfigError


def test_messages_name_key_place_value_and_remedy(tmp_path):
    assert error(chunk_size="0") == "LMCACHE_CHUNK_SIZE: '0' must be a whole number, 1 or more"
    assert (
        error({"lmcache.chunk_size": True})
        == "lmcache.chunk_size (in kv_connector_extra_config): True must be a whole number, 1 or more"
    )
    assert (
        file_error(tmp_path, "chunk_size: [1]")
        == "chunk_size (in c.yaml): a list must be a whole number, 1 or more"
    )
    assert (
        error({"skip_last_n_tokens": -1})
        == "skip_last_n_tokens (in kv_connector_extra_config): -1 must be a whole number, 0 or more"
    )
    assert (
        error(local_cpu="maybe")
        == "LMCACHE_LOCAL_CPU: 'maybe' must be true or false (1/0, yes/no and on/off are understood as well)"
    )
    assert (
        error(max_local_cpu_size="5G") == "LMCACHE_MAX_LOCAL_CPU_SIZE: '5G' must be a size, more than 0:"
        " GiB (5 or 5.0), or with a unit ('512MiB', '5GiB', '5GB', '1TB')"
    )
    assert error(max_local_cpu_size="0") == "LMCACHE_MAX_LOCAL_CPU_SIZE: '0' must be more than 0"
    assert error(reserve_local_cpu_size="-1") == "LMCACHE_RESERVE_LOCAL_CPU_SIZE: '-1' must be 0 or more"
    assert error(max_local_cpu_size="5368709120") == (
        "LMCACHE_MAX_LOCAL_CPU_SIZE: '5368709120' must be at most 1 PiB;"
        " plain numbers are GiB, bytes are written with a B ('5368709120B')"
    )
    assert error(cache_policy="ARC") == "LMCACHE_CACHE_POLICY: 'ARC' must be one of LRU, LFU, FIFO, MRU"
    assert (
        error(max_held_blocks_percent="101")
        == "LMCACHE_MAX_HELD_BLOCKS_PERCENT: '101' must be a number, 0 to 100"
    )
    assert error(extra_config="[1]") == (
        "LMCACHE_EXTRA_CONFIG: the value (not shown) must be a mapping with text keys;"
        " in a variable, a JSON object such as '{\"a\": 1}'"
    )
    assert error(extra_config="[" * 100_000).startswith("LMCACHE_EXTRA_CONFIG: the value (not shown) must be")
    assert error(remote_url="redis:6379") == (
        "LMCACHE_REMOTE_URL: the value (not shown) must be a URL such as redis://host:6379"
    )
    assert error(app_id="x", extra={"lmcache.app_id": True}).endswith("True must be text (put it in quotes)")
    assert error(extra_config='{"disk_io_threads": 0}') == (
        "extra_config.disk_io_threads: 0 must be a whole number, 1 or more"
    )


def test_a_wrong_value_stops_also_where_a_later_place_wins():
    assert error({"lmcache.chunk_size": 5}, chunk_size="x").startswith("LMCACHE_CHUNK_SIZE: ")


def test_a_wrong_value_stops_also_for_a_key_that_is_not_honoured():
    assert error(max_local_disk_size="big").startswith("LMCACHE_MAX_LOCAL_DISK_SIZE: 'big' must be a size")


def test_file_that_cannot_be_read(tmp_path):
    hint = "LMCACHE_CONFIG_FILE must name a YAML file"
    missing = tmp_path / "missing.yaml"
    assert error(config_file=str(missing)) == f"{missing}: cannot be read (No such file or directory); {hint}"
    assert error(config_file=str(tmp_path)) == f"{tmp_path}: cannot be read (Is a directory); {hint}"
    assert error(config_file="a\0b") == f"a\0b: cannot be read (not a path); {hint}"
    assert file_error(tmp_path, "#" * (2**20 + 1)) == f"c.yaml: is larger than 1 MiB; {hint}"


PLAIN = "write plain lines such as 'chunk_size: 256'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chunk_size", f"is not a mapping; {PLAIN}"),
        ("- chunk_size: 1", f"is not a mapping; {PLAIN}"),
        ("a: b: c", f"is not valid YAML (line 1, column 5); {PLAIN}"),
        ("chunk_size: 1\n\tx: 1", f"is not valid YAML (line 2, column 1); {PLAIN}"),
        (b"a: \xff", f"is not valid YAML; {PLAIN}"),
        ("[" * 3000, f"is not valid YAML; {PLAIN}"),
        ("a: 2024-99-99", f"is not valid YAML; {PLAIN}"),
        ("chunk_size: 1\nchunk_size: !!python/name:os.system", None),
        ("1: 2", "a key is 1; keys must be text"),
    ],
)
def test_file_that_is_not_settings(tmp_path, text, expected):
    if expected is None:
        expected = f"has a YAML tag or key that is not allowed (line 2, column 13); {PLAIN}"
    assert file_error(tmp_path, text) == f"c.yaml: {expected}"


def test_python_objects_are_refused(tmp_path):
    flag = tmp_path / "flag"
    for tag in ("apply:os.system", "object/apply:os.system", "object/new:os.system"):
        assert "not allowed" in file_error(tmp_path, f"chunk_size: !!python/{tag} ['touch {flag}']")
    assert not flag.exists()
