"""Lines look like LMCache's, go to standard error once, and obey LMCACHE_LOG_LEVEL."""

import logging
import re
import subprocess
import sys

import pytest

from lmcache_rs import log

FORMAT = "[%(asctime)s] LMCache %(levelname)s: %(message)s (%(filename)s:%(lineno)d:%(name)s)"
LINE = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] LMCache (\w+): (.*) \((\w+\.py):(\d+):([\w.]+)\)\n"
)


@pytest.fixture
def fresh(monkeypatch):
    """The package's root logger as it is before the first `init_logger`."""
    root = logging.getLogger("lmcache_rs")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "propagate", True)
    monkeypatch.delenv("LMCACHE_LOG_LEVEL", raising=False)
    level = root.level
    yield root
    root.setLevel(level)


def test_format_is_lmcaches(fresh, capsys):
    assert log.FORMAT == FORMAT
    log.init_logger("lmcache_rs.connector.scheduler").info("Storing KV cache for %d out of %d tokens", 31, 31)
    out, err = capsys.readouterr()
    match = LINE.fullmatch(err)
    assert match
    assert match.group(1, 2, 3) == ("INFO", "Storing KV cache for 31 out of 31 tokens", "test_log.py")
    assert match[5] == "lmcache_rs.connector.scheduler"
    assert out == ""


def test_one_handler_however_often(fresh, capsys):
    first, second = log.init_logger("lmcache_rs.a"), log.init_logger("lmcache_rs.a")
    log.init_logger("lmcache_rs.b")
    assert first is second
    assert (len(fresh.handlers), first.handlers, fresh.propagate) == (1, [], False)
    first.info("x")
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_reaches_the_root_logger(fresh, caplog):
    log.init_logger("lmcache_rs.a").warning("x")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "full"),
    [("lmcache_rs", "lmcache_rs"), ("mine", "lmcache_rs.mine"), ("lmcache_rsx", "lmcache_rs.lmcache_rsx")],
)
def test_names_are_below_the_package(fresh, name, full):
    assert log.init_logger(name).name == full


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (None, "INFO"),
        ("", "INFO"),
        ("debug", "DEBUG"),
        (" Warning ", "WARNING"),
        ("ERROR", "ERROR"),
        ("CRITICAL", "CRITICAL"),
    ],
)
def test_level(fresh, monkeypatch, capsys, value, level):
    if value is not None:
        monkeypatch.setenv("LMCACHE_LOG_LEVEL", value)
    logger = log.init_logger("lmcache_rs.a")
    assert logging.getLevelName(logger.getEffectiveLevel()) == level
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["LOUD", "10", "NOTSET", "WARN"])
def test_wrong_level_is_info_and_one_warning(fresh, monkeypatch, capsys, value):
    monkeypatch.setenv("LMCACHE_LOG_LEVEL", value)
    for _ in range(2):
        assert log.init_logger("lmcache_rs.a").getEffectiveLevel() == logging.INFO
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert (
        "WARNING: LMCACHE_LOG_LEVEL has an unknown value: INFO is used; write one of DEBUG, INFO" in lines[0]
    )


def test_standard_error_is_looked_up_for_each_line(fresh, capsys, monkeypatch):
    logger = log.init_logger("lmcache_rs.a")
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    logger.info("moved")
    assert "moved" in capsys.readouterr().out


def test_a_line_that_cannot_be_written_ends_nothing(fresh, monkeypatch):
    logger = log.init_logger("lmcache_rs.a")
    monkeypatch.setattr(sys, "stderr", None)
    logger.info("lost")
    monkeypatch.undo()


def test_importing_the_package_sets_up_nothing():
    code = "import logging, lmcache_rs, lmcache_rs.log; print(logging.getLogger('lmcache_rs').handlers)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
