"""Configuration: every setting of LMCache is known here, honoured or named; wrong values stop the start."""

from lmcache_rs.config.keys import Notice
from lmcache_rs.config.load import load_config
from lmcache_rs.config.model import Config
from lmcache_rs.config.tiers import TierUse
from lmcache_rs.errors import ConfigError

__all__ = ["Config", "ConfigError", "Notice", "TierUse", "load_config"]
