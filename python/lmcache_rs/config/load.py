"""Where settings come from and which wins: the YAML file, then variables, then kv_connector_extra_config."""

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import yaml

from lmcache_rs.config import extras, others
from lmcache_rs.config.keys import Key, Notice, Status, find
from lmcache_rs.config.model import Config, honoured_keys
from lmcache_rs.config.remote import settle
from lmcache_rs.config.tiers import TIER_THREADS_MAX, without_effect
from lmcache_rs.config.values import shown
from lmcache_rs.errors import ConfigError

FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
_FILE_BYTES_MAX = 2**20
_UNKNOWN_MAX = 20  # lines about unknown settings
_VARIABLE_PREFIX = "LMCACHE_"
EXTRA_PREFIX = "lmcache."


class _Setting(NamedTuple):
    """A setting as it was found. `key` is None where nothing is known by that name."""

    key: Key | None
    value: Any
    written: str  # the name as the user wrote it
    source: str  # where, in words; "" where `written` says it all
    choices: tuple[str, ...] = ()  # names that would have been right, spelt as in this place

    @property
    def place(self) -> str:
        """Where it was found, as messages put it behind the name."""
        return f" (in {self.source})" if self.source else ""


def load_config(extra: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and check all settings; `extra` is vLLM's kv_connector_extra_config. Later sources win.

    Raises ConfigError for a wrong value anywhere, also one that a later source overrides. What is merely
    unknown or not supported is in `Config.notices`.
    """
    chosen: dict[str, Any] = {}
    others_set: dict[str, tuple[_Setting, Any]] = {}
    attributes = {key.name: attribute for attribute, key in honoured_keys().items()}
    for source in (_from_file(environ), _from_variables(environ), _from_extra(extra or {})):
        for setting in source:
            if setting.key is not None and _unset(setting.value):
                continue
            value = _parse(setting)
            if setting.key is not None and setting.key.name in attributes:
                chosen[attributes[setting.key.name]] = value
            else:
                # A later source speaks for the same key; an unknown name only for itself.
                others_set[setting.key.name if setting.key else setting.written] = (setting, value)
    for setting in _inside_extra_config(chosen.get("extra_config") or {}):
        others_set[setting.written] = (setting, _parse(setting))
    spelled = {name: value for name, (_, value) in others_set.items()}
    notices = (*_notices(others_set.values()), *_caveats(chosen), *_tiers(chosen, spelled))
    return Config(**chosen, notices=notices)


@cache
def _known() -> dict[str, Key]:
    """Every key by name, old names included."""
    keys = {key.name: key for key in (*honoured_keys().values(), *others.OTHER_KEYS)}
    return keys | {old: keys[new] for old, new in others.ALIASES.items()}


def _lookup(name: str) -> Key | None:
    return _known().get(name) or find(others.OTHER_KEYS, name)


def _from_file(environ: Mapping[str, str]) -> Iterator[_Setting]:
    path = environ.get(FILE_VARIABLE, "").strip()
    if not path:
        return
    for name, value in _read_yaml(path).items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: a key is {shown(name)}; keys must be text")
        yield _Setting(_lookup(name), value, name, path, tuple(_known()))


def _read_yaml(path: str) -> dict[Any, Any]:
    """Read the mapping in a YAML file. Nothing of its text is shown: it may hold passwords."""
    hint = f"{FILE_VARIABLE} must name a YAML file"
    try:
        with open(path, "rb") as file:
            content = file.read(_FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        raise ConfigError(f"{path}: cannot be read ({reason}); {hint}") from None
    if len(content) > _FILE_BYTES_MAX:
        raise ConfigError(f"{path}: is larger than 1 MiB; {hint}")
    try:
        loaded = yaml.safe_load(content)
    except Exception as error:  # PyYAML lets ValueError, RecursionError and more through
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        tag = isinstance(error, yaml.constructor.ConstructorError)
        problem = "has a YAML tag or key that is not allowed" if tag else "is not valid YAML"
        raise ConfigError(f"{path}: {problem}{place}; write plain lines such as 'chunk_size: 256'") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: is not a mapping; write plain lines such as 'chunk_size: 256'")
    return loaded


def _from_variables(environ: Mapping[str, str]) -> Iterator[_Setting]:
    choices = tuple(f"{_VARIABLE_PREFIX}{name.upper()}" for name in _known())
    choices += tuple(key.name for key in extras.VARIABLES)
    for variable in sorted(environ):
        if not variable.startswith(_VARIABLE_PREFIX):
            continue
        name = variable.removeprefix(_VARIABLE_PREFIX)
        key = find(extras.VARIABLES, variable)
        if key is None and name == name.upper():
            key = _lookup(name.lower())
        yield _Setting(key, _unquoted(environ[variable]), variable, "", choices)


def _unquoted(value: str) -> str:
    """`value` without one pair of quotes around it, which env files of some tools leave there."""
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _from_extra(extra: Mapping[str, Any]) -> Iterator[_Setting]:
    """Yield what is ours; names without our prefix are other people's unless LMCache reads them."""
    place = "kv_connector_extra_config"
    names = [name for name in extra if isinstance(name, str)]
    choices = tuple(f"{EXTRA_PREFIX}{known}" for known in _known())
    for name in names:
        if name in extras.UNPREFIXED_HONOURED:
            yield _Setting(_lookup(name), extra[name], name, place)
        elif (key := find(extras.UNPREFIXED_KEYS, name)) is not None:
            yield _Setting(key, extra[name], name, place)
        elif (short := name.lower().removeprefix(_VARIABLE_PREFIX.lower())) in _known():
            yield _Setting(None, extra[name], name, place, (f"{EXTRA_PREFIX}{short}",))
        elif name.upper().startswith(_VARIABLE_PREFIX):
            yield _Setting(None, extra[name], name, place, choices)
    for name in names:
        if name.startswith(EXTRA_PREFIX):
            short = name.removeprefix(EXTRA_PREFIX)
            key = _lookup(short) or find(extras.PREFIXED_KEYS, short)
            yield _Setting(key, extra[name], name, place, choices)


def _unset(value: Any) -> bool:
    """Null and the empty text are no value: a key without one is at its default."""
    return value is None or (isinstance(value, str) and not value.strip())


def _parse(setting: _Setting) -> Any:
    """Read the value as the type of its key."""
    key, value = setting.key, setting.value
    if key is None:
        return value
    try:
        return key.kind.parse(value)
    except ValueError as problem:
        raise ConfigError(f"{setting.written}{setting.place}: {shown(value, key.kind)} {problem}") from None


def _notices(settings: Iterable[tuple[_Setting, Any]]) -> Iterator[Notice]:
    """Make a line for each setting that is not honoured and asks for something."""
    unknown = 0
    for setting, value in settings:
        if setting.key is not None:
            notice = _known_notice(setting, setting.key, value)
            if notice is not None:
                yield notice
            continue
        unknown += 1
        if unknown <= _UNKNOWN_MAX:
            yield _unknown_notice(setting)
    if unknown > _UNKNOWN_MAX:
        yield Notice(
            logging.WARNING, f"{unknown - _UNKNOWN_MAX} more settings are unknown: they have no effect"
        )


def _unknown_notice(setting: _Setting) -> Notice:
    written = shown(setting.written)[1:-1]
    meant = _nearest(written, [name for name in setting.choices if "*" not in name])
    advice = f"; did you mean {meant}?" if meant else ""
    return Notice(logging.WARNING, f"{written}{setting.place} is unknown and has no effect{advice}")


def _nearest(written: str, names: list[str]) -> str | None:
    """The only name, or the one that is like what was written apart from what all names begin with."""
    if len(names) == 1:
        return names[0]
    shared = len(os.path.commonprefix(names))  # noqa: RUF071 - names are no paths
    bare = {name[shared:].lower(): name for name in names}
    near = difflib.get_close_matches(written[shared:].lower(), bare, n=1)
    return bare[near[0]] if near else None


def _known_notice(setting: _Setting, key: Key, value: Any) -> Notice | None:
    if key.status is Status.HONOURED:
        return None
    if key.status is Status.IGNORED:
        return Notice(logging.INFO, f"{setting.written}{setting.place} is ignored: {key.text}")
    if type(value) is type(key.default) and value == key.default:
        return None
    return Notice(logging.WARNING, f"{setting.written}{setting.place} is {key.status.value}: {key.text}")


def _inside_extra_config(extra_config: Mapping[str, Any]) -> Iterator[_Setting]:
    choices = tuple(f"extra_config.{key.name}" for key in extras.EXTRA_CONFIG_KEYS)
    for name, value in extra_config.items():
        if not _unset(value):
            yield _Setting(find(extras.EXTRA_CONFIG_KEYS, name), value, f"extra_config.{name}", "", choices)


def _caveats(chosen: dict[str, Any]) -> list[Notice]:
    """Put right what this version cannot do as asked, and say so."""
    notes = []
    if (policy := chosen.get("cache_policy", "LRU")) != "LRU":
        chosen["cache_policy"] = "LRU"
        notes.append(Notice(logging.WARNING, f"cache_policy {policy} is not supported yet: LRU is used"))
    return notes


def _tiers(chosen: dict[str, Any], spelled: Mapping[str, Any]) -> list[Notice]:
    """Take what LMCache's users write inside `extra_config`, and say what leaves a tier out."""
    if (direct := spelled.get("extra_config.use_odirect")) is not None:
        chosen.setdefault("local_disk_direct", direct)
    if (threads := spelled.get("extra_config.disk_io_threads")) is not None:
        chosen.setdefault("tier_threads", min(threads, TIER_THREADS_MAX))
    notes = settle(chosen, spelled)
    directories, size = chosen.get("local_disk"), chosen.get("max_local_disk_bytes")
    if directories and not size:
        text = "local_disk is set and max_local_disk_size is 0: nothing will be kept on disk"
        notes.append(Notice(logging.WARNING, text))
    elif size and not directories:
        text = "max_local_disk_size is set and local_disk is not: nothing will be kept on disk"
        notes.append(Notice(logging.WARNING, text))
    has_disk, has_redis = bool(directories and size), chosen.get("remote_url") is not None
    notes += (Notice(logging.WARNING, text) for text in without_effect(chosen, has_disk, has_redis))
    if not chosen.get("local_cpu", True):
        beside = has_disk or has_redis
        text = (
            "KV is kept in RAM all the same, on its way to other tiers"
            if beside
            else "nothing will be stored"
        )
        notes.append(Notice(logging.WARNING, f"local_cpu is false: {text}"))
    return notes
