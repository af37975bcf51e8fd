"""Golden frames: what each message of each protocol looks like on the wire, byte by byte.

The samples come from the declaration alone: the least, a typical and the largest value of every
field. `python -m nexus.testing.golden tests/golden` compares, `--write` writes what is new. A
frame that changed without a new version of its protocol is refused by both.
"""

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

from msgspec import inspect

import nexus.protocols
from nexus.wire import HEADER, REPLY_BIT, Codec, Protocol, encode

LEAST, TYPICAL, MOST = "least", "typical", "most"
NONCE: Final = 0x0123_4567_89AB_CDEF
DEADLINE: Final = 0x0FED_CBA9_8765_4321
TRACE: Final = bytes(range(0x10, 0x20))
SPAN: Final = bytes(range(0x20, 0x28))
SIZE_MAX: Final = 40  # bytes, characters of a sample: beyond the shortest form of a length
COUNT_MAX: Final = 2  # elements of a sample's list
INT_TYPICAL: Final = 1_000


def protocols() -> list[Protocol]:
    """Every protocol of the tree, by number."""
    found = []
    for module in pkgutil.iter_modules(nexus.protocols.__path__):
        declared = getattr(
            importlib.import_module(f"nexus.protocols.{module.name}"), "PROTOCOL", None
        )
        if isinstance(declared, Protocol):
            found.append(declared)
    return sorted(found, key=lambda protocol: protocol.number)


def sample(declared: Any, which: str) -> Any:
    """One value of a declared message."""
    return _sample(inspect.type_info(declared), which)


def _sample(info: inspect.Type, which: str) -> Any:
    match info:
        case inspect.StructType(cls=cls, fields=fields):
            return cls(*(_sample(field.type, which) for field in fields))
        case inspect.IntType(ge=lowest, le=highest):
            least = -(1 << 63) if lowest is None else int(lowest)
            most = (1 << 64) - 1 if highest is None else int(highest)
            return _pick(which, least, max(least, min(most, INT_TYPICAL)), most)
        case inspect.FloatType():
            return _pick(which, -1.5, 0.25, 1e300)
        case inspect.BoolType():
            return which != LEAST
        case inspect.NoneType():
            return None
        case inspect.StrType(min_length=least, max_length=most, pattern=pattern):
            size = least or 0
            longest = max(size, _short(most))
            typical = "ab" * max(size, min(longest, 6))
            text = _pick(which, "a" * size, typical[: max(size, min(longest, 6))], "z" * longest)
            return text if pattern is None else _matching(pattern, text)
        case inspect.BytesType(min_length=least, max_length=most):
            size = least or 0
            longest = max(size, _short(most))
            return bytes(range(_pick(which, size, max(size, min(longest, 5)), longest)))
        case inspect.ListType(item_type=item, min_length=least, max_length=most):
            count = min(COUNT_MAX, most or 0)
            picked = _pick(which, least or 0, max(least or 0, min(1, count)), count)
            return [_sample(item, which) for _ in range(picked)]
        case inspect.TupleType(item_types=items):
            return tuple(_sample(item, which) for item in items)
        case inspect.UnionType(types=types):
            return _sample(_pick(which, types[0], types[-1], types[-1]), which)
        case inspect.EnumType(cls=cls):
            members: list[Enum] = list(cls)
            return _pick(which, members[0], members[len(members) // 2], members[-1])
        case _:
            raise AssertionError(f"no sample for {info!r}")


def _pick(which: str, least: Any, typical: Any, most: Any) -> Any:
    return {LEAST: least, TYPICAL: typical, MOST: most}[which]


def _matching(pattern: str, text: str) -> str:
    """The text, or one as long in capitals or in hexadecimal, whichever the pattern allows."""
    found = (each for each in (text, text.upper(), "f" * len(text)) if re.match(pattern, each))
    return next(found, text)


def _short(most: int | None) -> int:
    assert most is not None, "wire refuses a type without a bound"
    return min(most, SIZE_MAX)


def frame(codec: Codec, which: str, *, reply: bool) -> bytes:
    """The whole frame of a sample."""
    kind, version, op, _ = codec.prefix[:4]
    number = int.from_bytes(codec.prefix[4:6], "little")
    op |= REPLY_BIT if reply else 0
    header = HEADER.pack(kind, version, op, 0, number, 0, NONCE, DEADLINE, TRACE, SPAN)
    return header + encode(sample(codec.reply_type if reply else codec.request_type, which))


def lines(protocol: Protocol) -> Iterator[str]:
    """The golden file of a protocol: its version, then one line per frame."""
    yield f"version {protocol.version}"
    for codec in protocol.codecs.values():
        name = codec.request_type.__name__
        for which in (LEAST, TYPICAL, MOST):
            yield f"{name} {which} {frame(codec, which, reply=False).hex()}"
            yield f"{name} {which} reply {frame(codec, which, reply=True).hex()}"


def drift(protocol: Protocol, recorded: Sequence[str]) -> list[str]:
    """What is wrong with the recorded lines: frames that changed or went under the same version.

    New messages are no fault of the recorded lines; `is_complete` asks for them.
    """
    if not recorded or recorded[0] != f"version {protocol.version}":
        return []
    now = dict(_named(line) for line in lines(protocol))
    return [
        f"{protocol.name}: {name}: the frame has changed, and the version is still "
        f"{protocol.version}"
        for name, data in map(_named, recorded)
        if now.get(name) != data
    ]


def is_complete(protocol: Protocol, recorded: Sequence[str]) -> bool:
    """Whether every frame of the protocol is recorded as it is now."""
    return list(recorded) == list(lines(protocol))


def _named(line: str) -> tuple[str, str]:
    name, _, data = line.rpartition(" ")
    return name, data


def check(folder: Path, *, write: bool, declared: Sequence[Protocol] = ()) -> list[str]:
    """Faults of the golden files in `folder`; with `write` what may change is written."""
    faults = []
    for protocol in declared or protocols():
        path = folder / f"{protocol.name}.txt"
        recorded = path.read_text("ascii").splitlines() if path.exists() else []
        changed = drift(protocol, recorded)
        if changed:
            faults += changed
        elif not is_complete(protocol, recorded):
            if write:
                _ = path.write_text("\n".join(lines(protocol)) + "\n", "ascii")
            else:
                faults.append(f"{protocol.name}: new frames are not recorded: --write them")
    return faults


def main(arguments: Sequence[str]) -> int:
    """Compare or write; 1 if something is wrong."""
    folder = Path(next((each for each in arguments if not each.startswith("-")), "tests/golden"))
    faults = check(folder, write="--write" in arguments)
    _ = sys.stdout.write("".join(f"golden: {fault}\n" for fault in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
