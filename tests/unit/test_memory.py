"""HostPool, KvLayers and Mover as Python sees them: sharing, lifetimes, refusals, forks."""

from __future__ import annotations

import array
import ctypes
import gc
import os
import signal
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest

from lmcache_rs import _core

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")

ROW_BYTES = 5_000
CPU = (1, 0)


def make_pool(rows: int = 4, row_bytes: int = ROW_BYTES, **options: Any) -> _core.HostPool:
    return _core.HostPool(rows * -(-row_bytes // 4096) * 4096, row_bytes, **options)


def u32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class OldStyle:
    """A view of `tensor` as consumers and producers before DLPack 1.0 know it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.tensor.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


class TestHostPool:
    def test_geometry(self) -> None:
        pool = _core.HostPool(100_000, ROW_BYTES, prefault_threads=0)
        assert (pool.rows, pool.row_bytes, pool.row_stride) == (12, ROW_BYTES, 8_192)
        assert pool.size_bytes == 12 * 8_192
        assert pool.__dlpack_device__() == CPU
        assert "12 rows" in repr(pool)

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            ((4_095, 1), ["4095 bytes", "of 1 bytes", "raise"]),
            ((1 << 20, 0), ["row_bytes is 0"]),
            ((-1, 1), ["-1"]),
            ((1 << 70, 1), [str(1 << 70)]),
            ((1 << 20, 1, 65), ["prefault_threads is 65", "64"]),
        ],
    )
    def test_wrong_arguments(self, arguments: tuple[int, ...], parts: list[str]) -> None:
        with pytest.raises(_core.InvalidArgumentError) as caught:
            _core.HostPool(*arguments)
        assert all(part in str(caught.value) for part in parts)
        assert isinstance(caught.value, _core.LMCacheRsError)

    def test_memory_that_is_not_there(self) -> None:
        with pytest.raises(_core.OutOfMemoryError, match="smaller pool"):
            _core.HostPool(1 << 46, 1 << 20, prefault_threads=0)

    @pytest.mark.parametrize("huge_pages", [True, False])
    def test_prefaulting_takes_what_was_asked(self, huge_pages: bool) -> None:
        gc.collect()
        before = resident_bytes()
        pool = make_pool(100, 1 << 20, prefault_threads=2, huge_pages=huge_pages)
        assert pool.wait_prefaulted(60)
        assert pool.prefaulted_bytes == pool.size_bytes == 100 << 20
        assert pool.prefault_error is None
        assert abs(resident_bytes() - before - pool.size_bytes) <= pool.size_bytes * 0.02
        del pool
        assert resident_bytes() - before <= (100 << 20) * 0.02

    def test_a_pool_with_a_full_index_takes_what_was_asked(self) -> None:
        hashes = [number.to_bytes(32, "little") for number in range(5_000)]
        gc.collect()
        before = resident_bytes()
        pool = make_pool(len(hashes), 48 << 10)
        assert pool.wait_prefaulted(60)
        index = _core.Index(pool.rows)
        index.reserve(_core.KeySpace("sha256"), hashes).commit()
        assert index.stats()["visible"] == pool.rows == len(hashes)
        assert resident_bytes() - before <= pool.size_bytes * 1.02

    def test_without_threads_nobody_waits(self) -> None:
        start = time.monotonic()
        assert not make_pool(prefault_threads=0).wait_prefaulted(60)
        assert time.monotonic() - start < 30

    @pytest.mark.parametrize("timeout", [-1.0, float("nan")])
    def test_wrong_timeouts(self, timeout: float) -> None:
        with pytest.raises(_core.InvalidArgumentError, match="timeout_s"):
            make_pool().wait_prefaulted(timeout)

    def test_infinite_timeout(self) -> None:
        assert make_pool().wait_prefaulted(float("inf"))


class TestExport:
    def check_shared(self, pool: _core.HostPool, one: Any, other: Any) -> None:
        """`one` and `other` are views of the pool: same place, both ways."""
        assert one.shape == other.shape == (pool.rows, pool.row_stride)
        one[1, 7] = 42
        assert other[1, 7] == 42
        other[pool.rows - 1, pool.row_stride - 1] = 43
        assert one[pool.rows - 1, pool.row_stride - 1] == 43

    def test_numpy(self) -> None:
        pool = make_pool()
        one, other = np.from_dlpack(pool), np.from_dlpack(pool)
        assert one.dtype == np.uint8
        assert one.flags.writeable
        assert one.ctypes.data == other.ctypes.data
        assert one.ctypes.data % 4096 == 0
        assert not one.any()
        self.check_shared(pool, one, other)

    @needs_torch
    def test_torch(self) -> None:
        pool = make_pool()
        one, other = torch.from_dlpack(pool), np.from_dlpack(pool)
        assert one.dtype == torch.uint8
        assert one.is_contiguous()
        assert one.data_ptr() == other.ctypes.data
        self.check_shared(pool, one, other)
        # A row can be seen as any element type.
        assert one[0, :ROW_BYTES].view(torch.bfloat16).shape == (ROW_BYTES // 2,)

    def test_old_consumers_get_the_old_capsule(self) -> None:
        pool = make_pool()
        for arguments in ({}, {"max_version": None}, {"max_version": (0, 8)}):
            assert '"dltensor"' in repr(pool.__dlpack__(**arguments))
        assert '"dltensor_versioned"' in repr(pool.__dlpack__(max_version=(1, 0)))
        assert '"dltensor_versioned"' in repr(pool.__dlpack__(max_version=(2, 5), dl_device=CPU, copy=False))
        old, new = np.from_dlpack(OldStyle(pool)), np.from_dlpack(pool)
        assert old.ctypes.data == new.ctypes.data  # numpy makes old ones read-only
        new[3, 4095] = 5
        assert old[3, 4095] == 5

    @needs_torch
    def test_both_capsules_are_taken_by_torch(self) -> None:
        pool = make_pool()
        old = torch.utils.dlpack.from_dlpack(pool.__dlpack__())
        new = torch.utils.dlpack.from_dlpack(pool.__dlpack__(max_version=(1, 0)))
        assert old.data_ptr() == new.data_ptr()
        self.check_shared(pool, old, new)

    @pytest.mark.parametrize(
        "arguments", [{"stream": 1}, {"copy": True}, {"dl_device": (2, 0)}, {"dl_device": (1, 1)}]
    )
    def test_what_the_cpu_cannot_give_is_a_buffer_error(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(BufferError):
            make_pool().__dlpack__(**arguments)

    def test_the_memory_outlives_the_pool(self) -> None:
        pool = make_pool(64, 1 << 20)
        view = np.from_dlpack(pool)
        view[:] = 7
        part = view[60:, 5:9]
        del pool, view
        gc.collect()
        assert (part == 7).all()

    @pytest.mark.parametrize("max_version", [None, (1, 0)])
    def test_memory_of_dropped_capsules_and_views_comes_back(
        self, max_version: tuple[int, int] | None
    ) -> None:
        before = resident_bytes()
        for number in range(20):
            pool = make_pool(64, 1 << 20, prefault_threads=2)
            capsule = pool.__dlpack__(max_version=max_version)
            view = np.from_dlpack(pool)
            view[0, 0] = 1
            assert pool.wait_prefaulted(60)
            if number % 2:
                del pool, capsule, view
            else:
                del view, capsule, pool
        gc.collect()
        assert resident_bytes() - before < 64 << 20

    @pytest.mark.parametrize("old", [True, False])
    def test_another_thread_may_use_and_end_it(self, old: bool) -> None:
        box = [make_pool(16, 1 << 20)]
        failures: list[BaseException] = []

        def consume() -> None:
            try:
                view = np.from_dlpack(OldStyle(box[0]) if old else box[0])
                box.clear()
                gc.collect()
                assert view.flags.writeable != old
                assert int(view.sum()) == 0
                del view
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=consume)
        thread.start()
        thread.join(60)
        assert not failures
        assert not box


class TestKvLayers:
    def test_numpy(self) -> None:
        layers = _core.KvLayers([np.zeros((6, 4, 2), np.float32), np.zeros((6, 9), np.uint8), np.zeros(6)])
        assert (layers.layers, layers.blocks, layers.page_bytes, layers.row_bytes) == (3, 6, [32, 9, 8], 49)

    @needs_torch
    @pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"])
    def test_torch_types(self, name: str) -> None:
        tensor = torch.zeros((6, 4, 2), dtype=getattr(torch, name))
        assert _core.KvLayers((tensor, tensor.clone())).page_bytes == [8 * tensor.element_size()] * 2

    @needs_torch
    def test_strides(self) -> None:
        one = torch.zeros((6, 3, 4, 2), dtype=torch.bfloat16)
        # Layers inside of blocks, and the dimensions of a block permuted.
        layers = _core.KvLayers([one[:, 0], one[:, 2].transpose(1, 2)])
        assert layers.page_bytes == [16, 16]
        for wrong in (one[:, :, 0], one[..., 0], one[:, 0, ::2], one.transpose(0, 1)[:, 0]):
            if wrong.is_contiguous():
                continue
            with pytest.raises(_core.InvalidArgumentError, match="tensor 0 are not contiguous"):
                _core.KvLayers([wrong])
        with pytest.raises(_core.InvalidArgumentError, match="overlap"):
            _core.KvLayers([torch.zeros(1, 4).expand(6, 4)])

    @needs_torch
    def test_a_tensor_without_memory_is_refused(self) -> None:
        with pytest.raises(
            _core.InvalidArgumentError, match=r"tensor 0 cannot be shared.*memory of the CPU"
        ) as caught:
            _core.KvLayers([torch.zeros((6, 4), device="meta")])
        assert caught.value.__cause__ is not None

    def test_another_device_is_refused(self) -> None:
        capsule = np.zeros((6, 4)).__dlpack__()
        api = ctypes.pythonapi
        api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        device_type = api.PyCapsule_GetPointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        ctypes.c_int32.from_address(device_type).value = 2  # kDLCUDA

        class OnGpu:
            def __dlpack__(self) -> Any:
                return capsule

        with pytest.raises(_core.InvalidArgumentError, match="tensor 0 is on device 2:0"):
            _core.KvLayers([OnGpu()])

    def test_producers_from_before_dlpack_1(self) -> None:
        kv = np.zeros((2, ROW_BYTES), np.uint8)
        pool = make_pool()
        np.from_dlpack(pool)[1] = 9
        mover = _core.Mover(pool, _core.KvLayers([OldStyle(kv)]))
        mover.copy("load", u32(1), u32(0))
        assert (kv[0] == 9).all()
        assert not kv[1].any()

    @pytest.mark.parametrize(
        ("tensors", "part"),
        [
            ([], "one a layer"),
            ([np.zeros((6, 4)), np.zeros((5, 4))], "tensor 1 has 5 blocks, tensor 0 has 6"),
            ([np.zeros((6, 4)), [1, 2]], "tensor 1 is .*list.* no __dlpack__"),
            ([np.zeros(())], "no dimensions"),
            ([np.zeros((0, 4))], "0 blocks"),
            ([np.zeros((4, 0))], "empty"),
            ([np.zeros((6, 4, 4))[:, ::2]], "not contiguous"),
            ([np.zeros((6, 4))[::-1]], "backwards"),
            (np.zeros((6, 4)), "put it into a list"),
        ],
    )
    def test_refusals(self, tensors: Any, part: str) -> None:
        with pytest.raises(_core.InvalidArgumentError, match=part):
            _core.KvLayers(tensors)

    @pytest.mark.parametrize("wrap", [lambda tensor: tensor, OldStyle])
    def test_read_only_arrays_are_refused(self, wrap: Any) -> None:
        kv = np.zeros((6, 4))
        kv.flags.writeable = False
        with pytest.raises(_core.InvalidArgumentError, match=r"tensor 0 .*(read-?only|writable)"):
            _core.KvLayers([wrap(kv)])

    def test_errors_of_a_tensor_are_its_own(self) -> None:
        class Broken:
            def __dlpack__(self, **_: Any) -> Any:
                raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            _core.KvLayers([Broken()])

    def test_tensors_are_kept_and_given_back(self) -> None:
        pool = make_pool(4, 1 << 20)
        before = resident_bytes()
        for _ in range(10):
            mover = _core.Mover(pool, _core.KvLayers([np.ones((64, 1 << 20), np.uint8)]))
            gc.collect()
            mover.copy("store", u32(2), u32(63))
            assert (np.from_dlpack(pool)[2] == 1).all()
            mover.submit("store", 1, u32(2), u32(63))
            del mover
        assert resident_bytes() - before < 64 << 20


class TestMover:
    @pytest.fixture
    def ends(self) -> tuple[_core.HostPool, list[np.ndarray], np.ndarray]:
        rng = np.random.default_rng(1)
        pool = make_pool(8, 3_000)
        view = np.from_dlpack(pool)
        view[:] = rng.integers(0, 255, view.shape, np.uint8)
        return pool, [rng.integers(0, 255, (6, size), np.uint8) for size in (1_000, 2_000)], view

    @pytest.mark.parametrize(
        "kind", [lambda x: x, lambda x: x.tobytes(), lambda x: array.array("I", x.tolist())]
    )
    @pytest.mark.parametrize("threads", [1, 3])
    def test_copies(self, ends: Any, threads: int, kind: Any) -> None:
        pool, kv, view = ends
        mover = _core.Mover(pool, _core.KvLayers(kv), threads)
        assert mover.copy("store", kind(u32(7, 0, 3)), kind(u32(5, 1, 0))) == 9_000
        for row, block in ((7, 5), (0, 1), (3, 0)):
            assert (view[row, :1_000] == kv[0][block]).all()
            assert (view[row, 1_000:3_000] == kv[1][block]).all()
        expected = view[7, :3_000].copy()
        mover.submit("load", 11, kind(u32(7)), kind(u32(2)))
        assert mover.drain(60)
        ((job, copied, seconds),) = mover.poll()
        assert (job, copied) == (11, 3_000)
        assert 0 <= seconds < 60
        assert (np.concatenate([layer[2] for layer in kv]) == expected).all()
        assert mover.poll() == []
        assert mover.copy("load", b"", b"") == 0

    @needs_torch
    def test_bfloat16_with_strides(self) -> None:
        both = torch.randn((6, 2, 40, 8)).to(torch.bfloat16)
        expected = both.clone()
        pool = make_pool(3, 2 * 40 * 8 * 2)
        mover = _core.Mover(pool, _core.KvLayers([both[:, 0], both[:, 1]]), 2)
        mover.copy("store", u32(2, 0), u32(1, 4))
        both[1], both[4] = 0, 0
        mover.copy("load", u32(0, 2), u32(4, 1))
        assert torch.equal(both, expected)

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (("store", u32(8), u32(0)), "row 8 is outside of the pool's 8 rows"),
            (("load", u32(0), u32(6)), "block 6 is outside of the KV's 6 blocks"),
            (("load", u32(0, 1), u32(0)), "2 rows for 1 blocks"),
            (("both", u32(0), u32(0)), 'direction is "both"'),
            (("load", b"12345", u32(0)), "5 bytes are no whole number"),
            (("load", np.array([0]), u32(0)), "numpy.uint32"),
            (("load", [0], u32(0)), "numpy.uint32.*list"),
            (("load", u32(0, 1, 2, 3)[::2], u32(0, 1)), "contiguous"),
            (("load", u32(0, 1).reshape(1, 2), u32(0, 1)), "2 dimensions"),
        ],
    )
    def test_wrong_arguments_copy_nothing(self, ends: Any, arguments: Any, part: str) -> None:
        pool, kv, view = ends
        mover = _core.Mover(pool, _core.KvLayers(kv))
        before = [view.copy(), *(layer.copy() for layer in kv)]
        direction, *numbers = arguments
        with pytest.raises(_core.InvalidArgumentError, match=part):
            mover.copy(direction, *numbers)
        with pytest.raises(_core.InvalidArgumentError, match=part):
            mover.submit(direction, 1, *numbers)
        assert mover.drain(60)
        assert mover.poll() == []
        assert all((one == other).all() for one, other in zip(before, [view, *kv], strict=True))

    def test_what_does_not_fit(self, ends: Any) -> None:
        pool, kv, _ = ends
        with pytest.raises(_core.InvalidArgumentError, match=r"3000 bytes.*has 1000.*row_bytes=1000"):
            _core.Mover(pool, _core.KvLayers(kv[:1]))
        for threads in (0, 65, -1):
            with pytest.raises(_core.InvalidArgumentError):
                _core.Mover(pool, _core.KvLayers(kv), threads)
        with pytest.raises(_core.InvalidArgumentError):
            _core.Mover(pool, _core.KvLayers(kv)).submit("load", -1, b"", b"")

    def test_too_many_unpolled_jobs_are_refused(self, ends: Any) -> None:
        pool, kv, _ = ends
        mover = _core.Mover(pool, _core.KvLayers(kv))

        def submit_many() -> None:
            for job in range(100_000):
                mover.submit("store", job, u32(0), u32(0))

        with pytest.raises(_core.InvalidArgumentError, match="poll before"):
            submit_many()
        assert mover.drain(60)
        jobs = [job for job, _, _ in mover.poll()]
        assert sorted(jobs) == list(range(len(jobs)))
        mover.submit("store", 1, u32(0), u32(0))

    def test_a_closed_mover_refuses(self, ends: Any) -> None:
        pool, kv, view = ends
        mover = _core.Mover(pool, _core.KvLayers(kv))
        mover.submit("store", 1, u32(1), u32(2))
        assert mover.close()
        assert mover.close(timeout_s=0)
        assert (view[1, :1_000] == kv[0][2]).all()
        for call in (
            lambda: mover.copy("store", b"", b""),
            lambda: mover.submit("store", 1, b"", b""),
            mover.poll,
            lambda: mover.drain(1),
        ):
            with pytest.raises(_core.ClosedError):
                call()

    def test_the_interpreter_runs_while_it_copies(self) -> None:
        pool = make_pool(128, 1 << 20)
        mover = _core.Mover(pool, _core.KvLayers([np.ones((128, 1 << 20), np.uint8)]))
        numbers = np.tile(np.arange(128, dtype=np.uint32), 64)
        seconds = []

        def copy() -> None:
            start = time.monotonic()
            mover.copy("store", numbers, numbers)
            seconds.append(time.monotonic() - start)

        thread = threading.Thread(target=copy)
        last, pause_max = time.monotonic(), 0.0
        thread.start()
        while thread.is_alive():
            now = time.monotonic()
            last, pause_max = now, max(pause_max, now - last)
        assert pause_max < seconds[0] / 2

    def test_threads_may_use_every_cpu_though_the_caller_is_pinned(self) -> None:
        every = os.sched_getaffinity(0)
        if len(every) < 2:
            pytest.skip("one CPU only")
        release = threading.Event()
        unpinned = threading.Thread(target=release.wait)
        unpinned.start()
        try:
            os.sched_setaffinity(0, {min(every)})
            mover = _core.Mover(make_pool(), _core.KvLayers([np.zeros((2, ROW_BYTES), np.uint8)]), 2)
            mover.submit("store", 1, u32(0), u32(0))
            assert mover.drain(60)
            # A thread names itself, and unpins itself, when it first runs.
            deadline, allowed = time.monotonic() + 60, list[set[int]]()
            while len(allowed) < 2 or any(cpus != every for cpus in allowed):
                assert time.monotonic() < deadline, allowed
                time.sleep(0.001)
                allowed = [os.sched_getaffinity(task) for task in named_threads("lmcache-copy")]
        finally:
            os.sched_setaffinity(0, every)
            release.set()
            unpinned.join()


def named_threads(name: str) -> list[int]:
    found = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as comm:
            if comm.read().strip() == name:
                found.append(int(task))
    return found


def in_fork(body: Any) -> str:
    """What `body` returns in a forked child; the child is killed after 30 seconds."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            os.write(write, str(body()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status}"
    return answer


def test_a_forked_child_is_refused_and_the_parent_goes_on() -> None:
    pool = make_pool(64, 1 << 20, prefault_threads=2)
    kv = np.ones((64, 1 << 20), np.uint8)
    mover = _core.Mover(pool, _core.KvLayers([kv]), 2)
    every = np.arange(64, dtype=np.uint32)
    view = np.from_dlpack(pool)
    for job in range(3):
        mover.submit("store", job, every, every)

    def child() -> list[str]:
        calls = [
            lambda: mover.copy("store", every, every),
            lambda: mover.submit("store", 1, every, every),
            lambda: mover.poll(),
            lambda: mover.drain(60),
            lambda: mover.close(),
            lambda: pool.wait_prefaulted(60),
            lambda: pool.__dlpack__(),
            lambda: pool.pin(0),
            lambda: pool.pin_error,
            lambda: _core.Mover(pool, _core.KvLayers([kv])),
        ]
        raised = []
        for call in calls:
            try:
                call()
                raised.append("nothing")
            except Exception as error:
                raised.append(type(error).__name__)
        own = _core.Mover(make_pool(1, 1 << 20), _core.KvLayers([kv]))
        raised.append(f"own {own.copy('store', u32(0), u32(0))}")
        return raised

    answer = in_fork(child)
    assert answer == str(["ClosedError"] * 10 + [f"own {1 << 20}"])
    assert mover.drain(60)
    assert sorted(job for job, _, _ in mover.poll()) == [0, 1, 2]
    assert (view == 1).all()
    assert pool.wait_prefaulted(60)


def test_the_end_of_a_pool_in_a_forked_child_touches_nothing_of_the_childs() -> None:
    pool = make_pool(prefault_threads=0)
    address = np.from_dlpack(pool).ctypes.data

    def child() -> bool:
        nonlocal pool
        # The parent's memory is not there; what the child maps at that address stays when the pool ends.
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        fixed_no_replace, private, anonymous = 0x100000, 0x2, 0x20
        mapped = libc.mmap(address, 4096, 3, fixed_no_replace | private | anonymous, -1, 0)
        del pool
        gc.collect()
        ctypes.memset(address, 1, 4096)
        return bool(mapped == address)

    assert in_fork(child) == "True"


def test_the_end_of_a_pool_in_a_forked_child_waits_for_no_thread() -> None:
    pool = make_pool(4096, 1 << 20, prefault_threads=2)

    def child() -> str:
        nonlocal pool
        del pool
        gc.collect()
        return "ended"

    assert in_fork(child) == "ended"
    assert pool.prefaulted_bytes < pool.size_bytes


def test_the_end_of_a_mover_in_a_forked_child_waits_for_nothing() -> None:
    pool = make_pool(64, 1 << 20)
    mover = _core.Mover(pool, _core.KvLayers([np.ones((64, 1 << 20), np.uint8)]), 2)
    every = np.tile(np.arange(64, dtype=np.uint32), 64)
    mover.submit("store", 1, every, every)

    def child() -> str:
        nonlocal mover
        start = time.monotonic()
        del mover
        gc.collect()
        return "at once" if time.monotonic() - start < 2 else "late"

    assert in_fork(child) == "at once"
    assert mover.drain(60)
    assert len(mover.poll()) == 1


def test_a_mover_dropped_while_it_copies_keeps_what_it_needs() -> None:
    every = np.arange(64, dtype=np.uint32)
    for _ in range(10):
        pool = make_pool(64, 1 << 20)
        mover = _core.Mover(pool, _core.KvLayers([np.ones((64, 1 << 20), np.uint8)]), 2)
        view = np.from_dlpack(pool)
        mover.submit("store", 1, every, every)
        mover.submit("store", 2, every, every)
        del pool, mover
        assert view.all()
