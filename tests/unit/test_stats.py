"""Counters tell what was added since they were last taken, and whether anything was."""

from lmcache_rs.connector.stats import Counters


def test_what_was_added_is_told_once() -> None:
    counters = Counters()
    assert (counters.changed, counters.take()) == (False, {})
    counters.add("a")
    counters.add("a", 2)
    assert (counters.changed, counters.take()) == (True, {"a": 3})
    assert (counters.changed, counters.take()) == (False, {})


def test_a_total_counted_elsewhere_is_told_when_it_grew() -> None:
    counters = Counters()
    counters.set("a", 0)
    assert not counters.changed
    counters.set("a", 5)
    counters.set("a", 5)
    assert (counters.changed, counters.take()) == (True, {"a": 5})
    counters.set("a", 5)
    assert not counters.changed
    counters.set("a", 7)
    assert (counters.changed, counters.take()) == (True, {"a": 2})
