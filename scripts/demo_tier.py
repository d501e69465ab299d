"""The demo of disk and Redis: prompts are computed and stored, vLLM restarts, and the same prompts come from the tier.

`make demo TIER=disk` and `make demo TIER=redis` set up the environment and the model first. Starts what it needs: a
folder of its own, or a redis-server of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from demo import LOG, NUM_PROMPTS, NUM_TOKENS, Outcome, measure
from prepare_model import SMOLLM2
from progress import CommandError, fail, say
from redis_server import RedisServer

# Every chunk is written when it is computed: by default only what is seen again or is about to leave RAM.
SETTINGS = {"LMCACHE_WRITE_POLICY": "through"}
HEADER = f"{'':<18}{'first run':>12}{'after a restart':>18}{'speed-up':>11}   tokens hit"


@contextlib.contextmanager
def tier_settings(tier: str, folder: Path) -> Iterator[Mapping[str, str]]:
    """The settings of a tier that lives as long as the context."""
    if tier == "disk":
        yield SETTINGS | {"LMCACHE_LOCAL_DISK": str(folder), "LMCACHE_MAX_LOCAL_DISK_SIZE": "1"}
        return
    with RedisServer(folder) as server:
        yield SETTINGS | {"LMCACHE_REMOTE_URL": server.url}


def compare(tier: str, filled: Outcome, restarted: Outcome) -> None:
    """Print the table; fail when the words differ or nothing was found."""
    before, after = filled.first_s, restarted.first_s
    hit, total = restarted.first_tokens_hit, restarted.tokens
    say(f"\n{HEADER}")
    say(f"{tier:<18}{before:>10.2f} s{after:>16.2f} s{before / after:>10.2f}x   {hit:,} of {total:,}")
    same = filled.words == restarted.words
    say(f"\nSame words: {'yes' if same else 'no'}")
    if not same:
        fail(f"the cache changed what the model says; see {LOG}")
    if filled.first_tokens_hit:
        fail(f"the first run was to compute everything, and found something; see {LOG}")
    if hit == 0:
        fail(f"nothing was found after the restart; see {LOG}")


def main() -> None:
    """Fill the tier in one process, read it in another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tier", choices=("disk", "redis"))
    tier = parser.parse_args().tier
    LOG.unlink(missing_ok=True)
    say(
        f"{NUM_PROMPTS} prompts of {NUM_TOKENS:,} tokens on {SMOLLM2.name}, vLLM restarted in between; log: {LOG}"
    )
    try:
        with (
            tempfile.TemporaryDirectory(prefix="lmcache-") as folder,
            tier_settings(tier, Path(folder)) as settings,
        ):
            options = ("--enable-lmcache",)
            filled = measure(f"to fill {tier}", *options, settings=settings)
            restarted = measure("after a restart", *options, settings=settings)
    except CommandError as error:
        fail(str(error))
    compare(tier, filled, restarted)


if __name__ == "__main__":
    main()
