"""A request whose load failed, or that was told to ask again, never waits for blocks of those who wait behind it."""

import pytest

from lmcache_rs.connector import turns
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.turns import Turns

BOTH = pytest.mark.parametrize("holders_go_first", [False, True])


def loading(holders_go_first: bool, *request_ids: str) -> Turns:
    """These requests hold blocks for asynchronous loads."""
    made = Turns(Counters(), holders_go_first)
    for request_id in request_ids:
        assert made.answer(request_id, 8, True) == 8, "loads begin beside each other"
        made.admit(request_id, True)
    return made


@BOTH
def test_a_failed_request_waits_until_nobody_holds_blocks(holders_go_first: bool) -> None:
    made = loading(holders_go_first, "failed", "a", "b")
    assert made.answer("failed", 0, False) is None
    made.run(["a"])
    assert made.answer("failed", 0, False) is None
    made.run(["b"])
    assert made.answer("failed", 0, False) == 0


@BOTH
def test_no_load_begins_before_a_failed_request_runs(holders_go_first: bool) -> None:
    """Or its wait would never end."""
    made = loading(holders_go_first, "failed", "a")
    assert made.answer("failed", 0, False) is None
    assert made.answer("new", 8, True) is None
    assert made.answer("computed", 0, False) == 0, "that needs no load"
    made.run(["a"])
    assert made.answer("new", 8, True) is None, "the failed one has not run yet"
    assert made.answer("failed", 0, False) == 0
    made.admit("failed", False)
    assert made.answer("new", 8, True) == 8


@BOTH
@pytest.mark.parametrize("gone", ["failed", "a"])
def test_nobody_waits_for_a_request_that_is_gone(holders_go_first: bool, gone: str) -> None:
    made = loading(holders_go_first, "failed", "a")
    assert made.answer("failed", 0, False) is None
    made.withdraw(gone)
    if gone == "a":
        assert made.answer("failed", 0, False) == 0
        made.admit("failed", False)
    assert made.answer("new", 8, True) == 8


@BOTH
def test_several_failed_requests_do_not_wait_for_each_other(holders_go_first: bool) -> None:
    made = loading(holders_go_first, "one", "two", "a")
    assert made.answer("one", 0, False) is None
    assert made.answer("two", 0, False) is None
    made.run(["a"])
    assert made.answer("one", 0, False) == 0
    assert made.answer("two", 0, False) == 0


def test_who_was_told_to_ask_again_stands_before_loads_of_older_versions() -> None:
    made = Turns(Counters(), holders_go_first=False)
    assert made.answer("asked", None, False) is None
    assert made.answer("a", 8, True) == 8
    made.admit("a", True)
    assert made.answer("asked", 8, True) is None
    assert made.answer("new", 8, True) is None
    made.run(["a"])
    assert made.answer("asked", 8, True) == 8, "it need not wait for itself"
    made.admit("asked", True)
    assert made.answer("new", 8, True) is None, "it was told to ask again, too"
    made.run(["asked"])
    assert made.answer("new", 8, True) == 8


def test_newer_versions_move_it_behind() -> None:
    made = Turns(Counters(), holders_go_first=True)
    assert made.answer("asked", None, False) is None
    assert made.answer("a", 8, True) == 8
    made.admit("a", True)
    assert made.answer("asked", 8, True) == 8


def test_the_wait_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURNS_MAX", 5)
    made = loading(True, "failed", "stuck")
    assert [made.answer("failed", 0, False) for _ in range(6)] == [None] * 5 + [0]
    assert made._counters.totals() == {"waits_for_holders": 5}
