"""What a service, a port or a granted descriptor may be called."""

from typing import Final

from nexus.abi import SERVICE_NAME_SIZE_MAX

NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-_")


def name_is_valid(name: str) -> bool:
    """Whether a service may have this name: 1 to SERVICE_NAME_SIZE_MAX of [a-z0-9._-]."""
    return 1 <= len(name) <= SERVICE_NAME_SIZE_MAX and NAME_CHARACTERS.issuperset(name)
