"""The traps: everything a task can ask of the world.

`await Send(slot, data)` yields the trap object itself to the kernel that drives the coroutine;
the kernel resumes the coroutine with the result, or throws `AbiError`. Trap objects may be
kept and awaited again with other field values: hot paths do.

Common to all: slots outside 0..SLOTS_MAX-1 or empty are InvalidArgument; a slot without the
right is PermissionDenied; a refused trap changes nothing, unless a device failed or took too long.
"""

from collections.abc import Generator
from enum import IntEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from nexus.abi.identity import Sender
from nexus.abi.limits import (
    BUDGET_SIZE_DEFAULT,
    ENDPOINTS_PER_OWNER_MAX,
    LINK_DEPTH_DEFAULT,
    LINK_SIZE_MAX,
    MEMORY_SIZE_DEFAULT,
    MESSAGE_SIZE_MAX,
    OWNER_SIZE_DEFAULT,
)
from nexus.abi.status import SpawnReason
from nexus.abi.types import (
    NO_WAIT,
    CapKind,
    HardwareKind,
    LinkId,
    Nanos,
    Pid,
    QosClass,
    Rights,
    SecretBackend,
    ServiceId,
    Slot,
)

T_co = TypeVar("T_co", covariant=True)


class Trap(Generic[T_co]):
    """One request to the kernel, awaited for its result."""

    __slots__ = ()

    def __await__(self) -> "Generator[Trap[Any], Any, T_co]":
        result: T_co = yield self
        return result


class Message(NamedTuple):
    """A received message. `cap` is the slot of the capability that moved with it, or None.

    `link` and `source` tell which link of which endpoint it came by; `now` is the kernel's
    clock when it was taken from the queue, so that deadlines are checked without a trap.
    """

    data: bytes
    sender: Sender
    link: LinkId
    cap: Slot | None
    now: Nanos
    source: Slot


class LinkTerms(NamedTuple):
    """What a link may hold: messages, bytes, and how many links may be derived from it."""

    depth: int = LINK_DEPTH_DEFAULT
    size: int = LINK_SIZE_MAX
    delegations: int = 0


class NewLink(NamedTuple):
    """A fresh link: the SEND capability, and the link's id at the receiver if that is oneself."""

    slot: Slot
    link: LinkId | None


class CapInfo(NamedTuple):
    """Answer of CapQuery. `length` is bytes, rounded up to pages; 0 where it means nothing."""

    kind: CapKind
    rights: Rights
    length: int


class Isolation(IntEnum):
    """How a service's process is made on linux; the simulated kernel takes note only."""

    FORK = 0  # of init: shares its pages, and with them layout and hash seed
    EXEC = 1  # an interpreter of its own


class DeviceGrant(NamedTuple):
    """A character or block device, opened before the start; `name` is the service's word for it."""

    name: str
    path: str
    writable: bool


class ListenGrant(NamedTuple):
    """A listening TCP socket, bound before the start; `name` is the service's word for it."""

    name: str
    address: str
    port: int


class StreamRole(IntEnum):
    """How the connections of a stream port come about."""

    UNIX = 0  # callers come to a socket in the runtime directory
    TCP = 1  # callers come to a loopback address
    DIAL = 2  # the task asks for each (PortDial), to one address


class StreamGrant(NamedTuple):
    """A port whose connections are byte streams. `address` is numeric, empty for UNIX."""

    name: str
    role: StreamRole
    address: str = ""
    port: int = 0


class HardwareGrant(NamedTuple):
    """A device of the bus map: `name` is its name there. A live device has one holder."""

    name: str
    kind: HardwareKind


