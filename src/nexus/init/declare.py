"""Kinds of values a system file may hold: each reads a value and describes itself.

The same objects read a file (`nexus.init.system`) and make the published JSON schema, so the
two cannot differ.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final, Protocol

from nexus.abi import Nanos
from nexus.init.lines import KeyPath

SIZE_UNITS: Final = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
DURATION_UNITS: Final = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "min": 60_000_000_000,
}
FOUND_SIZE_MAX: Final = 60  # characters of a key, value or message that an error repeats
NUMBER_MAX: Final = 2**64  # a larger whole number is not repeated, nor can Python always print it

_SIZE: Final = r"^(0|[1-9][0-9]{0,8})(B|KiB|MiB|GiB)$"
_DURATION: Final = r"^(0|[1-9][0-9]{0,8})(ns|us|ms|s|min)$"


class WrongValue(Exception):
    """The value at `path` is not what was expected there: `wanted`, and what was `found`."""

    def __init__(self, path: KeyPath, wanted: str, found: str) -> None:
        super().__init__(f"{path}: {wanted}, not {found}")
        self.path = path
        self.wanted = wanted
        self.found = found

    @property
    def expected(self) -> str:
        """What was expected, with the place in the file."""
        return f"{place(self.path)} to be {self.wanted}"


class WrongKey(WrongValue):
    """The table around `path` has a key it may not have, or lacks one."""

    @property
    def expected(self) -> str:
        """The keys that were expected, with the table they belong to."""
        return f"{self.wanted} in {place(self.path)}"


class MisplacedKey(WrongKey):
    """A key that may not stand in its table, or not alone; the line is the key's own."""

    def __init__(self, table: KeyPath, key: str, wanted: str, found: str) -> None:
        super().__init__((*table, key), wanted, found)

    @property
    def expected(self) -> str:
        """What the table should have instead."""
        return f"{self.wanted} in {place(self.path[:-1])}"


def place(path: KeyPath) -> str:
    """`path` as a person would write it: dotted, keys with dots quoted, elements counted from 1."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key + 1}]"
        else:
            text += f"{'.' if text else ''}{_quoted(key)}"
    return text or "the file"


def _quoted(key: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9_-]+", key) and len(key) <= FOUND_SIZE_MAX
    return key if plain else show(key)


class Kind(Protocol):
    """What may stand behind a key."""

    def read(self, value: object, path: KeyPath) -> Any:
        """The value in the form of the program. Raises WrongValue."""

    def schema(self) -> dict[str, Any]:
        """The JSON schema of what `read` accepts, as far as a schema can say it."""


def show(value: object) -> str:
    """A wrong value, as it is repeated in an error."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= NUMBER_MAX:
        return f"a number of {value.bit_length()} bits"
    return cut(f'"{value}"' if isinstance(value, str) else str(value))


def cut(text: str) -> str:
    """At most FOUND_SIZE_MAX characters of `text`, on one line that a terminal only prints."""
    if len(text) > FOUND_SIZE_MAX:
        text = text[: FOUND_SIZE_MAX - 3] + "..."
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """A string of a given form."""

    pattern: str
    what: str
    size_max: int

    def read(self, value: object, path: KeyPath) -> str:
        if (
            not isinstance(value, str)
            or len(value) > self.size_max
            or re.fullmatch(self.pattern, value) is None
        ):
            raise WrongValue(path, self.what, show(value))
        return value

    def schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "pattern": f"^(?:{self.pattern})$",  # a schema's pattern may match anywhere
            "maxLength": self.size_max,
            "description": self.what,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """A truth value."""

    def read(self, value: object, path: KeyPath) -> bool:
        if not isinstance(value, bool):
            raise WrongValue(path, "true or false", show(value))
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """The address of a network interface of this machine, as numbers."""

    def read(self, value: object, path: KeyPath) -> str:
        expected = 'an IPv4 or IPv6 address such as "127.0.0.1"'
        if not isinstance(value, str):
            raise WrongValue(path, expected, show(value))
        try:
            return str(ip_address(value))
        except ValueError as error:
            raise WrongValue(path, expected, show(value)) from error

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Integer:
    """A whole number within bounds."""

    minimum: int
    maximum: int

    def read(self, value: object, path: KeyPath) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not self.minimum <= value <= self.maximum
        ):
            raise WrongValue(
                path, f"a whole number from {self.minimum} to {self.maximum}", show(value)
            )
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """A number with its unit, in one string: a size ("16KiB") or a duration ("50ms").

    Read as the smallest unit. Bounds are in that unit and belong to the sentence of an error.
    """

    units: Mapping[str, int]
    pattern: str
    example: str
    minimum: int
    maximum: int

    def read(self, value: object, path: KeyPath) -> int:
        units = ", ".join(self.units)
        match = re.fullmatch(self.pattern, value) if isinstance(value, str) else None
        if match is None:
            expected = f'a whole number with a unit ({units}) such as "{self.example}"'
            raise WrongValue(path, expected, show(value))
        amount = int(match[1]) * self.units[match[2]]
        if not self.minimum <= amount <= self.maximum:
            bounds = f"{amount_text(self.minimum, self.units)} to "
            bounds += amount_text(self.maximum, self.units)
            raise WrongValue(path, bounds, show(value))
        return amount

    def schema(self) -> dict[str, Any]:
        bounds = f"{amount_text(self.minimum, self.units)} to "
        bounds += amount_text(self.maximum, self.units)
        return {
            "type": "string",
            "pattern": self.pattern,
            "examples": [self.example],
            "description": bounds,
        }


