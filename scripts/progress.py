"""Runs a command with its output in a log file, and shows that it is alive; used by the other scripts here."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

LINE_WIDTH = 78
RETRY_PAUSE_S = 3


class CommandError(Exception):
    """A command failed; the message says which, with its last lines."""


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def fail(message: str) -> NoReturn:
    """End the script with one message."""
    say("")
    sys.exit(f"FAILED: {message}")


def tail(log: Path, lines: int, after: int = 0) -> list[str]:
    """The last non-empty lines that were written to `log` after byte `after`."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        # A line of a progress bar ends with a carriage return, so far more than `lines` lines of text are read.
        file.seek(max(after, size - 400 * lines - 2000))
        text = file.read().decode("utf-8", "replace")
    return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-lines:]


def run(
    what: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    attempts: int = 1,
    every_s: float = 10.0,
    status: Callable[[list[str]], str] = lambda lines: lines[-1] if lines else "",
) -> None:
    """Run `command`, its output appended to `log`, with a line of progress every `every_s` seconds.

    `status` makes the end of that line from the last lines of output. A command that fails is tried `attempts`
    times, since downloads do fail; then CommandError is raised.
    """
    words = [str(word) for word in command]
    say(f"- {what}")
    for attempt in range(1, attempts + 1):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"\n$ {shlex.join(words)}\n".encode())
            output.flush()
            begin = output.tell()
            # Its own standard input: a command that asks a question must fail, not wait.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd
            )
            code = _wait(process, log, begin, every_s, status)
        if code == 0:
            return
        if attempt < attempts:
            say(f"    it failed; trying again ({attempt + 1} of {attempts})")
            time.sleep(RETRY_PAUSE_S * attempt)
    last = "\n".join(f"    {line}" for line in tail(log, 15, begin))
    raise CommandError(
        f"{what}\n  command: {shlex.join(words)}\n  exit status: {code}\n  its last lines:\n{last}\n"
        f"  everything it printed: {log}"
    )


def _wait(
    process: subprocess.Popen[bytes],
    log: Path,
    begin: int,
    every_s: float,
    status: Callable[[list[str]], str],
) -> int:
    """Wait for the end of `process`, saying now and then how it stands; never leaves it running."""
    start = time.monotonic()
    try:
        while True:
            try:
                return process.wait(timeout=every_s)
            except subprocess.TimeoutExpired:
                line = f"    {time.monotonic() - start:4.0f} s  {status(tail(log, 40, begin)).strip()}"
                say(line[:LINE_WIDTH])
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
