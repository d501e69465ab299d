"""What users see of disk and Redis: addresses without passwords, a line for each trouble, a metric for each count."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmcache_rs
from lmcache_rs.config import load_config
from lmcache_rs.config.remote import shown
from lmcache_rs.connector.metric_names import COUNTERS, GAUGES, LABELLED
from lmcache_rs.connector.tier_check import check_in_background
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
    troubles = Troubles("Looking for KV", lambda: now[0])
    for refusal in ("absent", "late", "late", "paused", "io_error"):
        troubles.note("redis", refusal)
    troubles.note("disk", "denied", "/mnt/usage: Permission denied")
    assert len(heard.messages) == 3
    assert heard.messages[0].startswith(
        "Looking for KV on redis fails: it did not answer in time. Requests go on"
    )
    assert (
        "on disk fails: permission is missing, or it is read-only (/mnt/usage: Permission denied)."
        in heard.text
    )
    now[0] = QUIET_S
    troubles.note("redis", "late")
    assert len(heard.messages) == 4


@pytest.mark.parametrize(("refusal", "back"), [("io_error", True), ("late", True), ("quota", False)])
@pytest.mark.parametrize("answer", [None, "absent", "paused", "corrupt"])
def test_a_tier_that_is_back_is_told_of_once(
    refusal: str, back: bool, answer: str | None, heard: pytest.LogCaptureFixture
) -> None:
    troubles = Troubles("Looking for KV", lambda: 0.0)
    for noted in (None, refusal, answer, answer):
        troubles.note("redis", noted)
    troubles.note("disk", None)
    told = [message for message in heard.messages if message == "KV on redis is used again"]
    assert len(told) == (back and answer in (None, "absent"))
    assert not any("disk" in message for message in heard.messages)


def test_a_tier_that_cannot_be_used_is_told_of_at_the_start(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, size in ((tmp_path / "file", 1), (tmp_path / "huge", 2**20), (tmp_path / "right", 1e-6)):
        extra = {"lmcache.local_disk": str(path), "lmcache.max_local_disk_size": size}
        config = load_config(extra, environ={})
        for thread in check_in_background(config, open_tiers(config, 0, 1, bytes(32), searching=True)):
            thread.join(60)
    first, second = heard.messages
    assert first.startswith(
        f"KV cannot be kept on disk at {tmp_path}/file now: io_error ({tmp_path}/file/lmcache_rs"
    )
    assert second.startswith(f"max_local_disk_size: 1024 TiB for {tmp_path}/huge, whose file system has ")


# A server that takes connections and says nothing, and an interpreter that is still ending when it is given up.
ENDS_DURING_A_CHECK = """
import os, socket, sys, time
from lmcache_rs.config import load_config
from lmcache_rs.connector.tier_check import check_in_background
from lmcache_rs.connector.tiers import open_tiers

class Slow:
    def __del__(self, sleep=time.sleep, ending=sys.is_finalizing, write=os.write):
        write(1, str(ending()).encode())
        sleep(1.0)

silent = socket.create_server(("127.0.0.1", 0))
url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
config = load_config({"lmcache.remote_url": url, "lmcache.blocking_timeout_secs": 0.3}, {})
check_in_background(config, open_tiers(config, 0, 1, bytes(32), searching=True))
sys.modules["kept to the end"] = Slow()
"""


def test_the_interpreter_ends_while_a_tier_is_checked() -> None:
    command = [sys.executable, "-c", ENDS_DURING_A_CHECK]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True", "")


def test_every_count_has_a_metric() -> None:
    sources = (Path(lmcache_rs.__file__).parent / "connector").glob("*.py")
    text = "\n".join(path.read_text() for path in sources)
    counted = re.findall(r'ounters\.(?:add|set)\(\s*f?"([a-z_]+(?::[{}a-z_.:]+)?)"', text)
    assert {"lookups", "tier_lookups", "search_timeouts"} <= set(counted)
    known = COUNTERS.keys() | GAUGES.keys()
    tiers = ("disk", "redis")
    for name in set(counted):
        kind, _, label = name.partition(":")
        each = {f"{kind}:{tier}" for tier in tiers} if label == "{job.tier}" or label == "{tier}" else {name}
        assert kind in LABELLED or each <= known, name
