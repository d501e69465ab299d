"""Steps of a scenario about disk and Redis: what is waited for, damaged and restarted."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from held_queue import HeldQueue
from scenario_damage import handle, worker_side

WAIT_S = 60.0

POLLS_A_CHUNK = 20


class Tiers:
    """Works on the scheduler's side that lives in this process, and on the tiers from outside."""

    llm: Any
    generate: Callable[..., dict[str, Any]]

    def written(self) -> dict[str, float]:
        """Step until everything ordered is written; the statistics then."""
        scheduler, deadline = handle()._scheduler, time.monotonic() + WAIT_S
        while scheduler.has_work() or scheduler._tiering._writes.busy:
            self.llm.llm_engine.step()
            # An engine that has nothing to compute does not wait for writes, and makes no step for them.
            scheduler._ask_nearby()
            time.sleep(1e-3)
            if time.monotonic() > deadline:
                raise RuntimeError("writes do not end")
        return dict(handle().stats())

    def trickle(self) -> None:
        """From now on the worker is told of one fetched chunk each `POLLS_A_CHUNK` times that it asks."""
        tiers = worker_side().tiers
        open_tiers = tiers._open_tiers

        def opening(namespace: bytes) -> dict[str, Any]:
            opened = open_tiers(namespace)
            return {name: replace(tier, queue=Trickling(tier.queue)) for name, tier in opened.items()}

        tiers._open_tiers = opening

    def clear_ram(self) -> int:
        """RAM forgets, the slower tiers do not."""
        return int(handle()._scheduler.index.clear())

    def rotate_files(self, folder: str) -> int:
        """Each value on disk is now under the name of another one of its size."""
        by_size: dict[int, list[Path]] = {}
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.stat().st_size > 0:
                by_size.setdefault(path.stat().st_size, []).append(path)
        moved = 0
        for paths in by_size.values():
            if len(paths) > 1:
                contents = [path.read_bytes() for path in paths]
                for path, content in zip(paths, [*contents[1:], contents[0]], strict=True):
                    path.write_bytes(content)
                    moved += 1
        return moved

    def kill(self, pid: int) -> None:
        """Kill a server that another process started."""
        os.kill(pid, signal.SIGKILL)

    def hang(self, pid: int, hangs: bool = True) -> None:
        """Stop a server that another process started, or let it go on."""
        os.kill(pid, signal.SIGSTOP if hangs else signal.SIGCONT)

    def start(self, command: list[str]) -> None:
        """Start a server, which ends with this process's session."""
        # With this process's output it would keep its reader waiting.
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(command, **streams)

    def served_again(self, prompt: Any, tokens: int) -> dict[str, Any]:
        """Generate again and again, RAM empty each time, until so many tokens are found; the last answer.

        The first times write what was refused meanwhile, perhaps in parts.
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            self.clear_ram()
            answer = self.generate([prompt])
            self.written()
            if answer["cached"][0] == tokens or time.monotonic() > deadline:
                return answer
            time.sleep(0.2)


class Trickling(HeldQueue):
    """Tells of one fetched chunk at a time."""

    _polls = 0

    def poll(self) -> list[Any]:
        self._polls += 1
        self.may_tell = int(self._polls % POLLS_A_CHUNK == 0)
        return super().poll()