def size(minimum: int, maximum: int, example: str) -> Amount:
    """A size in bytes."""
    return Amount(
        units=SIZE_UNITS, pattern=_SIZE, example=example, minimum=minimum, maximum=maximum
    )


def duration(minimum: Nanos, maximum: Nanos, example: str) -> Amount:
    """A span of time in nanoseconds."""
    return Amount(
        units=DURATION_UNITS, pattern=_DURATION, example=example, minimum=minimum, maximum=maximum
    )


def amount_text(amount: int, units: Mapping[str, int]) -> str:
    """`amount` in the largest unit that divides it."""
    unit = next(
        name
        for name, factor in sorted(units.items(), key=lambda item: -item[1])
        if amount % factor == 0 and (amount or factor == 1)
    )
    return f"{amount // units[unit]}{unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def read(self, value: object, path: KeyPath) -> str:
        if not isinstance(value, str) or value not in self.words:
            listed = ", ".join(f'"{word}"' for word in self.words)
            raise WrongValue(path, f"one of {listed}", show(value))
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.words)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOf:
    """An array. `unique` is what an element is called if it may stand there once only."""

    item: Kind
    count_max: int
    unique: str = ""

    def read(self, value: object, path: KeyPath) -> list[Any]:
        if not isinstance(value, list):
            raise WrongValue(path, "an array", show(value))
        if len(value) > self.count_max:
            raise WrongValue(path, f"at most {self.count_max} elements", str(len(value)))
        elements = [self.item.read(each, (*path, index)) for index, each in enumerate(value)]
        for index, each in enumerate(elements if self.unique else ()):
            if each in elements[:index]:
                raise WrongValue((*path, index), f"each {self.unique} once", f"{show(each)} again")
        return elements

    def schema(self) -> dict[str, Any]:
        schema = {"type": "array", "items": self.item.schema(), "maxItems": self.count_max}
        return {**schema, "uniqueItems": True} if self.unique else schema


@dataclass(frozen=True, kw_only=True, slots=True)
class MapOf:
    """A table whose keys are free within a form."""

    key: Word
    item: Kind
    count_max: int

    def read(self, value: object, path: KeyPath) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise WrongValue(path, "a table", show(value))
        if len(value) > self.count_max:
            raise WrongValue(path, f"at most {self.count_max} entries", str(len(value)))
        return {
            self.key.read(name, (*path, name)): self.item.read(each, (*path, name))
            for name, each in value.items()
        }

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": self.key.schema(),
            "additionalProperties": self.item.schema(),
            "maxProperties": self.count_max,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Scalar:
    """A setting of a program: a string, a whole number or a truth value."""

    text_size_max: int

    def read(self, value: object, path: KeyPath) -> str | int | bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, int) and -(2**63) <= value < 2**63:
            return value
        if isinstance(value, str) and len(value) <= self.text_size_max:
            return value
        expected = f"true, false, a 64-bit whole number or at most {self.text_size_max} characters"
        raise WrongValue(path, expected, show(value))

    def schema(self) -> dict[str, Any]:
        return {
            "oneOf": [
                {"type": "boolean"},
                {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
                {"type": "string", "maxLength": self.text_size_max},
            ]
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Either:
    """Two forms of the same thing, told apart by being an array or a table."""

    array: ListOf
    table: MapOf

    def read(self, value: object, path: KeyPath) -> Any:
        if isinstance(value, list):
            return self.array.read(value, path)
        return self.table.read(value, path)

    def schema(self) -> dict[str, Any]:
        return {"oneOf": [self.array.schema(), self.table.schema()]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a table: what may stand there, and what it means."""

    kind: Kind
    doc: str
    required: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table with a closed set of keys. `read` leaves absent keys out.

    Exactly one of the keys `one_of` stands in it; a key of `beside` only with the one it names.
    """

    doc: str
    keys: Mapping[str, Key] = field(default_factory=dict)
    one_of: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)

    def read(self, value: object, path: KeyPath) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise WrongValue(path, "a table", show(value))
        for name in value:
            if name not in self.keys:
                listed = ", ".join(self.keys)
                raise MisplacedKey(path, name, f"one of the keys {listed}", show(name))
        read = {
            name: self.keys[name].kind.read(each, (*path, name)) for name, each in value.items()
        }
        for name, key in self.keys.items():
            if key.required and name not in value:
                raise WrongKey(path, f'the key "{name}"', "none")
        self._check_together(value, path)
        return read

    def _check_together(self, value: Mapping[str, object], path: KeyPath) -> None:
        """Which keys exclude or need each other."""
        chosen = [name for name in self.one_of if name in value]
        either = " or ".join(f'"{name}"' for name in self.one_of)
        if self.one_of and not chosen:
            raise WrongKey(path, f"the key {either}", "none")
        if len(chosen) > 1:
            raise MisplacedKey(path, chosen[1], f"only one of the keys {either}", "both")
        for name, needed in self.beside.items():
            if name in value and needed not in value:
                raise MisplacedKey(path, name, f'the key "{needed}" beside "{name}"', "none")

    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = {
            "type": "object",
            "description": self.doc,
            "properties": {
                name: _described(key.kind.schema(), key.doc) for name, key in self.keys.items()
            },
            "required": [name for name, key in self.keys.items() if key.required],
            "additionalProperties": False,
        }
        if self.one_of:
            schema["oneOf"] = [{"required": [name]} for name in self.one_of]
        if self.beside:
            schema["dependentRequired"] = {name: [each] for name, each in self.beside.items()}
        return schema


def _described(schema: dict[str, Any], doc: str) -> dict[str, Any]:
    """The schema with the key's meaning in front of what its kind says of itself."""
    own = schema.get("description")
    return {**schema, "description": f"{doc} ({own})" if own else doc}
