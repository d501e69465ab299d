"""A redis-server of one's own, on a Unix socket in a folder, with a password; used by the demo and the tests."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from progress import CommandError

PROGRAM = "LMCACHE_RS_REDIS_SERVER"
START_S_MAX = 20.0
# Nothing is written to disk, and old values leave when it is full.
SETTINGS = "port 0\nsave ''\nappendonly no\nmaxmemory {limit}\nmaxmemory-policy allkeys-lru\n"


def program() -> str | None:
    """The server's program: $LMCACHE_RS_REDIS_SERVER, or `redis-server` on the PATH; None: there is none."""
    return shutil.which(os.environ.get(PROGRAM, "redis-server"))


class RedisServer:
    """A server that is up from `with` on, or `start`; killed at the end, and with it what it holds."""

    def __init__(self, folder: Path, limit: str = "1gb") -> None:
        self._socket = folder / "redis.sock"
        self._log = folder / "redis.log"
        self._config = folder / "redis.conf"
        self.command = [program() or "redis-server", str(self._config)]
        self._process: subprocess.Popen[bytes] | None = None
        self.password = secrets.token_hex(16)
        self.url = f"unix://:{self.password}@{self._socket}"
        self._config.touch(mode=0o600)
        self._config.write_text(
            SETTINGS.format(limit=limit) + f"unixsocket {self._socket}\nrequirepass {self.password}\n"
        )

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, again if need be, and wait until it answers. Raises CommandError with what to do."""
        if program() is None:
            raise CommandError(
                f"there is no redis-server: install it (apt-get install redis-server), or name it in {PROGRAM}"
            )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_S_MAX
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise CommandError(f"redis-server does not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """The process that was started."""
        if self._process is None:
            raise ValueError("it is not up")
        return self._process.pid

    def kill(self) -> None:
        """End it at once, if it is up."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(str(self._socket))
                client.sendall(b"PING\r\n")
                return client.recv(64).startswith(b"-NOAUTH")
            except OSError:
                return False
