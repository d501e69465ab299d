"""Lines in LMCache's format on standard error, from Python's logging, one handler for the whole package."""

import logging
import os
import sys
import threading

FORMAT = "[%(asctime)s] LMCache %(levelname)s: %(message)s (%(filename)s:%(lineno)d:%(name)s)"
LEVEL_VARIABLE = "LMCACHE_LOG_LEVEL"

_ROOT = "lmcache_rs"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_lock = threading.Lock()


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: engines and test runners replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # as logging's own handlers do: a line must not end the program
            self.handleError(record)


def init_logger(name: str) -> logging.Logger:
    """Return the logger `name` below the package's own; the first call gives that its handler and level."""
    root = logging.getLogger(_ROOT)
    with _lock:
        if not any(isinstance(handler, _StandardError) for handler in root.handlers):
            _set_up(root)
    return logging.getLogger(name if name == _ROOT or name.startswith(f"{_ROOT}.") else f"{_ROOT}.{name}")


def _set_up(root: logging.Logger) -> None:
    root.addHandler(_StandardError())
    root.propagate = False  # vLLM's own handlers would write every line twice
    wanted = os.environ.get(LEVEL_VARIABLE, "").strip().upper()
    root.setLevel(wanted if wanted in _LEVELS else logging.INFO)
    if wanted and wanted not in _LEVELS:
        # The value is not shown: nobody knows what else was put there.
        root.warning(
            "%s has an unknown value: INFO is used; write one of %s", LEVEL_VARIABLE, ", ".join(_LEVELS)
        )
