"""How much memory this machine, or the container that this process lives in, can still give."""

from pathlib import Path

from lmcache_rs.log import init_logger

logger = init_logger(__name__)

RESERVE_BYTES = 1 << 30
"""Left to the rest of the machine whatever the configuration asks for."""


def available_bytes(root: Path = Path("/")) -> int | None:
    """The smallest of what the kernel calls available and what the control groups leave; None when neither is known.

    Sources: `MemAvailable` of proc_meminfo(5); `memory.max` and `memory.current` of cgroup v2, their twins of v1, of
    this process's group and all above it (cgroups(7); in a container the group itself may be mounted as the root).
    """
    limits = [_meminfo(root)]
    for line in ("0::/", ":memory:/", *_read(root / "proc/self/cgroup").splitlines()):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _cgroups(root, "", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            limits += _cgroups(root, "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def clamp(wanted: int, reserve: int, untouched: int, ranks: int) -> int:
    """Bytes that one of `ranks` processes may map for the cache, at most `wanted`.

    `reserve` bytes are left free, and so are `untouched`: memory that all ranks together have been promised and have
    not used yet. Says so in one line when it is less than wanted.
    """
    available = available_bytes()
    if available is None:
        return wanted
    granted = max(0, (available - untouched - max(reserve, RESERVE_BYTES)) // ranks)
    if granted >= wanted:
        return wanted
    logger.warning(
        "max_local_cpu_size: %.2f GiB asked for, %.2f GiB taken: the machine has %.2f GiB available for %d rank(s), of "
        "which %.2f GiB belong to the engine's own KV cache. Ask for less, or give the container more memory",
        wanted / 2**30,
        granted / 2**30,
        available / 2**30,
        ranks,
        untouched / 2**30,
    )
    return granted


def _meminfo(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroups(root: Path, controller: str, path: str, limit_file: str, usage_file: str) -> list[int]:
    left = []
    top = root / "sys/fs/cgroup" / controller
    group = top / path.strip("/")
    for base in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
        limit, usage = _read(base / limit_file).strip(), _read(base / usage_file).strip()
        # No limit: "max" (v2), or a number beyond any machine (v1), which the smallest limit takes care of.
        if limit.isdigit() and usage.isdigit():
            left.append(max(0, int(limit) - int(usage)))
    return left


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
