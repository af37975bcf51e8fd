"""What reaches a task from outside the system: callers at its ports, and signals sent to init.

Both join an endpoint as links whose sender is fixed, so that one wait and one rotation serve
them together with the links of tasks. A port of the ABI is a `Door` here: the driver calls its
own way to the kernel a port.
"""

import errno
import ipaddress
import os
import signal
import socket
import stat
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from nexus.abi import (
    KERNEL,
    MESSAGE_SIZE_MAX,
    OUTSIDE,
    PORT_PEERS_MAX,
    STREAM_LINGER,
    STREAM_QUEUE_SIZE,
    UID_UNKNOWN,
    AbiError,
    LinkId,
    LinkTerms,
    PeerIdentity,
    Pid,
    QosClass,
    Sender,
    Signal,
    Slot,
    Status,
    StreamGrant,
    StreamRole,
)
from nexus.kernel.core.paths import SOCKET_PATH_SIZE_MAX
from nexus.kernel.linux.native import MSG_CMSG_CLOEXEC, signalfd
from nexus.kernel.linux.objects import EPOLL_IN, EPOLL_OUT, Endpoint, OwnerLink

SIGNAL_LINK: Final = LinkId(0)  # drivers count their links from 1
SIGNAL_SENDER: Final = Sender(KERNEL, Pid(0), 0, QosClass.NORMAL)
SIGNALS: Final = frozenset(signal.Signals[name] for name in Signal)
NO_INBOX: Final = Slot(-1)  # as `source`: Call takes no answer from a connection
NO_TERMS: Final = LinkTerms(0, 0, 0)  # nothing is reserved for what comes from outside

SOCKET_SUFFIX: Final = ".sock"
SOCKET_MODE: Final = 0o600

ROOM_AGAIN: Final = STREAM_QUEUE_SIZE // 2  # bytes; what is queued when a refused sender is told
TCP_PEER: Final = PeerIdentity(0, UID_UNKNOWN)
ROOM: Final = 1 << 32  # beside the flags of recvmsg(2), an int: room is told
NO_WAIT_NO_SIGNAL: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

_SIGINFO_SIZE: Final = 128  # bytes of struct signalfd_siginfo, on every architecture
_SIGNAL_NUMBER: Final = struct.Struct("=I")  # its first field


class OutsideLink(OwnerLink):
    """A source of messages that no task sends: no share is reserved for them, no dead task can
    have sent one, and no capability comes with one."""

    __slots__ = ("stamp",)

    stamp: Sender


class PeerLink(OutsideLink):
    """A connection of a port."""

    __slots__ = ("identity",)

    def __init__(
        self, sock: socket.socket, link: LinkId, door: "Door", identity: PeerIdentity
    ) -> None:
        super().__init__(sock, link, door, NO_TERMS)
        self.source = NO_INBOX
        self.identity = identity
        self.stamp = Sender(OUTSIDE, Pid(identity.pid), 0, QosClass.NORMAL)
        # No room for descriptors: Linux closes those that come and reports CTRUNC.
        self.recvmsg = lambda size, _control, flags: sock.recvmsg(size, 0, flags)