class Grants(NamedTuple):
    """What a service may do beyond the ABI. Nothing by default.

    `threads` is how many further threads it may start. `ports` name doors to the outside
    (PortSend), `stream_ports` such whose connections are byte streams. `hardware` are devices of
    the bus map (DeviceQuery); `secret` is where its secret is kept (SecretRead), and needs EXEC.
    `devices`, `listen`, `connect` (TCP port numbers) and `streams` (AF_UNIX stream pairs, which
    asyncio needs) are for programs with ordinary libraries and need EXEC.
    """

    isolation: Isolation = Isolation.FORK
    threads: int = 0
    ports: tuple[str, ...] = ()
    devices: tuple[DeviceGrant, ...] = ()
    listen: tuple[ListenGrant, ...] = ()
    connect: tuple[int, ...] = ()
    streams: bool = False
    hardware: tuple[HardwareGrant, ...] = ()
    secret: SecretBackend = SecretBackend.NONE
    stream_ports: tuple[StreamGrant, ...] = ()


class BusEntry(NamedTuple):
    """A device of the bus map as the kernel finds it.

    `backing` is "virtio-mmio", "file", "node", "hwrng" or "getrandom". For virtio-mmio `magic`,
    `version` and `device_id` are the registers as they read; elsewhere they are 0, and so are
    `base` and `length`.
    """

    name: str
    kind: HardwareKind  # as the bus map declares it
    backing: str
    base: int
    length: int
    magic: int
    version: int
    device_id: int


class DeviceInfo(NamedTuple):
    """A granted device: its name in the bus map, what is behind it, and its size in blocks of
    BLOCK_SIZE bytes (0 where there are none, and for a window, whose driver reads them)."""

    name: str
    backing: str
    block_count: int
    writable: bool


class RegisterWindow(Protocol):
    """The registers of a device, mapped; they are read and written as little-endian 32-bit words.

    An access is the device's business and takes effect at once. ValueError for an offset outside
    the window or not a multiple of 4, and when the mapping has ended.
    """

    @property
    def length(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int) -> int:
        """A register's value."""
        ...

    def write(self, offset: int, value: int) -> None:
        """Set a register."""
        ...


class Clock(Protocol):
    """The kernel's clocks without a trap, as Linux's vDSO gives them: for time stamps, not waits.

    On the simulated kernel both stand still while a task runs from one trap to the next.
    """

    def monotonic(self) -> Nanos:
        """The clock that Now reads."""
        ...

    def wall(self) -> int:
        """Nanoseconds since 1970-01-01 UTC, as the machine has it. It may be set, also back."""
        ...


class DmaArea(NamedTuple):
    """Memory that a device reads and writes: DMA_PAGES pages, zeroed before the first owner.

    `addresses` has the device's address of each page; they need not follow one another.
    """

    view: memoryview
    addresses: tuple[int, ...]


class PolicyWord(NamedTuple):
    """The word of the policy page: the generation of decisions, and whether policyd answers.

    A decision may be kept as long as `generation` is what it was when the decision was asked for.
    While policyd is not `available` nothing that is not kept is allowed.
    """

    generation: int
    available: bool


class PeerIdentity(NamedTuple):
    """Who is at the other end of a port's connection, as Linux says.

    Over TCP nobody says it: then the pid is 0 and the uid UID_UNKNOWN.
    """

    pid: int
    uid: int


class SpawnSpec(NamedTuple):
    """What to start. The budgets are reserved from the system's totals at spawn."""

    name: str
    program: str
    control: Slot  # the spawner's endpoint that the child's control link leads to
    argument: bytes = b""
    qos: QosClass = QosClass.NORMAL
    cpu: int | None = None  # declared placement; None lets the kernel choose
    owner_size: int = OWNER_SIZE_DEFAULT  # bytes of link shares the child may reserve
    endpoints: int = ENDPOINTS_PER_OWNER_MAX
    budget: int = BUDGET_SIZE_DEFAULT  # bytes of kernel objects
    delegations: int = 0  # links derivable from the spawner's link to the child's endpoint
    grants: Grants = Grants()
    # bytes of private memory beside its program and its objects, where a kernel bounds it
    memory: int = MEMORY_SIZE_DEFAULT
    # percent of one CPU in each tenth of a second, where a kernel bounds it; None for its choice
    cpu_share: int | None = None


class Spawned(NamedTuple):
    """A started task: `slot` is the spawner's SEND and MANAGE link to the child's endpoint,
    `link` the id under which the child's control link is known at `SpawnSpec.control`."""

    pid: Pid
    service: ServiceId
    generation: int
    slot: Slot
    link: LinkId


