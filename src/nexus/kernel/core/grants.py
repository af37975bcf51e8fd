"""What a service may do beyond the ABI: what such a wish may look like, and how it is recorded."""

import ipaddress
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Final

from nexus.abi import (
    HARDWARE_MAX,
    PORTS_MAX,
    STREAM_PORTS_MAX,
    THREADS_MAX,
    Grants,
    HardwareKind,
    Isolation,
    SecretBackend,
    StreamGrant,
    StreamRole,
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
    taken = [port for port in doors_of(grants) if port in live_ports]
    return f"the port {taken[0]} belongs to a live task" if taken else None


def ports_count(grants: Grants) -> int:
    """How many ports a task has, of either kind."""
    return len(grants.ports) + len(grants.stream_ports)


def doors_of(grants: Grants) -> tuple[str, ...]:
    """What callers come to, by name or address: each belongs to one live task."""
    return (*grants.ports, *(door_of(each) for each in grants.stream_ports if door_of(each)))


def door_of(grant: StreamGrant) -> str:
    """What callers of a stream port come to; empty if nobody does."""
    if grant.role is StreamRole.UNIX:
        return grant.name
    return f"{grant.address} {grant.port}" if grant.role is StreamRole.TCP else ""


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
        "stream_ports": [
            {**each._asdict(), "role": StreamRole(each.role).name.lower()}
            for each in grants.stream_ports
        ],
    }


def _problems(grants: Grants) -> Iterator[str]:
    if grants.isolation not in list(Isolation):
        yield f"no isolation {grants.isolation!r}"
        return
    if not 0 <= grants.threads <= THREADS_MAX:
        yield f"threads {grants.threads} is not in 0..{THREADS_MAX}"
    if len(grants.ports) > PORTS_MAX:
        yield f"{len(grants.ports)} ports, a task has at most {PORTS_MAX}"
    if len(grants.stream_ports) > STREAM_PORTS_MAX:
        yield f"{len(grants.stream_ports)} stream ports, a task has at most {STREAM_PORTS_MAX}"
    yield from _names("port", [*grants.ports, *(each.name for each in grants.stream_ports)])
    for stream in grants.stream_ports:
        yield from _stream_problems(stream)
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


def _stream_problems(grant: StreamGrant) -> Iterator[str]:
    if grant.role not in list(StreamRole):
        yield f"no role of a stream port {grant.role!r}"
        return
    if grant.role is StreamRole.UNIX:
        if grant.address or grant.port:
            yield f"the stream port {grant.name} has a socket of its own, and no address"
        return
    try:
        address = ipaddress.ip_address(grant.address)
    except ValueError:
        yield f"the address {grant.address!r} of {grant.name} is not numeric"
        return
    if grant.role is StreamRole.TCP and not address.is_loopback:
        yield f"{grant.name} listens on {address}, which is no loopback address"
    if not 1 <= grant.port <= TCP_PORT_MAX:
        yield f"TCP port {grant.port} is not in 1..{TCP_PORT_MAX}"


def _names(what: str, names: Collection[str]) -> Iterator[str]:
    for name in names:
        if not name_is_valid(name):
            yield f"bad {what} name {name!r}"
    if len(set(names)) != len(names):
        yield f"two {what}s have one name"
