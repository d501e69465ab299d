"""Engines and handles are found and ended by name, safely from anywhere; LMCache's module names work."""

import logging
import os
import subprocess
import sys
import threading
import types

import pytest

import lmcache_rs
from lmcache_rs import _core, builder
from lmcache_rs.builder import LMCacheEngineBuilder
from lmcache_rs.config import Config, ConfigError, load_config
from lmcache_rs.errors import InvalidArgumentError
from lmcache_rs.integration.vllm.utils import ENGINE_NAME
from lmcache_rs.v1 import cache_engine
from lmcache_rs.v1.config import LMCacheEngineConfig


class Handle:
    def __init__(self, order=None, error=None):
        self.closed, self.order, self.error = 0, order, error

    def close(self):
        self.closed += 1
        if self.order is not None:
            self.order.append(self)
        if self.error is not None:
            raise self.error


class FakeEngine(Handle):
    def __init__(self, *args, config, **kwargs):
        super().__init__()
        self.given = (config, args, kwargs)


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(builder, "_registry", builder._Registry())
    module = types.ModuleType("lmcache_rs.engine")
    module.LMCacheEngine = FakeEngine
    monkeypatch.setitem(sys.modules, "lmcache_rs.engine", module)


@pytest.fixture
def lines(monkeypatch):
    """(level, text) of every line the builder writes."""
    written = []
    handler = logging.Handler()
    handler.emit = lambda record: written.append((record.levelname, record.getMessage()))
    monkeypatch.setattr(builder.logger, "handlers", [handler])
    return written


def test_names():
    assert ENGINE_NAME == "vllm-instance"
    assert cache_engine.LMCacheEngineBuilder is LMCacheEngineBuilder
    assert cache_engine.LMCacheEngine is lmcache_rs.LMCacheEngine is FakeEngine
    assert lmcache_rs.__version__ == _core.__version__
    assert set(lmcache_rs.__all__) <= set(dir(lmcache_rs))
    for module in (lmcache_rs, cache_engine):
        with pytest.raises(AttributeError, match="has no attribute 'nope'"):
            module.nope  # noqa: B018


def test_get_or_create_makes_one_engine_a_name():
    engine = LMCacheEngineBuilder.get_or_create("a", Config(), 1, two=2)
    assert engine.given == (Config(), (1,), {"two": 2})
    assert LMCacheEngineBuilder.get_or_create("a", Config()) is engine
    assert LMCacheEngineBuilder.get("a") is engine
    assert LMCacheEngineBuilder.get_or_create("b", Config()) is not engine
    with pytest.raises(InvalidArgumentError, match="instance a exists with another configuration"):
        LMCacheEngineBuilder.get_or_create("a", Config(chunk_size=1))


def test_an_engine_that_cannot_be_made_leaves_nothing(monkeypatch):
    def refuse(config):
        raise MemoryError

    monkeypatch.setattr(sys.modules["lmcache_rs.engine"], "LMCacheEngine", refuse)
    with pytest.raises(MemoryError):
        LMCacheEngineBuilder.get_or_create("a", Config())
    assert LMCacheEngineBuilder.get("a") is None


def test_destroy_closes_once_and_says_so(lines):
    engine = LMCacheEngineBuilder.get_or_create("a", Config())
    LMCacheEngineBuilder.destroy("a")
    assert engine.closed == 1
    assert LMCacheEngineBuilder.get("a") is None
    assert lines[1:] == [
        ("INFO", "Destroying LMCacheEngine instance: a"),
        ("INFO", "LMCacheEngine instance a destroyed"),
    ]
    LMCacheEngineBuilder.destroy("a")
    assert engine.closed == 1
    assert LMCacheEngineBuilder.get_or_create("a", Config(chunk_size=1)) is not engine


def test_destroy_of_an_unknown_name_is_one_info_line(lines):
    LMCacheEngineBuilder.destroy(ENGINE_NAME)
    text = "No engine named vllm-instance lives in this process; vLLM's own processes clean up by themselves"
    assert lines == [("INFO", text)]


