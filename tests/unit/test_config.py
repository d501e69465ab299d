"""Every honoured key is read from every place, and later places win."""

import json
import logging
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lmcache_rs.config import Config, Notice, load_config
from lmcache_rs.config.model import honoured_keys

GIB = 2**30

# attribute -> (value as it is written, what it is read as); none is a default
VALUES = {
    "chunk_size": (64, 64),
    "local_cpu": (False, False),
    "max_local_cpu_bytes": (7.5, int(7.5 * GIB)),
    "local_cpu_use_hugepages": (False, False),
    "reserve_local_cpu_bytes": ("512MiB", 512 * 2**20),
    "save_decode_cache": (True, True),
    "save_unfull_chunk": (False, False),
    "discard_partial_chunks": (True, True),
    "cache_policy": ("lru", "LRU"),
    "min_retrieve_tokens": (300, 300),
    "max_tokens_per_load": (4096, 4096),
    "skip_last_n_tokens": (1, 1),
    "enable_async_loading": (False, False),
    "priority_limit": (-3, -3),
    "force_skip_save": (True, True),
    "extra_config": ({"disk_io_threads": 4}, {"disk_io_threads": 4}),
    "kv_load_failure_policy": ("FAIL", "fail"),
    "pin": ("require", "require"),
    "sync_load_max_bytes": ("64MB", 64_000_000),
    "copy_threads": (4, 4),
    "prefault_threads": (0, 0),
    "pending_timeout_ms": (2.5, 2.5),
    "max_held_blocks_percent": (10, 10.0),
    "freeze": (True, True),
    "local_disk": (["/a", "/b"], ("/a", "/b")),
    "max_local_disk_bytes": (100, 100 * GIB),
    "remote_url": ("redis://h:1/2", "redis://h:1/2"),
    "blocking_timeout_secs": (0.5, 0.5),
    "retrieve_locations": (["localdiskbackend"], ("LocalDiskBackend",)),
    "store_location": ("RemoteBackend", "RemoteBackend"),
    "write_policy": ("Through", "through"),
    "tier_secret": ("hunter2", "hunter2"),
    "tier_threads": (8, 8),
    "local_disk_direct": (False, False),
    "redis_key_prefix": ("a:", "a:"),
    "redis_ttl_secs": (3600, 3600.0),
}


def from_yaml(
    tmp_path: Path, text: str, environ: dict[str, str] | None = None, extra: dict | None = None
) -> Config:
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(text)
    return load_config(extra, {"LMCACHE_CONFIG_FILE": str(path)} | (environ or {}))


def texts(config: Config) -> list[str]:
    return [notice.text for notice in config.notices]


def test_values_cover_every_honoured_key():
    assert set(VALUES) == set(honoured_keys()) == {one.name for one in fields(Config)} - {"notices"}


@pytest.mark.parametrize("attribute", VALUES)
def test_honoured_key_from_each_place(attribute, tmp_path):
    key, (written, expected) = honoured_keys()[attribute], VALUES[attribute]
    in_variable = json.dumps(written) if isinstance(written, dict) else str(written)
    if isinstance(written, list):
        in_variable = ",".join(written)
    configs = [
        from_yaml(tmp_path, yaml.safe_dump({key.name: written})),
        load_config(environ={key.variable: in_variable}),
        load_config({f"lmcache.{key.name}": written}, {}),
    ]
    for config in configs:
        assert getattr(config, attribute) == expected
        assert type(getattr(config, attribute)) is type(expected)
        others_at_default = [name for name in VALUES if name != attribute]
        assert all(getattr(config, name) == honoured_keys()[name].default for name in others_at_default)


def test_defaults():
    config = load_config(environ={})
    assert config == Config()
    assert config.notices == ()
    assert (config.chunk_size, config.local_cpu, config.max_local_cpu_bytes) == (256, True, 5 * GIB)
    assert config.tails
    assert config.describe() == "all settings at their defaults"


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "32")
    assert load_config().chunk_size == 32


