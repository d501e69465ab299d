"""In most steps there is nothing to do: the hooks that are not run then.

After a forward the model's weights have gone through the processor's caches, and each Python frame costs a microsecond.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast


class Stepping(Protocol):
    """An object that knows whether the step orders nothing and there is nothing to tell."""

    _quiet: bool


Hook = TypeVar("Hook", bound=Callable[..., Any])


def unless_quiet(answer: Any) -> Callable[[Hook], Hook]:
    """Answer `answer`, which nobody may change, in steps in which there is nothing to do; otherwise run the hook."""

    def decorate(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def asked(self: Stepping, *args: Any, **kwargs: Any) -> Any:
            return answer if self._quiet else hook(self, *args, **kwargs)

        return cast(Hook, asked)

    return decorate
