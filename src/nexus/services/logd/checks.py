"""Is this a record at all? What is looked at before a record uses up anything."""

import re
from collections.abc import Iterable
from typing import Final

from nexus.log.payload import HEAD_SIZE_INDEX, KEY_SEPARATOR, SHORT, Payload
from nexus.protocols.logd import (
    FIELDS_MAX,
    FIELDS_SIZE_MAX,
    KEY_PATTERN,
    KEY_WIRE_MAX,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    Append,
    LogdStatus,
)
from nexus.services.logd.journal import FIELD_OVERHEAD, fields_size, text_size

KEY: Final = re.compile(KEY_PATTERN)
SEPARATORS: Final = str.maketrans("", "", "-_. ")  # ways to spell one claim that readers overlook
ROLES: Final = ("sender", "service", "requester")
ATTRIBUTES: Final = ("", "id", "name", "pid", "sid", "generation", "serviceid", "servicename")
CLAIMS: Final = frozenset(role + attribute for role in ROLES for attribute in ATTRIBUTES) | {"sid"}
"""Keys, in lower case and without separators, that say who sends a record. That is the kernel's to
say. `generation` alone is that of the policy, in every audit record."""

CORE_CLAIMS: Final = frozenset({"pid"})
"""Keys that core senders may use about others, as a crash record does (RFC-0011), and nobody
else."""

SURE_SIZE: Final = 240  # bytes of a short line in which nothing is too large: each of its parts
# is text as it is shown, or a value of at most 9 bytes that is shown with 24 characters
SURE_KEYS: Final = 10  # of a short line that needs no second look
HEADS_KNOWN_MAX: Final = 64  # heads of short lines of one stream that need no second look

assert TEXT_SIZE_MAX >= SURE_SIZE
assert FIELDS_SIZE_MAX >= SURE_SIZE + SURE_KEYS * (24 - 1 + FIELD_OVERHEAD)


def claims_identity(request: Append, *, is_core: bool) -> bool:
    """Whether a field says who sends this, or a key is spelt as no key is."""
    return keys_claim((field.key for field in request.fields), is_core=is_core)


def keys_claim(keys: Iterable[str], *, is_core: bool) -> bool:
    """Whether one of these keys says who sends this, or is spelt as no key is."""
    for key in keys:
        if KEY.match(key) is None:
            return True
        plain = key.translate(SEPARATORS).casefold()
        if plain in CLAIMS or (plain in CORE_CLAIMS and not is_core):
            return True
    return False


def is_over_limit(request: Append) -> bool:
    """Whether scope, text or fields are larger than a record may have; bytes of UTF-8."""
    return (
        text_size(request.scope) > SCOPE_SIZE_MAX
        or text_size(request.text) > TEXT_SIZE_MAX
        or fields_size(request.fields) > FIELDS_SIZE_MAX
    )


class Looker:
    """Looks at the lines of one stream, and knows the heads of short ones it has seen to be good.

    A payload of at most SURE_SIZE bytes with such a head is a record for certain, at one glance:
    there are scope and keys in it, and whatever follows is shown as something.
    """

    def __init__(self, *, is_core: bool) -> None:
        self._is_core = is_core
        self.heads: set[bytes] = set()

    def refusal_of(self, payload: Payload) -> LogdStatus | None:
        """Why this is no record of the journal; as for a message, and in the same order."""
        keys = payload.keys.split(KEY_SEPARATOR) if payload.keys else []
        if len(keys) != len(payload.values) or self._claims(keys):
            return LogdStatus.INVALID_ARGS
        if (
            len(keys) > FIELDS_MAX
            or any(len(key) > KEY_WIRE_MAX for key in keys)
            or text_size(payload.scope) > SCOPE_SIZE_MAX
            or text_size(payload.text) > TEXT_SIZE_MAX
            or _fields_size(keys, payload.values) > FIELDS_SIZE_MAX
        ):
            return LogdStatus.OVER_LIMIT
        return None

    def knows(self, payloads: list[bytes]) -> bool:
        """Whether each of these begins with a head that is known."""
        heads = self.heads
        latest: tuple[bytes, ...] = ()  # what nothing begins with, until there is one
        for data in payloads:
            # Most lines are like the one before. A head has its own size in it, so what begins
            # with the bytes of one has that one.
            if not data.startswith(latest):
                head = data[: data[HEAD_SIZE_INDEX]] if len(data) > HEAD_SIZE_INDEX else b""
                if head not in heads:
                    return False
                latest = (head,)
        return True

    def learn(self, data: bytes, payload: Payload) -> None:
        """These bytes are that payload, and it was no reason to refuse it."""
        if (
            data[0] == SHORT
            and len(payload.values) <= SURE_KEYS
            and len(self.heads) < HEADS_KNOWN_MAX
        ):
            self.heads.add(data[: data[HEAD_SIZE_INDEX]])

    def _claims(self, keys: list[str]) -> bool:
        return keys_claim(keys, is_core=self._is_core)


def _fields_size(keys: list[str], values: list[str | int | float | bool | None]) -> int:
    shown = [value if type(value) is str else str(value) for value in values]
    return sum(map(text_size, keys)) + sum(map(text_size, shown)) + FIELD_OVERHEAD * len(keys)
