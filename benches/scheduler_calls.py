"""How long vLLM's scheduler waits for a call of ours under load: half, 99 %, 99.9 % and all of the calls.

    python benches/scheduler_calls.py [--steps 3000] [--rows 65536] [--step-tokens 32768]
        [--pace-ms 0] [--stalled-redis]

Without vLLM: requests of 8,192 tokens come, every second one with a prefix that came before; 16 at a time are computed,
so many tokens a step in all (vLLM's own limit is 8,192 or 16,384); answers of loads and stores come two steps late, as
when steps overlap; the pool is full throughout, so that every store evicts. The floor is 0; a step of a GPU takes 7 ms.
With --stalled-redis there is a Redis tier whose server takes connections and never answers. With --pace-ms there is so
much between two steps, in which caches grow cold: compare with other work of that length in the same pace.
"""

import argparse
import itertools
import logging
import os
import random
import socket
import threading
import time
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

from lmcache_rs.config import load_config
from lmcache_rs.connector.barrier import Barrier
from lmcache_rs.connector.geometry import Geometry
from lmcache_rs.connector.orders import JobResult, StepOrders, WorkerAcks
from lmcache_rs.connector.rules import Roles
from lmcache_rs.connector.scheduler import SchedulerSide
from lmcache_rs.connector.stats import Counters
from lmcache_rs.connector.tiers import open_tiers

BLOCK, BLOCKS = 16, 512
RUNNING, STEMS, LATE = 16, 64, 2
GPU_BLOCKS = 2 * RUNNING * BLOCKS


class Pool:
    """vLLM's block pool as stores use it: references."""

    num_gpu_blocks = GPU_BLOCKS

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=i, ref_cnt=1) for i in range(GPU_BLOCKS)]

    def touch(self, blocks: Any) -> None:
        """Reference blocks."""
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        """Give references back."""
        for block in blocks:
            block.ref_cnt -= 1

    def reset_prefix_cache(self) -> bool:
        """Not called here."""
        return True


def hashes(count: int) -> list[bytes]:
    """Block hashes that never occurred before."""
    noise = os.urandom(32 * count)
    return [noise[i : i + 32] for i in range(0, len(noise), 32)]