class ExitInfo(NamedTuple):
    """How a task ended: exit code, or the signal that killed it (0 if none). `over_memory` is that
    the kernel killed it for taking more memory than it may; whose signal that was, none tells."""

    pid: Pid
    code: int
    signal: int
    over_memory: bool = False


class TaskInfo(NamedTuple):
    """A row of the kernel's task list."""

    pid: Pid
    name: str
    service: ServiceId
    generation: int
    qos: QosClass


class TaskCounters(NamedTuple):
    """The kernel's own account of the calling task. Sizes are bytes; the others are counts."""

    slots: int  # used capability slots
    endpoints: int  # live endpoints owned
    links: int  # links into own endpoints
    reserved_size: int  # link shares reserved in own endpoints
    queued: int  # messages waiting in own endpoints
    queued_size: int
    sent: int
    sent_size: int
    received: int
    received_size: int
    timeouts: int  # waits that ended with TimedOut
    refused_identity: int  # messages dropped: pid 0, unknown, or not in the table
    refused_caps: int  # messages dropped: more than one capability attached
    refused_oversize: int
    refused_links: int  # derived links closed for exceeding their delegations
    budget_used: int
    budget_free: int
    budget_total: int
    refused_size: int  # size of the last allocation refused by the budget, 0 if none
    refused_align: int
    vmo_size: int  # bytes of VMOs held, page-rounded


class AuditLines(NamedTuple):
    """QoS audit lines in the order they were made; `dropped` older ones no longer fitted."""

    lines: tuple[str, ...]
    dropped: int


class EndpointCreate(Trap[Slot]):
    """Make an endpoint owned by the caller; its capability has RECV and MANAGE.

    Refuses: NoSpace (slots, endpoints of the owner, budget).
    """

    __slots__ = ()


