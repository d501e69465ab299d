"""The settings of disk and Redis: what LMCache's users write is understood, and no secret of it is shown."""

import logging
import os
from pathlib import Path

import pytest

from lmcache_rs.config import Config, ConfigError, TierUse, load_config

GIB = 2**30
CANARY = "hunter2SECRET"


def config_of(**settings: object) -> Config:
    return load_config({f"lmcache.{name}": value for name, value in settings.items()}, {})


def warnings(config: Config) -> list[str]:
    return [notice.text for notice in config.notices if notice.level == logging.WARNING]


def everything_said(config: Config) -> str:
    return repr(config) + str(config) + config.describe() + repr(config.notices)


@pytest.mark.parametrize(
    ("written", "directories"),
    [
        ("/a", ("/a",)),
        ("file:///a/b/", ("/a/b",)),
        ("file:///a,/b , file:///c", ("/a", "/b", "/c")),
        ("/a,/a/,/a/../a", ("/a",)),
        (["/a,b", "file:///c"], ("/a,b", "/c")),
        ("~/kv", (os.path.expanduser("~/kv"),)),
        ("kv", (os.path.join(os.getcwd(), "kv"),)),
        ("file://kv/x/", (os.path.join(os.getcwd(), "kv/x"),)),  # so in LMCache's own documentation
        (",", ()),
        ([], ()),
        ("none", ()),
        (False, ()),
    ],
)
def test_directories(written, directories):
    assert config_of(local_disk=written, max_local_disk_size=1).local_disk == directories


@pytest.mark.parametrize(
    "written",
    ["s3://a", "redis://h", "/a,http://b", "a\0b", "\ud800", True, "True", "/a,false", 5, [["/a"]], [None]],
)
def test_wrong_directories(written):
    with pytest.raises(ConfigError, match="must be directories"):
        config_of(local_disk=written)


def test_a_working_directory_that_is_gone_stops_only_relative_paths(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert config_of(local_disk="/a").local_disk == ("/a",)
    with pytest.raises(ConfigError, match="absolute"):
        config_of(local_disk="a")


def test_a_disk_without_size_and_a_size_without_disk_are_named():
    config = config_of(local_disk="/a")
    assert config.disk is None
    assert warnings(config) == [
        "local_disk is set and max_local_disk_size is 0: nothing will be kept on disk"
    ]
    config = config_of(max_local_disk_size=10)
    assert config.disk is None
    assert warnings(config) == [
        "max_local_disk_size is set and local_disk is not: nothing will be kept on disk"
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"store_location": "RemoteBackend"}, "store_location is RemoteBackend, and there is none"),
        ({"retrieve_locations": "RemoteBackend"}, "retrieve_locations leaves out LocalDiskBackend"),
        ({"redis_ttl_secs": 5}, "redis_ttl_secs is set and remote_url is not"),
        ({"redis_key_prefix": "x"}, "redis_key_prefix is set and remote_url is not"),
    ],
)
def test_what_a_tier_that_is_not_there_was_asked_is_named(settings, words):
    disk = {"local_disk": "/a", "max_local_disk_size": 1}
    (warning,) = warnings(config_of(**disk, **settings))
    assert warning.startswith(words)
    if "locations" not in words:
        assert not warnings(config_of(**disk, remote_url="redis://host", **settings))


def test_a_plugin_without_its_address_is_named():
    (warning,) = warnings(config_of(remote_url="plugin://redis"))
    assert "extra_config.redis_url" in warning


def test_a_secret_without_disk_and_redis_is_named():
    (warning,) = warnings(config_of(tier_secret="s"))
    assert warning == "tier_secret is set and neither disk nor Redis is: it has no effect"
    assert not warnings(config_of(tier_secret="s", local_disk="/a", max_local_disk_size=1))


@pytest.mark.parametrize(
    ("retrieve", "store", "disk", "redis"),
    [
        (None, None, TierUse(True, True), TierUse(True, True)),
        ("LocalDiskBackend", None, TierUse(True, True), TierUse(False, True)),
        (None, "RemoteBackend", TierUse(True, False), TierUse(True, True)),
        (["LocalCPUBackend", "RemoteBackend"], "RemoteBackend", None, TierUse(True, True)),
        ("LocalCPUBackend", "LocalCPUBackend", None, None),
        ([], "LocalDiskBackend", TierUse(False, True), None),
    ],
)
def test_what_tiers_are_for(retrieve, store, disk, redis):
    config = config_of(
        local_disk="/a",
        max_local_disk_size=1,
        remote_url="redis://h",
        retrieve_locations=retrieve,
        store_location=store,
    )
    assert (config.disk, config.redis) == (disk, redis)
    assert warnings(config) == []