class Load:
    """The requests, and a stopwatch around every call."""

    def __init__(self, rows: int, step_tokens: int, remote_url: str | None) -> None:
        self.share = step_tokens // RUNNING
        geometry = Geometry(BLOCK, 2 << 20, rows, ("l",), GPU_BLOCKS, 1, "cuda", 1)
        self.counters = Counters()
        barrier = Barrier(self.counters.add)
        config = load_config({"lmcache.remote_url": remote_url} if remote_url else {}, environ={})
        roles, space = Roles(may_store=True, may_load=True), bytes(32)
        tiers = open_tiers(config, 0, 1, space, searching=True)
        self.side = SchedulerSide(
            config, geometry, roles, "sha256", lambda *_: None, self.counters, barrier, tiers, space
        )
        self.side.bind_block_pool(Pool())
        self.times: dict[str, list[float]] = defaultdict(list)
        self.random = random.Random(1)
        self.stems = [hashes(BLOCKS // 2) for _ in range(STEMS)]
        self.tables = deque(list(range(i, i + BLOCKS)) for i in range(1, GPU_BLOCKS - BLOCKS, BLOCKS))
        self.ids = itertools.count()
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self.late: deque[WorkerAcks] = deque(WorkerAcks() for _ in range(LATE))

    def call(self, name: str, *arguments: Any) -> Any:
        """One call of the scheduler side, timed."""
        method = getattr(self.side, name)
        began = time.perf_counter()
        result = method(*arguments)
        self.times[name].append(time.perf_counter() - began)
        return result

    def arrive(self) -> None:
        """A request comes."""
        old = self.random.random() < 0.5
        chain = (self.random.choice(self.stems) if old else hashes(BLOCKS // 2)) + hashes(BLOCKS // 2)
        request = SimpleNamespace(
            request_id=f"r{next(self.ids)}",
            block_hashes=chain,
            num_tokens=BLOCKS * BLOCK + 1,
            num_prompt_tokens=BLOCKS * BLOCK + 1,
            num_computed_tokens=0,
            priority=0,
            kv_transfer_params=None,
            cache_salt=None,
            lora_request=None,
            mm_features=[],
            prompt_embeds=None,
            table=[],
            fresh=True,
        )
        self.call("add_request", request)
        self.waiting.append(request)

    def admit(self) -> None:
        """Look up all that wait; those that are answered run."""
        for request in list(self.waiting):
            tokens, _ = self.call("matched_tokens", request, 0)
            if tokens is None:
                continue
            self.waiting.remove(request)
            request.num_computed_tokens = tokens
            request.table = self.tables.popleft()
            self.call("admit", request, request.table, tokens)
            self.running.append(request)

    def step(self) -> None:
        """Plan a step, and hear of an earlier one."""
        while len(self.running) + len(self.waiting) < RUNNING:
            self.arrive()
        self.admit()
        counts = {r.request_id: min(self.share, r.num_tokens - r.num_computed_tokens) for r in self.running}
        new = [
            SimpleNamespace(
                req_id=r.request_id, block_ids=(r.table,), num_computed_tokens=r.num_computed_tokens
            )
            for r in self.running
            if r.fresh
        ]
        old = [r for r in self.running if not r.fresh]
        cached = SimpleNamespace(
            req_ids=[r.request_id for r in old],
            resumed_req_ids=set(),
            new_block_ids=[None] * len(old),
            num_computed_tokens=[r.num_computed_tokens for r in old],
        )
        output = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=counts,
            preempted_req_ids=None,
        )
        self.late.append(answers(self.call("plan_step", output)))
        self.call("acknowledge", self.late.popleft())
        for request in list(self.running):
            request.fresh = False
            request.num_computed_tokens += counts[request.request_id]
            if request.num_computed_tokens >= request.num_tokens:
                self.running.remove(request)
                self.call("finish_request", request, request.table)
                self.tables.append(request.table)


def stalled_server() -> socket.socket:
    """A server that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        kept = []
        while True:
            kept.append(server.accept())

    threading.Thread(target=accept, daemon=True).start()
    return server


def answers(orders: StepOrders) -> WorkerAcks:
    """Every job of a step done."""
    jobs = [load.job for load in orders.loads] + [store.job for store in orders.stores]
    return WorkerAcks({job: JobResult(1, 0, 1, 1e-3) for job in jobs})


def main() -> None:
    """Run the load and print the distribution of each call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--step-tokens", type=int, default=32_768)
    parser.add_argument("--stalled-redis", action="store_true")
    parser.add_argument("--pace-ms", type=float, default=0.0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    url = None
    if options.stalled_redis:
        url = f"redis://127.0.0.1:{stalled_server().getsockname()[1]}"
    load = Load(options.rows, options.step_tokens, url)
    for _ in range(options.steps // 10):
        load.step()
    load.times.clear()
    began = time.perf_counter()
    for _ in range(options.steps):
        load.step()
        if options.pace_ms:
            time.sleep(options.pace_ms / 1e3)
    print(f"{time.perf_counter() - began:.0f} s")
    counts, stats = load.counters.totals(), load.side.index.stats()
    loads, stores, late = (int(counts.get(name, 0)) for name in ("loads", "stores", "search_timeouts"))
    print(
        f"{len(load.times['add_request'])} requests, {loads} loads, {stores} stores, {stats['evictions']} evictions, "
        f"{stats['free']} of {stats['rows']} rows free, {late} searches not answered in time"
    )
    print(f"{'microseconds':16}{'calls':>9}{'50 %':>9}{'99 %':>9}{'99.9 %':>9}{'most':>9}")
    together = sorted(t for times in load.times.values() for t in times)
    for name, times in [*load.times.items(), ("all", together)]:
        ranks = sorted(times)
        cells = [ranks[min(len(ranks) - 1, int(len(ranks) * share))] for share in (0.5, 0.99, 0.999, 1)]
        print(f"{name:16}{len(ranks):9}" + "".join(f"{cell * 1e6:9.1f}" for cell in cells))


if __name__ == "__main__":
    main()
