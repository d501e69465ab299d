"""The pool is clamped to what the machine and its container can give, and says so."""

import logging
from pathlib import Path

import pytest

from lmcache_rs import memory

GIB = 1 << 30


def machine(
    root: Path, available: int, v2: tuple[str, str] | None = None, v1: tuple[str, str] | None = None
) -> Path:
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n"}
    for names, values in (
        (("memory.max", "memory.current"), v2),
        (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"), v1),
    ):
        if values is not None:
            files |= {
                f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in zip(names, values, strict=True)
            }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("v2", "v1", "expected"),
    [
        (None, None, 8 * GIB),
        (("max", "5"), None, 8 * GIB),
        ((str(4 * GIB), str(GIB)), None, 3 * GIB),
        ((str(GIB), str(2 * GIB)), None, 0),
        (None, (str(2**63 - 4096), "0"), 8 * GIB),
        (None, (str(6 * GIB), str(GIB)), 5 * GIB),
    ],
)
def test_the_smallest_limit_counts(
    tmp_path: Path, v2: tuple[str, str] | None, v1: tuple[str, str] | None, expected: int
) -> None:
    assert memory.available_bytes(machine(tmp_path, 8 * GIB, v2, v1)) == expected


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a.slice/b.scope", "", ("memory.max", "memory.current")),
        ("4:cpu,memory:/a.slice/b.scope", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
@pytest.mark.parametrize("limited", ["a.slice", "a.slice/b.scope", "."])
def test_every_group_above_the_process_counts(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str], limited: str
) -> None:
    root = machine(tmp_path, 8 * GIB)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text(f"9:pids:/elsewhere\n{line}\n")
    group = root / "sys/fs/cgroup" / folder / limited
    group.mkdir(parents=True)
    for name, value in zip(names, (3 * GIB, GIB), strict=True):
        (group / name).write_text(f"{value}\n")
    assert memory.available_bytes(root) == 2 * GIB


def test_nothing_known_limits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.available_bytes(tmp_path) is None
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert memory.clamp(5 * GIB, 0, 0, 1) == 5 * GIB


@pytest.mark.parametrize(
    ("reserve", "untouched", "ranks", "expected"),
    [
        (0, 0, 1, 9 * GIB),
        (3 * GIB, 0, 1, 7 * GIB),
        (0, 5 * GIB, 1, 4 * GIB),
        (0, GIB, 4, 2 * GIB),
        (0, 99 * GIB, 1, 0),
    ],
)
def test_what_is_asked_for_is_clamped_with_one_line(
    reserve: int, untouched: int, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(memory.logger, "handlers", [handler])
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * GIB)
    assert memory.clamp(expected // 2, reserve, untouched, ranks) == expected // 2
    assert not lines
    assert memory.clamp(100 * GIB, reserve, untouched, ranks) == expected
    (line,) = lines
    assert line.startswith("max_local_cpu_size: 100.00 GiB asked for, ")
