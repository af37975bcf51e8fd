"""What demo.testsvc tries by raw system calls when the ground has them.

A proof run puts these into demo.testsvc's table; the service itself may not import `os` or
`socket`, and on the simulated ground there is nothing to try them on.
"""

import errno
import socket
import struct
from typing import Final

from nexus.abi import Pid
from nexus.protocols.testsvc import AttackResult

DESCRIPTORS_MAX: Final = 256  # above every descriptor a service may have
LINES_MAX: Final = 40  # of AttackResult
CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
FIRST_DESCRIPTOR: Final = 3  # behind the standard streams
NO_SOCKET: Final = (errno.EBADF, errno.ENOTSOCK)  # nothing there, or something else


async def foreign_credentials(target: Pid) -> AttackResult:
    """Claim `target` in SCM_CREDENTIALS on every socket this process has; EPERM is due."""
    forged = CREDENTIALS.pack(target, 0, 0)
    lines: list[str] = []
    open_doors = 0
    for descriptor in range(FIRST_DESCRIPTOR, DESCRIPTORS_MAX):
        try:
            end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptor)
        except OSError as error:
            assert error.errno in NO_SOCKET, f"descriptor {descriptor}: {error}"
            continue
        met = _forge(end, forged)
        _ = end.detach()
        open_doors += met != "EPERM"
        lines.append(f"descriptor {descriptor}: {met}")
    if not lines:
        return AttackResult(["no socket found to try it on"], 1)
    return AttackResult(lines[:LINES_MAX], open_doors)


def _forge(end: socket.socket, forged: bytes) -> str:
    """What a message with forged credentials meets on one socket."""
    credentials = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, forged)]
    try:
        _ = end.sendmsg((b"\x03forged",), credentials, socket.MSG_DONTWAIT)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return "sent"