class EndpointClose(Trap[None]):
    """Close an endpoint for everybody: queues are dropped, every waiter gets NoSuchEndpoint.

    Rights: MANAGE; a refused close keeps the capability.
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class LinkCreate(Trap[NewLink]):
    """Make a fresh link: into the caller's own endpoint, or derived from a link it holds.

    Rights: MANAGE on an own endpoint; SEND on a link. From a link without MANAGE the terms may
    not exceed that link's, and the new link's delegations must be 0.
    A link derived from a held one counts against the `delegations` of that one until the owner
    has received the PeerGone of the derived link.
    Refuses: NoSpace (slots, delegations, owner's share, budget), InvalidArgument (depth not
    1..LINK_DEPTH_MAX, size not 1..LINK_SIZE_MAX), PermissionDenied, NoSuchEndpoint.
    """

    __slots__ = ("slot", "terms")

    def __init__(self, slot: Slot, terms: LinkTerms = LinkTerms()) -> None:  # noqa: B008 (immutable)
        self.slot = slot
        self.terms = terms


class Send(Trap[None]):
    """Queue one message, 1 to MESSAGE_SIZE_MAX bytes; the first byte is below 0xF0.

    With `move` that capability leaves the sender when the send succeeds, and only then.
    A link that is unused and held under one slot moves as it is; otherwise a link derived from
    it (same terms, no delegations) moves and the slot is emptied. VMOs move with MAP only and
    must be sealed or shared. Endpoints and MANAGE do not move.
    Rights: SEND on `slot`; SEND or MAP on `move`.
    Refuses: QueueFull (depth), NoSpace (bytes; delegations), TimedOut (no room before a deadline
    other than NO_WAIT), NoSuchEndpoint, InvalidArgument (size, kind, moving a link over itself),
    PermissionDenied.
    """

    __slots__ = ("data", "deadline", "move", "slot")

    def __init__(
        self,
        slot: Slot,
        data: bytes | bytearray,
        *,
        move: Slot | None = None,
        deadline: Nanos = NO_WAIT,
    ) -> None:
        self.slot = slot
        self.data = data
        self.move = move
        self.deadline = deadline


class Recv(Trap[Message]):
    """Take one message from the endpoints in `sources`; with `link`, from that link only.

    First in, first out within a link; links are served in rotation. A moved capability lands in
    the lowest free slot.
    Rights: RECV on each source.
    Refuses: QueueEmpty (NO_WAIT), TimedOut (a deadline passed; a queued message still wins over a
    past deadline), PeerGone (once per link, after its last message), NoSpace (every message at
    hand carries a capability and the table is full; nothing is lost), InvalidArgument (the
    message at hand is larger than `size_max`; nothing is lost), NoSuchEndpoint.
    """

    __slots__ = ("deadline", "link", "size_max", "sources")

    def __init__(
        self,
        sources: tuple[Slot, ...],
        deadline: Nanos,
        *,
        link: LinkId | None = None,
        size_max: int = MESSAGE_SIZE_MAX,
    ) -> None:
        self.sources = sources
        self.deadline = deadline
        self.link = link
        self.size_max = size_max


class Call(Trap[Message]):
    """Send without waiting for room, then receive from `link` of endpoint `inbox`, as one trap.

    Refuses: whatever Send refuses (nothing was sent; `sent` is False), then whatever Recv
    refuses (`sent` is True). `deadline` bounds the wait for the answer.
    """

    __slots__ = ("data", "deadline", "inbox", "link", "sent", "slot")

    def __init__(
        self, slot: Slot, data: bytes | bytearray, inbox: Slot, link: LinkId, deadline: Nanos
    ) -> None:
        self.slot = slot
        self.data = data
        self.inbox = inbox
        self.link = link
        self.deadline = deadline
        self.sent = False


class ReplyRecv(Trap[Message]):
    """Send `data` on `slot` unless it is None, without waiting, then Recv from `sources`.

    A refused send does not refuse the trap: `reply_status` holds its status, None if it was sent.
    """

    __slots__ = ("data", "deadline", "reply_status", "slot", "sources")

    def __init__(self, sources: tuple[Slot, ...], deadline: Nanos) -> None:
        self.slot: Slot | None = None
        self.data: bytes | bytearray = b""
        self.sources = sources
        self.deadline = deadline
        self.reply_status: int | None = None


class CapClone(Trap[Slot]):
    """A second slot for the same capability of this task. Endpoints cannot be cloned.

    Refuses: NoSpace, PermissionDenied.
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class CapDerive(Trap[Slot]):
    """A second slot with a subset of the rights. Refuses: PermissionDenied (superset), NoSpace."""

    __slots__ = ("rights", "slot")

    def __init__(self, slot: Slot, rights: Rights) -> None:
        self.slot = slot
        self.rights = rights


class CapClose(Trap[None]):
    """Drop a slot. The last slot of a link closes it; the slot of an own endpoint closes that."""

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class CapQuery(Trap[CapInfo]):
    """Kind, rights and length of a VMO or a device. Rights: MAP; endpoints and links refuse
    with PermissionDenied."""

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class VmoCreate(Trap[Slot]):
    """A zeroed memory object, 1..VMO_SIZE_MAX bytes, rounded up to pages; MAP and MANAGE.

    Refuses: InvalidArgument, NoSpace (slots; budget, with the request kept in TaskCounters).
    """

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class VmoWrite(Trap[None]):
    """Write into an unsealed VMO. Rights: MANAGE. Refuses: PermissionDenied once sealed or
    shared, InvalidArgument outside the length."""

    __slots__ = ("data", "offset", "slot")

    def __init__(self, slot: Slot, offset: int, data: bytes) -> None:
        self.slot = slot
        self.offset = offset
        self.data = data


