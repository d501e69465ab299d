"""What a lookup takes while a Redis is dead or stopped in the middle of a load, and how soon it is served again.

    python benches/redis_trouble.py [--chunk-mib 36] [--rounds 5]

A redis-server of the benchmark's own holds 8 chunks. In each round they are being loaded when it is killed (-9), or
stopped (SIGSTOP); then it is asked for them every 10 ms, as requests would, for 3 s; then it is started, or goes on.
Times are from `find` to the answer. The limits: 1 ms once the tier rests; 2 s from the server's return until chunks are
found and stored again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from lmcache_rs._core import HostPool
from lmcache_rs.config import load_config
from lmcache_rs.connector.tiers import OpenTier, open_tiers
from redis_server import RedisServer

CHUNKS = 8
KEYS = b"".join(bytes([i]) * 32 for i in range(CHUNKS))
EVERY_S = 0.01
TROUBLE_S = 3.0
ANSWER_S_MAX = 30.0


class Client:
    """A worker's and a searcher's queue, as an engine has them."""

    def __init__(self, url: str, row_bytes: int) -> None:
        config = load_config({"lmcache.remote_url": url}, environ={})
        self._searcher = open_tiers(config, 0, 1, bytes(32), searching=True)["redis"]
        self._worker = open_tiers(config, 0, 1, bytes(32))["redis"]
        self._pool = HostPool(CHUNKS * row_bytes, row_bytes)
        self._rows = np.arange(CHUNKS, dtype=np.uint32)
        self._jobs = itertools.count(1)

    def find(self) -> tuple[float, str | None]:
        """Seconds to the answer, and why it was refused."""
        began = time.perf_counter()
        self._searcher.queue.find(next(self._jobs), KEYS)
        ((_, _, refusal, _, _),) = ended(self._searcher, 1)
        return time.perf_counter() - began, refusal

    def store(self) -> bool:
        """All chunks; whether none was refused."""
        self._submit(self._worker.queue.store)
        return not any(refusal for _, _, refusal, _, _ in ended(self._worker, CHUNKS))

    def begin_load(self) -> None:
        """Ask for all chunks."""
        self._submit(self._worker.queue.load)

    def end_load(self) -> float:
        """Seconds until every chunk was answered."""
        began = time.perf_counter()
        ended(self._worker, CHUNKS)
        return time.perf_counter() - began

    def _submit(self, call: Callable[..., None]) -> None:
        ones = np.ones(CHUNKS, dtype=np.uint32)
        call(next(self._jobs), self._pool, KEYS, self._rows, ones, self._rows)

    def close(self) -> None:
        """End both queues."""
        for tier in (self._searcher, self._worker):
            tier.queue.close(1.0)


def ended(tier: OpenTier, count: int) -> list[tuple[int, int, str | None, int | bytes | str, float]]:
    """So many ends."""
    ends, deadline = list(tier.queue.poll()), time.monotonic() + ANSWER_S_MAX
    while len(ends) < count:
        tier.queue.wait(0.1)
        ends += tier.queue.poll()
        if time.monotonic() > deadline:
            raise RuntimeError("no answer")
    return ends


def trouble(client: Client, server: RedisServer, how: str) -> dict[str, float]:
    """One round; times in ms, the return in s."""
    client.begin_load()
    time.sleep(0.002)
    if how == "killed":
        server.kill()
    else:
        os.kill(server.pid, signal.SIGSTOP)
    first, _ = client.find()
    load = client.end_load()
    later = []
    until = time.monotonic() + TROUBLE_S
    while time.monotonic() < until:
        time.sleep(EVERY_S)
        later.append(client.find()[0])
    if how == "killed":
        server.start()
    else:
        os.kill(server.pid, signal.SIGCONT)
    returned = time.monotonic()
    while client.find()[1] is not None or not client.store():
        time.sleep(EVERY_S)
    back = time.monotonic() - returned
    later.sort()
    return {
        "first": first * 1e3,
        "load": load * 1e3,
        "median": statistics.median(later) * 1e3,
        "p99": later[int(0.99 * len(later))] * 1e3,
        "most": later[-1] * 1e3,
        "back": back,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunk-mib", type=float, default=36)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(
        "| the server is | first lookup, ms | the load ends, ms | lookups after, median, 99 %, most, ms | back, s |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        client = Client(server.url, int(options.chunk_mib * (1 << 20)))
        for how in ("killed", "stopped"):
            rounds = []
            for _ in range(options.rounds):
                if not client.store():
                    raise RuntimeError("a healthy server refused a chunk")
                rounds.append(trouble(client, server, how))
            middle = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            most = {name: max(r[name] for r in rounds) for name in rounds[0]}
            print(
                f"| {how} | {middle['first']:.1f} ({most['first']:.1f}) | {middle['load']:.0f} ({most['load']:.0f}) "
                f"| {middle['median']:.2f}, {middle['p99']:.2f}, {middle['most']:.1f} ({most['most']:.1f}) "
                f"| {middle['back']:.2f} ({most['back']:.2f}) |",
                flush=True,
            )
        client.close()


if __name__ == "__main__":
    main()
