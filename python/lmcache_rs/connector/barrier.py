"""Nothing that happens in our code ends the engine: a hook that fails answers its harmless default."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from lmcache_rs.connector.breaker import Breaker
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


DISTINCT_CAUSES_MAX = 64
"""Different causes remembered, each logged once with its traceback; later ones are only counted."""


def is_survivable(error: BaseException) -> bool:
    """Whether a barrier keeps `error`: every exception, and a panic of Rust, which pyo3 makes no `Exception`.

    What is left ends a program on purpose: KeyboardInterrupt, SystemExit, GeneratorExit. Each extension module has a
    PanicException of its own, so it is known by its name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class Barrier:
    """Counts what failed, logs each cause once, and tells the breaker, where there is one."""

    def __init__(self, count: Callable[[str], None], breaker: Breaker | None = None) -> None:
        self._count = count
        self._breaker = breaker
        self._seen: set[tuple[str, str]] = set()

    def report(self, hook: str, error: BaseException) -> None:
        """Note that `hook` failed. Raises nothing but an `error` that no barrier may keep, see `is_survivable`."""
        if not is_survivable(error):
            raise error
        self._count(f"errors:{hook}")
        self.note_failure()
        cause = (hook, _words(error))
        if cause in self._seen or len(self._seen) >= DISTINCT_CAUSES_MAX:
            return
        self._seen.add(cause)
        logger.error("%s failed; vLLM goes on without the cache for what it concerned", hook, exc_info=error)

    def note_failure(self) -> None:
        """A load or store failed on a worker."""
        if self._breaker is not None:
            self._breaker.note_failure()

    def is_off(self) -> bool:
        """Whether the cache has turned itself off, see `Breaker`."""
        return self._breaker is not None and self._breaker.is_off()


def _words(error: BaseException) -> str:
    try:
        return repr(error)[:200]
    except Exception:  # an exception of somebody else's whose words fail themselves
        return type(error).__name__


class Guarded(Protocol):
    """An object whose hooks are behind a barrier."""

    _barrier: Barrier


Hook = TypeVar("Hook", bound=Callable[..., Any])


def guard(default: Callable[[], Any], repair: Callable[..., None] | None = None) -> Callable[[Hook], Hook]:
    """Put a hook behind its object's barrier: when it fails, it answers `default()`.

    `repair(self, *arguments)` runs before and keeps what the failed hook owed to vLLM or to the other side.
    """

    def decorate(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def guarded(self: Guarded, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except BaseException as error:
                self._barrier.report(hook.__name__, error)
            if repair is not None:
                try:
                    repair(self, *args, **kwargs)
                except BaseException as error:
                    self._barrier.report(f"{hook.__name__}_repair", error)
            return default()

        return cast(Hook, guarded)

    return decorate