class VmoSeal(Trap[None]):
    """Make a VMO unchangeable for ever, for everybody. Rights: MANAGE.

    Refuses: PermissionDenied once shared.
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class VmoMap(Trap[memoryview]):
    """The content of a sealed VMO, read only. The mapping ends when the view is released.

    Rights: MAP. Refuses: PermissionDenied (not sealed, which a shared one never is),
    InvalidArgument (not a VMO).
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class VmoShare(Trap[memoryview]):
    """Make an unsealed VMO living memory: its length is fixed for ever, and this view is the one
    way to write into it, for the task that has it and as long as that lives. Rights: MANAGE.

    A shared VMO moves as a sealed one does, with MAP only; who gets it can look at it (VmoWatch)
    and finds what is there when it looks, also after the writer has ended. It is no bulk data:
    VmoMap refuses it. Refuses: PermissionDenied once sealed or shared, InvalidArgument (no VMO).
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class VmoWatch(Trap[memoryview]):
    """The content of a shared VMO, read only, as it changes; its length cannot. The mapping ends
    when the view is released; the slot may be closed before that.

    Whoever shared it may write at any moment, anything: copy first, then check the copy.
    Rights: MAP. Refuses: PermissionDenied (not shared), InvalidArgument (not a VMO).
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class Fence(Trap[None]):
    """A memory barrier on every CPU that runs a task: what a task wrote before the barrier is seen
    by what the caller reads after it, and nothing the caller reads after it is older.

    The writer needs none of its own. On linux membarrier(2); Unsupported where that is absent.
    """

    __slots__ = ()


class ClockMap(Trap[Clock]):
    """The clocks, to be read without a trap from now on."""

    __slots__ = ()


class Spawn(Trap[Spawned]):
    """Start a program as a task with an identity of its own. Only the root task may.

    Refuses: PermissionDenied; else a status with the reason kept for SpawnLastError: NoSpace
    with oom, cap-table-full or endpoint-quota; Unsupported with map-failed; InvalidArgument with
    invalid-payload (unknown program, bad name, bad budgets, a live task of that name).

    A task with isolation EXEC imports its program after this returns: what is sent to it waits,
    and if it cannot be imported, or not in time, that is the end of the task as any other.
    """

    __slots__ = ("spec",)

    def __init__(self, spec: SpawnSpec) -> None:
        self.spec = spec


class SpawnLastError(Trap[SpawnReason]):
    """Why the last failed Spawn failed; reading it clears it."""

    __slots__ = ()


class Wait(Trap[ExitInfo]):
    """Wait for the end of a task and reap it. Only the root task may.

    Refuses: InvalidArgument (not a child, or already reaped), QueueEmpty (NO_WAIT), TimedOut.
    """

    __slots__ = ("deadline", "pid")

    def __init__(self, pid: Pid, deadline: Nanos) -> None:
        self.pid = pid
        self.deadline = deadline


class Kill(Trap[None]):
    """End a task at once, as SIGKILL does. Only the root task may."""

    __slots__ = ("pid",)

    def __init__(self, pid: Pid) -> None:
        self.pid = pid


class Exit(Trap[None]):
    """End the calling task with a code 0..255. Returning from `main` is the same."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class TaskTable(Trap[tuple[TaskInfo, ...]]):
    """The kernel's list of live tasks, by pid. Only the root task may."""

    __slots__ = ()


class TaskQos(Trap[QosClass]):
    """The caller's own class."""

    __slots__ = ()


class SetTaskQos(Trap[None]):
    """Set the class of a task; `pid` None is oneself, `qos` is the raw number.

    Checks in this order, each with an audit line (core.md 1.2): InvalidArgument for a number that
    is no class (invalid_qos_class), InvalidArgument for an unknown task (invalid_target_pid),
    PermissionDenied for another task (unauthorized_other_pid), PermissionDenied for a raise
    (unauthorized_escalation), QueueFull (scheduler_queue_full; nothing changed), else applied.
    init, execd and policyd are exempt from the two authority checks. TimedOut where init decides
    and does not answer within the kernel's own bound.
    """

    __slots__ = ("pid", "qos")

    def __init__(self, pid: Pid | None, qos: int) -> None:
        self.pid = pid
        self.qos = qos


class Now(Trap[Nanos]):
    """The kernel's monotonic clock."""

    __slots__ = ()


class SleepUntil(Trap[Nanos]):
    """Sleep until an absolute time; returns the clock, never earlier than asked."""

    __slots__ = ("deadline",)

    def __init__(self, deadline: Nanos) -> None:
        self.deadline = deadline


