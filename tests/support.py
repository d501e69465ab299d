"""What tests share that is no fixture: where things are, and processes of their own to run things in."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import setup_env

ROOT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
# Settings of the caller's shell that would change what a test sees.
FOREIGN = ("LMCACHE_", "VLLM_", "PYTHONHASHSEED", "PYTHONPATH")


def require_markers(item: pytest.Item) -> None:
    """Skip what this machine cannot run; in CI a missing vLLM is a failure, so that no test vanishes silently."""
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        lack("vLLM is not installed (make setup installs it)")
    if item.get_closest_marker("gpu") and not setup_env.has_nvidia_driver():
        pytest.skip("needs an NVIDIA GPU")


def lack(reason: str) -> None:
    """Something that CI must have is missing."""
    if IN_CI:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that runs vLLM: nothing of the caller's settings, offline, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        # With more threads a busy neighbour makes vLLM's CPU build up to 20 times slower.
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "VLLM_NO_USAGE_STATS": "1",
        **(extra or {}),
    }


def hash_of(path: Path) -> str:
    """A short name for a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class RunScript:
    """Runs Python in a process of its own, since vLLM leaves too much behind in the one it ran in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def __call__(
        self,
        code_or_path: str | Path,
        *arguments: str | Path | int,
        env: Mapping[str, str] | None = None,
        timeout: float = 240,
        in_process: bool = False,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run code (a str) or a script (a Path), stderr merged into stdout.

        `in_process` keeps vLLM's engine in that one process: 10 s quicker to start, and no `__main__` guard needed.
        With `check` an exit status other than 0 fails the test and shows the output.
        """
        path = code_or_path if isinstance(code_or_path, Path) else self._write(code_or_path)
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if in_process else {}
        process = subprocess.Popen(
            [sys.executable, str(path), *map(str, arguments)],
            env=clean_environment({**variables, **(env or {})}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end_session(process)
            output, _ = process.communicate()
            pytest.fail(f"{path} took more than {timeout} s\n{output[-8000:]}", pytrace=False)
        finally:
            end_session(process)
        if check and process.returncode != 0:
            pytest.fail(f"{path} ended with status {process.returncode}\n{output[-8000:]}", pytrace=False)
        return subprocess.CompletedProcess(process.args, process.returncode, output, "")

    def _write(self, code: str) -> Path:
        self._count += 1
        path = self.folder / f"script{self._count}.py"
        path.write_text(code)
        return path


def end_session(process: subprocess.Popen[str]) -> None:
    """Kill a process and all its children: vLLM's engine processes outlive a killed parent."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Soak:
    """Repeats what a test does: a few times in CI, for LMCACHE_SOAK_SECONDS under `make soak`; counts how often.

    Round numbers are seeds. They begin at LMCACHE_SOAK_SEED (default 0), so that a round that failed can be repeated.
    """

    def __init__(self) -> None:
        self.seconds = float(os.environ.get("LMCACHE_SOAK_SECONDS", "0"))
        self.seed = int(os.environ.get("LMCACHE_SOAK_SEED", "0"))
        self.what = "rounds"
        self.count = 0

    def rounds(self, short: int, what: str = "rounds") -> Iterator[int]:
        """The numbers of `short` rounds, or of as many as the time allows. `what`: what a round is, in the plural."""
        self.what = what
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline if self.seconds else self.count < short:
            yield self.seed + self.count
            self.count += 1
