"""What `make soak` makes of the reports of pytest and of Rust's tests."""

from pathlib import Path

import pytest

import soak

REPORT = """<testsuites><testsuite>
<testcase name="test_that_ran"><properties><property name="soak_what" value="kills" />
<property name="soak_count" value="7" /></properties></testcase>
<testcase name="test_that_failed"><properties><property name="soak_count" value="3" /></properties>
<failure /></testcase>
<testcase name="test_that_was_skipped"><skipped /></testcase>
<testcase name="test_that_did_not_start"><error /></testcase>
</testsuite></testsuites>"""

OUTPUT = """
running 3 tests
test one ... soak: one thing: 5 steps
ok
test two ...
thread 'two' panicked
FAILED
test three ... soak: another: 12 interleavings
ok

failures:

failures:
    some::tests::number_two

test result: FAILED. 2 passed; 1 failed
"""


def test_rows_of_python(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert list(soak.python_rows(tmp_path / "report.xml")) == [
        soak.Row("that ran", 7, "kills", 0),
        soak.Row("that failed", 3, "rounds", 1),
        soak.Row("that did not start", 0, "rounds", 1),
    ]


def test_rows_of_rust() -> None:
    assert list(soak.rust_rows(OUTPUT)) == [
        soak.Row("one thing", 5, "steps", 0),
        soak.Row("another", 12, "interleavings", 0),
        soak.Row("number two", 0, "", 1),
    ]


def test_a_run_that_ends_without_a_word_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "attempt", lambda *_: False)
    assert soak.soak_python(1, {}, tmp_path) == [soak.Row("Python tests", 0, "", 1)]
    (tmp_path / "x.log").write_text("")
    assert soak.soak_rust("x", [], {}, tmp_path) == [soak.Row("x", 0, "", 1)]


def test_the_table_says_how_to_repeat_what_was_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.show([soak.Row("one", 1000, "steps", 0)], 5) == 0
    assert "1,000 steps" in capsys.readouterr().out
    assert soak.show([soak.Row("one", 1000, "steps", 0), soak.Row("two", 0, "", 1)], 5) == 1
    assert "2 tests, 1 wrong; repeat with --seed 5" in capsys.readouterr().out
