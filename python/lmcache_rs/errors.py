"""The exceptions of lmcache_rs: one tree under `LMCacheRsError`."""

from lmcache_rs._core import (
    ClosedError,
    DeviceError,
    InternalError,
    InvalidArgumentError,
    LMCacheRsError,
    OutOfMemoryError,
    TierError,
)

__all__ = [
    "ClosedError",
    "ConfigError",
    "DeviceError",
    "InternalError",
    "InvalidArgumentError",
    "LMCacheRsError",
    "OutOfMemoryError",
    "TierError",
]


class ConfigError(LMCacheRsError):
    """A setting has a wrong value, or the configuration file cannot be read."""
