"""Whatever is written anywhere, nothing but ConfigError is raised and no secret is shown."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_rs.config import ConfigError, load_config, others
from lmcache_rs.config import values as v
from lmcache_rs.config.model import honoured_keys

CANARY = "hunter2SECRET"


@pytest.mark.parametrize(
    "text",
    [
        f"redis://user:{CANARY}@host:6379/0",
        f"redis://user:{CANARY}@x@host",
        f"redis://:pre/{CANARY}@host",
        f"redis://user:a b\n{CANARY}@host",
        f"user:{CANARY}@host",
        f"redis://host?password={CANARY}",
        f"redis://host?password=a\n{CANARY}",
        f"redis:/6host?password={CANARY}",
        f"redis://user:{CANARY}6host:6379/0",
    ],
)
def test_mask(text):
    assert CANARY not in v.mask(text)
    assert CANARY not in v.shown(text)


SECRETS = [
    f"redis://u:{CANARY}@h:1",
    f"rediss://h:1?password={CANARY}",
    f"u:{CANARY}@h:1",
    [f"redis://u:{CANARY}@h:1"],
    {"password": CANARY},
    {
        "password": [CANARY],
        "redis_url": f"redis://u:{CANARY}@h",
        "remote_storage_plugin.redis.redis_url": CANARY,
    },
    {"request_timeout": f"redis://:{CANARY}@h"},
]
ALL_KEYS = sorted({key.name.replace("*", "x") for key in others.OTHER_KEYS})


def everything_said(extra, environ) -> str:
    try:
        config = load_config(extra, environ)
    except ConfigError as problem:
        return str(problem)
    return repr(config) + config.describe() + repr(config.notices)


@pytest.mark.parametrize("secret", SECRETS, ids=range(len(SECRETS)))
def test_no_secret_is_shown_whatever_key_it_is_given_to(secret, tmp_path):
    names = [*ALL_KEYS, *(key.name for key in honoured_keys().values())]
    for name in [*names, "remote_urll", "zzz"]:
        assert CANARY not in everything_said({f"lmcache.{name}": secret}, {})
        if isinstance(secret, str):
            assert CANARY not in everything_said({}, {f"LMCACHE_{name.upper()}": secret})


@pytest.mark.parametrize(
    "variable", ["RESP_PASSWORD", "RESP_USERNAME", "AEROSPIKE_PASSWORD", "LOG_LEVEL", "EC_REMOTE_URL"]
)
def test_no_secret_is_shown_from_other_variables(variable):
    assert CANARY not in everything_said({}, {f"LMCACHE_{variable}": CANARY})


@pytest.mark.parametrize(
    "text",
    [
        f"remote_url: *{CANARY}",
        f"remote_url: !{CANARY} x",
        f"remote_url: 'redis://u:{CANARY}@h",
        f"remote_url: [redis://u:{CANARY}@h",
        f"redis://u:{CANARY}@h",
        f"redis://u:{CANARY}@h: 1",
        f"extra_config: {{password: {CANARY}, redis_url: {CANARY}}}",
        f"extra_config: {{'redis://u:{CANARY}@h': 1}}",
        f"extra_config: {{password: {CANARY}",
    ],
)
def test_no_secret_is_shown_from_a_file(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert CANARY not in everything_said({}, {"LMCACHE_CONFIG_FILE": str(path)})


# Anything at all.

NAMES = st.one_of(
    st.sampled_from(
        [*ALL_KEYS, "chunk_size", "max_local_cpu_size", "local_cpu", "extra_config", "remote_url"]
    ),
    st.text(max_size=12),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
# A fixed seed in CI comes from hypothesis' own settings; the file is the function's, hence the health check.
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    extra=st.dictionaries(st.one_of(NAMES, NAMES.map("lmcache.".__add__), st.integers()), VALUES, max_size=5)
)
def test_any_extra_config(extra):
    everything_said(extra, {})


@FUZZ
@given(environ=st.dictionaries(NAMES.map(lambda name: "LMCACHE_" + name.upper()), st.text(), max_size=5))
def test_any_environment(environ):
    everything_said({}, environ)


YAML_TEXT = st.lists(
    st.sampled_from(
        [
            "chunk_size",
            "extra_config",
            ": ",
            "\n",
            "- ",
            "[",
            "]",
            "{",
            "}",
            "!!python/object:os.x",
            "&a ",
            "*a",
        ]
    )
    | st.sampled_from(
        ["!!timestamp x", "!!int x", "!!float x", "!!binary x", "? ", "1:99", "<<", "0x", "'", "|", "\t"]
    )
    | st.text(max_size=5),
    max_size=12,
).map("".join)


@FUZZ
@given(content=YAML_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))
def test_any_file(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    everything_said({}, {"LMCACHE_CONFIG_FILE": str(path)})