def test_handles_are_closed_newest_first_and_errors_are_lines(lines):
    order: list[Handle] = []
    handles = [Handle(order), Handle(order, RuntimeError("stuck")), Handle(order)]
    for handle in handles:
        builder.register("a", handle)
    builder.register("a", handles[0])
    assert LMCacheEngineBuilder.get("a") is handles[0]
    LMCacheEngineBuilder.destroy("a")
    assert order == handles[::-1]
    assert ("ERROR", "Error closing cache engine: RuntimeError: stuck") in lines
    assert lines[-1] == ("INFO", "LMCacheEngine instance a destroyed")


def test_unregister():
    first, second = Handle(), Handle()
    builder.register("a", first)
    builder.register("a", second)
    builder.unregister("a", first)
    builder.unregister("a", first)
    builder.unregister("b", first)
    assert LMCacheEngineBuilder.get("a") is second
    builder.unregister("a", second)
    assert LMCacheEngineBuilder.get("a") is None
    LMCacheEngineBuilder.destroy("a")
    assert (first.closed, second.closed) == (0, 0)


def test_close_may_unregister_itself():
    class Leaving(Handle):
        def close(self):
            super().close()
            thread = threading.Thread(target=builder.unregister, args=("a", self))  # needs the lock
            thread.start()
            thread.join(5)
            assert not thread.is_alive()

    handle = Leaving()
    builder.register("a", handle)
    LMCacheEngineBuilder.destroy("a")
    assert handle.closed == 1


def test_threads_make_one_engine_and_close_it_once():
    engines = []
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        engines.append(LMCacheEngineBuilder.get_or_create("a", Config()))
        barrier.wait()
        LMCacheEngineBuilder.destroy("a")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(engines) == 8
    assert len(set(map(id, engines))) == 1
    assert engines[0].closed == 1


def test_a_forked_child_has_nothing_to_close_and_no_lock_held():
    handle = Handle()
    builder.register("a", handle)
    with builder._registry.lock:
        child = os.fork()
        if child == 0:
            thread = threading.Thread(target=LMCacheEngineBuilder.destroy, args=("a",))
            thread.start()
            thread.join(5)
            os._exit(int(thread.is_alive()) or handle.closed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert LMCacheEngineBuilder.get("a") is handle


@pytest.mark.parametrize(
    "module",
    ["lmcache_rs", "lmcache_rs.v1.cache_engine", "lmcache_rs.integration.vllm.utils", "lmcache_rs.v1.config"],
)
def test_importing_loads_no_torch_no_vllm_and_starts_no_thread(module):
    code = (
        f"import sys, threading, os, {module}\n"
        "print(sorted({'torch', 'vllm', 'numpy', 'lmcache_rs.engine'} & set(sys.modules)),"
        " threading.active_count(), len(os.listdir('/proc/self/task')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[] 1 1\n", "")


def test_lmcache_engine_config(monkeypatch, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("chunk_size: 8")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(path))
    monkeypatch.setenv("LMCACHE_COPY_THREADS", "3")
    assert load_config() == Config(chunk_size=8, copy_threads=3)
    assert LMCacheEngineConfig.from_env() == Config(copy_threads=3)
    assert LMCacheEngineConfig.from_file(path) == Config(chunk_size=8)
    assert LMCacheEngineConfig.from_defaults() == Config()
    assert LMCacheEngineConfig.from_defaults(max_local_cpu_size=1) == Config(max_local_cpu_bytes=2**30)
    assert LMCacheEngineConfig.from_dict({"chunk_size": "9"}) == Config(chunk_size=9)
    with pytest.raises(ConfigError, match="chunk_size"):
        LMCacheEngineConfig.from_defaults(chunk_size=0)


def test_builder_logs_below_the_package():
    assert builder.logger.name == "lmcache_rs.builder"
    assert builder.logger.getEffectiveLevel() == logging.INFO
