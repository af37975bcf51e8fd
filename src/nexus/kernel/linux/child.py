"""A service's process from the fork to its end."""

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, NoReturn

from nexus.abi import (
    CONTROL_LINK_SIZE,
    LINK_DEPTH_DEFAULT,
    BootImage,
    LinkTerms,
    Nanos,
    Pid,
    Program,
    Rights,
    Sender,
    ServiceId,
    SpawnSpec,
    StreamRole,
)
from nexus.kernel.core import EXIT_CRASH, Account, OwnerShare
from nexus.kernel.linux.channel import InitIsGone, Prepared, TaskPort
from nexus.kernel.linux.devices import Granted, adopt_device
from nexus.kernel.linux.driver import Driver
from nexus.kernel.linux.harden import Confinement, Hardening
from nexus.kernel.linux.identity import IdentityView
from nexus.kernel.linux.objects import Endpoint, HolderLink, adopt
from nexus.kernel.linux.secrets import hold
from nexus.kernel.linux.truesize import Truesize

EXIT_ORPHAN: Final = 71  # EX_OSERR: init is gone
EXIT_UNPREPARED: Final = 78  # EX_CONFIG: an interpreter of its own that could not import or confine

CONTROL_TERMS: Final = LinkTerms(LINK_DEPTH_DEFAULT, CONTROL_LINK_SIZE, 0)


class Birth(NamedTuple):
    """Everything a child inherits by the fork on purpose; descriptors by number."""

    spec: SpawnSpec
    program: Program | None  # None in an interpreter of its own, which has imported it by itself
    me: Sender
    spawner: ServiceId
    devices: tuple[Granted, ...]  # of the bus map
    names: tuple[str, ...]  # of granted character devices and sockets
    # keeps channel, control link, own link, identity, ports, devices, granted
    confinement: Confinement
    share: OwnerShare
    truesize: Truesize
    trace: bool


def live(birth: Birth) -> NoReturn:
    """Run the child to its end. Nothing of init's stack is ever returned to, so none of its
    objects is collected here: that would close numbers which are ours by now."""
    code = EXIT_CRASH
    try:
        code = _live(birth)
    except InitIsGone:
        code = EXIT_ORPHAN
    finally:
        os._exit(code)


def _live(birth: Birth) -> int:
    hardening = Hardening(birth.confinement)
    channel, *inherited = hardening.before_identity()
    port = TaskPort(adopt_channel(channel))
    try:
        assert birth.program is not None, "a fork has what init has"
        driver, boot = furnish(birth, port, inherited)
        hardening.finish()
        coroutine = birth.program.main(boot)
    except Exception as error:  # noqa: BLE001 (a program that cannot be started is told as such)
        port.prepared(Prepared(0, 0, (), f"{type(error).__name__}: {error}"))
        return EXIT_CRASH
    port.prepared(Prepared(os.getuid(), os.getgid(), tuple(hardening.why), ""))
    return run(port, lambda: driver.run(coroutine)[0])


def run(port: TaskPort, work: Callable[[], int]) -> int:
    """Run a program to its end: its exit code. A traceback is left with init."""
    code = EXIT_CRASH
    try:
        code = work()
    except InitIsGone:
        raise
    except BaseException:  # noqa: BLE001 (the process ends here, whatever the program raised)
        port.crashed(traceback.format_exc())
    port.flush()
    return code


def furnish(birth: Birth, port: TaskPort, inherited: Sequence[int]) -> tuple[Driver, BootImage]:
    """A task's driver with its first slots, and the boot image that names them."""
    control, endpoint, identity, *rest = inherited
    view = IdentityView(identity)
    os.close(identity)
    driver = _driver(birth, port, view, control, endpoint)
    ports: list[tuple[str, StreamRole | None]] = [(name, None) for name in birth.spec.grants.ports]
    ports += [(grant.name, grant.role) for grant in birth.spec.grants.stream_ports]
    slots = []
    for name, role in ports:
        listening = None if role is StreamRole.DIAL else socket.socket(fileno=rest.pop(0))
        slots.append(driver.open_port(name, listening, role))
    hardware = []
    for granted in birth.devices:
        number = rest.pop(0) if granted.described else -1
        hardware.append(driver.take_device(adopt_device(granted, number)))
    driver.secret = hold(birth.spec.grants.secret, birth.confinement.secret)
    boot = BootImage(
        name=birth.spec.name,
        service=driver.me.service,
        pid=driver.me.pid,
        generation=driver.me.generation,
        control=driver.control,
        endpoint=driver.endpoint,
        now=Nanos(time.monotonic_ns()),
        argument=birth.spec.argument,
        ports=tuple(slots),
        hardware=tuple(hardware),
        descriptors=tuple(zip(birth.names, rest, strict=True)),
    )
    return driver, boot


def _driver(
    birth: Birth, port: TaskPort, view: IdentityView, control: int, endpoint: int
) -> Driver:
    driver = Driver(
        me=birth.me._replace(pid=Pid(os.getpid())),
        view=view,
        port=port,
        share=birth.share,
        budget=Account(f"budget of {birth.spec.name}", birth.spec.budget),
        truesize=birth.truesize,
        trace=birth.trace,
    )
    port.peer_dead = driver.peer_dead
    near = adopt(control)
    driver.control = driver.put(
        HolderLink(near, birth.spawner, CONTROL_TERMS, birth.truesize), Rights.SEND
    )
    own = Endpoint()
    driver.endpoint = driver.place(own)
    birth.share.endpoints.take(1)
    terms = CONTROL_TERMS._replace(delegations=birth.spec.delegations)
    driver.own(own, terms, adopt(endpoint)).managed = True
    return driver


def adopt_channel(descriptor: int) -> socket.socket:
    """The kernel channel's own end."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)
