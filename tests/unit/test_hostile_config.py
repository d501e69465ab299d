"""Whatever is written into the configuration, nothing of it is run, and only ConfigError is raised."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmcache_rs.config import ConfigError, load_config, others
from lmcache_rs.config.model import honoured_keys
from support import Soak

CANARY = "hunter2SECRET"

# What reading a configuration never does; see "Audit events table" in Python's documentation.
FORBIDDEN = ("exec", "compile", "pickle.", "marshal.", "os.", "subprocess.", "socket.", "ctypes.", "shutil.")
ALLOWED = ("os.scandir", "os.listdir")


class Watch:
    """Notes forbidden events while it is on. An audit hook stays for the life of the process."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: Any) -> None:
        if self.on and event.startswith(FORBIDDEN) and event not in ALLOWED:
            self.seen.append(f"{event} {arguments!r}"[:200])
        if self.on and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append(f"{event} {arguments!r}"[:200])

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.seen, self.on = [], True
        try:
            yield
        finally:
            self.on = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


NAMES = sorted({key.name.replace("*", "x") for key in (*others.OTHER_KEYS, *honoured_keys().values())})
ATTACKS = [
    "!!python/object/apply:os.system ['true']",
    "!!python/object/new:subprocess.Popen [['true']]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    '!!python/object/apply:eval [\'__import__("os").system("true")\']',
    "!!binary gASVJAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAh0b3VjaCAveJSFlFKULg==",
    "__import__('os').system('true')",
    "${jndi:ldap://x}",
    "$(true)",
    "`true`",
    "{{7*7}}",
    "&a [*a, *a]",
    "&a {a: *a}",
    "{" * 500,
    "[" * 500,
    "9" * 5000,
    "1e999",
    "0x" + "f" * 300,
    "-",
    "\x00",
    "\ud800",
    f"redis://user:{CANARY}@host:6379/0",
    f"redis://host?password={CANARY}",
    "NaN",
    "-5GiB",
    "true",
    "5GB",
]


def a_value(source: random.Random, depth: int = 0) -> Any:
    choice = source.randrange(9 if depth < 3 else 6)
    if choice < 3:
        return source.choice(ATTACKS)
    if choice == 3:
        return "".join(chr(source.randrange(1, 0x300)) for _ in range(source.randrange(12)))
    if choice == 4:
        return source.choice([None, True, False, 0, -1, 2**70, 1.5, float("nan"), float("inf"), b"\x80"])
    if choice == 5:
        return source.randrange(-(10**6), 10**6)
    if choice < 8:
        return [a_value(source, depth + 1) for _ in range(source.randrange(4))]
    return {str(a_value(source, 3)): a_value(source, depth + 1) for _ in range(source.randrange(4))}


def a_name(source: random.Random) -> str:
    name = source.choice(NAMES)
    if source.random() < 0.2:
        at = source.randrange(len(name))
        name = name[:at] + source.choice("_xZ.* ") + name[at + 1 :]
    return name


def an_extra(source: random.Random) -> dict[Any, Any]:
    prefix = source.choice(("", "lmcache.", "lmcache.", "lmcache.extra_config."))
    return {prefix + a_name(source): a_value(source) for _ in range(source.randrange(5))}


def an_environment(source: random.Random) -> dict[str, str]:
    return {"LMCACHE_" + a_name(source).upper(): str(a_value(source)) for _ in range(source.randrange(5))}


def a_file(source: random.Random) -> bytes:
    lines = [f"{a_name(source)}: {a_value(source)}" for _ in range(source.randrange(5))]
    text = source.choice(("\n", "\n", "\r\n", "\n  ", "\n- ", ", ")).join(lines)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(source.randrange(4) if content and source.random() < 0.5 else 0):
        content[source.randrange(len(content))] = source.randrange(256)
    return bytes(content)


def everything_said(extra: dict[Any, Any], environ: dict[str, str]) -> str:
    try:
        config = load_config(extra, environ)
    except ConfigError as error:
        return str(error) + repr(error)
    return repr(config) + config.describe() + repr(config.notices)


@pytest.mark.soak
def test_hostile_inputs(watch: Watch, soak: Soak, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("chunk_size: 256")
    everything_said(
        {}, {"LMCACHE_CONFIG_FILE": str(path)}
    )  # what Python imports at the first use is not looked at
    for seed in soak.rounds(1500, "inputs"):
        source = random.Random(seed)
        extra, environ = an_extra(source), an_environment(source)
        if source.random() < 0.5:
            path.write_bytes(a_file(source))
            environ["LMCACHE_CONFIG_FILE"] = str(path)
        with watch.watching():
            said = everything_said(extra, environ)
        assert CANARY not in said
        assert not watch.seen


def test_the_watch_sees_what_it_should(watch: Watch) -> None:
    with watch.watching():
        eval(compile("1", "x", "eval"))
    assert {event.split()[0] for event in watch.seen} == {"compile", "exec"}
