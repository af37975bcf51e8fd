"""What the simulated kernel keeps: tasks, endpoints, links, memory objects, CPUs."""

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from nexus.abi import (
    NEVER,
    CapKind,
    LinkId,
    LinkTerms,
    Nanos,
    PeerIdentity,
    Pid,
    Program,
    QosClass,
    SecretBackend,
    ServiceId,
    Slot,
    SpawnReason,
    StreamGrant,
    Trap,
)
from nexus.kernel.core import (
    DEVICE_SIZE,
    ENDPOINT_SIZE,
    LINK_END_SIZE,
    PORT_SIZE,
    Account,
    CapTable,
    Held,
    OwnerShare,
)

# States of a task, plain integers: they are compared on every send.
READY: Final = 0  # in a run queue
RUNNING: Final = 1  # on a CPU
WAIT_RECEIVE: Final = 2
WAIT_SEND: Final = 3
WAIT_TIME: Final = 4
WAIT_CHILD: Final = 5
PUT_OFF: Final = 7  # woken or stopped, and held back from its run queue
DEAD: Final = 6  # exited; kept until the root task has waited for it

FIRST_WAIT: Final = WAIT_RECEIVE
LAST_WAIT: Final = WAIT_CHILD

CLASS_COUNT: Final = len(QosClass)


class Blocked:
    """The type of BLOCKED, which a trap's handler returns when its task has to wait."""

    __slots__ = ()


BLOCKED: Final = Blocked()


class Endpoint:
    """A set of links owned by their receiver."""

    __slots__ = ("alive", "links", "owner", "ready", "slot")

    kind: Final = CapKind.ENDPOINT
    cost: Final = ENDPOINT_SIZE

    def __init__(self, owner: "Task") -> None:
        self.owner = owner
        self.slot = Slot(0)  # in the owner's table; set when it is placed there
        self.alive = True
        self.links: dict[LinkId, Link] = {}
        self.ready: deque[Link] = deque()  # links that may have something, in rotation


class Link:
    """One holder's private queue into an endpoint: exact in messages and in bytes.

    `listed` is true while the link stands in its endpoint's `ready` (which may be stale: the
    queue can have been emptied through a filtered receive). `delayed` hides the queue while an
    injected fault holds its delivery back.
    """

    __slots__ = (
        "closed",
        "delayed",
        "delegations",
        "depth",
        "derived",
        "endpoint",
        "id",
        "listed",
        "maker_pid",
        "parent",
        "queue",
        "queued_size",
        "serial",
        "size",
        "used",
        "waiter",
    )

    kind: Final = CapKind.LINK
    cost: Final = LINK_END_SIZE

    def __init__(
        self,
        endpoint: Endpoint,
        terms: LinkTerms,
        link_id: LinkId,
        *,
        serial: int,
        maker_pid: Pid,
        parent: "Link | None",
    ) -> None:
        self.endpoint = endpoint
        self.depth, self.size, self.delegations = terms
        self.id = link_id
        self.serial = serial
        self.maker_pid = maker_pid  # who held it first; identity is never taken from here
        self.parent = parent
        self.derived = 0  # live links derived from this one; at most `delegations`
        self.queue: deque[Entry] = deque()
        self.queued_size = 0
        self.used = False  # a message was sent over it
        self.closed = False  # the holder's end is gone
        self.listed = False
        self.delayed = False
        self.waiter: Task | None = None  # the holder, while it waits for room

    @property
    def terms(self) -> LinkTerms:
        """The link's terms, as it was made."""
        return LinkTerms(self.depth, self.size, self.delegations)


class Port(Endpoint):
    """A door to the outside: an endpoint whose links are the connections of processes there.

    `stream` is its grant if those are byte streams.
    """

    __slots__ = ("name", "stream")

    cost: Final = PORT_SIZE  # type: ignore[misc]  # of an endpoint, and named on its own

    def __init__(self, owner: "Task", name: str, stream: StreamGrant | None = None) -> None:
        super().__init__(owner)
        self.name = name
        self.stream = stream


class Connection(Link):
    """A connection of a port: a link whose holder is a process outside, and the way back.

    `stamp` is the number its messages carry in the place of a pid; no task has a negative one.
    """

    __slots__ = (
        "half_closed",
        "outgoing",
        "outgoing_size",
        "over",
        "peer",
        "stamp",
        "stream",
        "wants_room",
    )

    def __init__(
        self, port: Port, terms: LinkTerms, link_id: LinkId, *, serial: int, peer: PeerIdentity
    ) -> None:
        super().__init__(port, terms, link_id, serial=serial, maker_pid=Pid(0), parent=None)
        self.peer = peer
        self.stamp = Pid(-serial)
        self.outgoing: deque[bytes] = deque()
        self.outgoing_size = 0
        self.over = False  # ended for both sides; nothing of it is charged any more
        self.stream = port.stream is not None
        self.half_closed = False  # the peer sends no more, and still reads
        self.wants_room = False  # the owner is to be told that there is room


class Vmo:
    """A memory object. `references` counts tables and queued messages that hold it."""

    __slots__ = (
        "cost",
        "data",
        "freed",
        "mapped_first",
        "references",
        "sealed",
        "shared",
        "viewers",
    )

    kind: Final = CapKind.VMO

    def __init__(self, length: int) -> None:
        self.data = bytearray(length)
        self.cost = length
        self.sealed = False
        self.shared = False  # living memory: one writable view, and it is never sealed
        self.freed = False
        self.references = 0
        self.mapped_first: Task | None = None  # the task whose views are views of `data` itself
        self.viewers = 0  # tasks that view it as it changes


