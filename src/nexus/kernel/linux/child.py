"""A service's process from the fork to its end."""

import os
import socket
import time
import traceback
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
)
from nexus.kernel.core import EXIT_CRASH, Account, OwnerShare
from nexus.kernel.linux.channel import InitIsGone, Prepared, TaskPort
from nexus.kernel.linux.driver import Driver
from nexus.kernel.linux.harden import Confinement, Hardening
from nexus.kernel.linux.identity import IdentityView
from nexus.kernel.linux.objects import Endpoint, HolderLink, adopt
from nexus.kernel.linux.truesize import Truesize

EXIT_ORPHAN: Final = 71  # EX_OSERR: init is gone

CONTROL_TERMS: Final = LinkTerms(LINK_DEPTH_DEFAULT, CONTROL_LINK_SIZE, 0)


class Birth(NamedTuple):
    """Everything a child inherits by the fork on purpose; descriptors by number."""

    spec: SpawnSpec
    program: Program
    me: Sender
    spawner: ServiceId
    descriptors: tuple[int, ...]  # kernel channel, control link, own endpoint's link, identity
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
    channel, control, endpoint, identity = hardening.before_identity()
    port = TaskPort(adopt_channel(channel))
    try:
        view = IdentityView(identity)
        os.close(identity)
        driver = _driver(birth, port, view, control, endpoint)
        hardening.finish()
        coroutine = birth.program.main(_boot_image(birth, driver))
    except Exception as error:  # noqa: BLE001 (a program that cannot be started is told as such)
        port.prepared(Prepared(0, 0, (), f"{type(error).__name__}: {error}"))
        return EXIT_CRASH
    port.prepared(Prepared(os.getuid(), os.getgid(), tuple(hardening.why), ""))
    code = EXIT_CRASH
    try:
        code, _ = driver.run(coroutine)
    except InitIsGone:
        raise
    except BaseException:  # noqa: BLE001 (the process ends here, whatever the program raised)
        port.crashed(traceback.format_exc())
    port.flush()
    return code


def _boot_image(birth: Birth, driver: Driver) -> BootImage:
    return BootImage(
        name=birth.spec.name,
        service=driver.me.service,
        pid=driver.me.pid,
        generation=driver.me.generation,
        control=driver.control,
        endpoint=driver.endpoint,
        now=Nanos(time.monotonic_ns()),
        argument=birth.spec.argument,
    )


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