def test_tiers_that_are_not_there_are_for_nothing():
    assert (Config().disk, Config().redis) == (None, None)


@pytest.mark.parametrize("name", ["retrieve_locations", "store_location"])
def test_unknown_locations_are_errors(name):
    with pytest.raises(ConfigError, match="must be one of LocalCPUBackend, LocalDiskBackend, RemoteBackend"):
        config_of(**{name: "PDBackend"})


GOOD_URLS = [
    "redis://h",
    "redis://h:6379/15",
    "redis://[::1]:6379/",
    "resp://user:p%40w@h:1",
    "valkey://:p@h",
    "rediss://h:6380?ssl_ca_certs=/a/b.pem",
    "redis://h?db=3",
    "redis://u:a@b@h",
    "unix:///run/redis.sock?db=2",
    "unix://u:p@/run/redis.sock",
    "redis-sentinel://a,b:26380,[::1]:1/master/3",
    "redis-sentinel://a",
    "redis-cluster://u:p@a:1,b",
]


@pytest.mark.parametrize("url", GOOD_URLS)
def test_urls_of_a_redis(url):
    config = config_of(remote_url=f"  {url.split(':')[0].upper()}:{url.partition(':')[2]}")
    assert config.remote_url == url
    assert config.redis == TierUse(True, True)
    assert warnings(config) == []


BAD_URLS = [
    f"redis://{CANARY}:port",
    f"redis://{CANARY}:0",
    f"redis://{CANARY}:65536",
    f"redis://{CANARY}:1:2",
    f"redis://u:{CANARY}@",
    f"redis://u:{CANARY}@h/x",
    f"redis://u:{CANARY}@h/3000000000",
    f"redis://u:{CANARY}@h?db=x",
    f"redis://u:{CANARY}@h1:1,h2:2",
    f"redis://u:{CANARY}%@h",
    f"redis://u:{CANARY}%ff@h",
    f"redis://u:{CANARY}@[::1",
    f"redis://u:{CANARY}/@ h",
    f"unix://u:{CANARY}@",
    f"unix://u:{CANARY}@relative",
    f"unix://u:{CANARY}@/a?db=-1",
    f"unix://u:{CANARY}@/a%zz",
    f"redis-sentinel://u:{CANARY}@/master",
    f"redis-sentinel://u:{CANARY}@a,,b",
    f"redis-sentinel://u:{CANARY}@a,b:99999/m",
    f"redis-cluster://u:{CANARY}@a/0",
    f"redis:{CANARY}",
    f"redis://{CANARY}\ud800",
]


@pytest.mark.parametrize("url", BAD_URLS, ids=range(len(BAD_URLS)))
@pytest.mark.parametrize("name", ["remote_url", "extra_config"])
def test_malformed_urls_are_errors_that_do_not_repeat_them(name, url):
    with pytest.raises(ConfigError) as caught:
        config_of(**{name: {"redis_url": url} if name == "extra_config" else url})
    assert CANARY not in str(caught.value)
    assert "must " in str(caught.value)


@pytest.mark.parametrize(
    ("url", "extra", "environ", "expected"),
    [
        ("redis://h", {"username": "u", "password": "a@b/c?%"}, {}, "redis://u:a%40b%2Fc%3F%25@h"),
        ("redis://h", {"password": "p"}, {}, "redis://:p@h"),
        ("redis://a:b@h", {"username": "u", "password": "p"}, {}, "redis://a:b@h"),
        ("valkey://h", {"valkey_username": "u", "valkey_password": "p"}, {}, "valkey://u:p@h"),
        ("redis://h", {"valkey_username": "u", "valkey_password": "p"}, {}, "redis://h"),
        ("valkey://h:1", {"valkey_database": 4}, {}, "valkey://h:1/4"),
        ("valkey://h:1/2", {"valkey_database": 4}, {}, "valkey://h:1/2"),
        ("redis://h:1", {"valkey_database": 4}, {}, "redis://h:1"),
        ("valkey://h:1", {"valkey_mode": "cluster", "valkey_database": 0}, {}, "redis-cluster://h:1"),
        ("valkey://h:1", {"valkey_mode": "standalone"}, {}, "valkey://h:1"),
        ("redis://h:1", {"tls_enable": True}, {}, "rediss://h:1"),
        ("redis://h:1", {"tls_enable": False}, {}, "redis://h:1"),
        ("rediss://h:1", {"tls_enable": True}, {}, "rediss://h:1"),
        ("resp://h", {}, {"LMCACHE_RESP_USERNAME": "u", "LMCACHE_RESP_PASSWORD": "p"}, "resp://u:p@h"),
        ("redis://h", {}, {"LMCACHE_RESP_PASSWORD": "p"}, "redis://h"),
        (None, {"redis_url": "redis://h"}, {}, "redis://h"),
        ("plugin://redis", {"remote_storage_plugin.redis.redis_url": "redis://h"}, {}, "redis://h"),
        ("redis://a", {"redis_url": "redis://h"}, {}, "redis://a"),
    ],
)
def test_what_lmcache_reads_elsewhere_completes_the_url(url, extra, environ, expected):
    config = load_config({"lmcache.remote_url": url, "lmcache.extra_config": extra}, environ)
    assert config.remote_url == expected
    assert warnings(config) == []


