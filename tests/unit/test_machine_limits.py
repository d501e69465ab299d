"""What the machine may refuse, and ends that nobody prepared: each in a process of its own, which must end well."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lmcache_rs.config import load_config
from lmcache_rs.engine import LMCacheEngine
from support import RunScript, Soak, clean_environment

GROUPS = Path("/sys/fs/cgroup/memory")
MIB = 1 << 20

ENGINE = """
import os, resource, signal, sys, threading
import numpy as np
from lmcache_rs import _core
from lmcache_rs.config import load_config
from lmcache_rs.engine import LMCacheEngine

def limit(which, room):
    '''Lets the process have `room` more than it has.'''
    used = 0
    if which == resource.RLIMIT_AS:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(which, (used + room, used + room))

def engine(size="64MiB"):
    settings = {"lmcache.max_local_cpu_size": size}
    return LMCacheEngine([np.ones((64, 1 << 18), np.uint8)], 4, load_config(settings, environ={}))

def works(one):
    tokens = list(range(250))
    assert one.store(tokens, range(63)) == 250
    assert one.retrieve(tokens, range(63)) == 250
"""


@pytest.fixture
def run(run_script: RunScript) -> Callable[..., str]:
    """`run(code)`: what it printed; it must end with status 0."""
    return lambda code, **options: run_script(ENGINE + code, **options).stdout


def test_without_locked_memory_all_works(run: Callable[..., str]) -> None:
    assert "done" in run("limit(resource.RLIMIT_MEMLOCK, 0); works(engine()); print('done')")


def test_address_space_that_is_refused_is_an_error_with_size_and_remedy(run: Callable[..., str]) -> None:
    code = """
limit(resource.RLIMIT_AS, 256 << 20)
try:
    engine("1GiB")
except _core.OutOfMemoryError as error:
    print(error)
try:
    _core.Index(1 << 24)
except _core.OutOfMemoryError as error:
    print(error)
works(engine())
print("done")
"""
    output = run(code)
    assert f"refused {1 << 30} bytes" in output
    assert "smaller pool" in output
    assert f"an index of {1 << 24} rows" in output
    assert "done" in output, "what fits is still given"


def test_threads_that_are_refused_are_an_error_or_done_without(run: Callable[..., str]) -> None:
    code = """
kv = _core.KvLayers([np.ones((8, 4096), np.uint8)])
small = _core.HostPool(8 * 4096, 4096, prefault_threads=0)
limit(resource.RLIMIT_AS, 1 << 20)
pool = _core.HostPool(8 * 4096, 4096, prefault_threads=1)
print(pool.prefault_error)
for attempt in range(20):
    try:
        _core.Mover(small, kv, 4)
    except _core.OutOfMemoryError as error:
        print(error)
print("done")
"""
    output = run(code)
    assert "a prefault thread did not start" in output
    assert output.count("a copy thread did not start") == 20
    assert "done" in output


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of this test's own, of cgroup v1."""
    group = GROUPS / f"lmcache-rs-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    with contextlib.suppress(OSError):
        group.rmdir()


def test_a_control_group_clamps_the_pool_and_nobody_is_killed(
    run: Callable[..., str], memory_group: Path
) -> None:
    (memory_group / "memory.limit_in_bytes").write_text(str(1024 * MIB + 512 * MIB))
    code = f"""
from lmcache_rs.memory import clamp
open({str(memory_group / "cgroup.procs")!r}, "w").write(str(os.getpid()))
granted = clamp(4 << 30, 0, 0, 1)
assert 256 << 20 < granted <= 512 << 20, granted
pool = _core.HostPool(granted, 1 << 20, 2)
assert pool.wait_prefaulted(60)
print("done")
"""
    assert "done" in run(code)


def test_a_process_may_fork_before_the_cache_starts_and_spawn_after(run: Callable[..., str]) -> None:
    code = """
import multiprocessing
if __name__ == "__main__":
    child = os.fork()
    works(engine())
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    one = engine()
    spawned = multiprocessing.get_context("spawn").Process(target=print, args=("spawned",))
    spawned.start()
    spawned.join()
    assert spawned.exitcode == 0
    works(one)
    print("done")
"""
    output = run(code)
    assert "spawned" in output
    assert "done" in output


