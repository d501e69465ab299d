"""Runs the long forms of the tests: each of them for a time, then a table of what was run and how much of it was wrong.

Python tests with the marker `soak` read LMCACHE_SOAK_SECONDS and LMCACHE_SOAK_SEED and note in pytest's report what
they ran and how often (`tests/support.py`); Rust tests read the same variables and print it: "soak: NAME: NUMBER WHAT".
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from progress import CommandError, run, say

ROOT = Path(__file__).resolve().parent.parent
MARGIN_S = 600
"""What a test may take beyond its time: the round that it is in, and what it sets up."""
CASES_PER_SECOND = 1000
"""Of the index's model, about; that test knows no time."""
COUNTED = re.compile(r"soak: (?P<name>.+): (?P<count>\d+) (?P<what>\w+)$", re.MULTILINE)
FAILED = re.compile(r"^failures:\n((?: {4}[\w:]+\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """A test: how many of what it ran, and whether it found something wrong."""

    name: str
    count: int
    what: str
    wrong: int


def python_rows(report: Path) -> Iterator[Row]:
    """What pytest's report says."""
    for case in ElementTree.parse(report).iter("testcase"):
        notes = {note.get("name"): note.get("value") for note in case.iter("property")}
        wrong = sum(case.find(kind) is not None for kind in ("failure", "error"))
        name = str(case.get("name")).removeprefix("test_").replace("_", " ")
        if case.find("skipped") is None:
            yield Row(name, int(notes.get("soak_count") or 0), notes.get("soak_what") or "rounds", wrong)


def rust_rows(output: str) -> Iterator[Row]:
    """What the tests printed; a test that prints nothing is told of if it failed."""
    for match in COUNTED.finditer(output):
        yield Row(match["name"], int(match["count"]), match["what"], 0)
    for match in FAILED.finditer(output):
        for name in match[1].split():
            yield Row(name.rpartition("::")[2].replace("_", " "), 0, "", 1)


def attempt(what: str, command: Sequence[str | Path], log: Path, env: dict[str, str]) -> bool:
    """Run a command that may fail, with its end shown then."""
    try:
        run(what, command, log, env=os.environ | env, cwd=ROOT)
    except CommandError as error:
        say(str(error))
        return False
    return True


def soak_python(seconds: int, env: dict[str, str], folder: Path) -> list[Row]:
    """Every Python test with a long form."""
    report = folder / "report.xml"
    options = [f"--timeout={seconds + MARGIN_S}", f"--junitxml={report}", "-v"]
    command = [sys.executable, "-m", "pytest", "-m", "soak", *options]
    ended_well = attempt("Python tests", command, folder / "python.log", env)
    rows = list(python_rows(report)) if report.exists() else []
    return rows if ended_well or any(row.wrong for row in rows) else [*rows, Row("Python tests", 0, "", 1)]


def soak_rust(name: str, options: list[str], env: dict[str, str], folder: Path) -> list[Row]:
    """Some tests of the Rust core."""
    log = folder / f"{name}.log"
    command = ["cargo", "test", "--release", "-p", "lmcache-core", *options]
    ended_well = attempt(f"Rust tests, {name}", [*command, "--", "--nocapture", "--test-threads=1"], log, env)
    rows = list(rust_rows(log.read_text()))
    return rows if ended_well or any(row.wrong for row in rows) else [*rows, Row(name, 0, "", 1)]


def main() -> int:
    """Run everything; 1 when something was wrong."""
    parser = argparse.ArgumentParser(description="Run the long forms of the tests.")
    parser.add_argument("seconds", type=int, help="how long each of them runs")
    parser.add_argument("--seed", type=int, default=None, help="the first seed; chosen at random by default")
    arguments = parser.parse_args()
    seconds = max(1, arguments.seconds)
    seed = arguments.seed if arguments.seed is not None else random.randrange(1 << 32)
    cases = seconds * CASES_PER_SECOND
    env = {
        "LMCACHE_SOAK_SECONDS": str(seconds),
        "LMCACHE_SOAK_SEED": str(seed),
        "PROPTEST_CASES": str(cases),
    }
    folder = Path(tempfile.mkdtemp(prefix="lmcache-rs-soak-"))
    say(f"Each test runs for {seconds} s, from seed {seed} on; logs are in {folder}")
    rows = soak_python(seconds, env, folder)
    for name, options in (
        ("schedules", ["--features", "shuttle", "--lib", "schedules"]),
        ("interleavings", ["--features", "loom", "--test", "loom_index"]),
        ("model", ["--test", "index_model"]),
    ):
        rows += soak_rust(name, options, env, folder)
    if not any(row.name.startswith("behaves") for row in rows):
        rows.append(Row("behaves like the model", cases, "cases", 0))
    return show(rows, seed)


def show(rows: list[Row], seed: int) -> int:
    """The table; 1 when a row is wrong."""
    say("")
    width = max(len(row.name) for row in rows)
    for row in rows:
        say(f"{row.name:<{width}}  {row.count:>12,} {row.what:<24}  {row.wrong} wrong")
    wrong = sum(row.wrong for row in rows)
    say(f"\n{len(rows)} tests, {wrong} wrong" + (f"; repeat with --seed {seed}" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
