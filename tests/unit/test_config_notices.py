"""What is not honoured is named in one line each, with the reason or the nearest right name."""

import json
import logging
from pathlib import Path

import pytest

from lmcache_rs.config import Config, Notice, extras, load_config, others, remote
from lmcache_rs.config.keys import Status
from lmcache_rs.config.model import honoured_keys

GIB = 2**30
LMCACHE = json.loads(Path(__file__).with_name("test_config_lmcache_056.json").read_text())


def texts(config: Config, level: int | None = None) -> list[str]:
    return [notice.text for notice in config.notices if level is None or notice.level == level]


def write(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(text)
    return {"LMCACHE_CONFIG_FILE": str(path)}


@pytest.mark.parametrize("name", LMCACHE)
def test_every_key_of_lmcache_is_known_with_its_default(name):
    keys = {key.name: key for key in (*honoured_keys().values(), *others.OTHER_KEYS)}
    key, default = keys[name], LMCACHE[name]
    if key.differs:
        return
    if key.kind.name.startswith("size"):
        default = int(default * GIB)
    if default == "inf":
        default = float("inf")
    assert key.default == {"extra_config": {}, "local_disk": ()}.get(name, default)


UNSUPPORTED = [
    key for key in others.OTHER_KEYS if key.status is not Status.IGNORED and key.default is not None
]


@pytest.mark.parametrize("key", UNSUPPORTED, ids=lambda key: key.name)
def test_lmcache_default_of_an_unsupported_key_is_silent(key):
    value = f"{key.default}B" if key.kind.name.startswith("size") else key.default
    assert load_config({f"lmcache.{key.name}": value}, {}).notices == ()


OTHERS = [key for key in others.OTHER_KEYS if not key.name.endswith("*")]
SAMPLES = ("true", "false", "7", "7.5", "auto", "cachegen", "sync", "redis://h")


@pytest.mark.parametrize("key", OTHERS, ids=lambda key: key.name)
def test_other_keys_are_named_with_status_and_reason(key):
    for sample in SAMPLES:  # the first that the key accepts and that is not its default
        try:
            if key.kind.parse(sample) == key.default:
                continue
        except ValueError:
            continue
        level = logging.INFO if key.status is Status.IGNORED else logging.WARNING
        expected = Notice(level, f"{key.variable} is {key.status.value}: {key.text}")
        assert load_config(environ={key.variable: sample}).notices == (expected,)
        return
    pytest.fail("no sample fits")


@pytest.mark.parametrize("old", others.ALIASES)
def test_old_names_are_known(old):
    (text,) = texts(load_config(environ={f"LMCACHE_{old.upper()}": "1"}))
    assert text.startswith(f"LMCACHE_{old.upper()} is not supported: ")


@pytest.mark.parametrize("key", [*extras.VARIABLES, *extras.FOREIGN_VARIABLES], ids=lambda key: key.name)
def test_other_variables(key, tmp_path):
    path = tmp_path / "1"
    path.write_text("")
    variable = key.name.replace("*", "X")
    notices = load_config(environ={variable: str(path) if variable == "LMCACHE_CONFIG_FILE" else "1"}).notices
    if key.status is Status.HONOURED or key in extras.FOREIGN_VARIABLES:
        assert notices == ()
    else:
        level = logging.INFO if key.status is Status.IGNORED else logging.WARNING
        assert notices == (Notice(level, f"{variable} is {key.status.value}: {key.text}"),)


def test_encoder_cache_settings(tmp_path):
    config = load_config(
        None, write(tmp_path, "ec: {chunk_size: 1}\nec_local_cpu: true") | {"LMCACHE_EC_CHUNK_SIZE": "1"}
    )
    assert len(texts(config)) == 2  # a family has one line
    assert all("the encoder's cache is not kept" in text for text in texts(config))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"LMCACHE_MAX_CPU_SIZE": "5"},
            "LMCACHE_MAX_CPU_SIZE is unknown and has no effect; did you mean LMCACHE_MAX_LOCAL_CPU_SIZE?",
        ),
        (
            {"LMCACHE_LOGLEVEL": "x"},
            "LMCACHE_LOGLEVEL is unknown and has no effect; did you mean LMCACHE_LOG_LEVEL?",
        ),
        (
            {"LMCACHE_Chunk_Size": "5"},
            "LMCACHE_Chunk_Size is unknown and has no effect; did you mean LMCACHE_CHUNK_SIZE?",
        ),
        ({"LMCACHE_QQQQQQQQQ": "5"}, "LMCACHE_QQQQQQQQQ is unknown and has no effect"),
        ({"LMCACHE_LOG_X": "5"}, "LMCACHE_LOG_X is unknown and has no effect"),
        ({"LMCACHE_": "5"}, "LMCACHE_ is unknown and has no effect"),
    ],
)
def test_unknown_variable_is_named_with_the_nearest(environ, expected):
    assert load_config(environ=environ).notices == (Notice(logging.WARNING, expected),)


