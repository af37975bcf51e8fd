"""Ports: doors for processes outside the system, and the host's side of them.

Receiving from a port is Ipc's, since a connection is a link to whoever receives from it. What is
different stands here: who may connect, the way back, and the end of a connection.
"""

from typing import Final

from nexus.abi import (
    LINK_SIZE_MAX,
    MESSAGE_SIZE_MAX,
    OUTSIDE,
    PORT_PEERS_MAX,
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
)
from nexus.kernel.core import MESSAGE_SIZE
from nexus.kernel.sim import log
from nexus.kernel.sim.heap import CONNECTION_CHARGE, connection_size
from nexus.kernel.sim.ipc import Ipc, OnRefused
from nexus.kernel.sim.objects import Connection, Port, Task

PORT_DEPTH: Final = 32  # messages queued in either direction of a connection
PORT_QUEUE_SIZE: Final = 4 * LINK_SIZE_MAX  # bytes in either direction
UID_ROOT: Final = 0
UID_SYSTEM: Final = 1000  # the user who runs the simulated system

assert PORT_QUEUE_SIZE >= 4 * MESSAGE_SIZE_MAX, "a few messages of any size fit"

_TERMS: Final = LinkTerms(PORT_DEPTH, PORT_QUEUE_SIZE, 0)


class SimPeer:
    """A process outside that has connected, or was turned away: then it is `closed` at once."""

    def __init__(self, ports: "Ports", connection: Connection | None) -> None:
        self._ports = ports
        self._connection = connection
        self._left: list[bytes] = []  # what had come before the end

    @property
    def closed(self) -> bool:
        """Whether the connection is over, whoever ended it."""
        return self._connection is None or self._connection.over or self._connection.closed

    def send(self, data: bytes) -> bool:
        """Send one message; False if the queue is full or the connection is over.

        An empty one ends the connection, as it does on a socket. One that is larger than
        MESSAGE_SIZE_MAX ends it too, behind what was sent before, and is counted.
        """
        if self._connection is None or self.closed:
            return False
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
            self._ports.hang_up(self._connection)

    def keep(self, left: list[bytes]) -> None:
        """Take over what was on its way when the connection ended."""
        self._left += left


class SimPort:
    """The outer side of the port of one name, whichever task has it."""

    def __init__(self, ports: "Ports", name: str) -> None:
        self._ports = ports
        self._name = name

    def connect(self, pid: int, uid: int) -> SimPeer:
        """Connect as this process of this user. Raises ConnectionRefusedError: no task has it."""
        return self._ports.connect(self._name, PeerIdentity(pid, uid))


class Ports:
    """The live ports of a system."""

    def __init__(self, ipc: Ipc, on_refused: OnRefused, uid: int) -> None:
        self._ipc = ipc
        self._heap = ipc.heap
        self._on_refused = on_refused
        self._uid = uid
        self._peers: dict[int, SimPeer] = {}  # by the connection's serial
        self.live: dict[str, Port] = {}
        ipc.on_port_end = self._end_port
        ipc.on_connection_end = self._end_connection

    @property
    def connections(self) -> int:
        """Live connections of all ports."""
        return len(self._peers)

    def create(self, task: Task, name: str) -> Slot:
        """Make a port in the task's lowest free slot. Refuses: NoSpace."""
        assert name not in self.live, "looked at before the spawn"
        port = Port(task, name)
        self._heap.charge(task, port.cost)
        try:
            port.slot = self._heap.hold(task, port, Rights.RECV)
        except AbiError:
            self._heap.refund(port.cost)
            raise
        task.ports[port.slot] = port
        self.live[name] = port
        return port.slot

    # ---- what the owner asks for

    def send(self, task: Task, slot: Slot, link: LinkId, data: bytes | bytearray) -> None:
        """Queue a message to a peer. Refuses as PortSend."""
        port = self.owned(task, slot)
        size = len(data)
        if not 1 <= size <= MESSAGE_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"a message of {size} bytes")
        connection = self.connection(port, link)
        if connection.closed:
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"the peer of {link} has closed")
        full = len(connection.outgoing) >= PORT_DEPTH
        if full or connection.outgoing_size + size > PORT_QUEUE_SIZE:
            raise AbiError(Status.QUEUE_FULL, "the peer does not read")
        copy = self._ipc.copy_in(data)
        if MESSAGE_SIZE + size > self._ipc.account.free:
            raise AbiError(Status.QUEUE_FULL, "the kernel heap is full")
        self._ipc.account.used += MESSAGE_SIZE + size
        connection.outgoing.append(copy)
        connection.outgoing_size += size
        task.sent += 1
        task.sent_size += size
        self._note(task.tag | log.PORT_SENT, connection.serial << 16 | size)

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
        if not self.is_known(peer.uid):
            port.owner.refused_identity += 1
            self._on_refused(port.owner, "identity")
            return SimPeer(self, None)
        if len(port.links) >= PORT_PEERS_MAX or not self._room(CONNECTION_CHARGE):
            port.owner.refused_links += 1
            self._on_refused(port.owner, "excess_link")
            return SimPeer(self, None)
        return self._connect(port, peer)

    def is_known(self, uid: int) -> bool:
        """Whether a user may connect: root, and the one who runs the system."""
        return uid in (UID_ROOT, self._uid)

    def _room(self, size: int) -> bool:
        return size <= self._ipc.account.free

    def _connect(self, port: Port, identity: PeerIdentity) -> SimPeer:
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
        return peer

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

    def _end_port(self, port: Port) -> None:
        """The owner has closed a port or has ended: so do its connections."""
        port.alive = False
        for link in list(port.links.values()):
            assert isinstance(link, Connection), "a port has connections alone"
            self._ipc.forget_connection(link)
        del port.owner.ports[port.slot]
        del self.live[port.name]
        self._heap.refund(port.cost)

    def _note(self, what: int, detail: int) -> None:
        self._ipc.event_log.records += (self._ipc.clock.now, what, detail)
