"""Ports: doors for processes outside the system, and the host's side of them.

Receiving from a port is Ipc's, since a connection is a link to whoever receives from it. What is
different stands here: who may connect, the way back, and the end of a connection.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from nexus.abi import (
    LINK_SIZE_MAX,
    MESSAGE_SIZE_MAX,
    OUTSIDE,
    PORT_PEERS_MAX,
    STREAM_QUEUE_SIZE,
    UID_UNKNOWN,
    AbiError,
    LinkId,
    LinkTerms,
    PeerIdentity,
    Pid,
    QosClass,
    Rights,
    Sender,
    Slot,
    Status,
    StreamGrant,
    StreamRole,
)
from nexus.kernel.core import MESSAGE_SIZE, door_of
from nexus.kernel.sim import log
from nexus.kernel.sim.heap import CONNECTION_CHARGE, connection_size
from nexus.kernel.sim.ipc import Ipc, OnRefused
from nexus.kernel.sim.objects import Connection, Port, Task

PORT_DEPTH: Final = 32  # messages queued in either direction of a connection
PORT_QUEUE_SIZE: Final = 4 * LINK_SIZE_MAX  # bytes in either direction
ROOM_AGAIN: Final = STREAM_QUEUE_SIZE // 2  # bytes; what is queued when a refused sender is told
TCP_PEER: Final = PeerIdentity(0, UID_UNKNOWN)
UID_ROOT: Final = 0
UID_SYSTEM: Final = 1000  # the user who runs the simulated system

assert PORT_QUEUE_SIZE >= 4 * MESSAGE_SIZE_MAX, "a few messages of any size fit"

_TERMS: Final = LinkTerms(PORT_DEPTH, PORT_QUEUE_SIZE, 0)

OnPeer = Callable[["SimPeer"], None]


class SimPeer:
    """A process outside that has connected, or was turned away: then it is `closed` at once."""

    def __init__(self, ports: "Ports", connection: Connection | None) -> None:
        self._ports = ports
        self._connection = connection
        self._left: list[bytes] = []  # what had come before the end
        self.on_data: OnPeer | None = None  # called when something has come, or the end

    @property
    def closed(self) -> bool:
        """Whether the connection is over, whoever ended it."""
        connection = self._connection
        if connection is None or connection.over:
            return True
        return connection.closed and not connection.half_closed

    def send(self, data: bytes) -> bool:
        """Send one message; False if the queue is full or the connection is over.

        An empty one ends the connection, as it does on a socket. One that is larger than
        MESSAGE_SIZE_MAX ends it too, behind what was sent before, and is counted. At a stream
        port they are bytes, all or none of which are taken.
        """
        if self._connection is None or self.closed or self._connection.half_closed:
            return False
        if self._connection.stream:
            return self._ports.arrive_bytes(self._connection, bytes(data))
        if not data:
            self.close()
            return True
        return self._ports.arrive(self._connection, bytes(data))

    def take(self) -> list[bytes]:
        """The messages that have come from the service since the last taking."""
        taken, self._left = self._left, []
        if self._connection is not None and not self._connection.over:
            taken += self._ports.drain(self._connection)
        return taken

    def close(self) -> None:
        """End the connection; what was sent is still received."""
        if self._connection is not None and not self.closed:
            self._connection.half_closed = False
            self._ports.hang_up(self._connection)

    def half_close(self) -> None:
        """Send no more; what comes is still read."""
        if self._connection is not None and not self.closed:
            assert self._connection.stream, "packets have no half"
            self._connection.half_closed = True
            self._ports.hang_up(self._connection)

    def keep(self, left: list[bytes]) -> None:
        """Take over what was on its way when the connection ended."""
        self._left += left

    def heard(self) -> None:
        """Something has come, or the end."""
        if self.on_data is not None:
            self.on_data(self)


class SimPort:
    """The outer side of the port of one name, whichever task has it."""

    def __init__(self, ports: "Ports", name: str) -> None:
        self._ports = ports
        self._name = name

    def connect(self, pid: int, uid: int) -> SimPeer:
        """Connect as this process of this user. Raises ConnectionRefusedError: no task has it."""
        return self._ports.connect(self._name, PeerIdentity(pid, uid))


class SimListener:
    """A process outside that listens at an address, where ports that dial find it."""

    def __init__(self, on_connect: OnPeer | None = None) -> None:
        self._on_connect = on_connect
        self.accepted: deque[SimPeer] = deque()

    def admit(self, peer: SimPeer) -> None:
        """A port has dialled."""
        self.accepted.append(peer)
        if self._on_connect is not None:
            self._on_connect(peer)


class Ports:
    """The live ports of a system."""

    def __init__(self, ipc: Ipc, on_refused: OnRefused, uid: int) -> None:
        self._ipc = ipc
        self._heap = ipc.heap
        self._on_refused = on_refused
        self._uid = uid
        self._peers: dict[int, SimPeer] = {}  # by the connection's serial
        self.live: dict[str, Port] = {}  # that have callers, by what those come to
        self.listeners: dict[tuple[str, int], SimListener] = {}  # outside, by address
        ipc.on_port_end = self._end_port
        ipc.on_connection_end = self._end_connection

    @property
    def connections(self) -> int:
        """Live connections of all ports."""
        return len(self._peers)

    def create(self, task: Task, name: str, stream: StreamGrant | None = None) -> Slot:
        """Make a port in the task's lowest free slot. Refuses: NoSpace."""
        door = name if stream is None else door_of(stream)
        assert door not in self.live, "looked at before the spawn"
        port = Port(task, name, stream)
        self._heap.charge(task, port.cost)
        try:
            port.slot = self._heap.hold(task, port, Rights.RECV)
        except AbiError:
            self._heap.refund(port.cost)
            raise
        task.ports[port.slot] = port
        if door:
            self.live[door] = port
        return port.slot

    # ---- what the owner asks for

    def send(self, task: Task, slot: Slot, link: LinkId, data: bytes | bytearray) -> None:
        """Queue a message to a peer. Refuses as PortSend."""
        port = self.owned(task, slot)
        size = len(data)
        if not 1 <= size <= MESSAGE_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"a message of {size} bytes")
        connection = self.connection(port, link)
        if connection.closed and not connection.half_closed:
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"the peer of {link} has closed")
        if not self._queue_out(connection, data):
            connection.wants_room = connection.stream
            raise AbiError(Status.QUEUE_FULL, "the peer does not read, or the heap is full")
        task.sent += 1
        task.sent_size += size
        self._note(task.tag | log.PORT_SENT, connection.serial << 16 | size)
        self._peers[connection.serial].heard()

    def _queue_out(self, connection: Connection, data: bytes | bytearray) -> bool:
        """Put a message on its way to a peer: False if there is no room."""
        size, stream = len(data), connection.stream
        full = len(connection.outgoing) >= PORT_DEPTH and not stream
        room = STREAM_QUEUE_SIZE if stream else PORT_QUEUE_SIZE
        if full or connection.outgoing_size + size > room:
            return False
        joins = stream and bool(connection.outgoing)  # bytes have no boundaries
        cost = size if joins else MESSAGE_SIZE + size
        if cost > self._ipc.account.free:
            return False
        copy = self._ipc.copy_in(data)
        self._ipc.account.used += cost
        if joins:
            connection.outgoing[-1] += copy
        else:
            connection.outgoing.append(copy)
        connection.outgoing_size += size
        return True

    def dial(self, task: Task, slot: Slot) -> LinkId:
        """Begin a connection to the address of the port's grant. Refuses as PortDial."""
        port = self.owned(task, slot)
        grant = port.stream
        if grant is None or grant.role is not StreamRole.DIAL:
            raise AbiError(Status.INVALID_ARGUMENT, f"the port {port.name} does not dial")
        if len(port.links) >= PORT_PEERS_MAX or not self._room(CONNECTION_CHARGE + MESSAGE_SIZE):
            raise AbiError(Status.NO_SPACE, f"{len(port.links)} connections are live")
        connection, peer = self._join(port, TCP_PEER)
        listener = self.listeners.get((grant.address, grant.port))
        if listener is None:
            self.hang_up(connection)
        else:
            self._tell_room(connection)
            listener.admit(peer)
        return connection.id

    def _tell_room(self, connection: Connection) -> None:
        connection.wants_room = False
        self._ipc.account.used += MESSAGE_SIZE
        connection.queue.append((b"", connection.stamp, None))
        self._note(log.SENT, connection.serial << 16)
        self._ipc.deliver(connection)

    def close(self, task: Task, slot: Slot, link: LinkId) -> None:
        """End a connection; its owner is not told. Refuses as PortClose."""
        self._ipc.forget_connection(self.connection(self.owned(task, slot), link))

    def peer_of(self, task: Task, slot: Slot, link: LinkId) -> PeerIdentity:
        """Who is at the other end. Refuses as PortPeer."""
        return self.connection(self.owned(task, slot), link).peer

    def owned(self, task: Task, slot: Slot) -> Port:
        """The port in a slot. Refuses: InvalidArgument."""
        port = task.table.get(slot).object
        if not isinstance(port, Port):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot} is no port")
        return port

    def connection(self, port: Port, link: LinkId) -> Connection:
        """A live connection of a port. Refuses: NoSuchEndpoint."""
        connection = port.links.get(link)
        if not isinstance(connection, Connection):
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"no connection {link}")
        return connection

    # ---- what the host does

    def connect(self, name: str, peer: PeerIdentity) -> SimPeer:
        """A process outside connects. Raises ConnectionRefusedError: no task has the port."""
        port = self.live.get(name)
        if port is None:
            raise ConnectionRefusedError(f"no task has the port {name}")
        if port.stream is not None and port.stream.role is StreamRole.TCP:
            peer = TCP_PEER
        elif not self.is_known(peer.uid):
            port.owner.refused_identity += 1
            self._on_refused(port.owner, "identity")
            return SimPeer(self, None)
        if len(port.links) >= PORT_PEERS_MAX or not self._room(CONNECTION_CHARGE + MESSAGE_SIZE):
            port.owner.refused_links += 1
            self._on_refused(port.owner, "excess_link")
            return SimPeer(self, None)
        connection, visitor = self._join(port, peer)
        if connection.stream:
            self._tell_room(connection)
        return visitor

    def is_known(self, uid: int) -> bool:
        """Whether a user may connect: root, and the one who runs the system."""
        return uid in (UID_ROOT, self._uid)

    def _room(self, size: int) -> bool:
        return size <= self._ipc.account.free

    def _join(self, port: Port, identity: PeerIdentity) -> tuple[Connection, SimPeer]:
        ipc, owner = self._ipc, port.owner
        self._heap.charge(owner, CONNECTION_CHARGE)
        ipc.serial += 1
        owner.links_made += 1
        connection = Connection(
            port, _TERMS, LinkId(owner.links_made), serial=ipc.serial, peer=identity
        )
        port.links[connection.id] = connection
        sender = Sender(OUTSIDE, Pid(identity.pid), 0, QosClass.NORMAL)
        ipc.identities[connection.stamp] = sender
        peer = self._peers[connection.serial] = SimPeer(self, connection)
        self._note(owner.tag | log.PORT_OPEN, connection.serial)
        return connection, peer

    def arrive_bytes(self, connection: Connection, data: bytes) -> bool:
        """Queue bytes from a peer, in messages; False if there is no room for all."""
        parts = [
            data[start : start + MESSAGE_SIZE_MAX]
            for start in range(0, len(data), MESSAGE_SIZE_MAX)
        ]
        room = connection.queued_size + len(data) <= PORT_QUEUE_SIZE
        room = room and len(connection.queue) + len(parts) <= PORT_DEPTH
        if not room or not self._room(MESSAGE_SIZE * len(parts) + len(data)):
            return False
        return all(self.arrive(connection, part) for part in parts)

    def arrive(self, connection: Connection, data: bytes) -> bool:
        """Queue a message from a peer; False if there is no room."""
        ipc, size = self._ipc, len(data)
        owner = connection.endpoint.owner
        if size > MESSAGE_SIZE_MAX:
            owner.refused_oversize += 1
            self._on_refused(owner, "oversize")
            self.hang_up(connection)
            return True
        if ipc.room(connection, size) is not None or not self._room(MESSAGE_SIZE + size):
            return False
        ipc.account.used += MESSAGE_SIZE + size
        connection.queue.append((data, connection.stamp, None))
        connection.queued_size += size
        self._note(log.SENT, connection.serial << 16 | size)
        ipc.deliver(connection)
        return True

    def drain(self, connection: Connection) -> list[bytes]:
        """Take everything that is on its way to a peer."""
        taken = list(connection.outgoing)
        self._heap.refund(MESSAGE_SIZE * len(taken) + connection.outgoing_size)
        connection.outgoing.clear()
        connection.outgoing_size = 0
        if connection.wants_room and self._room(MESSAGE_SIZE):
            self._tell_room(connection)
        return taken

    def hang_up(self, connection: Connection) -> None:
        """The peer has closed: the owner is told once it has received what had been sent."""
        connection.closed = True
        self._ipc.deliver(connection)

    # ---- the end

    def _end_connection(self, connection: Connection) -> None:
        """Give everything back that a connection had. Its peer keeps what was on its way."""
        peer = self._peers.pop(connection.serial)
        size = connection_size(connection)
        peer.keep(list(connection.outgoing))
        self._heap.refund(size)
        connection.queue.clear()
        connection.outgoing.clear()
        connection.queued_size = connection.outgoing_size = 0
        connection.over = True
        connection.closed = False  # nothing is left to be told
        del self._ipc.identities[connection.stamp]
        owner = connection.endpoint.owner
        self._note(owner.tag | log.PORT_END, connection.serial)
        peer.heard()

    def _end_port(self, port: Port) -> None:
        """The owner has closed a port or has ended: so do its connections."""
        port.alive = False
        for link in list(port.links.values()):
            assert isinstance(link, Connection), "a port has connections alone"
            self._ipc.forget_connection(link)
        del port.owner.ports[port.slot]
        door = port.name if port.stream is None else door_of(port.stream)
        _ = self.live.pop(door, None)
        self._heap.refund(port.cost)

    def _note(self, what: int, detail: int) -> None:
        self._ipc.event_log.records += (self._ipc.clock.now, what, detail)
