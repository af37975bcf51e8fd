"""Rights are derived downwards only, and some never leave their task."""

from nexus.abi import AbiError, CapKind, Rights, Status


def derive(held: Rights, wanted: Rights) -> Rights:
    """The rights of a derived capability: a subset of those held.

    Refuses: PermissionDenied for any bit that is not held, known or not.
    """
    if int(wanted) & ~int(held):
        raise AbiError(Status.PERMISSION_DENIED, "rights are derived downwards only")
    return Rights(wanted)


def moved(kind: CapKind, held: Rights) -> Rights:
    """The rights a capability arrives with when it moves with a message: SEND or MAP alone.

    MANAGE stays behind: it ends with the slot that is emptied.
    Refuses: PermissionDenied for an endpoint, and where SEND (link) or MAP (VMO) is not held.
    """
    right = {CapKind.LINK: Rights.SEND, CapKind.VMO: Rights.MAP}.get(kind)
    if right is None or not held & right:
        raise AbiError(Status.PERMISSION_DENIED, f"{kind.name} with {held!r} does not move")
    return right
