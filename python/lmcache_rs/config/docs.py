"""The page docs/configuration.md, from the tables: run `python -m lmcache_rs.config.docs` and redirect it."""

import sys
from collections.abc import Iterable
from typing import Any

from lmcache_rs.config import extras, others, remote
from lmcache_rs.config.keys import Key, Status
from lmcache_rs.config.model import honoured_keys
from lmcache_rs.config.values import size_words

_INTRODUCTION = """\
# Configuration

<!-- Generated: edit python/lmcache_rs/config, then run `python -m lmcache_rs.config.docs > docs/configuration.md`. -->

Every setting of LMCache 0.5.6 is known: it is honoured, or named in one line at the start with the reason why not.
A name that is not known is named with the nearest right one. A wrong value stops the start with the key, its place,
the value and what would be right. Passwords are in no line.

## Where settings are written

Later places win:

1. the YAML file named by `LMCACHE_CONFIG_FILE`: `chunk_size: 256`;
2. environment variables, `LMCACHE_` and the key in upper case: `LMCACHE_CHUNK_SIZE=256`;
3. vLLM's `kv_connector_extra_config`, with the prefix `lmcache.`: `{"lmcache.chunk_size": 256}`.

A key that is empty or null is not set. A key that may be none is set so by the word `none`.

## How values are written

| type | written |
|---|---|
| true or false | `true`/`false`, `1`/`0`, `yes`/`no`, `on`/`off`, in any case |
| size | a number is GiB (`5`, `5.0`); units are decimal (`5GB`, `512MB`, `1TB`) or binary (`5GiB`, `512MiB`); `B` is bytes |
| list | a YAML list, or text with commas: `1,2,3` |
| mapping | a YAML mapping; in a variable, a JSON object |
"""  # noqa: E501 - a row of a table is one line

_PREFIX = """\

Without the prefix, {names} are honoured in `kv_connector_extra_config` as well, as LMCache has them there.
Names that are not LMCache's are other people's, and left alone.
"""

_REMOTE = """\

`remote_url` names a Redis (what is in brackets may be left out; a user, a password or a path writes `@`, `?` and `%` as
`%40`, `%3F` and `%25`):

{forms}
`rediss` is TLS, by the system's certificates or those in the file `?ssl_ca_certs=FILE`. A sentinel is asked for the
master `mymaster` where none is named.

LMCache's other schemes ({others}) are not supported: one line says so, and the engine runs without.
"""

_REQUEST = """
## For one request

In `SamplingParams.extra_args["kv_transfer_params"]`: `lmcache.skip_save` (true: nothing of this request is
stored) and `lmcache.tag.NAME` (requests share KV only where their tags are equal).
"""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _default(key: Key) -> str:
    if key.default in (None, ()):
        return "none"
    if key.default == "":
        return "empty"
    if key.kind.name.startswith("size"):
        return size_words(key.default) if key.default else "0"
    if isinstance(key.default, bool):
        return str(key.default).lower()
    if isinstance(key.default, str):
        return f"`{key.default}`"
    return f"{key.default:g}" if isinstance(key.default, float) else str(key.default)


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _honoured(keys: Iterable[Key]) -> str:
    rows = []
    for key in keys:
        text = f"{key.text} (LMCache's default: {key.differs}.)" if key.differs else key.text
        rows.append((f"`{key.name}`", key.kind.name, _default(key), f"`{key.variable}`", text))
    return table(("key", "type", "default", "variable", "what it does"), rows)


def _others(keys: Iterable[Key]) -> str:
    rows = [(f"`{key.name}`", key.kind.name, _default(key), f"`{key.variable}`", key.text) for key in keys]
    return table(("key", "type", "LMCache's default", "variable", "why"), rows)


def _by_status(keys: Iterable[Key]) -> str:
    rows = [(f"`{key.name}`", key.kind.name, key.status.value, key.text) for key in keys]
    return table(("name", "type", "status", "why, or what it does"), rows)


def document() -> str:
    """Return the whole page."""
    honoured = list(honoured_keys().values())
    forms = "".join(f"    {scheme}://{form}\n" for scheme, form in remote.FORMS.items())
    parts = [
        _INTRODUCTION,
        "\n## Honoured: LMCache's keys\n\n",
        _honoured(key for key in honoured if not key.ours),
        _REMOTE.format(forms=forms, others=", ".join(remote.OTHER_SCHEMES)),
        _PREFIX.format(names=" and ".join(f"`{name}`" for name in extras.UNPREFIXED_HONOURED)),
        "\n## Honoured: our own keys\n\n",
        _honoured(key for key in honoured if key.ours),
    ]
    for status, title in (
        (Status.NOT_YET, "Not supported yet"),
        (Status.IGNORED, "Ignored"),
        (Status.NOT_PLANNED, "Not supported"),
    ):
        parts += [f"\n## {title}\n\n", _others(key for key in others.OTHER_KEYS if key.status is status)]
    old = table(("old name", "name"), ((f"`{old}`", f"`{new}`") for old, new in others.ALIASES.items()))
    unprefixed = [*extras.UNPREFIXED_KEYS, *(_prefixed(key) for key in extras.PREFIXED_KEYS)]
    parts += ["\nOld names:\n\n", old]
    parts += ["\n## Inside `extra_config`\n\n", _by_status(extras.EXTRA_CONFIG_KEYS)]
    parts += ["\n## Only in `kv_connector_extra_config`\n\n", _by_status(unprefixed), _REQUEST]
    parts += ["\n## Other variables\n\n", _by_status((*extras.VARIABLES, *extras.FOREIGN_VARIABLES))]
    return "".join(parts)


def _prefixed(key: Key) -> Key:
    return Key(f"lmcache.{key.name}", key.kind, key.default, key.status, key.text)


if __name__ == "__main__":
    sys.stdout.write(document())