def test_a_name_that_is_like_none_gets_no_proposal():
    extra = {"lmcache.log_x": 1, "lmcache.extra_config": {"foo": 1}}
    assert texts(load_config(extra, {}), logging.WARNING) == [
        "lmcache.log_x (in kv_connector_extra_config) is unknown and has no effect",
        "extra_config.foo is unknown and has no effect",
    ]


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({}, "nothing will be stored"),
        ({"lmcache.remote_url": "redis://h"}, "KV is kept in RAM all the same, on its way to other tiers"),
        (
            {"lmcache.local_disk": "/kv", "lmcache.max_local_disk_size": 1},
            "KV is kept in RAM all the same, on its way to other tiers",
        ),
    ],
)
def test_without_local_cpu_ram_serves_other_tiers_or_nothing_is_stored(beside, expected):
    config = load_config({"lmcache.local_cpu": False} | beside, {})
    assert texts(config, logging.WARNING) == [f"local_cpu is false: {expected}"]


def test_unknown_keys_are_named_with_the_nearest(tmp_path):
    environ = write(tmp_path, "chunk-size: 5\nextra_config: {use_odirec: 1}")
    config = load_config({"lmcache.chunksize": 1}, environ)
    path = tmp_path / "lmcache_config.yaml"
    assert texts(config, logging.WARNING) == [
        f"chunk-size (in {path}) is unknown and has no effect; did you mean chunk_size?",
        "lmcache.chunksize (in kv_connector_extra_config) is unknown and has no effect; "
        "did you mean lmcache.chunk_size?",
        "extra_config.use_odirec is unknown and has no effect; did you mean extra_config.use_odirect?",
    ]
    assert config.chunk_size == 256


@pytest.mark.parametrize("name", ["lmcache_chunk_size", "LMCACHE_CHUNK_SIZE", "lmcache_chunk_siz"])
def test_names_with_another_prefix_are_not_other_peoples(name):
    (warning,) = texts(load_config({name: 5, "lmcache_rpc_port": "x"}, {}), logging.WARNING)
    assert warning.startswith(f"{name} (in kv_connector_extra_config) is unknown")
    assert warning.endswith("did you mean lmcache.chunk_size?")


def test_many_unknown_settings_make_few_lines(tmp_path):
    config = load_config(None, write(tmp_path, "\n".join(f"zq{n}: 1" for n in range(100))))
    assert len(config.notices) == 21
    assert config.notices[-1].text == "80 more settings are unknown: they have no effect"


@pytest.mark.parametrize("policy", ["LFU", "fifo", "Mru"])
def test_other_policies_give_lru_and_a_line(policy):
    config = load_config(environ={"LMCACHE_CACHE_POLICY": policy})
    assert config.cache_policy == "LRU"
    assert texts(config, logging.WARNING) == [
        f"cache_policy {policy.upper()} is not supported yet: LRU is used"
    ]


def test_no_ram_tier_is_named():
    assert "nothing will be stored" in load_config(environ={"LMCACHE_LOCAL_CPU": "0"}).notices[0].text


@pytest.mark.parametrize("algorithm", ["builtin", "sha256_cbor"])
def test_hash_algorithm_is_named_always(algorithm):
    notices = load_config(environ={"LMCACHE_PRE_CACHING_HASH_ALGORITHM": algorithm}).notices
    expected = "LMCACHE_PRE_CACHING_HASH_ALGORITHM is ignored: keys are always 256-bit"
    assert notices == (Notice(logging.INFO, expected),)


@pytest.mark.parametrize("scheme", [*remote.OTHER_SCHEMES, "https"])
def test_other_urls_are_not_supported(scheme):
    config = load_config(environ={"LMCACHE_REMOTE_URL": f"{scheme}://h1:1"})
    (text,) = texts(config, logging.WARNING)
    assert text.startswith(f"remote_url is not supported: {scheme}:// is ")
    assert config.remote_url is None
