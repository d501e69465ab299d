"""Requests whose KV can be checked quickly: a cell is a digest of all tokens up to it, chained once."""

from typing import Any

import numpy as np
import numpy.typing as npt
from toy_engine import BLOCK, Request

VOCABULARY = 1000


class Prompt(Request):
    """A request with what vLLM's scheduler notes of it. What it generates follows from its prompt.

    It ends by itself after `stop_after` tokens, which nobody knows before.
    """

    def __init__(
        self, request_id: str, prompt: list[int], salt: int, max_tokens: int, stop_after: int
    ) -> None:
        super().__init__(request_id, prompt, max_tokens)
        self.stop_after = stop_after
        self.placeholders = 0
        """Tokens that steps in flight will bring."""
        self.in_flight = 0
        """Steps whose output was not seen."""
        self.stale = 0
        """Those of them from before a preemption or a failed load."""
        self.drop_stale = False
        """Their tokens are wrong."""
        self.loaded = range(0)
        """The tokens of its last load."""
        self.offer_below = 1 << 30
        """After a failed load it must be offered less."""
        self.place: int | None = None
        """In the queue of those that vLLM passed over."""
        self.resumed = False
        self.ended = False
        digests = [hash((salt,))]
        for position in range(len(prompt) + max_tokens):
            token = prompt[position] if position < len(prompt) else digests[-1] % VOCABULARY
            digests.append(hash((digests[-1], token)))
        self.digests = digests
        self.cells = np.array(digests[1:], np.int64).view(np.uint64)
        """What the KV of each token must be, on rank 0; on rank n it is XORed with n."""
        self._hashes = [block_hash(digest, b"b") for digest in digests[BLOCK::BLOCK]]

    def note_bad(self, bad: set[int], table: list[int], loaded: range) -> None:
        """These blocks are bad; nothing of its own failed if only blocks are that it shares with others."""
        if not bad.isdisjoint(table[loaded.start // BLOCK : -(-loaded.stop // BLOCK)]):
            self.offer_below = loaded.stop

    @property
    def next_token(self) -> int:
        return self.digests[self.num_tokens] % VOCABULARY

    @property
    def block_hashes(self) -> list[bytes]:
        return self._hashes[: self.num_tokens // BLOCK]

    def cells_of(self, rank: int, start: int, end: int) -> npt.NDArray[np.uint64]:
        return self.cells[start:end] ^ np.uint64(rank)


def block_hash(digest: int, kind: bytes) -> bytes:
    return kind + digest.to_bytes(8, "little", signed=True)


def tail_hash(request: Any, start: int) -> bytes:
    return block_hash(request.digests[request.num_tokens], b"t%d" % (request.num_tokens - start))
