"""What a task's capability slots name on Linux, and the far ends its endpoints own."""

import fcntl
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from nexus.abi import AbiError, LinkId, LinkTerms, Sender, ServiceId, Slot, Status
from nexus.kernel.linux.devices import Device
from nexus.kernel.linux.frames import NO_COOKIE, TRAILER_SIZE
from nexus.kernel.linux.native import SIOCINQ, SIOCOUTQ
from nexus.kernel.linux.truesize import TRUESIZE_SLACK, Truesize

# Marks on the sizes in a link's account of what it sent.
WITH_CAP: Final = 1 << 20  # TRAILER_SIZE of these bytes are not the task's
KERNEL_FRAME: Final = 1 << 21  # counts neither as a message nor as bytes
SIZE_MASK: Final = WITH_CAP - 1

EPOLL_IN: Final = select.EPOLLIN
EPOLL_OUT: Final = select.EPOLLOUT

Receive = Callable[[int, int, int], tuple[bytes, list[tuple[int, int, bytes]], int, Any]]
"""recvmsg(2) of a link: sizes of the message and of its ancillary data, flags."""


def make_pair(terms: LinkTerms, *, wall: bool) -> tuple[socket.socket, socket.socket]:
    """A fresh link: near end and far end, stamping credentials from the first message on.

    With `wall` the kernel's own bound of the near end is set as tight as the terms allow; only
    init can, for the filter of a service does not let it touch SO_SNDBUF.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    if wall:
        messages = terms.depth + terms.delegations + 1
        charge = 2 * terms.size + 2 * TRAILER_SIZE * terms.depth + TRUESIZE_SLACK * messages
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, charge // 2 + 1)
    return near, far


def adopt(descriptor: int) -> socket.socket:
    """A socket object for a received end of a link, stamping credentials whatever its maker
    did."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return end


class HolderLink:
    """The near end of a link: what a SEND capability names.

    Keeps an exact account of what is still queued: the sizes of what was sent, cut to the
    newest ones that add up to what the kernel says is unread. Invariant: exactly one task holds
    a near end, so nobody else's messages are in that sum.
    """

    __slots__ = (
        "_answer",
        "_fileno",
        "attached",
        "delegations",
        "depth",
        "local",
        "owner",
        "queue",
        "queued_size",
        "send",
        "size",
        "sock",
        "truesize",
        "used",
    )

    def __init__(
        self, sock: socket.socket, owner: ServiceId, terms: LinkTerms, truesize: Truesize
    ) -> None:
        self.sock = sock
        self._fileno = sock.fileno()
        self._answer = bytearray(4)
        self.owner = owner
        self.depth, self.size, self.delegations = terms
        self.truesize = truesize
        self.queue: deque[int] = deque()  # sizes on the wire with their marks, oldest first
        self.queued_size = 0  # bytes of the task's messages in `queue`
        self.attached = 0  # links derived from this one that the owner still has
        self.used = False  # a message went over it, so it does not move as it is
        self.local: OwnerLink | None = None  # the far end, if that is this task's own
        self.send: Callable[[bytes | bytearray, int], int] = sock.send

    @property
    def terms(self) -> LinkTerms:
        """The terms it was made with."""
        return LinkTerms(self.depth, self.size, self.delegations)

    def make_room(self, size: int) -> None:
        """See that a message of `size` bytes fits. Refuses: QueueFull, NoSpace,
        NoSuchEndpoint."""
        if len(self.queue) < self.depth and self.queued_size + size <= self.size:
            return
        messages = self._account()
        if messages < self.depth and self.queued_size + size <= self.size:
            return
        if self.closed():
            raise AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint closed")
        if size > self.size:  # never fits: waiting would not help
            raise AbiError(Status.NO_SPACE, f"{size} bytes, the link holds {self.size}")
        if messages >= self.depth:
            raise AbiError(Status.QUEUE_FULL, f"{messages} messages are queued")
        raise AbiError(Status.NO_SPACE, f"{self.queued_size} of {self.size} bytes are queued")

    def closed(self) -> bool:
        """Whether the owner has closed the far end, or died."""
        look = select.poll()
        look.register(self._fileno, 0)  # a hang-up is told unasked
        return bool(look.poll(0))

    def sent(self, wire_size: int, mark: int = 0) -> None:
        """Note what the kernel has accepted."""
        self.queue.append(wire_size | mark)
        if mark & KERNEL_FRAME:
            return
        self.used = True
        self.queued_size += wire_size - TRAILER_SIZE if mark & WITH_CAP else wire_size

    def _account(self) -> int:
        """Forget what has been read; returns how many of the task's messages are queued."""
        answer = self._answer
        _ = fcntl.ioctl(self._fileno, SIOCOUTQ, answer)
        unread = int.from_bytes(answer, "little")
        queue = self.queue
        if unread == 0:
            queue.clear()
            self.queued_size = 0
            return 0
        kept: deque[int] = deque()
        messages = size = 0
        while unread > 0 and queue:
            entry = queue.pop()
            wire_size = entry & SIZE_MASK
            unread -= self.truesize.of(wire_size)
            kept.appendleft(entry)
            if entry & KERNEL_FRAME:
                continue
            messages += 1
            size += wire_size - TRAILER_SIZE if entry & WITH_CAP else wire_size
        queue.clear()
        queue.extend(kept)
        self.queued_size = size
        return messages


