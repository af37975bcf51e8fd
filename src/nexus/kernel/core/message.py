"""The shape of a message and of a link, before anything is looked up."""

from nexus.abi import (
    LINK_DEPTH_MAX,
    LINK_SIZE_MAX,
    MESSAGE_KIND_RESERVED,
    MESSAGE_SIZE_MAX,
    AbiError,
    LinkTerms,
    Status,
)
from nexus.kernel.core.spawn import DELEGATIONS_MAX


def check_data(data: bytes | bytearray) -> int:
    """The size of a message's bytes. Refuses: InvalidArgument (size, reserved first byte)."""
    size = len(data)
    if not 1 <= size <= MESSAGE_SIZE_MAX:
        raise AbiError(Status.INVALID_ARGUMENT, f"a message of {size} bytes")
    if data[0] >= MESSAGE_KIND_RESERVED:
        raise AbiError(Status.INVALID_ARGUMENT, "the first byte is one of the kernel's")
    return size


def check_terms(terms: LinkTerms) -> None:
    """Check the terms of a link. Refuses: InvalidArgument."""
    depth, size, delegations = terms
    if not (
        1 <= depth <= LINK_DEPTH_MAX
        and 1 <= size <= LINK_SIZE_MAX
        and 0 <= delegations <= DELEGATIONS_MAX
    ):
        raise AbiError(Status.INVALID_ARGUMENT, f"a link of {terms}")


def check_derived(terms: LinkTerms, held: LinkTerms) -> None:
    """Check terms against those of the link they derive from, which is held without MANAGE.

    Refuses: PermissionDenied (deeper, larger, or with delegations of its own).
    """
    if terms.depth > held.depth or terms.size > held.size or terms.delegations:
        raise AbiError(Status.PERMISSION_DENIED, f"{terms} exceed {held}")
