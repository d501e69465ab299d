"""The block hashes that vLLM gives its requests, from Rust: the same bytes, sooner.

vLLM hashes a prompt on the thread that takes requests in, and holds Python's lock while its scheduler waits for it:
0.8 ms for 10,000 tokens, for any connector. This takes 0.2, most of it without the lock.
"""

from collections.abc import Callable
from typing import Any

from lmcache_rs._core import sha256_block_hashes
from lmcache_rs.connector.barrier import is_survivable
from lmcache_rs.errors import InvalidArgumentError
from lmcache_rs.log import init_logger

logger = init_logger(__name__)

RequestHasher = Callable[[Any], list[bytes]]
"""From a vLLM request to the hashes of its full blocks that have none yet."""


class BlockHasher:
    """Stands in for vLLM's own hasher of requests; what is not plain tokens stays with that.

    It is believed after it gave for a first request what `own` gives, and never again after anything else.

    `utils` is vLLM's module `kv_cache_utils`. Its `generate_block_hash_extra_keys` tells what is added to the hash of a
    range of tokens (LoRA, images, salt): nothing for all of them is nothing for any block of them. Its `NONE_HASH`, the
    parent of the first block, is set when an engine starts.
    """

    def __init__(self, own: RequestHasher, block_size: int, utils: Any) -> None:
        self._own = own
        self._block_size = block_size
        self._utils = utils
        self.is_believed: bool | None = None
        """None until there was a first request with a full block."""

    def __call__(self, request: Any) -> list[bytes]:
        """See `RequestHasher`. Raises what `own` raises, nothing else."""
        if self.is_believed is False:
            return self._own(request)
        if request.num_tokens < (len(request.block_hashes) + 1) * self._block_size:
            return []  # a step added a token or two
        try:
            hashes = self._hashes(request)
        except BaseException as error:
            if not is_survivable(error):
                raise
            self._give_up(repr(error))
            hashes = None
        if hashes is None:
            return self._own(request)
        if self.is_believed is None:
            right = self._own(request)
            if hashes != right:
                self._give_up("its hashes are made in another way")
            else:
                self.is_believed = True
            return right
        return hashes

    def _hashes(self, request: Any) -> list[bytes] | None:
        """None for what has to be left to vLLM."""
        if request.prompt_embeds is not None:
            return None  # their extra keys are hashes, which take long
        known = request.block_hashes
        start = len(known) * self._block_size
        end = request.num_tokens // self._block_size * self._block_size
        extra, _ = self._utils.generate_block_hash_extra_keys(request, start, end, 0)
        if extra:
            return None
        parent = known[-1] if known else self._utils.NONE_HASH
        try:
            return sha256_block_hashes(parent, request.all_token_ids[start:end], self._block_size)
        except InvalidArgumentError:
            return None

    def _give_up(self, why: str) -> None:
        self.is_believed = False
        logger.warning("vLLM hashes the blocks of its prompts itself: %s", why)
