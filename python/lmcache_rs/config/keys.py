"""What is known of one setting: its name, type, default, and what lmcache_rs does with it."""

import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from lmcache_rs.config.values import Kind


class Status(Enum):
    """What happens to a setting."""

    HONOURED = "honoured"
    NOT_YET = "not supported yet"
    IGNORED = "ignored"
    NOT_PLANNED = "not supported"


class Notice(NamedTuple):
    """A line for the log, to be written once at the start."""

    level: int
    text: str

    def log(self, logger: logging.Logger) -> None:
        """Write the line."""
        logger.log(self.level, "%s", self.text)


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. `default` is ours for a honoured key and LMCache's for all others.

    A name that ends in "*" stands for every name that begins so. `text` is what a honoured key does, and the
    reason for every other. `differs` says what LMCache's default is, and why ours is another.
    """

    name: str
    kind: Kind
    default: Any
    status: Status
    text: str
    differs: str = ""
    ours: bool = False

    @property
    def variable(self) -> str:
        """The environment variable of this key."""
        return f"LMCACHE_{self.name.upper()}"

    def covers(self, name: str) -> bool:
        """Whether this entry stands for `name`."""
        return name.startswith(self.name[:-1]) if self.name.endswith("*") else name == self.name


def setting(
    default: Any, kind: Kind, text: str, *, name: str = "", differs: str = "", ours: bool = False
) -> Any:
    """Declare a dataclass field that is a setting; `name` is the setting's where the field is called otherwise."""
    # A field does not know its own name yet: `honoured_keys` puts it in.
    key = Key(name, kind, default, Status.HONOURED, text, differs, ours)
    return field(default=default, metadata={"key": key})


def find(table: tuple[Key, ...], name: str) -> Key | None:
    """Find the entry of `table` for `name`; exact names go before families."""
    exact = next((key for key in table if key.name == name), None)
    return exact or next((key for key in table if key.covers(name)), None)
