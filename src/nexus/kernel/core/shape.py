"""Whether a trap holds values of the types it declares: asked only when a handler has failed.

A handler that fails on values of the wrong type has met a bug of the task; on values of the right
types it has one of its own.
"""

import types
import typing
from typing import Any, Final, NewType

from nexus.abi import ReplyRecv, Slot, Trap

NUMBER_BITS_MAX: Final = 64  # no number of the ABI is wider; text of one far wider is refused

# Fields that hot paths set between two awaits and that are no arguments of the constructor.
LATER_FIELDS: Final[dict[type[Trap[Any]], dict[str, object]]] = {
    ReplyRecv: {"slot": Slot | None, "data": bytes | bytearray}
}


def well_typed(trap: object) -> bool:
    """Whether `trap` is a trap and each of its arguments is of the declared type."""
    if not isinstance(trap, Trap):
        return False
    fields = _fields(type(trap))
    return all(hasattr(trap, name) and _fits(getattr(trap, name), fields[name]) for name in fields)


def _fields(kind: type[Any]) -> dict[str, object]:
    # A subclass may take other arguments; the trap that it is declares the fields.
    declared: type[Any] = next(base for base in kind.__mro__ if base.__module__ == Trap.__module__)
    if "__init__" not in vars(declared):
        return {}
    hints = typing.get_type_hints(declared.__init__)
    _ = hints.pop("return", None)
    return hints | LATER_FIELDS.get(declared, {})


def _fits(value: object, hint: Any) -> bool:
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(
            _fits(each, typing.get_args(hint)[0]) for each in value
        )
    if issubclass(hint, int):
        # Classes and rights are numbers until they are checked.
        return isinstance(value, int) and value.bit_length() <= NUMBER_BITS_MAX
    if issubclass(hint, tuple):
        return isinstance(value, hint) and all(
            _fits(getattr(value, name), each) for name, each in typing.get_type_hints(hint).items()
        )
    return isinstance(value, hint)
