"""What reaches a task from outside the system: callers at its ports, and signals sent to init.

Both join an endpoint as links whose sender is fixed, so that one wait and one rotation serve
them together with the links of tasks. A port of the ABI is a `Door` here: the driver calls its
own way to the kernel a port.
"""

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
    OUTSIDE,
    PORT_PEERS_MAX,
    LinkId,
    LinkTerms,
    PeerIdentity,
    Pid,
    QosClass,
    Sender,
    Signal,
    Slot,
)
from nexus.kernel.core.paths import SOCKET_PATH_SIZE_MAX
from nexus.kernel.linux.native import MSG_CMSG_CLOEXEC, signalfd
from nexus.kernel.linux.objects import EPOLL_IN, Endpoint, OwnerLink

SIGNAL_LINK: Final = LinkId(0)  # drivers count their links from 1
SIGNAL_SENDER: Final = Sender(KERNEL, Pid(0), 0, QosClass.NORMAL)
SIGNALS: Final = frozenset(signal.Signals[name] for name in Signal)
NO_INBOX: Final = Slot(-1)  # as `source`: Call takes no answer from a connection
NO_TERMS: Final = LinkTerms(0, 0, 0)  # nothing is reserved for what comes from outside

SOCKET_SUFFIX: Final = ".sock"
SOCKET_MODE: Final = 0o600

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


class Door(Endpoint):
    """A port: an endpoint whose links are connections, and the socket that callers come to."""

    __slots__ = ("listener", "name", "uids")

    def __init__(self, name: str, listener: socket.socket, uids: frozenset[int]) -> None:
        super().__init__()
        self.name = name
        self.listener = listener
        self.uids = uids  # users who get a connection
        self.epoll.register(listener.fileno(), EPOLL_IN)


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


def listen(path: Path) -> socket.socket:
    """A listening socket at a path that only its user and root may connect to, in place of what
    an earlier run left there. Raises OSError, with a sentence for people."""
    if len(os.fsencode(path)) > SOCKET_PATH_SIZE_MAX:
        raise OSError(f"{path} is longer than the {SOCKET_PATH_SIZE_MAX} bytes of a socket's path")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_socket(path)
    listener = socket.socket(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
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
