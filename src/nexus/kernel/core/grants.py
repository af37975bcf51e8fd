"""What a service may do beyond the ABI: what such a wish may look like, and how it is recorded."""

from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Final

from nexus.abi import (
    HARDWARE_MAX,
    PORTS_MAX,
    THREADS_MAX,
    Grants,
    HardwareKind,
    Isolation,
    SecretBackend,
)
from nexus.kernel.core.budget import ENDPOINT_SIZE, SLOT_SIZE
from nexus.kernel.core.name import name_is_valid

PORT_SIZE: Final = ENDPOINT_SIZE  # bytes; a port is charged to its owner's budget as an endpoint is
PORT_BUDGET_SIZE: Final = PORT_SIZE + SLOT_SIZE
DEVICE_SIZE: Final = ENDPOINT_SIZE  # bytes; so is a device of the bus map
DEVICE_BUDGET_SIZE: Final = DEVICE_SIZE + SLOT_SIZE
DESCRIPTORS_MAX: Final = 16  # devices and listening sockets of one service; a gateway has a few
CONNECT_MAX: Final = 16  # TCP ports one service may connect to
TCP_PORT_MAX: Final = 65_535


def grants_problem(grants: Grants) -> str | None:
    """What is wrong with these grants, for a reader; None if they may be given."""
    return next(_problems(grants), None)


def ports_problem(grants: Grants, live_ports: Collection[str]) -> str | None:
    """Which of the ports a live task has already; None if all are free."""
    taken = [port for port in grants.ports if port in live_ports]
    return f"the port {taken[0]} belongs to a live task" if taken else None


def grants_fields(grants: Grants) -> dict[str, object]:
    """The grants as a field of a SPAWN event; both kernels record the same."""
    return {
        "isolation": Isolation(grants.isolation).name.lower(),
        "threads": grants.threads,
        "ports": list(grants.ports),
        "devices": [device._asdict() for device in grants.devices],
        "listen": [socket._asdict() for socket in grants.listen],
        "connect": list(grants.connect),
        "streams": grants.streams,
        "hardware": [
            {"name": each.name, "kind": HardwareKind(each.kind).name.lower()}
            for each in grants.hardware
        ],
        "secret": SecretBackend(grants.secret).name.lower(),
    }


def _problems(grants: Grants) -> Iterator[str]:
    if grants.isolation not in list(Isolation):
        yield f"no isolation {grants.isolation!r}"
        return
    if not 0 <= grants.threads <= THREADS_MAX:
        yield f"threads {grants.threads} is not in 0..{THREADS_MAX}"
    if len(grants.ports) > PORTS_MAX:
        yield f"{len(grants.ports)} ports, a task has at most {PORTS_MAX}"
    yield from _names("port", grants.ports)
    descriptors = [device.name for device in grants.devices]
    descriptors += [socket.name for socket in grants.listen]
    if len(descriptors) > DESCRIPTORS_MAX:
        yield f"{len(descriptors)} devices and sockets, a task has at most {DESCRIPTORS_MAX}"
    yield from _names("descriptor", descriptors)
    if len(grants.connect) > CONNECT_MAX:
        yield f"{len(grants.connect)} ports to connect to, a task has at most {CONNECT_MAX}"
    for device in grants.devices:
        path = PurePosixPath(device.path)
        if not path.is_absolute() or ".." in path.parts or "\0" in device.path:
            yield f"the device path {device.path!r} is not absolute"
    for port in (*(socket.port for socket in grants.listen), *grants.connect):
        if not 1 <= port <= TCP_PORT_MAX:
            yield f"TCP port {port} is not in 1..{TCP_PORT_MAX}"
    if len(grants.hardware) > HARDWARE_MAX:
        yield f"{len(grants.hardware)} bus devices, a task has at most {HARDWARE_MAX}"
    yield from _names("bus device", [each.name for each in grants.hardware])
    for each in grants.hardware:
        if each.kind not in list(HardwareKind):
            yield f"no kind of device {each.kind!r}"
    if grants.secret not in list(SecretBackend):
        yield f"no secret backend {grants.secret!r}"
    elif grants.secret and grants.isolation is not Isolation.EXEC:
        yield "a secret needs an interpreter of its own (EXEC)"
    if grants.isolation is not Isolation.EXEC and (descriptors or grants.connect or grants.streams):
        yield "devices, sockets and streams need an interpreter of their own (EXEC)"


def _names(what: str, names: Collection[str]) -> Iterator[str]:
    for name in names:
        if not name_is_valid(name):
            yield f"bad {what} name {name!r}"
    if len(set(names)) != len(names):
        yield f"two {what}s have one name"
