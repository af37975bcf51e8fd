"""One log line as it may be sent: everything cut to what a record may have, and marked if it was.

Nothing is escaped here: a record is made safe to show by logd, which trusts no sender.
"""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

from nexus.protocols.logd import (
    FIELDS_MAX,
    FIELDS_SIZE_MAX,
    KEY_WIRE_MAX,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    Append,
    Field,
    Level,
)

FieldValue: TypeAlias = str | int | float | bool | None
"""What a field may be given as; shown as str() shows it."""

MARK: Final = "\N{HORIZONTAL ELLIPSIS}"  # ends what was cut
MARK_SIZE: Final = len(MARK.encode())  # bytes
CUT_KEY: Final = "log.cut"  # the field that says how many fields were cut or left out
FIELD_OVERHEAD: Final = 2  # bytes of a field besides key and value (services.md 1.3)
INT_BITS_MAX: Final = 64  # of an integer shown in decimal; Python refuses to show very large ones
CUT_FIELD_SIZE: Final = len(CUT_KEY) + FIELD_OVERHEAD + 3  # bytes; the count has 3 digits at most
NO_KEY: Final = re.compile(r"[^a-z0-9_.-]")

assert SCOPE_SIZE_MAX > MARK_SIZE
assert CUT_FIELD_SIZE < FIELDS_SIZE_MAX


class Line(NamedTuple):
    """What to send, and whether anything of it was cut."""

    request: Append
    is_cut: bool


def make_line(
    level: Level, scope: str, text: str, fields: Mapping[str, FieldValue] | None = None
) -> Line:
    """A line within the bounds of a record, fields sorted by key. Raises nothing."""
    scope, scope_cut = cut(scope, SCOPE_SIZE_MAX)
    text, text_cut = cut(text, TEXT_SIZE_MAX)
    shown, fields_cut = _fields(fields or {})
    return Line(Append(level, scope, text, shown), scope_cut or text_cut or fields_cut)


def cut(text: str, size_max: int) -> tuple[str, bool]:
    """`text`, or as much of it as fits `size_max` bytes with the mark; and whether it was cut.

    What UTF-8 cannot say (half a surrogate pair) is spelled out.
    """
    data = text[: size_max + 1].encode("utf-8", "backslashreplace")
    if len(data) <= size_max:
        return data.decode(), False
    return data[: size_max - MARK_SIZE].decode("utf-8", "ignore") + MARK, True


def _fields(fields: Mapping[str, FieldValue]) -> tuple[list[Field], bool]:
    pairs = sorted((_key(key), _value(value)) for key, value in fields.items())
    whole = [Field(key, value) for key, (value, _) in pairs]
    fits = len(whole) <= FIELDS_MAX and sum(map(_size, whole)) <= FIELDS_SIZE_MAX
    if fits and not any(was_cut for _, (_, was_cut) in pairs):
        return whole, False
    left = FIELDS_SIZE_MAX - CUT_FIELD_SIZE
    kept: list[Field] = []
    changed = 0
    for field, (_, (_, was_cut)) in zip(whole, pairs, strict=True):
        room = left - len(field.key) - FIELD_OVERHEAD
        if len(kept) == FIELDS_MAX - 1 or room <= MARK_SIZE:
            changed += 1
            continue
        value, cut_here = cut(field.value, room)
        changed += was_cut or cut_here
        kept.append(Field(field.key, value))
        left -= _size(kept[-1])
    return [*kept, Field(CUT_KEY, str(min(changed, 999)))], True


def _size(field: Field) -> int:
    """Bytes a field counts for (services.md 1.3)."""
    return len(field.key) + len(field.value.encode()) + FIELD_OVERHEAD


def _key(key: str) -> str:
    """A key logd takes: a line is not lost for the spelling of a key."""
    return NO_KEY.sub("_", key[:KEY_WIRE_MAX].lower())[:KEY_WIRE_MAX] or "_"


def _value(value: FieldValue) -> tuple[str, bool]:
    """How a value is shown, and whether that is not all of it."""
    if isinstance(value, int) and value.bit_length() > INT_BITS_MAX:
        return f"{value >> value.bit_length() - INT_BITS_MAX:#x}{MARK}", True
    text = str.__str__(value) if isinstance(value, str) else str(value)
    return cut(text, FIELDS_SIZE_MAX)
