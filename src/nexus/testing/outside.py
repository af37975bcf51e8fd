"""The world outside a system under test: a place on disk, and processes that talk to it.

A test's root program acts for the world outside by itself, between two of its traps: it connects
to a port, sends itself a signal, reads what the service manager was told. So what happens is in
one order on every kernel, and no second process has to be in step.
"""

import errno
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from nexus.abi import BLOCK_SIZE, MESSAGE_SIZE_MAX, NOTIFY_SIZE_MAX, Nanos, SecretBackend, Signal
from nexus.kernel.core import Hardware
from nexus.kernel.sim import SimKernel, SimPeer
from nexus.kernel.sim.disk import Disk

STRANGER: Final = 54_321  # a user id that runs no system and is not root
SIM_PEER_PID: Final = 4_711
LOOPBACK: Final = "127.0.0.1"
GIVEN_PORTS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
TCP_PORT_FIRST: Final = 20_000  # above what services usually listen at
TCP_PORT_TRIES_MAX: Final = 100
_RECEIVE_SIZE: Final = 2 * MESSAGE_SIZE_MAX


class Peer(Protocol):
    """One end of a connection to a port."""

    @property
    def closed(self) -> bool:
        """Whether the other end, or this one, has ended the connection."""
        ...

    def send(self, data: bytes) -> bool:
        """Send one message; False if there is no room, or nobody to take it."""
        ...

    def take(self) -> list[bytes]:
        """What has come since the last taking."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class Stream(Peer, Protocol):
    """One end of a connection of bytes; `take` gives them in pieces of any size."""

    def half_close(self) -> None:
        """Send no more; what comes is still read."""
        ...


class Listener(Protocol):
    """A process outside that ports may dial."""

    def accept(self) -> Stream | None:
        """A connection that has come, None if there is none."""
        ...

    def close(self) -> None:
        """Listen no more."""
        ...


class Outside(Protocol):
    """What a test's root program does for the world outside."""

    @property
    def pid(self) -> int: ...

    @property
    def uid(self) -> int: ...

    def connect(self, port: str) -> Peer:
        """Connect to a port. Raises ConnectionRefusedError or FileNotFoundError: nobody has it."""
        ...

    def connect_as_stranger(self, port: str) -> Peer | None:
        """The same as a user who may not; None where a test cannot become one."""
        ...

    def connect_stream(self, port: str) -> Stream:
        """Connect to a stream port. Raises ConnectionRefusedError or FileNotFoundError."""
        ...

    def connect_stream_as_stranger(self, port: str) -> Stream | None:
        """The same as a user who may not; None where a test cannot become one."""
        ...

    def connect_tcp(self, port: int) -> Stream:
        """Connect to a loopback address. Raises ConnectionRefusedError."""
        ...

    def listen_tcp(self, port: int) -> Listener:
        """Listen at a loopback address."""
        ...

    def free_tcp_port(self) -> int:
        """A TCP port that nobody has now."""
        ...

    def signal(self, signal_: Signal) -> None:
        """Send a signal to the root task, now."""
        ...

    def signal_after(self, span: Nanos, signal_: Signal) -> None:
        """Send a signal to the root task a while later."""
        ...

    def notices(self) -> list[str]:
        """What the service manager has been told since the last taking."""
        ...

    def full_disk(self) -> AbstractContextManager[None]:
        """While it is open the disk has no space."""
        ...

    def break_disk(self, name: str) -> None:
        """From now on the last block of this block device cannot be read."""
        ...

    def damage_secret(self, service: str) -> None:
        """From now on the secret of a live service, in a file, can neither be read nor replaced."""
        ...


@dataclass
class Place:
    """Where a system lives between its boots; `outside` is set while one runs.

    `directory` is for kernels that use the file system; `memory`, `disks` and `secrets` are what
    others keep. `hardware` is its bus map; on every kernel the kernel drives those devices.
    """

    directory: Path
    memory: bytes | None = b""
    hardware: tuple[Hardware, ...] = ()
    disks: Mapping[str, Disk] = field(default_factory=dict)
    secrets: Mapping[tuple[str, SecretBackend], bytes] = field(default_factory=dict)
    current: Outside | None = None

    @property
    def state_dir(self) -> Path:
        """Where the system keeps what survives a boot."""
        return self.directory / "state"

    @property
    def runtime_dir(self) -> Path:
        """Where the system has its sockets."""
        return self.directory / "run"

    @property
    def outside(self) -> Outside:
        """The world outside of the running system."""
        assert self.current is not None, "there is a world outside while a system runs"
        return self.current