class LiveViews:
    """One task's views of a shared object: of its very bytes, yet told apart from others'.

    They are views of one array over the object's bytes, which lives as long as one of them.
    """

    __slots__ = ("_array", "_data")

    def __init__(self, data: bytearray) -> None:
        self._data = data
        self._array: weakref.ref[ctypes.Array[ctypes.c_ubyte]] | None = None

    def view(self) -> memoryview:
        """One more view, which may be written."""
        array = None if self._array is None else self._array()
        if array is None:
            array = (ctypes.c_ubyte * len(self._data)).from_buffer(self._data)
            self._array = weakref.ref(array)
        return memoryview(array).cast("B")

    @property
    def out(self) -> bool:
        """Whether a view has not been released."""
        return self._array is not None and self._array() is not None


class Device:
    """A device of the bus in the hands of its holder. `length` is that of its registers."""

    __slots__ = ("kind", "length", "name")

    cost: Final = DEVICE_SIZE

    def __init__(self, name: str, kind: CapKind, length: int) -> None:
        self.name = name
        self.kind: Final = kind
        self.length = length


KernelObject: TypeAlias = Endpoint | Link | Vmo | Device
Entry: TypeAlias = tuple[bytes, Pid, Held[KernelObject] | None]
"""A queued message: its bytes, the pid stamped on it, and the capability that moves with it."""


class Task:
    """One running service instance."""

    __slots__ = (
        "budget",
        "code",
        "coroutine",
        "cpu",
        "crash",
        "deadline",
        "devices",
        "endpoints",
        "entries",
        "error",
        "filter",
        "freezes",
        "frozen",
        "generation",
        "kernel_link",
        "links",
        "links_made",
        "maps",
        "name",
        "pid",
        "pinned",
        "ports",
        "program",
        "qos",
        "queued_at",
        "received",
        "received_size",
        "refused_caps",
        "refused_identity",
        "refused_links",
        "refused_oversize",
        "resume",
        "secret",
        "send",
        "sent",
        "sent_size",
        "service",
        "share",
        "size_max",
        "sources",
        "spawn_error",
        "state",
        "table",
        "tag",
        "throw",
        "timeouts",
        "timer_at",
        "took",
        "trap",
        "turn",
        "value",
        "wait_link",
        "wait_pid",
    )

    def __init__(
        self,
        *,
        pid: Pid,
        name: str,
        service: ServiceId,
        generation: int,
        qos: QosClass,
        program: Program,
        share: OwnerShare,
        budget: int,
    ) -> None:
        self.pid = pid
        self.tag = pid << 16  # the pid where log records carry it
        self.name = name
        self.service = service
        self.generation = generation
        self.qos = qos
        self.program = program
        self.share = share
        self.budget = Account(f"budget of {name}", budget)
        self.table: CapTable[KernelObject] = CapTable()
        self.entries = self.table.entries
        self.endpoints: dict[Slot, Endpoint] = {}  # own ones, by their slot
        self.links: dict[LinkId, Link] = {}  # into own endpoints
        self.links_made = 0  # ids given, to connections of ports too; never used twice
        self.kernel_link: Link | None = None  # by which signals come; the root task has one
        self.ports: dict[Slot, Port] = {}  # own ones, by their slot
        self.devices: list[Device] = []  # held, in the order of the grants, whatever the slots say
        self.secret = SecretBackend.NONE  # where its own is kept
        self.maps: dict[int, tuple[Vmo, bytearray | LiveViews]] = {}  # by id: views still out
        self.coroutine: Coroutine[Trap[Any], Any, int | None] | None = None
        self.send: Callable[[Any], Any] = _not_started
        self.throw: Callable[[BaseException], Any] = _not_started
        # What the task waits for, and how it goes on.
        self.state = READY
        self.trap: Any = None
        self.code = 0  # of the trap, in log records
        self.took = 0  # link and size of the last message taken, in log records
        self.resume: Callable[[Task], Any] = _not_started
        self.value: Any = None
        self.error: Exception | None = None
        self.deadline: Nanos = NEVER
        self.timer_at: Nanos = NEVER  # the earliest entry for it in the timer heap
        self.sources: tuple[Endpoint, ...] = ()
        self.filter: Link | None = None
        self.size_max = 0
        self.turn = 0  # which of several sources is looked at first
        self.wait_link: Link | None = None  # the link it waits for room on
        self.wait_pid: Pid | None = None  # the child it waits for
        # Scheduling.
        self.cpu: Any = None  # a sched.Cpu
        self.pinned = False
        self.queued_at: Nanos = Nanos(0)
        self.frozen = False  # stopped from outside: it enters no run queue
        self.freezes = 0  # how many stops have not run out
        # Accounts.
        self.spawn_error = SpawnReason.NONE
        self.crash: str | None = None
        self.sent = self.sent_size = self.received = self.received_size = 0
        self.timeouts = 0
        self.refused_identity = self.refused_caps = 0
        self.refused_oversize = self.refused_links = 0


def _not_started(*_: object) -> Any:
    raise AssertionError("the task has not been started")
