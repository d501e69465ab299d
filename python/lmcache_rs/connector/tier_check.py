"""Says soon after the start which slower tier cannot be used, and why. Nobody waits for it."""

import os
from collections.abc import Mapping
from threading import Thread

from lmcache_rs._core import Tier
from lmcache_rs.config import Config
from lmcache_rs.config import values as v
from lmcache_rs.connector.tiers import OpenTier, place
from lmcache_rs.errors import TierError
from lmcache_rs.log import init_logger

logger = init_logger(__name__)


def check_in_background(config: Config, tiers: Mapping[str, OpenTier]) -> list[Thread]:
    """Check each tier on a thread of its own, which may hang as long as its medium does."""
    threads = [
        Thread(target=check, args=(config, name, tier.tier), name=f"lmcache_rs check of {name}", daemon=True)
        for name, tier in tiers.items()
    ]
    for thread in threads:
        thread.start()
    return threads


def check(config: Config, name: str, tier: Tier) -> None:
    """Warn if the tier cannot be reached, or is smaller than what it is to hold. Blocks."""
    try:
        tier.check()
    except TierError as error:
        logger.warning(
            "KV cannot be kept on %s now: %s. It is tried again whenever it is needed",
            place(config, name),
            error,
        )
        return
    if name == "disk":
        share = config.max_local_disk_bytes // len(config.local_disk)
        for path in config.local_disk:
            system = os.statvfs(path)
            if share > (total := system.f_blocks * system.f_frsize):
                logger.warning(
                    "max_local_disk_size: %s for %s, whose file system has %s",
                    v.size_words(share),
                    path,
                    v.size_words(total),
                )