class StreamLink(PeerLink):
    """A connection of a stream port, with what is on its way to the peer and Linux did not take.

        accepted, dialled --writable--> room is told --> stands      --it fails--> end
        stands --refused a send--> half of the queue is free --> room is told, once
        stands --end told, or PortClose--> lingers until the queue is empty or nobody reads it

    It is written from `recvmsg`, which the driver calls whenever epoll reports it: while there is
    something to write, epoll reports room for that too.
    """

    __slots__ = ("_dialled", "_mask", "lingers_until", "queued", "wants_room")

    def __init__(
        self,
        sock: socket.socket,
        link: LinkId,
        door: "Door",
        identity: PeerIdentity,
        *,
        dialled: bool = False,
    ) -> None:
        super().__init__(sock, link, door, identity)
        self.queued = bytearray()
        self.wants_room = True  # the task is to be told that there is room
        self.lingers_until: int | None = None  # its end was told; only `queued` is left of it
        self._dialled = dialled  # not known to stand yet
        self._mask = EPOLL_IN
        self.recvmsg = self._receive

    @property
    def awaits_writing(self) -> bool:
        """Whether there is something to do when Linux has room."""
        return self._dialled or self.wants_room or bool(self.queued)

    def interest(self) -> None:
        """Have epoll report what matters now; after it has joined its port."""
        mask = 0 if self.lingers_until is not None else EPOLL_IN
        mask |= EPOLL_OUT if self.awaits_writing else 0
        if mask != self._mask:
            self._mask = mask
            self.endpoint.epoll.modify(self.fileno, mask)

    def write(self, data: bytes | bytearray) -> None:
        """Queue bytes, all or none. Refuses: QueueFull, NoSuchEndpoint."""
        taken = 0
        if not (self._dialled or self.queued):
            taken = self._pass(data)
        if len(self.queued) + len(data) - taken > STREAM_QUEUE_SIZE:
            assert not taken, "what Linux took makes room for the rest of a message"
            self.wants_room = True
            self.interest()
            raise AbiError(Status.QUEUE_FULL, "the peer does not read")
        self.queued += memoryview(data)[taken:]
        self.interest()

    def linger(self, now: int) -> bool:
        """Its end is told: False if nothing is left to be sent, else it is to be kept a while."""
        if not self.queued or self._dialled:
            return False
        self.lingers_until = now + STREAM_LINGER
        self.interest()
        return True

    def flush(self) -> None:
        """Pass on what Linux takes now. Raises AbiError with NoSuchEndpoint."""
        if self._dialled:
            _ = self.sock.send(b"", NO_WAIT_NO_SIGNAL)  # fails until it stands
            self._dialled = False
        if self.queued:
            del self.queued[: self._pass(self.queued)]
        self.interest()

    def _pass(self, data: bytes | bytearray) -> int:
        """How much of it Linux took. Refuses: NoSuchEndpoint."""
        try:
            return self.sock.send(data, NO_WAIT_NO_SIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.ENOMEM):
                return 0  # Linux's own want of room
            raise AbiError(Status.NO_SUCH_ENDPOINT, "the peer has closed") from None

    def _receive(
        self, size: int, _control: int, flags: int
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        """As recvmsg(2), and whatever writing is due: no bytes are the end, or room with ROOM.
        Never waits, and raises nothing but BlockingIOError."""
        try:
            self.flush()
        except BlockingIOError:
            raise  # a dialled one is still on its way
        except (AbiError, OSError):
            self.queued.clear()
            self.wants_room = self._dialled = False
            if self.lingers_until is not None:
                return b"", [], MSG_CMSG_CLOEXEC, None
        if self.lingers_until is not None:
            if self.queued:
                raise BlockingIOError
            return b"", [], MSG_CMSG_CLOEXEC, None
        if self.wants_room and len(self.queued) <= ROOM_AGAIN:
            self.wants_room = bool(flags & socket.MSG_PEEK)
            self.interest()
            return b"", [], MSG_CMSG_CLOEXEC | ROOM, None
        flags |= socket.MSG_DONTWAIT
        try:
            data = self.sock.recv(min(size, MESSAGE_SIZE_MAX), flags & ~MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise
        except OSError:
            data = b""  # a reset, a refused or an unreachable address: the end
        return data, [], MSG_CMSG_CLOEXEC, None


class Door(Endpoint):
    """A port: an endpoint whose links are connections, and the socket that callers come to."""

    __slots__ = ("listener", "name", "role", "uids")

    def __init__(
        self,
        name: str,
        listener: socket.socket | None,
        uids: frozenset[int],
        role: StreamRole | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.listener = listener  # None: nobody calls, the task dials
        self.uids = uids  # users who get a connection
        self.role = role  # None: its connections carry packets
        if listener is not None:
            self.epoll.register(listener.fileno(), EPOLL_IN)

    def caller(self, sock: socket.socket, link: LinkId, identity: PeerIdentity) -> PeerLink:
        """A connection of somebody who has called."""
        if self.role is None:
            return PeerLink(sock, link, self, identity)
        return StreamLink(sock, link, self, identity)


class SignalLink(OutsideLink):
    """The signals that wait for the root task, blocked in init: Linux keeps each once until it
    is taken, so none is lost and a repeated one waits as one."""

    __slots__ = ("told",)

    def __init__(self, endpoint: Endpoint, told: set[signal.Signals]) -> None:
        descriptor = signalfd(SIGNALS)
        self._join(descriptor, SIGNAL_LINK, endpoint, NO_TERMS)
        self.stamp = SIGNAL_SENDER
        self.told = told  # what the root task has been told in this run
        self.recvmsg = self._receive

    def close(self) -> None:
        """What is not taken goes on waiting."""
        os.close(self.fileno)

    def _receive(
        self, _size: int, _control: int, flags: int
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        """As recvmsg(2): take, or look at, the name of the lowest signal that waits."""
        if flags & socket.MSG_PEEK:
            waiting = signal.sigpending() & SIGNALS
            if not waiting:
                raise BlockingIOError
            number = signal.Signals(min(waiting))
        else:
            (raw,) = _SIGNAL_NUMBER.unpack_from(os.read(self.fileno, _SIGINFO_SIZE))
            number = signal.Signals(raw)
            self.told.add(number)
        return number.name.encode(), [], MSG_CMSG_CLOEXEC, None


def block_signals() -> set[signal.Signals | int]:
    """Let what the root task is told wait; returns the mask before."""
    return {*signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)}


def restore_signals(former: set[signal.Signals | int], told: set[signal.Signals]) -> None:
    """Put the mask back. What came too late for the root task goes to the process's own
    handlers, but not a repeated wish to end after the run has ended for the first one, nor a
    wish to read the policy files of a run that is over."""
    moot = {signal.SIGHUP}
    if told & {signal.SIGTERM, signal.SIGINT}:
        moot |= {signal.SIGTERM, signal.SIGINT}
    while signal.sigtimedwait(moot - former, 0) is not None:
        pass
    _ = signal.pthread_sigmask(signal.SIG_SETMASK, former)


def rest_handlers(stack: ExitStack) -> None:
    """Let no timer and no handler that some imported module left run in init, or in a child of
    it before that has taken its own steps; `stack` puts them back. The signals of `SIGNALS` are
    blocked, and reach their handlers after the run."""
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        left, interval = signal.setitimer(timer, 0)  # alarm(2) is the first of them
        if left or interval:
            _ = stack.callback(signal.setitimer, timer, left, interval)
    descriptor = signal.set_wakeup_fd(-1)
    if descriptor != -1:
        _ = stack.callback(signal.set_wakeup_fd, descriptor)
    for number in signal.valid_signals() - SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler):
            former = signal.signal(number, signal.SIG_DFL)
            _ = stack.callback(signal.signal, number, former)


def socket_path(directory: Path, name: str) -> Path:
    """Where callers of a port connect to."""
    return directory / f"{name}{SOCKET_SUFFIX}"


def listen(path: Path, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> socket.socket:
    """A listening socket at a path that only its user and root may connect to, in place of what
    an earlier run left there. Raises OSError, with a sentence for people."""
    if len(os.fsencode(path)) > SOCKET_PATH_SIZE_MAX:
        raise OSError(f"{path} is longer than the {SOCKET_PATH_SIZE_MAX} bytes of a socket's path")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_socket(path)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    former = os.umask(0o777 & ~SOCKET_MODE)  # there is no moment in which others may connect
    try:
        listener.bind(os.fspath(path))
        listener.listen(PORT_PEERS_MAX)
    except OSError:
        listener.close()
        raise
    finally:
        _ = os.umask(former)
    return listener


def listen_tcp(address: str, port: int, backlog: int = PORT_PEERS_MAX) -> socket.socket:
    """A listening TCP socket at a numeric address. Raises OSError or ValueError."""
    listener = _tcp_socket(address)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def dial(grant: StreamGrant) -> socket.socket:
    """A TCP socket that is being connected to the address of a grant; how that ends, the socket
    itself will say. Raises OSError."""
    sock = _tcp_socket(grant.address)
    _ = sock.connect_ex((grant.address, grant.port))
    return sock


def _tcp_socket(address: str) -> socket.socket:
    """One that does not block; what it accepts has no delay of small answers either."""
    is_v4 = ipaddress.ip_address(address).version == 4
    sock = socket.socket(
        socket.AF_INET if is_v4 else socket.AF_INET6,
        socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
    )
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def remove(path: Path) -> None:
    """Remove a port's socket file, as far as that goes: the next start replaces what is left."""
    with suppress(OSError):
        path.unlink()


def _remove_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(f"{path} is in the way: it is no socket")
    path.unlink()