class Entropy(Trap[bytes]):
    """1..ENTROPY_SIZE_MAX fresh bytes. Only the root task, until rngd owns the device."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class ConsoleWrite(Trap[None]):
    """Print one line, stamped with the sender by the kernel, with evidence as JSON next to it.

    Refuses: InvalidArgument (longer than the limits, a line break or another control character,
    evidence that is not a JSON object), QueueFull.
    """

    __slots__ = ("evidence", "line")

    def __init__(self, line: str, evidence: bytes = b"") -> None:
        self.line = line
        self.evidence = evidence


class TaskStats(Trap[TaskCounters]):
    """The kernel's account of the calling task."""

    __slots__ = ()


class AuditLog(Trap[AuditLines]):
    """Take the kernel's QoS audit lines (core.md 1.2) made since the last taking.

    The kernel keeps the last AUDIT_LINES_MAX and counts what it drops. Only the root task may.
    """

    __slots__ = ()


class PolicyRead(Trap[PolicyWord]):
    """The word of the policy page: no message, no round trip. Generation 0 before the first."""

    __slots__ = ()


class PolicyRaise(Trap[PolicyWord]):
    """Raise the generation by one and say whether policyd answers. Only the root task may.

    In force for every task's next PolicyRead when the trap returns. Nobody else can write the page.
    """

    __slots__ = ("available",)

    def __init__(self, available: bool) -> None:
        self.available = available


class BootMemoryRead(Trap[bytes]):
    """What BootMemoryReplace last stored, in this or an earlier boot; empty if nothing was.

    Only the root task may. Refuses: Unsupported (this run has no state directory).
    """

    __slots__ = ()


class BootMemoryReplace(Trap[None]):
    """Store at most BOOT_MEMORY_SIZE_MAX bytes so that they survive this boot: all or nothing,
    durable when the trap returns. Only the root task may.

    Refuses: InvalidArgument (size), NoSpace (disk full), Unsupported (no state directory).
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class Notify(Trap[None]):
    """Tell the service manager outside, in the words of sd_notify(3). Only the root task may.

    Without one nothing happens. Refuses: InvalidArgument (longer than NOTIFY_SIZE_MAX bytes).
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class PortSend(Trap[None]):
    """Queue one message to the peer at `link` of an own port, without waiting.

    A port is a slot with RECV that Recv and ReplyRecv take as a source. Its messages come from
    processes outside the system: `sender.service` is OUTSIDE, `sender.pid` the process, `link`
    the connection; PeerGone ends it. At most PORT_PEERS_MAX connections live; only root and the
    user who runs the system get one, but over TCP, where anybody does.

    At a stream port messages are bytes as they come, of no certain length. An empty one is the
    first of each connection, which stands by then, and says, once, that after a QueueFull there is
    room again. Bytes are queued all or none, up to STREAM_QUEUE_SIZE beside what Linux takes.
    PeerGone says that nothing more comes; what was queued
    by then, or before PortClose, is still sent to a peer that reads it within STREAM_LINGER.
    Refuses: QueueFull, NoSuchEndpoint (no such connection), InvalidArgument (size, no port).
    """

    __slots__ = ("data", "link", "port")

    def __init__(self, port: Slot, link: LinkId, data: bytes | bytearray) -> None:
        self.port = port
        self.link = link
        self.data = data


class PortClose(Trap[None]):
    """End a connection of an own port. Refuses: NoSuchEndpoint, InvalidArgument."""

    __slots__ = ("link", "port")

    def __init__(self, port: Slot, link: LinkId) -> None:
        self.port = port
        self.link = link


class PortPeer(Trap[PeerIdentity]):
    """Who is at the other end of a connection. Refuses: NoSuchEndpoint, InvalidArgument."""

    __slots__ = ("link", "port")

    def __init__(self, port: Slot, link: LinkId) -> None:
        self.port = port
        self.link = link


class PortDial(Trap[LinkId]):
    """Begin a connection of an own port of role DIAL, to the address of its grant.

    An empty message by it says that it stands, PeerGone that it does not or no longer does.
    Refuses: NoSpace (PORT_PEERS_MAX live), InvalidArgument (no such port).
    """

    __slots__ = ("port",)

    def __init__(self, port: Slot) -> None:
        self.port = port


