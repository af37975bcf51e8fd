"""Is this a record at all? What is looked at before a record uses up anything."""

import re
from typing import Final

from nexus.protocols.logd import (
    FIELDS_SIZE_MAX,
    KEY_PATTERN,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    Append,
)
from nexus.services.logd.journal import fields_size, text_size

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


def claims_identity(request: Append, *, is_core: bool) -> bool:
    """Whether a field says who sends this, or a key is spelt as no key is."""
    for field in request.fields:
        if KEY.match(field.key) is None:
            return True
        plain = field.key.translate(SEPARATORS).casefold()
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
