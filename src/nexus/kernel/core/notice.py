"""What the root task may say to the world outside: its memory across boots, and sd_notify."""

from nexus.abi import BOOT_MEMORY_SIZE_MAX, NOTIFY_SIZE_MAX, AbiError, Status


def check_boot_memory(data: bytes) -> bytes:
    """A copy of what is to be stored. Refuses: InvalidArgument (size)."""
    if len(data) > BOOT_MEMORY_SIZE_MAX:
        raise AbiError(
            Status.INVALID_ARGUMENT, f"{len(data)} bytes, boot memory is {BOOT_MEMORY_SIZE_MAX}"
        )
    return bytes(data)


def check_notice(text: str) -> bytes:
    """The bytes of a notice. Refuses: InvalidArgument (too long, not UTF-8)."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise AbiError(Status.INVALID_ARGUMENT, "the notice is not UTF-8") from None
    if len(data) > NOTIFY_SIZE_MAX:
        raise AbiError(Status.INVALID_ARGUMENT, f"a notice of {len(data)} bytes")
    return data