LEFT_AT_WORK = """
pool = _core.HostPool(64 << 20, 1 << 20, 2)
mover = _core.Mover(pool, _core.KvLayers([np.ones((64, 1 << 20), np.uint8)]), 2)
everything = np.arange(64, dtype=np.uint32)
for job in range(50):
    mover.submit("store", job, everything, everything)
view = np.from_dlpack(pool)
print("at work", flush=True)
"""


@pytest.mark.soak
def test_an_interpreter_that_ends_without_cleaning_up_ends_well(soak: Soak, run: Callable[..., str]) -> None:
    ends = ["", "sys.modules.clear()", "cycle = [mover, pool]; cycle.append(cycle)", "sys.exit(0)"]
    for seed in soak.rounds(len(ends), "ends"):
        assert "at work" in run(LEFT_AT_WORK + ends[seed % len(ends)], timeout=60)


@pytest.mark.soak
def test_a_killed_process_leaves_nothing_behind(soak: Soak, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ENGINE + LEFT_AT_WORK + "while True: mover.copy('load', everything, everything)")
    places = [Path("/dev/shm"), Path(tempfile.gettempdir()), tmp_path]
    for _ in soak.rounds(3, "kills"):
        before = [set(os.listdir(place)) for place in places]
        process = subprocess.Popen(
            [sys.executable, str(script)], env=clean_environment(), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "at work\n"
            process.kill()
            assert process.wait(10) == -signal.SIGKILL
        left = [set(os.listdir(place)) - names for place, names in zip(places, before, strict=True)]
        assert not [name for names in left for name in names if "lmcache" in name.lower()]
        assert not left[-1]


def small_engine() -> LMCacheEngine:
    settings = {"lmcache.max_local_cpu_size": "1MiB"}
    return LMCacheEngine([np.ones((64, 512), np.uint8)], 4, load_config(settings, environ={}))


@pytest.mark.soak
def test_engines_come_and_go_in_many_threads(soak: Soak) -> None:
    failures: list[BaseException] = []

    def come_and_go() -> None:
        try:
            for _ in range(5):
                with small_engine() as engine:
                    assert engine.store(range(40), range(10)) == 40
                    assert engine.retrieve(range(40), range(10)) == 40
                    engine.close()
                engine.close()
        except BaseException as error:
            failures.append(error)

    for _ in soak.rounds(20, "rounds of 40 engines"):
        threads = [threading.Thread(target=come_and_go) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not failures


@pytest.mark.soak
def test_an_engine_closed_by_several_threads_at_work_ends_once(soak: Soak) -> None:
    for _ in soak.rounds(50, "engines"):
        engine = small_engine()
        refused: list[str] = []

        def work(engine: LMCacheEngine = engine, refused: list[str] = refused) -> None:
            with contextlib.suppress(Exception):
                for number in range(50):
                    engine.store([number, *range(39)], range(10))
                refused.append("nothing")

        threads = [threading.Thread(target=work) for _ in range(2)]
        threads += [threading.Thread(target=engine.close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        stats = engine.stats()
        assert stats["reserved"] == stats["leases"] == stats["leaving"] == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.soak
def test_memory_stays_flat(soak: Soak) -> None:
    """A hundred operations a round, after as many rounds as fill every table."""
    source = np.random.default_rng(0)
    with small_engine() as engine:
        after_start = 0
        for seed in soak.rounds(500, "hundreds of operations"):
            for _ in range(33):
                tokens = source.integers(0, 50, 64, dtype=np.uint32)
                engine.store(tokens, range(16))
                engine.lookup(tokens)
                engine.retrieve(tokens[: 1 + seed % 64], range(16))
            engine.clear()
            if soak.count == 100:
                after_start = resident_bytes()
        assert soak.count <= 100 or resident_bytes() - after_start < 16 * MIB
        assert engine.stats()["evictions"] > 0