def test_quickstart(tmp_path):
    environ = {"LMCACHE_CHUNK_SIZE": "256", "LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "5.0"}
    assert load_config({}, environ) == Config()
    assert from_yaml(tmp_path, "chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 5\n") == Config()


def test_precedence(tmp_path):
    file, variable, extra = "chunk_size: 1", {"LMCACHE_CHUNK_SIZE": "2"}, {"lmcache.chunk_size": 3}
    assert from_yaml(tmp_path, file).chunk_size == 1
    assert from_yaml(tmp_path, file, variable).chunk_size == 2
    assert from_yaml(tmp_path, file, variable, extra).chunk_size == 3
    assert load_config(extra, variable).chunk_size == 3


def test_empty_and_null_are_not_set(tmp_path):
    environ = {"LMCACHE_CHUNK_SIZE": " ", "LMCACHE_REMOTE_URL": ""}
    extra = {"lmcache.chunk_size": None, "lmcache.extra_config": None}
    assert from_yaml(tmp_path, "chunk_size: 9\nremote_url: null\n", environ, extra) == Config(chunk_size=9)
    assert from_yaml(tmp_path, "") == Config()


def test_none_takes_a_value_back(tmp_path):
    assert from_yaml(tmp_path, "copy_threads: 4", {"LMCACHE_COPY_THREADS": "None"}).copy_threads is None


def test_quotes_around_a_variable_are_dropped():
    assert load_config(environ={"LMCACHE_MAX_LOCAL_CPU_SIZE": "'6GiB'"}).max_local_cpu_bytes == 6 * GIB


def test_names_without_prefix_in_extra_config():
    extra = {
        "discard_partial_chunks": True,
        "skip_last_n_tokens": 2,
        "use_native": True,
        "chunk_size": 1,
        "lmcache_local_cpu": False,
        "somebody_elses": 4,
        5: 6,
    }
    config = load_config(extra, {})
    assert (config.discard_partial_chunks, config.skip_last_n_tokens, config.chunk_size) == (True, 2, 256)
    assert sorted(texts(config)) == [
        f"{name} (in kv_connector_extra_config) {text}"
        for name, text in (
            ("chunk_size", "is unknown and has no effect; did you mean lmcache.chunk_size?"),
            ("lmcache_local_cpu", "is unknown and has no effect; did you mean lmcache.local_cpu?"),
            ("use_native", "is ignored: there is one connector"),
        )
    ]
    both = {"lmcache.skip_last_n_tokens": 3, "skip_last_n_tokens": 2}
    assert load_config(both, {}).skip_last_n_tokens == 3


@pytest.mark.parametrize(
    ("unfull", "discard", "tails"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_tails(unfull, discard, tails):
    extra = {"lmcache.save_unfull_chunk": unfull, "discard_partial_chunks": discard}
    assert load_config(extra, {}).tails is tails


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF"])
def test_force_skip_save_is_a_boolean(word):
    assert load_config(environ={"LMCACHE_FORCE_SKIP_SAVE": word}).force_skip_save is False


def test_describe_is_one_line_of_what_is_not_default():
    extra = {
        "lmcache.max_local_cpu_size": "20GiB",
        "lmcache.extra_config": {"password": "hunter2", "use_odirect": True},
        "lmcache.redis_key_prefix": "a\nb",
        "lmcache.chunk_size": 256,
    }
    expected = r"max_local_cpu_size=20 GiB, extra_config={'password', 'use_odirect'}, redis_key_prefix='a\nb'"
    config = load_config(extra, {})
    assert config.describe() == expected
    assert repr(config) == f"Config({expected})"


def test_notice_logs_itself(caplog):
    logger = logging.getLogger("elsewhere")
    with caplog.at_level(logging.INFO, "elsewhere"):
        Notice(logging.WARNING, "100 %s sure").log(logger)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(30, "100 %s sure")]
