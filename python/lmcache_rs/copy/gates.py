"""Gates: where CUDA graphs, captured once, wait for the parts of whichever load by layers comes before a replay."""

from collections.abc import Callable, Sequence

import torch

_kept: list[torch.cuda.Event] = []
"""Graphs may be replayed as long as the process lives, whatever became of the mover."""


class Gates:
    """One event for each part but the first, for which a replay waits in front of its whole.

    `firsts`: the first layer of each part. A graph waits for what a gate's event was last recorded for: nothing, when
    there was no load since. All are recorded on one stream, so what is recorded later includes what was before: a
    replay that is still on its way waits for its own load whether CUDA looks at the event when it is launched (as
    measured) or when it gets there. But a load that itself waits for such a replay must not be recorded.
    """

    def __init__(self, firsts: Sequence[int], device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # External: in a capture a wait becomes a node of the graph.
        self._events = {first: torch.cuda.Event(external=True) for first in firsts if first}  # type: ignore[no-untyped-call]
        for event in self._events.values():
            event.record(self._stream)
        _kept.extend(self._events.values())
        self._device = device
        self._fence: torch.cuda.Event | None = None

    def fenced(self) -> None:
        """A load comes after everything that the current stream was given until now, and later loads come after it."""
        self._fence = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._fence.record(torch.cuda.current_stream(self._device))

    def wait(self, layer: int) -> None:
        """Have the graph that is captured wait for the part that begins after this layer, if one does."""
        event = self._events.get(layer + 1)
        if event is not None:
            event.wait()

    def set(self, join: Callable[[int, int], None]) -> bool:
        """Put the parts of a load behind the gates; `join` makes a stream wait for a layer of it.

        False, and nothing is done: loads may still wait for replays, which would wait for them.
        """
        if self._fence is not None and not self._fence.query():  # type: ignore[no-untyped-call]
            return False
        for first, event in self._events.items():
            join(self._stream.cuda_stream, first)
            event.record(self._stream)
        return True
