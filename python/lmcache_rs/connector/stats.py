"""Counters of the connector, kept as plain numbers by name; vLLM's metric classes are made from them elsewhere."""

from collections.abc import Mapping


def pool_gauges(stats: Mapping[str, int], slot_bytes: int) -> dict[str, float]:
    """How full the pool is, by the index's `stats`."""
    used = stats["rows"] - stats["free"]
    gauges: dict[str, float] = {"pool_rows": stats["rows"], "pool_used_rows": used}
    return gauges | {"pool_bytes": stats["rows"] * slot_bytes, "pool_used_bytes": used * slot_bytes}


class Counters:
    """Counts since the start, and what was added since they were last taken."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._taken: dict[str, float] = {}
        self.changed = False
        """Whether anything was added since they were last taken."""

    def add(self, name: str, amount: float = 1) -> None:
        """Count `amount` under `name`; a label follows after a colon, as in `misses:not_found`."""
        self._totals[name] = self._totals.get(name, 0) + amount
        self.changed = True

    def set(self, name: str, total: float) -> None:
        """Take over a total that is counted elsewhere."""
        self.changed = self.changed or self._totals.get(name, 0) != total
        self._totals[name] = total

    def totals(self) -> Mapping[str, float]:
        """Everything counted since the start."""
        return dict(self._totals)

    def take(self) -> dict[str, float]:
        """What was added since the last call."""
        self.changed = False
        totals = dict(self._totals)  # Another thread may be counting a failure.
        news = {k: v - self._taken.get(k, 0) for k, v in totals.items() if v != self._taken.get(k, 0)}
        self._taken = totals
        return news
