"""Nothing that happens in our code ends the engine: a hook that fails answers its harmless default."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from lmcache_rs.log import init_logger

logger = init_logger(__name__)


DISTINCT_CAUSES_MAX = 64
"""Different causes remembered, each logged once with its traceback; later ones are only counted."""


class Barrier:
    """Counts hooks that failed, and logs each cause once."""

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._seen: set[tuple[str, str]] = set()

    def report(self, hook: str, error: Exception) -> None:
        """Note that `hook` failed. Never raises."""
        self._count(f"errors:{hook}")
        cause = (hook, repr(error)[:200])
        if cause in self._seen or len(self._seen) >= DISTINCT_CAUSES_MAX:
            return
        self._seen.add(cause)
        logger.error("%s failed; vLLM goes on without the cache for what it concerned", hook, exc_info=error)


class Guarded(Protocol):
    """An object whose hooks are behind a barrier."""

    _barrier: Barrier


Hook = TypeVar("Hook", bound=Callable[..., Any])


def guard(default: Callable[[], Any]) -> Callable[[Hook], Hook]:
    """Put a hook behind its object's barrier: on an exception it answers `default()`."""

    def decorate(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def guarded(self: Guarded, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:
                self._barrier.report(hook.__name__, error)
                return default()

        return cast(Hook, guarded)

    return decorate
