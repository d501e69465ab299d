"""Steps of a scenario that damage something: what is stored, the copies, or a call behind a hook."""

from typing import Any


class Damage:
    """Works on the connector's sides that live in this process."""

    llm: Any
    early: "EarlyLoads | None" = None

    def swap_layers(self) -> None:
        """Negative control: every stored row now has its layers' KV in another order.

        Rows exchanged within a prompt would not do: keys carry their own positions, so attention hardly sees it.
        """
        import numpy

        rows = numpy.from_dlpack(worker_side()._mover._pool)
        layers = self.llm.llm_engine.model_config.hf_config.num_hidden_layers
        layers = max(2, layers // len(handle()._scheduler.groups))
        used, row_bytes = used_rows(), worker_side()._mover._pool.row_bytes
        rows[:used, :row_bytes] = numpy.roll(rows[:used, :row_bytes], row_bytes // layers, axis=1)

    def swap_prompts(self) -> None:
        """Negative control: the first half of the stored rows changes places with the second."""
        import numpy

        rows = numpy.from_dlpack(worker_side()._mover._pool)
        used = used_rows() // 2 * 2
        rows[:used] = numpy.roll(rows[:used], used // 2, axis=0)

    def fail_loads(self, count: int) -> None:
        """The next `count` loads raise in the mover."""
        mover, left = worker_side()._mover, [count]
        for name in ("load_now", "submit_load"):
            setattr(mover, name, failing(getattr(mover, name), left))

    def ask_again(self, tokens: int, count: int) -> None:
        """The next `count` questions about prompts of this length are answered by "ask again"."""
        lookup, left = handle()._scheduler._lookup, [count]
        answer = lookup.answer

        def answering(record: Any, *arguments: Any) -> Any:
            if record.request.num_prompt_tokens == tokens and left[0] > 0:
                left[0] -= 1
                return None, False
            return answer(record, *arguments)

        lookup.answer = answering

    def fault(self, side: str, call: str, panics: bool) -> None:
        """The next call of a method behind a hook raises, or panics in Rust; failures before are forgotten."""
        target = getattr(handle(), f"_{side}")
        handle()._scheduler._barrier._breaker._failures.clear()

        def fail(*arguments: Any, **options: Any) -> Any:
            del vars(target)[call]
            if not panics:
                raise RuntimeError("injected")
            from tiktoken import _tiktoken

            _tiktoken.CoreBPE({b"a": 0}, {}, "a|b").encode_ordinary("b")

        setattr(target, call, fail)

    def faults_left(self) -> list[str]:
        """Methods that were to fail and were not called."""
        sides = (handle()._scheduler, handle()._worker)
        named = [(name, value) for side in sides for name, value in vars(side).items()]
        return [name for name, value in named if getattr(value, "__name__", "") == "fail"]

    def tell_loads_early(self) -> None:
        """From now on vLLM is told of asynchronous loads as soon as they began, and they end after they were joined."""
        worker_side()._pace.lead = lambda: 1.0
        self.early = EarlyLoads(worker_side())

    def early_loads(self) -> int:
        """Those that were told early and joined."""
        return len(self.early.told & self.early.joined) if self.early is not None else 0

    def pass_time(self, seconds: float) -> None:
        """The cache that turned itself off sees so much time pass."""
        breaker = handle()._scheduler._barrier._breaker
        clock = breaker._clock
        breaker._clock = lambda: clock() + seconds


class EarlyLoads:
    """Puts itself before the mover: all loads are told early, and not seen to end before a forward was made to wait.

    So they are whole only if it waits. One that nobody waits for, of an aborted request, ends after some looks.
    """

    looks_max = 100

    def __init__(self, worker: Any) -> None:
        self.told: set[int] = set()
        self.joined: set[int] = set()
        self._looks: dict[int, int] = {}
        self._kept: list[tuple[int, int, float]] = []
        self._answers, mover = worker.answers, worker._mover
        self._poll, self._join_load = mover.poll, mover.join_load
        mover.poll, mover.join_load, mover.settle_loads = self.poll, self.join_load, self.settle_loads

    def settle_loads(self, _seconds: float, _by_layers: float) -> list[int]:
        self.told.update(self._answers.asynchronous)
        return list(self._answers.asynchronous)

    def poll(self) -> list[tuple[int, int, float]]:
        ended = self._kept + self._poll()
        self._kept = [end for end in ended if self._is_kept(end[0])]
        return [end for end in ended if end not in self._kept]

    def join_load(self, job: int, *layer: int) -> None:
        self.joined.add(job)
        self._join_load(job, *layer)

    def _is_kept(self, job: int) -> bool:
        if job not in self.told or job in self.joined:
            return False
        self._looks[job] = self._looks.get(job, 0) + 1
        return self._looks[job] < self.looks_max


def failing(call: Any, left: list[int]) -> Any:
    def wrapped(*arguments: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("injected")
        return call(*arguments)

    return wrapped


def used_rows() -> int:
    """Rows of the pool that hold something, one for each cache group, if none ever left."""
    stats = handle().stats()
    return int(stats["rows"] - stats["free"]) * len(handle()._scheduler.groups)


def handle() -> Any:
    from lmcache_rs.builder import LMCacheEngineBuilder
    from lmcache_rs.integration.vllm.utils import ENGINE_NAME

    return LMCacheEngineBuilder.get(ENGINE_NAME)


def worker_side() -> Any:
    return handle()._worker if handle() is not None else None


def hold_completions() -> Any:
    """Loads end unseen until the returned function is called."""
    mover = worker_side()._mover
    poll = mover.poll
    mover.poll = list

    def release() -> None:
        mover.poll = poll

    return release
