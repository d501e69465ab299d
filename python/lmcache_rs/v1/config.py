"""Where LMCache keeps `LMCacheEngineConfig`: its ways to load a configuration, each giving a `Config`."""

import os
from collections.abc import Mapping
from typing import Any

from lmcache_rs.config import Config, load_config
from lmcache_rs.config.load import EXTRA_PREFIX, FILE_VARIABLE

__all__ = ["LMCacheEngineConfig"]


class LMCacheEngineConfig:
    """Makes `Config` objects from one source each; all raise ConfigError for a wrong value."""

    @staticmethod
    def from_env() -> Config:
        """Read the variables, not the file."""
        return load_config(
            environ={name: value for name, value in os.environ.items() if name != FILE_VARIABLE}
        )

    @staticmethod
    def from_file(file_path: str | os.PathLike[str]) -> Config:
        """Read a YAML file, not the variables."""
        return load_config(environ={FILE_VARIABLE: os.fspath(file_path)})

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> Config:
        """Take settings by name, as they are written in YAML."""
        return load_config({f"{EXTRA_PREFIX}{name}": value for name, value in settings.items()}, environ={})

    @staticmethod
    def from_defaults(**settings: Any) -> Config:
        """Take the defaults, and some settings by name."""
        return LMCacheEngineConfig.from_dict(settings)
