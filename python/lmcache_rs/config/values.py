"""How the value of a setting is read from text, YAML or JSON, and how it is shown without its secrets."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GIB = 2**30
SIZE_MAX = 2**50  # 1 PiB: above that a number of bytes was written where GiB are meant
_INT_MAX = 2**63 - 1
_UNLIMITED = 2**31 - 1  # a maximum that is too large to be worth a word

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}
_UNITS = {"": GIB, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value: what the documentation calls it, how it is read, and whether it may hold a secret.

    `parse` raises ValueError with the words that follow the value in an error: "must be ...".
    """

    name: str
    parse: Callable[[Any], Any]
    secret: bool = False


def boolean() -> Kind:
    """Make the kind for true and false, in the usual spellings."""

    def parse(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower() if isinstance(value, (int, str)) else ""
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
        raise ValueError("must be true or false (1/0, yes/no and on/off are understood as well)")

    return Kind("true or false", parse)


def _range_words(minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None and maximum < _UNLIMITED:
        return f", {minimum} to {maximum}"
    if minimum is not None:
        return f", {minimum} or more"
    return ""


def tokens(minimum: int = 0) -> Kind:
    """Make the kind for a number of tokens."""
    return integer(minimum, _UNLIMITED)


def integer(minimum: int | None = None, maximum: int | None = None) -> Kind:
    """Make the kind for a whole number within limits (63 bits where none are given)."""
    name = "whole number" + _range_words(minimum, maximum)
    low, high = -_INT_MAX if minimum is None else minimum, _INT_MAX if maximum is None else maximum

    def parse(value: Any) -> int:
        number: int | None = None
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, float) and value.is_integer():
            number = int(value)
        elif isinstance(value, str) and len(value) < 40:
            try:
                number = int(value)
            except ValueError:
                number = None
        if number is None or not low <= number <= high:
            raise ValueError(f"must be a {name}")
        return number

    return Kind(name, parse)


def number(minimum: float | None = None, maximum: float | None = None, *, infinite: bool = False) -> Kind:
    """Make the kind for a number within limits, finite unless `infinite`."""
    name = "number" + _range_words(minimum, maximum)

    def parse(value: Any) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError
            result = float(value)
        except (ValueError, OverflowError):
            result = math.nan
        finite = math.isfinite(result) or (infinite and math.isinf(result))
        if (
            not finite
            or (minimum is not None and result < minimum)
            or (maximum is not None and result > maximum)
        ):
            raise ValueError(f"must be a {name}")
        return result

    return Kind(name, parse)


def size(*, zero: bool = False) -> Kind:
    """Make the kind for a size, read as bytes: plain numbers are GiB; 5GB is decimal, 5GiB binary."""
    least = "0 or more" if zero else "more than 0"

    def parse(value: Any) -> int:
        text = repr(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) and len(text) < 400 else None
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"must be a size, {least}: GiB (5 or 5.0), or with a unit ('512MiB', '5GiB', '5GB', '1TB')"
            )
        size_bytes = float(match[1]) * unit
        if size_bytes > SIZE_MAX:
            raise ValueError(
                "must be at most 1 PiB; plain numbers are GiB, bytes are written with a B ('5368709120B')"
            )
        if size_bytes < 0 or (size_bytes < 1 and not (zero and size_bytes == 0)):
            raise ValueError(f"must be {least}")
        return int(size_bytes)

    return Kind("size", parse)


def is_text(value: str) -> bool:
    """Whether `value` can be written as UTF-8: halves of characters and a variable's odd bytes cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def text(characters: int | None = None) -> Kind:
    """Make the kind for text, of at most so many characters; numbers are taken as they are written."""

    def parse(value: Any) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = repr(value)
        if not isinstance(value, str):
            raise ValueError("must be text (put it in quotes)")
        if not is_text(value) or (characters is not None and len(value) > characters):
            raise ValueError("must be text in UTF-8" + (f" of {characters} characters" if characters else ""))
        return value

    return Kind("text", parse)


def secret() -> Kind:
    """Make the kind for text that is never shown."""
    return Kind("text (secret)", text().parse, secret=True)


def choice(*words: str) -> Kind:
    """Make the kind for one of `words`, in any case."""
    by_lower = {word.lower(): word for word in words}

    def parse(value: Any) -> str:
        word = by_lower.get(value.strip().lower()) if isinstance(value, str) else None
        if word is None:
            raise ValueError(f"must be one of {', '.join(words)}")
        return word

    return Kind(" / ".join(words), parse)


def list_of(item: Kind) -> Kind:
    """Make the kind for a list: also a single item, or text with commas between the items."""

    def parse(value: Any) -> list[Any]:
        items: list[Any] = value if isinstance(value, list) else [value]
        if isinstance(value, str):
            items = [part.strip() for part in value.split(",") if part.strip()]
        return [item.parse(one) for one in items]

    return Kind(f"list: {item.name}", parse, item.secret)


def tuple_of(item: Kind) -> Kind:
    """Make the kind for what `list_of` reads, unchangeable."""
    items = list_of(item)
    return Kind(items.name, lambda value: tuple(items.parse(value)), items.secret)


def url() -> Kind:
    """Make the kind for a URL. It may hold a password, so errors show no more than its scheme."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or not _URL.match(value.strip()) or not is_text(value):
            raise ValueError("must be a URL such as redis://host:6379")
        return value.strip()

    return Kind("URL", parse, secret=True)


def scheme(address: str) -> str:
    """Return the scheme of a URL in lower case, "" when there is none."""
    match = _URL.match(address)
    return match[1].lower() if match else ""


def mapping() -> Kind:
    """Make the kind for a mapping, or the text of a JSON object. It may hold passwords."""

    def parse(value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(
                "must be a mapping with text keys; in a variable, a JSON object such as '{\"a\": 1}'"
            )
        return dict(value)

    return Kind("mapping (JSON object)", parse, secret=True)


def anything() -> Kind:
    """Make the kind for a value that is not looked into, so it may be a secret."""
    return Kind("any", lambda value: value, secret=True)


def optional(kind: Kind, none: Any = None) -> Kind:
    """Make `kind` accept "none", for no value, which is `none`."""

    def parse(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.strip().lower() in {"none", "null"}):
            return none
        return kind.parse(value)

    return Kind(f"{kind.name}, or none", parse, kind.secret)


def mask(value: str) -> str:
    """Hide what may be a password: all of a URL but its scheme, all before the last "@", all after a "?"."""
    value = re.sub(r"://.*", "://***", value, flags=re.DOTALL)
    value = re.sub(r"\A.*@", "***@", value, flags=re.DOTALL)
    return re.sub(r"\?.*", "?***", value, flags=re.DOTALL)


def shown(value: Any, kind: Kind | None = None) -> str:
    """Return `value` as messages show it: short, on one line, with no secret and nothing nested."""
    if kind is not None and kind.secret:
        prefix = scheme(value) if isinstance(value, str) else ""
        return f"{prefix}://***" if prefix else "the value (not shown)"
    if isinstance(value, str):
        masked = mask(value)
        return ascii(masked if len(masked) <= 60 else masked[:57] + "...")
    if isinstance(value, (bool, float)) or value is None:
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**30 else "a number of more than 30 digits"
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else f"a value of type {type(value).__name__}"


def size_words(size_bytes: int) -> str:
    """Say bytes in the largest unit they fill: 5368709120 -> "5 GiB"."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 2**power:
            return f"{round(size_bytes / 2**power, 3):g} {unit}"
    return f"{size_bytes} B"
