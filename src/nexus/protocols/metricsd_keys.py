"""Which keys of labels and attributes are refused because they look as if a secret came with them.

metricsd decides by it, and the facade already refuses by the same words.
"""

import re
from typing import Final

SEPARATORS: Final = str.maketrans("", "", "_.")

SECRET_WORDS: Final = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "credential",
    "authorization",
    "apikey",
    "accesskey",
    "privatekey",
    "secretkey",
    "sessionkey",
    "cookie",
    "bearer",
)
"""A key that has one of these anywhere in it, in any case and with any separators, is denied."""

SECRET_PARTS: Final = frozenset({"key", "pwd", "pass", "pin", "auth", "seed", "otp", "private"})
"""And one that has one of these as a whole part between separators, or is it: `auth_header` is
denied, `author` and `keyboard` are not."""

OPEN_PARTS: Final = frozenset({"key_id", "key_size", "key_count"})
"""Keys about keys that tell no secret."""


def looks_secret(key: str) -> bool:
    """Whether a label of this name probably holds what nobody should read (services.md D15)."""
    lowered = key.casefold()
    if lowered in OPEN_PARTS:
        return False
    plain = lowered.translate(SEPARATORS)
    parts = re.split(r"[_.]", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).casefold())
    return any(word in plain for word in SECRET_WORDS) or not SECRET_PARTS.isdisjoint(parts)
