"""What users see of disk and Redis: addresses without passwords, a line for each trouble, a metric for each count."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmcache_rs
from lmcache_rs.config import load_config
from lmcache_rs.config.remote import shown
from lmcache_rs.connector.tiers import describe, open_tiers
from lmcache_rs.connector.troubles import QUIET_S, Troubles


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("redis://host:6379/2", "redis://host:6379/2"),
        ("rediss://me:secret@host", "rediss://host"),
        ("unix://:secret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("redis-sentinel://:secret@a:1,b:2/master", "redis-sentinel://a:1,b:2/master"),
        ("redis://me:se?cret@host", "redis://***"),
    ],
)
def test_an_address_is_shown_without_its_login(address: str, text: str) -> None:
    assert shown(address) == text


def test_tiers_are_named_with_their_place_and_use(tmp_path: Path) -> None:
    extra = {
        "lmcache.local_disk": f"{tmp_path}/a,{tmp_path}/b",
        "lmcache.max_local_disk_size": 3,
        "lmcache.remote_url": "redis://me:secret@host:7000",
        "lmcache.retrieve_locations": ["LocalDiskBackend"],
    }
    config = load_config(extra, environ={})
    tiers = open_tiers(config, 0, 1, bytes(32), searching=True)
    assert describe(config, tiers) == (
        f"disk at {tmp_path}/a, {tmp_path}/b (3 GiB); redis at redis://host:7000 (only written)"
    )


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What our logger, which passes nothing on, says from INFO on."""
    logger = logging.getLogger("lmcache_rs")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


def test_a_trouble_is_told_once_in_a_while(heard: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    troubles = Troubles(lambda: now[0])
    for refusal in ("absent", "late", "late", "paused", "io_error"):
        troubles.note("redis", refusal)
    troubles.note("disk", "late")
    assert len(heard.messages) == 3
    assert "KV on redis is not used: it did not answer in time" in heard.messages[0]
    now[0] = QUIET_S
    troubles.note("redis", "late")
    assert len(heard.messages) == 4


@pytest.mark.parametrize(("refusal", "back"), [("io_error", True), ("late", True), ("quota", False)])
@pytest.mark.parametrize("answer", [None, "absent", "paused", "corrupt"])
def test_a_tier_that_is_back_is_told_of_once(
    refusal: str, back: bool, answer: str | None, heard: pytest.LogCaptureFixture
) -> None:
    troubles = Troubles(lambda: 0.0)
    for noted in (None, refusal, answer, answer):
        troubles.note("redis", noted)
    troubles.note("disk", None)
    told = [message for message in heard.messages if message == "KV on redis is used again"]
    assert len(told) == (back and answer in (None, "absent"))
    assert not any("disk" in message for message in heard.messages)


@pytest.mark.vllm
def test_every_count_has_a_metric() -> None:
    from lmcache_rs.connector.metrics import COUNTERS, GAUGES, LABELLED

    sources = (Path(lmcache_rs.__file__).parent / "connector").glob("*.py")
    text = "\n".join(path.read_text() for path in sources)
    counted = re.findall(r'ounters\.(?:add|set)\(\s*f?"([a-z_]+(?::[{}a-z_.]+)?)"', text)
    assert {"lookups", "tier_lookups", "search_timeouts"} <= set(counted)
    known = COUNTERS.keys() | GAUGES.keys()
    tiers = ("disk", "redis")
    for name in set(counted):
        kind, _, label = name.partition(":")
        each = {f"{kind}:{tier}" for tier in tiers} if label == "{job.tier}" or label == "{tier}" else {name}
        assert kind in LABELLED or each <= known, name
