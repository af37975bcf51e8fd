"""`nexus call SERVICE REQUEST key=value...`: one request, from words to its answer in words."""

import json
import re
import time
from collections.abc import Sequence
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any, Final

import msgspec

from nexus.cli.ask import Asked
from nexus.cli.client import ServiceRefused, Unanswered
from nexus.cli.errors import EXIT_FAILED, EXIT_OK, UsageError
from nexus.cli.output import say, say_json, say_table, tell
from nexus.init.declare import cut
from nexus.protocols.meta import PROTOCOL as META
from nexus.wire import Protocol, Request, encode

SPANS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000}
SPAN: Final = re.compile(r"(\+?)([0-9]{1,20}(?:\.[0-9]{1,20})?)(ns|us|ms|s|m)")
INTEGERS: Final = range(-(1 << 63), 1 << 64)  # what MessagePack has; msgspec bounds them at sending
HEX: Final = "hex:"
INDEX: Final = re.compile(r"\$\[(\d+)\]")
ASKABLE_META: Final = ("Health", "GetStatus")


def call(
    asked: Asked,
    service: str,
    name: str,
    words: Sequence[str],
    seconds: float,
    *,
    as_json: bool,
    verbose: bool = False,
) -> int:
    """Ask and print; the exit code. `verbose` says which trace it is, beside the answer. Raises
    CommandFailed and UsageError."""
    protocol, kind = find_request(service, name, asked.protocols(service))
    request = make_request(kind, words)
    try:
        with asked.client() as client:
            if verbose:
                tell(f"nexus: trace {client.trace}")
            reply = client.relay(service, protocol, request, seconds)
    except (ServiceRefused, Unanswered) as error:
        outcome = "refused" if isinstance(error, ServiceRefused) else "unanswered"
        if as_json:
            say_json({outcome: error.status.name, "status": int(error.status)})
        else:
            tell(f"nexus: {error}")
        return EXIT_FAILED
    if as_json:
        say_json(shown(reply))
    else:
        _print(reply)
    return EXIT_OK


def find_request(
    service: str, name: str, protocols: Sequence[Protocol]
) -> tuple[Protocol, type[Request[Any]]]:
    """The request class of that name, however it is written: GetStatus, get-status, get_status."""
    known: list[str] = []
    for protocol in (*protocols, META):
        for kind in protocol.codecs:
            own = kind.__name__
            if protocol is META and own not in ASKABLE_META:
                continue
            if plain(own) == plain(name):
                return protocol, kind
            known.append(own)
    raise UsageError(f"{service} has no request {name}: it has {', '.join(known)}")


def plain(name: str) -> str:
    """A name as it is compared: small letters, nothing between them."""
    return name.replace("-", "").replace("_", "").lower()


def make_request(kind: type[Request[Any]], words: Sequence[str]) -> Request[Any]:
    """The request that key=value words describe. Raises UsageError."""
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    usage = " ".join(f"{name}=..." for name in fields) or "no arguments"
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in fields or key in given:
            what = "is given twice" if key in given else "is no key=value of it"
            raise UsageError(f"{kind.__name__}: {word!r} {what}; it takes {usage}")
        given[key] = value_of(fields[key].type, text)
    missing = [name for name, field in fields.items() if name not in given and field.required]
    if missing:
        raise UsageError(f"{kind.__name__}: {', '.join(missing)} is missing; it takes {usage}")
    values = [given.get(name, field.default) for name, field in fields.items()]
    try:
        request: Request[Any] = msgspec.convert(values, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"{kind.__name__}: {_with_name(str(error), list(fields))}") from error
    try:
        _ = encode(request)  # a list may have too large a number, a text half of a character
    except (OverflowError, UnicodeEncodeError) as error:
        raise UsageError(f"{kind.__name__}: a value cannot be sent: {error}") from error
    return request


def value_of(declared: Any, text: str) -> Any:
    """A word as the value of a field: spans of time, names of enum members, JSON, bytes, text."""
    info = msgspec.inspect.type_info(declared)
    match info:
        case msgspec.inspect.IntType():
            return _number(text)
        case msgspec.inspect.EnumType(cls=cls):
            return _member(cls, text)
        case msgspec.inspect.BytesType():
            return _bytes(text)
        case msgspec.inspect.StrType() | msgspec.inspect.BoolType() | msgspec.inspect.FloatType():
            return text
        case _:
            return _json(text)


def _number(text: str) -> int | str:
    """An integer; `250ms` is its nanoseconds, and `+250ms` a time that far from now."""
    span = SPAN.fullmatch(text)
    if span is not None:
        start = time.monotonic_ns() if span[1] else 0
        number = start + int(Fraction(span[2]) * SPANS[span[3]])
    else:
        try:
            number = int(text, 0)
        except ValueError:
            return text  # refused with what the field takes
    if number not in INTEGERS:
        raise UsageError(f"{cut(text)!r} is no integer of 64 bits")
    return number


def _member(cls: type[Enum], text: str) -> Any:
    for member in cls:
        if plain(member.name) == plain(text) or str(member.value) == text:
            return member.value
    names = ", ".join(member.name.lower() for member in cls)
    raise UsageError(f"{text!r} is none of {names}")


def _bytes(text: str) -> bytes:
    if not text.startswith(HEX):
        return text.encode()
    try:
        return bytes.fromhex(text.removeprefix(HEX))
    except ValueError as error:
        raise UsageError(f"{text!r} is not hexadecimal: write {HEX}00ff, or plain text") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{cut(text)!r} is no JSON, which this field takes: {error}") from error


def _with_name(text: str, names: Sequence[str]) -> str:
    """msgspec's sentence, with the field's name for its index."""
    found = INDEX.search(text)
    if found is None:
        return text
    return f"{names[int(found[1])]}: {text.partition(' - at ')[0]}"


def shown(value: Any) -> Any:
    """A reply as JSON shows it: fields by name, enums by name, bytes in hexadecimal."""
    match value:
        case msgspec.Struct():
            return {name: shown(getattr(value, name)) for name in value.__struct_fields__}
        case IntEnum():
            return value.name
        case bytes():
            return value.hex()
        case list():
            return [shown(each) for each in value]
        case _:
            return value


def _print(reply: Any) -> None:
    """A reply for a person: a line per field, and a table per list of rows."""
    tables = []
    for name, value in shown(reply).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append((name, value))
        else:
            say(f"{name}: {cell(value)}")
    for name, rows in tables:
        say(f"{name}:")
        say_table(
            tuple(key.upper() for key in rows[0]),
            [tuple(cell(value) for value in row.values()) for row in rows],
        )


def cell(value: Any) -> str:
    """A value in a line or a column."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(cell(each) for each in value) or "-"
        case dict():
            return " ".join(f"{key}={cell(each)}" for key, each in value.items())
        case _:
            return str(value)
