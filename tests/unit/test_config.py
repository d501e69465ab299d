"""Every honoured key is read from every place, later places win, and all else is named."""

import json
import logging
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from lmcache_rs.config import Config, Notice, extras, load_config, others
from lmcache_rs.config.keys import Status
from lmcache_rs.config.model import honoured_keys

GIB = 2**30
LMCACHE = json.loads(Path(__file__).with_name("test_config_lmcache_056.json").read_text())

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
    "lmcache_instance_id": ("engine-7", "engine-7"),
    "extra_config": ({"use_odirect": True}, {"use_odirect": True}),
    "kv_load_failure_policy": ("FAIL", "fail"),
    "sync_load_max_bytes": ("64MB", 64_000_000),
    "copy_threads": (4, 4),
    "prefault_threads": (0, 0),
    "pending_timeout_ms": (2.5, 2.5),
    "max_held_blocks_percent": (10, 10.0),
    "freeze": (True, True),
}


def from_yaml(
    tmp_path: Path, text: str, environ: dict[str, str] | None = None, extra: dict | None = None
) -> Config:
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(text)
    return load_config(extra, {"LMCACHE_CONFIG_FILE": str(path)} | (environ or {}))


def texts(config: Config, level: int | None = None) -> list[str]:
    return [notice.text for notice in config.notices if level is None or notice.level == level]


def test_values_cover_every_honoured_key():
    assert set(VALUES) == set(honoured_keys()) == {one.name for one in fields(Config)} - {"notices"}


@pytest.mark.parametrize("attribute", VALUES)
def test_honoured_key_from_each_place(attribute, tmp_path):
    key, (written, expected) = honoured_keys()[attribute], VALUES[attribute]
    in_variable = json.dumps(written) if isinstance(written, dict) else str(written)
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
    assert config.stores
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
        5: 6,
    }
    config = load_config(extra, {})
    assert (config.discard_partial_chunks, config.skip_last_n_tokens, config.chunk_size) == (True, 2, 256)
    assert texts(config) == ["use_native (in kv_connector_extra_config) is ignored: there is one connector"]
    both = {"lmcache.skip_last_n_tokens": 3, "skip_last_n_tokens": 2}
    assert load_config(both, {}).skip_last_n_tokens == 3


@pytest.mark.parametrize(
    ("unfull", "discard", "tails"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_tails(unfull, discard, tails):
    extra = {"lmcache.save_unfull_chunk": unfull, "discard_partial_chunks": discard}
    assert load_config(extra, {}).tails is tails


@pytest.mark.parametrize("name", ["local_cpu", "force_skip_save", "freeze"])
def test_stores(name):
    assert load_config({f"lmcache.{name}": name != "local_cpu"}, {}).stores is False


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF"])
def test_force_skip_save_is_a_boolean(word):
    assert load_config(environ={"LMCACHE_FORCE_SKIP_SAVE": word}).force_skip_save is False


# What is not honoured.


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
    assert key.default == ({} if name == "extra_config" else default)


UNSUPPORTED = [
    key for key in others.OTHER_KEYS if key.status is not Status.IGNORED and key.default is not None
]


@pytest.mark.parametrize("key", UNSUPPORTED, ids=lambda key: key.name)
def test_lmcache_default_of_an_unsupported_key_is_silent(key):
    value = f"{key.default}B" if key.kind.name.startswith("size") else key.default
    assert load_config({f"lmcache.{key.name}": value}, {}).notices == ()


OTHERS = [key for key in others.OTHER_KEYS if not key.name.endswith("*") and key.name != "remote_url"]
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
    path = tmp_path / "7"
    path.write_text("")
    variable = key.name.replace("*", "X")
    notices = load_config(environ={variable: str(path) if variable == "LMCACHE_CONFIG_FILE" else "7"}).notices
    if key.status is Status.HONOURED or key in extras.FOREIGN_VARIABLES:
        assert notices == ()
    else:
        level = logging.INFO if key.status is Status.IGNORED else logging.WARNING
        assert notices == (Notice(level, f"{variable} is {key.status.value}: {key.text}"),)


def test_encoder_cache_settings(tmp_path):
    config = from_yaml(tmp_path, "ec: {chunk_size: 1}\nec_local_cpu: true", {"LMCACHE_EC_CHUNK_SIZE": "1"})
    assert len(texts(config)) == 2  # a family has one line
    assert all("the encoder's cache is not kept" in text for text in texts(config))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"LMCACHE_MAX_CPU_SIZE": "5"},
            "LMCACHE_MAX_CPU_SIZE is unknown: did you mean LMCACHE_MAX_LOCAL_CPU_SIZE?",
        ),
        ({"LMCACHE_LOGLEVEL": "x"}, "LMCACHE_LOGLEVEL is unknown: did you mean LMCACHE_LOG_LEVEL?"),
        ({"LMCACHE_Chunk_Size": "5"}, "LMCACHE_Chunk_Size is unknown: did you mean LMCACHE_CHUNK_SIZE?"),
        ({"LMCACHE_QQQQQQQQQ": "5"}, "LMCACHE_QQQQQQQQQ is unknown: it has no effect"),
    ],
)
def test_unknown_variable_is_named_with_the_nearest(environ, expected):
    assert load_config(environ=environ).notices == (Notice(logging.WARNING, expected),)


def test_unknown_keys_are_named_with_the_nearest(tmp_path):
    config = from_yaml(
        tmp_path, "chunk-size: 5\nextra_config: {use_odirec: 1}", extra={"lmcache.chunksize": 1}
    )
    path = tmp_path / "lmcache_config.yaml"
    assert texts(config, logging.WARNING) == [
        f"chunk-size (in {path}) is unknown: did you mean chunk_size?",
        "lmcache.chunksize (in kv_connector_extra_config) is unknown: did you mean lmcache.chunk_size?",
        "extra_config.use_odirec is unknown: did you mean extra_config.use_odirect?",
    ]
    assert config.chunk_size == 256


def test_many_unknown_settings_make_few_lines(tmp_path):
    config = from_yaml(tmp_path, "\n".join(f"zq{n}: 1" for n in range(100)))
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


@pytest.mark.parametrize("scheme", others.REDIS_SCHEMES)
def test_redis_urls_are_not_yet(scheme):
    (text,) = texts(load_config(environ={"LMCACHE_REMOTE_URL": f"{scheme.upper()}://h1:1,h2:2"}))
    assert text == f"remote_url is not supported yet: {scheme}:// will be Redis, in a later version"


@pytest.mark.parametrize("scheme", [*others.OTHER_SCHEMES, "https"])
def test_other_urls_are_not_supported(scheme):
    (text,) = texts(load_config(environ={"LMCACHE_REMOTE_URL": f"{scheme}://h1:1"}))
    assert text.startswith(f"remote_url is not supported: {scheme}:// is ")


def test_describe_is_one_line_of_what_is_not_default():
    extra = {
        "lmcache.max_local_cpu_size": "20GiB",
        "lmcache.extra_config": {"password": "hunter2", "use_odirect": True},
        "lmcache.lmcache_instance_id": "a\nb",
        "lmcache.chunk_size": 256,
    }
    expected = (
        r"max_local_cpu_size=20 GiB, lmcache_instance_id='a\nb', extra_config={'password', 'use_odirect'}"
    )
    config = load_config(extra, {})
    assert config.describe() == expected
    assert repr(config) == f"Config({expected})"


def test_notice_logs_itself(caplog):
    logger = logging.getLogger("elsewhere")
    with caplog.at_level(logging.INFO, "elsewhere"):
        Notice(logging.WARNING, "100 %s sure").log(logger)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(30, "100 %s sure")]
