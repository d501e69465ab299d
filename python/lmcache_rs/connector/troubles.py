"""Tells the user when a slower tier fails, once for each reason and not again for a while, and when it is back."""

import time
from collections.abc import Callable

from lmcache_rs.log import init_logger

logger = init_logger(__name__)

QUIET_S = 60.0

REASONS = {
    "io_error": "it failed or cannot be reached",
    "no_space": "there is no room",
    "quota": "its quota is too small",
    "denied": "permission is missing, or it is read-only",
    "locked": "another process holds its lock",
    "late": "it did not answer in time",
    "corrupt": "a checksum does not fit",
    "foreign": "a value is not the one asked for",
    "internal": "an internal error",
}
"""Refusals that tell of a failure, as told to the user; the others are misses, or come of these."""

OUTAGES = {"io_error", "late"}
"""Those that say that the tier itself is gone, so that any answer says that it is back."""


class Troubles:
    """What was told of, and when."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` is done with the tiers here, as the user reads it."""
        self._what = what
        self._clock = clock
        self._told: dict[tuple[str, str], float] = {}
        self._out: set[str] = set()

    def note(self, tier: str, refusal: str | None, cause: object = "") -> None:
        """The tier did something, or refused to because of `cause`."""
        if refusal in (None, "absent") and tier in self._out:
            self._out.discard(tier)
            logger.info("KV on %s is used again", tier)
        if refusal is None or refusal not in REASONS:
            return
        now = self._clock()
        if now - self._told.get((tier, refusal), -QUIET_S) < QUIET_S:
            return
        self._told[tier, refusal] = now
        if refusal in OUTAGES:
            self._out.add(tier)
        logger.warning(
            "%s on %s fails: %s%s. Requests go on without (counted in lmcache:num_tier_refusals, told once in %d s)",
            self._what,
            tier,
            REASONS[refusal],
            f" ({cause})" if cause else "",
            QUIET_S,
        )