@pytest.mark.parametrize("url", ["redis-cluster://u:p@h", "redis-sentinel://h", "unix:///s"])
def test_tls_that_cannot_be_is_not_left_out(url):
    config = config_of(remote_url=url, extra_config={"tls_enable": True})
    assert config.remote_url is None
    assert warnings(config)[0].startswith("remote_url is not used: extra_config.tls_enable is for one server")


def test_parameters_without_effect_are_named():
    config = config_of(remote_url=f"redis://h?password={CANARY}&db=1")
    assert warnings(config) == [
        "remote_url has parameters that have no effect: db and ssl_ca_certs are known"
    ]
    assert CANARY not in everything_said(config)


def test_disk_settings_inside_extra_config():
    config = config_of(extra_config={"use_odirect": False, "disk_io_threads": 100})
    assert (config.local_disk_direct, config.tier_threads) == (False, 64)
    config = config_of(
        extra_config={"use_odirect": False, "disk_io_threads": 7}, local_disk_direct=True, tier_threads=2
    )
    assert (config.local_disk_direct, config.tier_threads) == (True, 2)


@pytest.mark.parametrize(
    ("extra", "seconds"),
    [
        ({}, None),
        ({"valkey_ttl_sec": 60}, None),
        ({"valkey_enable_ttl": True}, 86_400.0),
        ({"valkey_enable_ttl": True, "valkey_ttl_sec": 60}, 60.0),
        ({"valkey_enable_ttl": False, "valkey_ttl_sec": 60}, None),
    ],
)
def test_times_to_live(extra, seconds):
    assert config_of(remote_url="valkey://h", extra_config=extra).redis_ttl_secs == seconds
    assert config_of(remote_url="valkey://h", extra_config=extra, redis_ttl_secs=5).redis_ttl_secs == 5.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tier_threads", 0),
        ("tier_threads", 65),
        ("redis_ttl_secs", 0),
        ("redis_key_prefix", "x" * 201),
        ("blocking_timeout_secs", -1),
        ("blocking_timeout_secs", 1e300),
        ("write_policy", "never"),
        ("tier_secret", ["x"]),
        ("max_local_disk_size", -1),
    ],
)
def test_wrong_values(name, value):
    with pytest.raises(ConfigError, match=f"lmcache.{name} .*must be"):
        config_of(**{name: value})


def test_other_serdes_are_named():
    assert warnings(config_of(remote_serde="cachegen")) == [
        "lmcache.remote_serde (in kv_connector_extra_config) is not supported: KV is kept as it is (naive)"
    ]
    assert warnings(config_of(remote_serde="naive")) == []


def test_secrets_are_read_and_never_shown(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(f"remote_url: redis://u:{CANARY}@h:1\ntier_secret: {CANARY}\n")
    config = load_config({}, {"LMCACHE_CONFIG_FILE": str(path)})
    assert (config.remote_url, config.tier_secret) == (f"redis://u:{CANARY}@h:1", CANARY)
    assert CANARY not in everything_said(config)
    assert config.describe() == "remote_url=redis://***, tier_secret=***"
    config = config_of(remote_url="redis://h", extra_config={"password": CANARY})
    assert CANARY in str(config.remote_url)
    assert CANARY not in everything_said(config)
    with pytest.raises(ConfigError) as caught:
        config_of(tier_secret=[CANARY])
    assert CANARY not in str(caught.value)


def test_directories_are_shown():
    assert config_of(local_disk="/a,/b", max_local_disk_size=1).describe() == (
        "local_disk=['/a', '/b'], max_local_disk_size=1 GiB"
    )
