"""`nexus state`: the values a running system keeps, and a look at the image of its disk."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient, ServiceRefused
from nexus.cli.errors import EXIT_FAILED, EXIT_OK, CommandFailed, UsageError
from nexus.cli.files import read_input, write_output
from nexus.cli.output import say, say_bytes, say_json, say_table
from nexus.init.declare import cut
from nexus.protocols.statefsd import (
    INLINE_VALUE_MAX,
    LIST_MAX,
    PROTOCOL,
    ROOT,
    Delete,
    Durability,
    Get,
    GetStore,
    Keys,
    ListKeys,
    Lost,
    Put,
    StatefsdStatus,
    Store,
    Stored,
)
from nexus.wire import ReplyStatus, Request

STATEFSD: Final = "statefsd"
ASK_TIME: Final = 5.0  # seconds; a write that takes longer has met a disk in trouble

WHY: Final = {
    ReplyStatus.DENIED: "operator's entry in the system file gives it no right to that: "
    "statefs.read or statefs.write, or that of a special area",
    StatefsdStatus.NOT_FOUND: "there is no such key",
    StatefsdStatus.VALUE_TOO_LARGE: f"a command stores up to {INLINE_VALUE_MAX} bytes",
    StatefsdStatus.KEY_TOO_LONG: "the key is too long",
    StatefsdStatus.INVALID_KEY: f"a key is a path of plain segments below {ROOT}",
    StatefsdStatus.OVER_QUOTA: "the area has used up its quota",
    StatefsdStatus.NO_SPACE: "the store is full",
    StatefsdStatus.IO_ERROR: "the device failed, and whether it was done is not known",
    StatefsdStatus.READ_ONLY: "the device cannot be written: see `nexus logs`, and when it works "
    "again, `nexus restart statefsd`",
    StatefsdStatus.LARGE: f"the value has more than {INLINE_VALUE_MAX} bytes, "
    "which a command cannot fetch",
    StatefsdStatus.CORRUPTED: "its record was damaged and is set aside: put the key again",
}
"""What a refusal means for the one who asked."""


def get(asked: Asked, key: str, output: Path | None, *, as_json: bool) -> None:
    """Print a value, byte by byte, or write it to a file. Raises CommandFailed."""
    value = _ask(asked, key, Get(_key(key)))
    if output is not None:
        write_output(output, value.value)
    if as_json:
        say_json({"key": key, "sequence": value.sequence, **_shown("value", value.value)})
    elif output is None:
        say_bytes(value.value)
        if sys.stdout.isatty() and not value.value.endswith(b"\n"):
            say("")


def put(
    asked: Asked,
    key: str,
    value: str | None,
    file: Path | None,
    *,
    durable: bool,
    request_id: int,
    as_json: bool,
) -> None:
    """Set a key to words of the command line, or to what a file holds. Raises CommandFailed."""
    if (value is None) is (file is None):
        raise UsageError("give the value, or --file FILE (- is the standard input)")
    data = (
        read_input(file, INLINE_VALUE_MAX)
        if file is not None
        else (value or "").encode("utf-8", "surrogateescape")
    )
    durability = Durability.DURABLE if durable else Durability.ACCEPTED
    if len(data) > INLINE_VALUE_MAX:
        raise UsageError(f"the value has {len(data)} bytes: up to {INLINE_VALUE_MAX} are possible")
    stored = _ask(asked, key, Put(_key(key), data, durability, request_id))
    _say_stored(key, stored, "was set", as_json=as_json)


def remove(asked: Asked, key: str, *, request_id: int, as_json: bool) -> None:
    """Drop a key, for good. Raises CommandFailed."""
    stored = _ask(asked, key, Delete(_key(key), Durability.DURABLE, request_id))
    _say_stored(key, stored, "was removed", as_json=as_json)


def ls(asked: Asked, prefix: str, *, as_json: bool) -> None:
    """Print the keys below a prefix that operator may see. Raises CommandFailed."""
    with asked.client() as client:
        keys = [key.decode() for key in _listed(client, prefix)]
    if as_json:
        say_json({"prefix": prefix, "keys": keys})
        return
    for key in keys:
        say(key)


def check(asked: Asked, *, as_json: bool) -> int:
    """Say how the store of a running system is; EXIT_FAILED if something is wrong with it."""
    with asked.client() as client:
        store = client.relay(STATEFSD, PROTOCOL, GetStore(), ASK_TIME)
    is_well = store.writable and not store.quarantined
    if as_json:
        say_json({name: _json(getattr(store, name)) for name in store.__struct_fields__})
    else:
        for line in _lines(store):
            say(line)
        _say_lost(store.lost)
    return EXIT_OK if is_well else EXIT_FAILED


def _lines(store: Store) -> Iterator[str]:
    written = "" if store.writable else ", which cannot be written"
    yield f"device: {store.device} ({store.backing}){written}"
    yield (
        f"epoch {store.epoch}, sequence {store.sequence}, durable up to {store.durable}, "
        f"compactions {store.compactions}"
    )
    yield f"keys: {store.keys}, {store.used} of {store.capacity} bytes used"
    yield f"quarantined: {store.quarantined}"


def _say_lost(lost: list[Lost]) -> None:
    if lost:
        say_table(
            ("KEY", "OFFSET", "SEQUENCE"),
            [
                (
                    each.key.decode(errors="backslashreplace") or "-",
                    str(each.offset),
                    str(each.sequence) if each.sequence else "-",
                )
                for each in lost
            ],
        )


def _listed(client: OperatorClient, prefix: str) -> Iterator[bytes]:
    """Every key below a prefix, a page at a time."""
    after = b""
    while True:
        page: Keys = _relayed(client, prefix, ListKeys(_key(prefix), after, LIST_MAX))
        yield from page.keys
        if not page.more or not page.keys:
            return
        after = page.keys[-1]


def _ask(asked: Asked, key: str, request: Request[Any]) -> Any:
    with asked.client() as client:
        return _relayed(client, key, request)


def _relayed(client: OperatorClient, key: str, request: Request[Any]) -> Any:
    """statefsd's answer; a refusal in a sentence."""
    try:
        return client.relay(STATEFSD, PROTOCOL, request, ASK_TIME)
    except ServiceRefused as error:
        why = WHY.get(error.status)
        if why is None:
            raise
        name = error.status.name
        raise CommandFailed(f"{cut(key)}: {name}, {why}") from error


def _key(text: str) -> bytes:
    """A key as it is sent: the bytes of the command line, whatever they are."""
    data = text.encode("utf-8", "surrogateescape")
    longest = 300
    if len(data) > longest:
        raise UsageError(f"the key has {len(data)} bytes: up to 255 are possible")
    return data


def _say_stored(key: str, stored: Stored, what: str, *, as_json: bool) -> None:
    if as_json:
        say_json(
            {
                "key": key,
                "sequence": stored.sequence,
                "durable": stored.durable,
                "repeated": stored.repeated,
            }
        )
        return
    done = "had been applied before" if stored.repeated else what
    kept = "durable" if stored.durable else "accepted"
    say(f"{key} {done}: sequence {stored.sequence}, {kept}")


def _shown(name: str, data: bytes) -> dict[str, Any]:
    """Bytes in JSON: as text if they are text, else as hexadecimal."""
    try:
        return {name: data.decode(), "size": len(data)}
    except UnicodeDecodeError:
        return {f"{name}_hex": data.hex(), "size": len(data)}


def _json(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [
        {
            "key": each.key.decode(errors="backslashreplace"),
            "offset": each.offset,
            "sequence": each.sequence,
        }
        for each in value
    ]
