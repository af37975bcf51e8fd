"""What init opens for a service before it exists: granted devices and listening sockets."""

import os
import stat
from contextlib import ExitStack
from typing import Final

from nexus.abi import (
    DeviceGrant,
    Grants,
    Isolation,
    ListenGrant,
    Program,
    SecretBackend,
    SpawnReason,
)
from nexus.kernel.core import SpawnRefused
from nexus.kernel.linux import landlock
from nexus.kernel.linux.outside import listen_tcp

LISTEN_BACKLOG: Final = 64  # connections not accepted yet; more wait in their own SYN


def check_grants(grants: Grants, program: Program, *, harden: bool) -> None:
    """Refuse what this program or this machine cannot be granted: SpawnRefused with
    invalid-payload or map-failed."""
    if grants.isolation is Isolation.EXEC and not program.entry:
        raise SpawnRefused(
            SpawnReason.INVALID_PAYLOAD, f"{program.name} names no entry to execute it by"
        )
    if program.ordinary and not (grants.isolation is Isolation.EXEC and grants.streams):
        raise SpawnRefused(
            SpawnReason.INVALID_PAYLOAD,
            f"{program.name} needs isolation = exec and streams, for its event loop",
        )
    if grants.secret is SecretBackend.FILE and harden and not landlock.version():
        raise SpawnRefused(
            SpawnReason.MAP_FAILED,
            "this Linux kernel has no Landlock, which bounds a secret's directory; a secret in "
            "the keyring does without",
        )
    network = bool(grants.listen or grants.connect)
    if network and harden and landlock.version() < landlock.NET_SINCE:
        raise SpawnRefused(
            SpawnReason.MAP_FAILED,
            f"Landlock ABI {landlock.version()} cannot bound TCP connections to the granted "
            f"ports: {landlock.NET_SINCE} is needed (Linux 6.7)",
        )


def open_granted(grants: Grants, undo: ExitStack) -> dict[str, int]:
    """Descriptors by name, devices first; `undo` closes them. Refuses: SpawnRefused
    (map-failed)."""
    opened: dict[str, int] = {}
    for device in grants.devices:
        try:
            opened[device.name] = _open_device(device, undo)
        except OSError as error:
            raise SpawnRefused(
                SpawnReason.MAP_FAILED, f"device {device.name}: {device.path}: {error.strerror}"
            ) from None
    for listening in grants.listen:
        try:
            opened[listening.name] = _listen(listening, undo)
        except (OSError, ValueError) as error:
            raise SpawnRefused(
                SpawnReason.MAP_FAILED,
                f"socket {listening.name}: {listening.address} port {listening.port}: {error}",
            ) from None
    return opened


def _open_device(device: DeviceGrant, undo: ExitStack) -> int:
    """Never waits: a serial line without O_NONBLOCK would until somebody is at its other end."""
    mode = os.O_RDWR if device.writable else os.O_RDONLY
    descriptor = os.open(device.path, mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    _ = undo.callback(os.close, descriptor)
    kind = os.fstat(descriptor).st_mode
    if not (stat.S_ISCHR(kind) or stat.S_ISBLK(kind)):
        raise SpawnRefused(
            SpawnReason.MAP_FAILED, f"device {device.name}: {device.path} is no device"
        )
    return descriptor


def _listen(grant: ListenGrant, undo: ExitStack) -> int:
    listening = undo.enter_context(listen_tcp(grant.address, grant.port, LISTEN_BACKLOG))
    return listening.fileno()