class BusScan(Trap[tuple[BusEntry, ...]]):
    """The devices of the bus map, looked at without touching their state. Only the root task may.

    Sorted by name.
    """

    __slots__ = ()


class DeviceQuery(Trap[DeviceInfo]):
    """What a granted device is. Rights: MAP. Its kind is CapQuery's answer: DEVICE for a window
    onto its registers, BLOCK or ENTROPY for one that the kernel drives.

    Refuses: InvalidArgument (no device).
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class DeviceMap(Trap[RegisterWindow]):
    """The registers of a device, from `offset` (a multiple of PAGE_SIZE) to the window's end.

    The mapping lasts as long as the task and can be had again; pages are never executable.
    Rights: MAP. Refuses: PermissionDenied (`execute`, offset not below the length, another
    kind of capability), InvalidArgument (offset not aligned).
    """

    __slots__ = ("execute", "offset", "slot")

    def __init__(self, slot: Slot, offset: int = 0, *, execute: bool = False) -> None:
        self.slot = slot
        self.offset = offset
        self.execute = execute


class DeviceDma(Trap[DmaArea]):
    """The memory that the device of this window may read and write. The same area each time.

    Rights: MAP. Refuses: PermissionDenied (another kind of capability).
    """

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class BlockRead(Trap[bytes]):
    """`count` blocks of BLOCK_SIZE bytes from block `block` on.

    Rights: MAP. Refuses: InvalidArgument (outside the device, more than BLOCK_TRANSFER_MAX),
    TimedOut (the deadline had passed; on the simulated kernel also: the device takes longer),
    DeviceFailed, PermissionDenied (no block device).
    """

    __slots__ = ("block", "count", "deadline", "slot")

    def __init__(self, slot: Slot, block: int, count: int, deadline: Nanos) -> None:
        self.slot = slot
        self.block = block
        self.count = count
        self.deadline = deadline


class BlockWrite(Trap[None]):
    """Write whole blocks from block `block` on. With `durable` these bytes survive a power cut
    when the trap returns; earlier writes still need a BlockFlush.

    After DeviceFailed or TimedOut any part of it may have been written.
    Rights: MAP. Refuses: as BlockRead; PermissionDenied (read only), NoSpace (the disk under a
    device that is a file is full).
    """

    __slots__ = ("block", "data", "deadline", "durable", "slot")

    def __init__(
        self,
        slot: Slot,
        block: int,
        data: bytes | bytearray | memoryview,
        deadline: Nanos,
        *,
        durable: bool = False,
    ) -> None:
        self.slot = slot
        self.block = block
        self.data = data
        self.deadline = deadline
        self.durable = durable


class BlockFlush(Trap[None]):
    """Everything written so far survives a power cut when the trap returns.

    Refuses: as BlockRead. After a failed flush earlier writes may be lost, and a later flush
    that succeeds says nothing about them.
    """

    __slots__ = ("deadline", "slot")

    def __init__(self, slot: Slot, deadline: Nanos) -> None:
        self.slot = slot
        self.deadline = deadline


class EntropyDraw(Trap[bytes]):
    """1..ENTROPY_SIZE_MAX bytes as the granted source delivers them: at most `size`, perhaps none.

    Rights: MAP. Refuses: InvalidArgument (size), PermissionDenied (no entropy source),
    DeviceFailed.
    """

    __slots__ = ("size", "slot")

    def __init__(self, slot: Slot, size: int) -> None:
        self.slot = slot
        self.size = size


class SecretQuery(Trap[SecretBackend]):
    """Where the caller's secret is kept; NONE without the grant."""

    __slots__ = ()


class SecretRead(Trap[bytes]):
    """What SecretReplace last stored; empty if nothing was.

    Refuses: PermissionDenied (no grant), DeviceFailed (there is something that cannot be read).
    """

    __slots__ = ()


class SecretReplace(Trap[None]):
    """Store 1..SECRET_SIZE_MAX bytes: all or nothing, and durable as far as the backend is.

    Refuses: PermissionDenied (no grant), InvalidArgument (size), NoSpace, DeviceFailed; the old
    secret is then still there.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data