class OwnerLink:
    """The far end of a link: one holder's private queue into an endpoint of this task."""

    __slots__ = (
        "attached",
        "cookie",
        "delegations",
        "depth",
        "endpoint",
        "fileno",
        "fresh",
        "known",
        "link",
        "maker",
        "managed",
        "parent",
        "recvmsg",
        "size",
        "sock",
        "source",
        "spoken",
        "void",
    )

    def __init__(
        self, sock: socket.socket, link: LinkId, endpoint: "Endpoint", terms: LinkTerms
    ) -> None:
        self.sock = sock
        self.recvmsg: Receive = sock.recvmsg
        self._join(sock.fileno(), link, endpoint, terms)

    def _join(self, fileno: int, link: LinkId, endpoint: "Endpoint", terms: LinkTerms) -> None:
        self.fileno = fileno
        self.link = link
        self.endpoint = endpoint
        self.source = endpoint.slot
        self.depth, self.size, self.delegations = terms
        self.attached = 0  # links derived from this one that are alive
        self.parent: OwnerLink | None = None  # the link it was derived from
        self.maker: Sender | None = None  # who derived it
        self.managed = False  # its holder may derive links of any terms
        self.known: dict[bytes, Sender] = {}  # credentials seen on it, of the current epoch
        self.cookie = NO_COOKIE  # the kernel's name of the near end, if this task made it
        self.fresh = True  # nothing has been received on it
        self.spoken = False  # something of its holder has been received, beside kernel frames
        self.void = False  # its maker took it back before anybody got it

    def close(self) -> None:
        """Close its descriptor, after it has left its endpoint."""
        self.sock.close()

    def unread_size(self) -> int:
        """Bytes on the wire that wait to be received."""
        answer = bytearray(4)
        _ = fcntl.ioctl(self.fileno, SIOCINQ, answer)
        return int.from_bytes(answer, "little")


class Endpoint:
    """A set of far ends, served in rotation: epoll puts a link it reported behind the others.

    `batch` holds the links a poll found ready, the next one last.
    """

    __slots__ = ("batch", "closed", "epoll", "links", "poll", "slot")

    def __init__(self) -> None:
        self.epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self.poll = self.epoll.poll
        self.slot = Slot(-1)
        self.links: dict[int, OwnerLink] = {}  # by descriptor
        self.batch: list[OwnerLink] = []
        self.closed = False

    def add(self, link: OwnerLink) -> None:
        """Let a link join."""
        self.links[link.fileno] = link
        self.epoll.register(link.fileno, EPOLL_IN)

    def remove(self, link: OwnerLink) -> None:
        """Let a link leave, before its descriptor is closed: epoll would go on reporting it
        while a duplicate lives anywhere."""
        del self.links[link.fileno]
        self.epoll.unregister(link.fileno)
        if link in self.batch:
            self.batch.remove(link)


class Vmo:
    """A memory object: a memfd of whole pages. It is charged while a slot or a view holds it."""

    __slots__ = ("descriptor", "length", "sealed", "shared", "views")

    def __init__(
        self, descriptor: int, length: int, *, sealed: bool = False, shared: bool = False
    ) -> None:
        self.descriptor = descriptor  # -1 once no slot holds it
        self.length = length  # bytes
        self.sealed = sealed
        self.shared = shared  # living memory: one writable mapping, and it is never sealed
        self.views = 0  # mappings that are still out


Named = HolderLink | Endpoint | Vmo | Device
"""What a slot can name."""