@contextmanager
def new_place(user: int | None) -> Iterator[Place]:
    """A fresh place that belongs to a user, None for the test's own; gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="nexus-rig-"))
    try:
        place = Place(directory)
        for each in (place.state_dir, place.runtime_dir):
            each.mkdir(mode=0o700)
        if user is not None:
            for each in (directory, place.state_dir, place.runtime_dir):
                os.chown(each, user, user)
        yield place
    finally:
        shutil.rmtree(directory)


class SimListening:
    """A process outside that listens, in a simulated world."""

    def __init__(self, kernel: SimKernel, port: int) -> None:
        self._kernel = kernel
        self._port = port
        self._listener = kernel.listen(LOOPBACK, port)

    def accept(self) -> SimPeer | None:
        """The oldest connection that was not accepted yet."""
        return self._listener.accepted.popleft() if self._listener.accepted else None

    def close(self) -> None:
        """Nobody listens there any more."""
        self._kernel.unlisten(LOOPBACK, self._port)


class SimOutside:
    """The world outside a simulated kernel."""

    pid = SIM_PEER_PID

    def __init__(self, kernel: SimKernel) -> None:
        self._kernel = kernel
        self._port_last = SIM_PEER_PID
        self.uid = kernel.uid

    def connect(self, port: str) -> SimPeer:
        """Connect as the user who runs the system."""
        return self._kernel.port(port).connect(self.pid, self.uid)

    def connect_as_stranger(self, port: str) -> SimPeer:
        """Connect as somebody else."""
        return self._kernel.port(port).connect(self.pid, STRANGER)

    def connect_stream(self, port: str) -> SimPeer:
        """Connect as the user who runs the system."""
        return self.connect(port)

    def connect_stream_as_stranger(self, port: str) -> SimPeer:
        """Connect as somebody else."""
        return self.connect_as_stranger(port)

    def connect_tcp(self, port: int) -> SimPeer:
        """Connect as nobody in particular."""
        return self._kernel.port(f"{LOOPBACK} {port}").connect(self.pid, STRANGER)

    def listen_tcp(self, port: int) -> SimListening:
        """Listen in the simulated world."""
        return SimListening(self._kernel, port)

    def free_tcp_port(self) -> int:
        """There is nobody else in the simulated world."""
        self._port_last += 1
        return self._port_last

    def signal(self, signal_: Signal) -> None:
        """Send a signal now."""
        self._kernel.signal(signal_)

    def signal_after(self, span: Nanos, signal_: Signal) -> None:
        """Send a signal at a virtual time."""
        self._kernel.at(Nanos(self._kernel.now + span), lambda: self._kernel.signal(signal_))

    def notices(self) -> list[str]:
        """What Notify has said."""
        taken = list(self._kernel.notices)
        self._kernel.notices.clear()
        return taken

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """While it is open nothing is stored."""
        self._kernel.disk_full = True
        try:
            yield
        finally:
            self._kernel.disk_full = False

    def break_disk(self, name: str) -> None:
        """The block is gone for good."""
        disk = self._kernel.bus.disks[name]
        disk.faults = replace(disk.faults, unreadable=frozenset({disk.block_count - 1}))

    def damage_secret(self, service: str) -> None:
        """Its backend gives errors."""
        self._kernel.secrets.failing.add(service)


def free_tcp_port() -> int:
    """A loopback port below those that Linux gives to whoever connects or asks for any.

    One of these would be somebody else's a moment later, also of who dials it while nobody listens:
    a connection to the port that it was given itself is one to itself.
    """
    first_given = int(GIVEN_PORTS.read_text().split()[0])
    assert first_given > TCP_PORT_FIRST, "no port is left to choose from"
    for _ in range(TCP_PORT_TRIES_MAX):
        port = TCP_PORT_FIRST + secrets.randbelow(first_given - TCP_PORT_FIRST)
        with suppress(OSError), socket.create_server((LOOPBACK, port)):
            return port
    raise AssertionError("every port that was tried is in use")


class SocketPeer:
    """A connection to a port over a real socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)

    @property
    def closed(self) -> bool:
        """Whether nothing more can come."""
        if self._socket.fileno() < 0:
            return True
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def send(self, data: bytes) -> bool:
        """Send one packet."""
        try:
            _ = self._socket.send(data)
        except (BlockingIOError, ConnectionError):
            return False
        return True

    def take(self) -> list[bytes]:
        """The packets that are here.

        A reset is told once, in front of what can still be read: the other end closed with
        packets of ours unread.
        """
        taken: list[bytes] = []
        reset = False
        while True:
            try:
                data = self._socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                return taken
            except ConnectionResetError:
                if reset:
                    return taken
                reset = True
                continue
            if not data:
                return taken
            taken.append(data)

    def half_close(self) -> None:
        """Send no more."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class SocketListener:
    """A listening TCP socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_server((LOOPBACK, port))
        self._socket.setblocking(False)

    def accept(self) -> SocketPeer | None:
        """The oldest connection that was not accepted yet."""
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return None
        return SocketPeer(connection)

    def close(self) -> None:
        """Close the socket; what was accepted lives on."""
        self._socket.close()


