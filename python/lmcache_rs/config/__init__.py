"""Configuration: every setting of LMCache is known here, honoured or named; wrong values stop the start."""

from lmcache_rs.config.load import load_config
from lmcache_rs.config.model import Config, Notice
from lmcache_rs.errors import ConfigError

__all__ = ["Config", "ConfigError", "Notice", "load_config"]
