"""`remote_url`: which Redis is meant, checked and completed from the other places where LMCache's users write it."""

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from lmcache_rs.config import values as v
from lmcache_rs.config.keys import Notice

_SINGLE = ("redis", "resp", "valkey")  # one server without TLS
REDIS_SCHEMES = (*_SINGLE, "rediss", "unix", "redis-sentinel", "redis-cluster")
OTHER_SCHEMES = (
    *("lm", "fs", "s3", "azure", "sagemaker-hyperpod", "eic", "hf3fs", "infinistore", "mooncakestore"),
    *("audit", "blackhole", "mock", "external", "plugin"),
)
"""What LMCache knows beside Redis."""

_PARAMETERS = {"db", "ssl_ca_certs"}
_DATABASE_MAX = 2**31 - 1
_VALKEY_TTL_SECS = 86_400  # LMCache's, where only valkey_enable_ttl is given

_HOST = r"(?:\[[0-9a-f:.]+\]|[^\[\]:/,\s]+)(?::\d{1,5})?"
_HOSTS = rf"{_HOST}(?:,{_HOST})*"
_PORT = re.compile(r":(\d+)(?=[,/]|\Z)", re.ASCII)
_PLACES = {
    scheme: re.compile(pattern, re.ASCII | re.IGNORECASE)
    for scheme, pattern in {
        **dict.fromkeys((*_SINGLE, "rediss"), rf"{_HOST}(?:/(?P<database>\d*))?"),
        "unix": r"/.+",
        "redis-sentinel": rf"{_HOSTS}(?:/[^/]*(?:/(?P<database>\d*))?)?",
        "redis-cluster": rf"{_HOSTS}/*",
    }.items()
}
FORMS = {
    **dict.fromkeys((*_SINGLE, "rediss"), "[user:password@]host[:port][/database]"),
    "unix": "[user:password@]/path[?db=database]",
    "redis-sentinel": "[user:password@]host[:port][,host...][/master[/database]]",
    "redis-cluster": "[user:password@]host[:port][,host...]",
}


class _Parts(NamedTuple):
    """A URL taken apart as the Redis tier does it. A password may hold anything but "@" and "?"."""

    scheme: str
    login: str
    place: str
    query: str

    @classmethod
    def of(cls, address: str) -> "_Parts":
        scheme, _, rest = address.partition("://")
        rest, _, query = rest.partition("?")
        login, _, place = rest.rpartition("@")
        return cls(scheme.lower(), login, place, query)

    def __str__(self) -> str:
        login, query = self.login and f"{self.login}@", self.query and f"?{self.query}"
        return f"{self.scheme}://{login}{self.place}{query}"


def _parse(value: Any) -> str:
    """Read a URL; one of a Redis must be complete. Errors do not repeat it."""
    parts = _Parts.of(v.url().parse(value))
    form = _PLACES.get(parts.scheme)
    if form is None:
        return str(parts)
    match = form.fullmatch(parts.place)
    in_path = match.groupdict().get("database") if match else None
    database = in_path or next(iter(re.findall(r"(?:\A|&)db=([^&]*)", parts.query)), "0")
    numbers = re.fullmatch(r"[0-9]{1,10}", database) and int(database) <= _DATABASE_MAX
    if parts.scheme != "unix":
        numbers = numbers and all(0 < int(port) < 65536 for port in _PORT.findall(parts.place))
    if not (match and numbers):
        raise ValueError(f"must be {parts.scheme}://{FORMS[parts.scheme]}")
    if not all(map(_decodes, (parts.login, parts.query, parts.place if parts.scheme == "unix" else ""))):
        raise ValueError("must have each % of its user, password or path written as %25")
    return str(parts)


def _decodes(text: str) -> bool:
    try:
        unquote(text, errors="strict")
    except UnicodeDecodeError:
        return False
    return re.search(r"%(?![0-9a-fA-F]{2})", text) is None


REMOTE_URL = v.Kind("URL", _parse, secret=True)


def shown(address: str) -> str:
    """The address without user, password and parameters, for lines in the log."""
    parts = _Parts.of(address)
    # A password with an unescaped "?" looks like a host before it.
    return f"{parts.scheme}://{'***' if '@' in parts.query else parts.place}"


def settle(chosen: dict[str, Any], spelled: Mapping[str, Any]) -> list[Notice]:
    """Complete `remote_url` and `redis_ttl_secs` of `chosen`, or drop what is no Redis and say so.

    `spelled` has what LMCache reads elsewhere: `extra_config.NAME` and variables.
    """

    def extra(name: str) -> Any:
        return spelled.get(f"extra_config.{name}")

    address = chosen.get("remote_url")
    if address is None or address.startswith("plugin://redis"):
        address = extra("redis_url") or extra("remote_storage_plugin.redis.redis_url") or address
    chosen["remote_url"] = None
    if address is None:
        return []
    parts = _Parts.of(address)
    if parts.scheme not in REDIS_SCHEMES:
        if address.startswith("plugin://redis"):
            text = "remote_url is not used: plugin://redis needs the address in extra_config.redis_url"
            return [Notice(logging.WARNING, text)]
        what = "LMCache's" if parts.scheme in OTHER_SCHEMES else "an unknown scheme"
        text = (
            f"remote_url is not supported: {parts.scheme}:// is {what}; Redis is {', '.join(REDIS_SCHEMES)}"
        )
        return [Notice(logging.WARNING, text)]
    notices = []
    parts = _as_valkey(_with_login(parts, spelled), extra("valkey_mode"), extra("valkey_database"))
    if extra("tls_enable"):
        if parts.scheme not in (*_SINGLE, "rediss"):
            # Without TLS would be a promise broken: a password would cross the network in the clear.
            text = f"remote_url is not used: extra_config.tls_enable is for one server, not {parts.scheme}://"
            return [Notice(logging.WARNING, text)]
        parts = parts._replace(scheme="rediss")
    if {field.partition("=")[0] for field in parts.query.split("&") if field} - _PARAMETERS:
        text = "remote_url has parameters that have no effect: db and ssl_ca_certs are known"
        notices.append(Notice(logging.WARNING, text))
    if extra("valkey_enable_ttl"):
        chosen.setdefault("redis_ttl_secs", float(extra("valkey_ttl_sec") or _VALKEY_TTL_SECS))
    chosen["remote_url"] = str(parts)
    return notices


def _with_login(parts: _Parts, spelled: Mapping[str, Any]) -> _Parts:
    if parts.login:
        return parts
    places = ["extra_config.valkey_{}"] if parts.scheme == "valkey" else []
    for place in (*places, "extra_config.{}", *(["LMCACHE_RESP_{}"] if parts.scheme == "resp" else [])):
        case = str.upper if place.startswith("LMCACHE") else str.lower
        user, password = (spelled.get(place.format(case(name))) for name in ("username", "password"))
        if user or password:
            return parts._replace(login=f"{quote(user or '', safe='')}:{quote(password or '', safe='')}")
    return parts


def _as_valkey(parts: _Parts, mode: str | None, database: int | None) -> _Parts:
    if parts.scheme != "valkey":
        return parts
    host, _, path = parts.place.partition("/")
    if mode == "cluster":
        return parts._replace(scheme="redis-cluster", place=host)
    return parts._replace(place=f"{host}/{database}") if database is not None and not path else parts