class LinuxOutside:
    """The world outside a kernel of real processes; made in the process that becomes init.

    A service manager listens at `manager` from here on.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.pid = os.getpid()
        self.uid = os.geteuid()
        self.manager = str(place.directory / "notify.sock")
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        Path(self.manager).unlink(missing_ok=True)  # of an earlier boot in this place
        self._manager.bind(self.manager)
        self._manager.setblocking(False)

    def connect(self, port: str) -> SocketPeer:
        """Connect to the port's socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(self._place.runtime_dir / f"{port}.sock"))
        except OSError:
            connection.close()
            raise
        return SocketPeer(connection)

    def connect_stream(self, port: str) -> SocketPeer:
        """Connect to the stream port's socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self._place.runtime_dir / f"{port}.sock"))
        except OSError:
            connection.close()
            raise
        return SocketPeer(connection)

    def connect_tcp(self, port: int) -> SocketPeer:
        """Connect to the loopback address."""
        return SocketPeer(socket.create_connection((LOOPBACK, port)))

    def listen_tcp(self, port: int) -> SocketListener:
        """Listen at the loopback address."""
        return SocketListener(port)

    def free_tcp_port(self) -> int:
        """One that Linux gives to nobody who does not ask for it by its number."""
        return free_tcp_port()

    def connect_as_stranger(self, port: str) -> SocketPeer | None:
        """Connect as a user to whom the way was opened on purpose: only root can do that."""
        return self._as_stranger(port, self.connect)

    def connect_stream_as_stranger(self, port: str) -> SocketPeer | None:
        """The same for a stream port."""
        return self._as_stranger(port, self.connect_stream)

    def _as_stranger(self, port: str, connect: Callable[[str], SocketPeer]) -> SocketPeer | None:
        if self.uid != 0:
            return None
        opened = (self._place.directory, self._place.runtime_dir)
        door = self._place.runtime_dir / f"{port}.sock"
        modes = {path: path.stat().st_mode for path in (*opened, door)}
        for path in opened:
            path.chmod(0o711)
        door.chmod(0o666)
        os.seteuid(STRANGER)
        try:
            return connect(port)
        finally:
            os.seteuid(0)
            for path, mode in modes.items():
                path.chmod(mode & 0o7777)

    def signal(self, signal_: Signal) -> None:
        """Send a signal to this process, which is init."""
        os.kill(self.pid, signal.Signals[signal_.value])

    def signal_after(self, span: Nanos, signal_: Signal) -> None:
        """Have another process send it."""
        script = f"(sleep {span / 1e9}; kill -{signal_.value.removeprefix('SIG')} {self.pid}) &"
        _ = subprocess.run(["/bin/sh", "-c", script], check=True)  # noqa: S603 (our own words)

    def notices(self) -> list[str]:
        """The datagrams that have come."""
        taken: list[str] = []
        while True:
            try:
                taken.append(self._manager.recv(2 * NOTIFY_SIZE_MAX).decode())
            except BlockingIOError:
                return taken

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """While it is open a file cannot be made durable for want of space."""
        original: Callable[[int], None] = os.fsync

        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full  # type: ignore[assignment]
        try:
            yield
        finally:
            os.fsync = original  # type: ignore[assignment]

    def break_disk(self, name: str) -> None:
        """The image becomes shorter than the device it stands for."""
        image = self._place.state_dir / f"{name}.img"
        os.truncate(image, image.stat().st_size - BLOCK_SIZE)

    def damage_secret(self, service: str) -> None:
        """Something that is no file takes the place of the file."""
        secret = self._place.state_dir / "secrets" / service / "secret"
        secret.unlink()
        secret.mkdir()
