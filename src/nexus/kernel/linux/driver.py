"""The driver of one task: turns the traps its coroutine yields into system calls.

The same code drives the root task in init's process and every service in its own. What differs
is the port: a service asks init over its kernel channel, the root task's port is the kernel.

Decisions that a test must be able to break sit in small methods looked up at each use:
`_sender_of`, `_expired`, `_fits`, `_passed`, `_let_go`, `_vmo_length`, `_arm`, `_confirmable`,
`_may_call`, `_room_for_caller`.
"""

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator, Mapping
from time import monotonic_ns, time_ns
from typing import Any, Final, NoReturn, Protocol, cast

from nexus.abi import (
    INIT_NAME,
    LINK_DEPTH_MAX,
    MESSAGE_SIZE_MAX,
    NEVER,
    NO_WAIT,
    PAGE_SIZE,
    PORT_PEERS_MAX,
    PORTS_MAX,
    SECRET_SIZE_MAX,
    SLOTS_MAX,
    STREAM_PORTS_MAX,
    VMO_SIZE_MAX,
    AbiError,
    AuditLog,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootMemoryRead,
    BootMemoryReplace,
    BusScan,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapInfo,
    CapKind,
    CapQuery,
    Clock,
    ClockMap,
    ConsoleWrite,
    DeviceDma,
    DeviceInfo,
    DeviceMap,
    DeviceQuery,
    DmaArea,
    EndpointClose,
    EndpointCreate,
    Entropy,
    EntropyDraw,
    EventKind,
    Exit,
    Fence,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    NewLink,
    Notify,
    Now,
    PeerGone,
    PeerIdentity,
    Pid,
    PolicyRaise,
    PolicyRead,
    PolicyWord,
    PortClose,
    PortDial,
    PortPeer,
    PortSend,
    QosClass,
    Recv,
    ReplyRecv,
    Rights,
    SecretBackend,
    SecretQuery,
    SecretRead,
    SecretReplace,
    Send,
    Sender,
    ServiceId,
    SetTaskQos,
    SleepUntil,
    Slot,
    Spawn,
    SpawnLastError,
    SpawnReason,
    Status,
    StreamRole,
    TaskCounters,
    TaskQos,
    TaskStats,
    TaskTable,
    Trap,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
    Wait,
    service_id,
)
from nexus.abi import (
    MESSAGE_KIND_RESERVED as RESERVED,
)
from nexus.kernel.core import (
    DEVICE_SIZE,
    ENDPOINT_SIZE,
    EXIT_CODE_MAX,
    LINK_END_SIZE,
    OBJECT_ALIGN,
    SLOT_SIZE,
    Account,
    CapTable,
    Held,
    OwnerShare,
    check_console,
    check_data,
    check_derived,
    check_terms,
    derive,
    end_coroutine,
    exit_code,
    moved,
    page_round,
)
from nexus.kernel.linux.devices import Block, Device, Registers, Source, Window
from nexus.kernel.linux.frames import (
    COOKIE_SIZE,
    DETACH,
    FRAME_ATTACH,
    FRAME_DETACH,
    FRAME_VOID,
    RECEIVE_SIZE,
    TRAILER_SIZE,
    VOID,
    Trailer,
    pack_attach,
    pack_trailer,
    unpack_attach,
    unpack_trailer,
)
from nexus.kernel.linux.identity import (
    CREDENTIALS,
    EPOCH,
    POLICY,
    IdentityView,
    unpack_policy,
)
from nexus.kernel.linux.native import (
    F_SEAL_FUTURE_WRITE,
    MEMBARRIER_GLOBAL_EXPEDITED,
    MEMBARRIER_REGISTER_GLOBAL_EXPEDITED,
    MSG_CMSG_CLOEXEC,
    SO_COOKIE,
    SO_PEEK_OFF,
    map_read_only,
    map_writable,
    membarrier,
    timerfd,
    timerfd_arm,
)
from nexus.kernel.linux.objects import (
    KERNEL_FRAME,
    WITH_CAP,
    Endpoint,
    HolderLink,
    Named,
    OwnerLink,
    Vmo,
    adopt,
    make_pair,
)
from nexus.kernel.linux.outside import (
    ROOM,
    TCP_PEER,
    Door,
    OutsideLink,
    PeerLink,
    SignalLink,
    StreamLink,
)
from nexus.kernel.linux.secrets import Holding
from nexus.kernel.linux.truesize import Truesize

OWNED_LINKS_MAX: Final = 512  # far ends of one task: they take descriptors and no slots
WAIT_SETS_MAX: Final = 4  # sets of several endpoints kept ready for waiting
FRAMES_PER_TURN: Final = 64  # refused or kernel frames taken from a link before others' turn
EVENTS_PER_POLL: Final = 64
CALLERS_PER_TURN: Final = 2 * PORT_PEERS_MAX  # taken from a port's door before others' turn
ROOT_UID: Final = 0
INIT_ID: Final = service_id(INIT_NAME)
NOTES_MAX: Final = 256  # events a task may have recorded about refusals; then it only counts

# Descriptors of a service that no slot and no link names: 0-2, kernel channel, timer, the idle
# set, sets of several endpoints. And of each port: the door, its callers, one to be turned away.
PORT_DESCRIPTORS: Final = (PORTS_MAX + STREAM_PORTS_MAX) * (PORT_PEERS_MAX + 2)
FIXED_DESCRIPTORS: Final = 6 + WAIT_SETS_MAX + PORT_DESCRIPTORS
SPARE_DESCRIPTORS: Final = 16
DESCRIPTORS_MAX: Final = SLOTS_MAX + FIXED_DESCRIPTORS + OWNED_LINKS_MAX + SPARE_DESCRIPTORS


RECEIVE_STEP: Final = 100_000_000  # nanoseconds; SO_RCVTIMEO, set once per link
RECEIVE_TIMEOUT: Final = struct.pack("@ll", 0, RECEIVE_STEP // 1000)  # struct timeval
RECEIVE_FAR: Final = 2 * RECEIVE_STEP  # a later deadline waits in recvmsg, a nearer in select
SELECT_MAX: Final = 1024  # FD_SETSIZE
ROOM_STEP: Final = 1  # milliseconds between two looks for room in a full link

assert DESCRIPTORS_MAX <= SELECT_MAX, "select takes no higher descriptors"

# Room for credentials and one descriptor exactly; a second one would fit CMSG_SPACE's padding.
CONTROL_SIZE: Final = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_LEN(4)
# Room for credentials only: a look then says CTRUNC exactly when a descriptor is attached.
LOOK_SIZE: Final = socket.CMSG_SPACE(CREDENTIALS.size)

WAITING: Final = MSG_CMSG_CLOEXEC
AT_ONCE: Final = MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
LOOKING: Final = AT_ONCE | socket.MSG_PEEK
DONT_WAIT: Final = int(socket.MSG_DONTWAIT)
CLEAN: Final = MSG_CMSG_CLOEXEC  # what the kernel reports about a whole message

SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Of living memory: its length is fixed, nobody maps it to write any more, and so it stays.
SHARED_SEALS: Final = (
    F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
)
DESCRIPTOR: Final = struct.Struct("=i")

# What a send to a peer that closed or died may say.
GONE_ERRORS: Final = frozenset((errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN))

SHORT_ERRORS: Final = frozenset(
    (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    )
)

_new_message: Final = tuple.__new__  # a third of the time of Message(...)

Ancillary = list[tuple[int, int, bytes]]
Handler = Callable[[Any], Any]


class Port(Protocol):
    """How a driver reaches the kernel's own side, which init's process holds."""

    fileno: int  # readable when `serve` has something to do
    root: bool

    def serve(self) -> None:
        """Do what waits; never blocks."""

    def console(self, line: str, evidence: bytes) -> None:
        """Print a checked line. Refuses: QueueFull."""

    def set_qos(self, pid: Pid, raw: int) -> None:
        """Refuses as SetTaskQos."""

    def dial(self, name: str) -> socket.socket:
        """A socket on its way to the address that a grant of this name says. Refuses: NoSpace,
        TimedOut, PermissionDenied."""

    def note(self, kind: EventKind, fields: Mapping[str, object]) -> None:
        """Record an event, if there is room."""

    def confirm(self, pid: int) -> None:
        """Nothing that a dead task sent is queued here any more."""

    def trace(self, trap: type, status: int, size: int) -> None:
        """Record a trap."""

    def flush(self) -> None:
        """Hand over recorded traps before a wait."""


class MappedClock:
    """Linux's clocks, which CPython reads without a system call where there is a vDSO."""

    __slots__ = ("monotonic", "wall")

    def __init__(self) -> None:
        self.monotonic = cast(Callable[[], Nanos], monotonic_ns)
        self.wall: Callable[[], int] = time_ns


class Exited(Exception):
    """The task has ended: an exit code, or the signal that ended it."""

    def __init__(self, code: int, signal: int = 0) -> None:
        super().__init__(f"exit {code}, signal {signal}")
        self.code = code
        self.signal = signal


class Handlers(dict[type, Handler]):
    """What to do for each trap. A subclass of a trap is that trap."""

    def __missing__(self, kind: type) -> Handler:
        for parent in kind.__mro__:
            if parent in self:
                self[kind] = self[parent]
                return self[parent]
        raise TypeError(f"{kind.__name__} is no trap")


class Driver:
    """Holds a task's table, endpoints and accounts, and runs its coroutine."""

    __slots__ = (
        "_armed",
        "_careful",
        "_cells",
        "_epoch",
        "_fences",
        "_fired",
        "_idle",
        "_next_link",
        "_notes",
        "_outside",
        "_port",
        "_received",
        "_received_size",
        "_receivers",
        "_refused",
        "_senders",
        "_sent",
        "_sent_size",
        "_tight",
        "_timeouts",
        "_timer",
        "_trace",
        "_truesize",
        "_turn",
        "_undrained",
        "_view",
        "_viewed",
        "_vmo_size",
        "_wait_sets",
        "budget",
        "control",
        "endpoint",
        "handlers",
        "links",
        "me",
        "secret",
        "share",
        "table",
        "wall",
    )

    def __init__(
        self,
        *,
        me: Sender,
        view: IdentityView,
        port: Port,
        share: OwnerShare,
        budget: Account,
        truesize: Truesize,
        trace: bool,
    ) -> None:
        self.me = me
        self.share = share
        self.budget = budget
        self.table: CapTable[Named] = CapTable()
        self.links: dict[int, OwnerLink] = {}  # by id: links into own endpoints and ports
        self.control: Slot | None = None  # of the link to the spawner
        self.endpoint = Slot(-1)  # of the task's first endpoint
        self.secret: Holding | None = None
        self.wall = port.root
        self._view = view
        self._cells = view.cells
        self._epoch = self._cells[EPOCH]
        self._port = port
        self._truesize = truesize
        self._trace = trace
        self._next_link = 1
        self._outside = 0  # of `links`, those that no task holds
        self._timer = timerfd()
        self._armed: int = NEVER
        self._idle = select.epoll(flags=select.EPOLL_CLOEXEC)
        for descriptor in (self._timer, port.fileno):
            self._idle.register(descriptor, select.EPOLLIN)
        self._wait_sets: dict[tuple[Slot, ...], select.epoll] = {}
        self._turn = 0  # which of several sources is looked at first
        self._fired = False  # the timer was seen to have fired
        # Slots as the hot paths find them; an entry is dropped whenever its slot changes.
        self._senders: dict[int, HolderLink] = {}
        self._receivers: dict[int, Endpoint] = {}
        self._tight = False  # a capability might not fit: look before taking a message
        self._careful = trace  # tight, tracing, or a dead task's messages to be counted
        # Dead tasks whose queued messages are not all received: bytes left, by descriptor.
        self._undrained: dict[int, dict[int, int]] = {}
        self._notes = 0
        self._sent = 0
        self._sent_size = 0
        self._received = 0
        self._received_size = 0
        self._timeouts = 0
        self._refused = {"identity": 0, "several_caps": 0, "oversize": 0, "excess_link": 0}
        self._vmo_size = 0
        self._viewed: list[Vmo] = []  # no slot holds them any more, a view does
        self._fences = self._join_barriers()
        self.handlers = Handlers(
            {
                ReplyRecv: self._reply_recv,
                Call: self._call,
                Recv: self._recv,
                Send: self._send,
                EndpointCreate: self._endpoint_create,
                EndpointClose: self._endpoint_close,
                LinkCreate: self._link_create,
                CapClone: self._cap_clone,
                CapDerive: self._cap_derive,
                CapClose: self._cap_close,
                CapQuery: self._cap_query,
                VmoCreate: self._vmo_create,
                VmoWrite: self._vmo_write,
                VmoSeal: self._vmo_seal,
                VmoMap: self._vmo_map,
                VmoShare: self._vmo_share,
                VmoWatch: self._vmo_watch,
                Fence: self._fence,
                ClockMap: self._clock_map,
                Spawn: self._root_only,
                SpawnLastError: self._spawn_last_error,
                Wait: self._root_only,
                Kill: self._root_only,
                TaskTable: self._root_only,
                AuditLog: self._root_only,
                Entropy: self._root_only,
                Exit: self._exit,
                TaskQos: self._task_qos,
                SetTaskQos: self._set_task_qos,
                Now: self._now,
                SleepUntil: self._sleep_until,
                ConsoleWrite: self._console_write,
                TaskStats: self._task_stats,
                PolicyRead: self._policy_read,
                PolicyRaise: self._root_only,
                BootMemoryRead: self._root_only,
                BootMemoryReplace: self._root_only,
                Notify: self._root_only,
                PortSend: self._port_send,
                PortClose: self._port_close,
                PortPeer: self._port_peer,
                PortDial: self._port_dial,
                BusScan: self._root_only,
                DeviceQuery: self._device_query,
                DeviceMap: self._device_map,
                DeviceDma: self._device_dma,
                BlockRead: self._block_read,
                BlockWrite: self._block_write,
                BlockFlush: self._block_flush,
                EntropyDraw: self._entropy_draw,
                SecretQuery: self._secret_query,
                SecretRead: self._secret_read,
                SecretReplace: self._secret_replace,
            }
        )

    # ------------------------------------------------------------------ the loop

    def run(self, coroutine: Coroutine[Trap[Any], Any, int | None]) -> tuple[int, int]:
        """Drive a coroutine to its end: exit code and signal. A fault of the task propagates."""
        try:
            if self._trace or self._port.root:
                self._drive_watched(coroutine)
            self._drive(coroutine)
        except Exited as exited:
            end_coroutine(coroutine)
            return exit_code(exited.code), exited.signal
        except StopIteration as stop:
            return exit_code(stop.value), 0

    def _drive(self, coroutine: Coroutine[Trap[Any], Any, int | None]) -> NoReturn:
        resume, throw, handlers = coroutine.send, coroutine.throw, self.handlers
        reply_recv, call = handlers[ReplyRecv], handlers[Call]
        trap = resume(None)
        while True:
            kind = type(trap)
            try:
                if kind is ReplyRecv:
                    result = reply_recv(trap)
                elif kind is Call:
                    result = call(trap)
                else:
                    result = handlers[kind](trap)
            except AbiError as refusal:
                trap = throw(refusal)
            except OSError as error:
                trap = throw(_closed_set(error))
            else:
                trap = resume(result)

    def _drive_watched(self, coroutine: Coroutine[Trap[Any], Any, int | None]) -> NoReturn:
        """The same loop with traces, and for root with the kernel's work between traps."""
        resume, throw, handlers, port = coroutine.send, coroutine.throw, self.handlers, self._port
        trap = resume(None)
        while True:
            if port.root:
                port.serve()
            status = 0
            result: Any = None
            refusal: AbiError | None = None
            try:
                result = handlers[type(trap)](trap)
            except AbiError as error:
                refusal = error
            except OSError as error:
                refusal = _closed_set(error)
            if refusal is not None:
                status = int(refusal.status)
            if self._trace:
                size = 0
                if isinstance(result, Message):
                    size = len(result.data)
                elif isinstance(trap, (Send, PortSend)) and status == 0:
                    size = len(trap.data)
                port.trace(type(trap), status, size)
            trap = throw(refusal) if refusal is not None else resume(result)

    def close(self) -> None:
        """Give every descriptor back: for the root task, whose process goes on."""
        for slot in list(self.table.slots()):
            if slot in self.table.entries:
                self.drop(slot)
        for wait_set in self._wait_sets.values():
            wait_set.close()
        self._idle.close()
        os.close(self._timer)

    # ------------------------------------------------------------------ slots

    def put(self, named: Named, rights: Rights, *, asked: int | None = None) -> Slot:
        """Fill the lowest free slot and charge for it. Refuses: NoSpace (slots, budget)."""
        self.check_room()
        cost = SLOT_SIZE if self.table.aliases(named) else SLOT_SIZE + _cost(named)
        align = PAGE_SIZE if isinstance(named, Vmo) else OBJECT_ALIGN
        self._charge(cost, align, asked)
        slot = self.table.set(named, rights)
        self._measure()
        return slot

    def check_room(self) -> None:
        """See that a slot is free. Refuses: NoSpace."""
        if self.table.full:
            raise AbiError(Status.NO_SPACE, "every slot is used")

    def _charge(self, size: int, align: int = OBJECT_ALIGN, asked: int | None = None) -> None:
        try:
            self.budget.charge(size, align, asked=asked)
        except AbiError:
            self._note(EventKind.HEAP, self.budget.fields())
            raise

    def _measure(self) -> None:
        """Note whether any capability that might arrive would fit."""
        largest = SLOT_SIZE + LINK_END_SIZE + VMO_SIZE_MAX
        self._tight = self.table.full or self.budget.free < largest
        self._careful = self._tight or self._trace or bool(self._undrained)

    def _empty(self, slot: Slot) -> Named:
        """Empty a slot; what it named stays open."""
        named = self.table.take(slot).object
        _ = self._senders.pop(slot, None)
        _ = self._receivers.pop(slot, None)
        cost = SLOT_SIZE
        if not self.table.aliases(named) and not (isinstance(named, Vmo) and named.views):
            cost += _cost(named)
        self.budget.refund(cost)
        self._measure()
        return named

    def drop(self, slot: Slot) -> None:
        """Empty a slot, and end what it named if that was the last one."""
        named = self._empty(slot)
        if self.table.aliases(named):
            return
        if isinstance(named, Endpoint):
            self._close_endpoint(named)
        elif isinstance(named, HolderLink):
            named.sock.close()
        elif isinstance(named, Vmo):
            self._close_vmo(named)
        else:
            named.close()

    def _close_vmo(self, vmo: Vmo) -> None:
        """No slot holds it any more; a view that is out keeps the memory."""
        os.close(vmo.descriptor)
        vmo.descriptor = -1
        if vmo.views:
            self._viewed.append(vmo)
        else:
            self._vmo_size -= vmo.length

    def _let_go(self, end: socket.socket) -> None:
        """Close our copy of an end that another task has now: a copy kept would hide from its
        peer that the task died."""
        end.close()

    def _sender_link(self, slot: Slot) -> HolderLink:
        held = self.table.require(slot, Rights.SEND)
        assert isinstance(held.object, HolderLink), "only links have SEND"
        self._senders[slot] = held.object
        return held.object

    def _endpoint(self, slot: Slot) -> Endpoint:
        held = self.table.require(slot, Rights.RECV)
        assert isinstance(held.object, Endpoint), "only endpoints have RECV"
        if held.object.closed:
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"the endpoint of slot {slot} is closed")
        self._receivers[slot] = held.object
        return held.object

    def _no_inbox(self, slot: Slot, link: LinkId) -> AbiError:
        """Why an endpoint's slot and a link do not go together."""
        if isinstance(self._endpoint(slot), Door):
            return AbiError(Status.INVALID_ARGUMENT, "no answer comes by a port")
        return AbiError(Status.NO_SUCH_ENDPOINT, f"no link {link} at slot {slot}")

    # ------------------------------------------------------------------ the fast paths

    def _call(self, trap: Call) -> Message:
        trap.sent = False
        inbox = self.links.get(trap.link)
        if inbox is None or inbox.source != trap.inbox:
            raise self._no_inbox(trap.inbox, trap.link)
        link = self._senders.get(trap.slot)
        if link is None:
            link = self._sender_link(trap.slot)
        data = trap.data
        size = len(data)
        if not 0 < size <= MESSAGE_SIZE_MAX or data[0] >= RESERVED:
            _ = check_data(data)
        queue = link.queue
        if len(queue) >= link.depth or link.queued_size + size > link.size:
            link.make_room(size)
        try:
            _ = link.send(data, DONT_WAIT)
        except OSError as error:
            raise self._send_refusal(error) from None
        queue.append(size)
        link.queued_size += size
        link.used = True
        trap.sent = True
        self._sent += 1
        self._sent_size += size
        return self._receive_one(inbox, trap.deadline)

    def _receive_one(self, link: OwnerLink, deadline: int) -> Message:
        """Wait for a message of one link: in recvmsg while the deadline is far."""
        if deadline - monotonic_ns() < RECEIVE_FAR or self._careful:
            return self._receive_near(link, deadline)
        try:
            data, ancillary, flags, _ = link.recvmsg(RECEIVE_SIZE, CONTROL_SIZE, WAITING)
        except (BlockingIOError, ConnectionResetError):
            return self._receive_near(link, deadline)
        if flags == CLEAN and len(ancillary) == 1 and self._cells[EPOCH] == self._epoch:
            sender = link.known.get(ancillary[0][2])
            size = len(data)
            if sender is not None and 0 < size <= MESSAGE_SIZE_MAX and data[0] < RESERVED:
                self._received += 1
                self._received_size += size
                # The tuple is what Message(...) makes, without its constructor.
                return _new_message(
                    Message, (data, sender, link.link, None, monotonic_ns(), link.source)
                )
        message = self._admit(link, data, ancillary, flags)
        return self._receive_near(link, deadline) if message is None else message

    def _reply_recv(self, trap: ReplyRecv) -> Message:
        sources = trap.sources
        endpoint = self._receivers.get(sources[0]) if len(sources) == 1 else None
        if endpoint is None:
            for slot in sources:
                endpoint = self._endpoint(slot)
        trap.reply_status = None
        if trap.slot is not None:
            slot = trap.slot
            data = trap.data
            try:
                size = len(data)
                link = self._senders.get(slot)
                if link is None:
                    link = self._sender_link(slot)
                if not 0 < size <= MESSAGE_SIZE_MAX or data[0] >= RESERVED:
                    _ = check_data(data)
                if len(link.queue) >= link.depth or link.queued_size + size > link.size:
                    link.make_room(size)
                try:
                    _ = link.send(data, DONT_WAIT)
                except OSError as error:
                    raise self._send_refusal(error) from None
            except AbiError as refusal:
                trap.reply_status = refusal.status
            else:
                link.queue.append(size)
                link.queued_size += size
                link.used = True
                self._sent += 1
                self._sent_size += size
        if endpoint is None or len(sources) != 1:
            return self._receive(sources, trap.deadline, MESSAGE_SIZE_MAX)
        return self._receive_from(endpoint, trap.deadline)

    def _receive_from(self, endpoint: Endpoint, deadline: int) -> Message:
        """One message of one endpoint, in rotation."""
        if self._careful:
            return self._receive((endpoint.slot,), deadline, MESSAGE_SIZE_MAX)
        rounds = 0
        while True:
            if endpoint.batch:
                link = endpoint.batch.pop()
            elif deadline < self._armed or deadline == NO_WAIT or rounds:
                self._poll(endpoint, deadline, rounds)
                rounds += 1
                continue
            else:
                events = endpoint.poll(-1, EVENTS_PER_POLL)
                found = endpoint.links.get(events[0][0]) if len(events) == 1 else None
                if found is None:
                    self._polled(endpoint, deadline, events)
                    rounds += 1
                    continue
                link = found
            try:
                data, ancillary, flags, _ = link.recvmsg(RECEIVE_SIZE, CONTROL_SIZE, AT_ONCE)
            except BlockingIOError:
                self._emptied(link)
                continue
            except ConnectionResetError:
                endpoint.batch.append(link)
                continue
            if flags == CLEAN and len(ancillary) == 1 and self._cells[EPOCH] == self._epoch:
                sender = link.known.get(ancillary[0][2])
                size = len(data)
                if sender is not None and 0 < size <= MESSAGE_SIZE_MAX and data[0] < RESERVED:
                    self._received += 1
                    self._received_size += size
                    return _new_message(
                        Message, (data, sender, link.link, None, monotonic_ns(), link.source)
                    )
            message = self._admit(link, data, ancillary, flags)
            if message is None:
                message = self._take(link)
            if message is not None:
                return message
            rounds += 1

    # ------------------------------------------------------------------ receiving

    def _recv(self, trap: Recv) -> Message:
        size_max = min(trap.size_max, MESSAGE_SIZE_MAX)
        if trap.link is None:
            if len(trap.sources) == 1 and size_max == MESSAGE_SIZE_MAX:
                endpoint = self._receivers.get(trap.sources[0])
                if endpoint is None:
                    endpoint = self._endpoint(trap.sources[0])
                return self._receive_from(endpoint, trap.deadline)
            return self._receive(trap.sources, trap.deadline, size_max)
        for slot in trap.sources:
            _ = self._endpoint(slot)
        owned = self.links.get(trap.link)
        if owned is None or owned.endpoint.slot not in trap.sources:
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"no link {trap.link} at these sources")
        if size_max == MESSAGE_SIZE_MAX:
            return self._receive_one(owned, trap.deadline)
        return self._receive_near(owned, trap.deadline, size_max)

    def _receive(self, sources: tuple[Slot, ...], deadline: int, size_max: int) -> Message:
        """One message of several endpoints, or with a look at each before it is taken."""
        if not sources:
            raise AbiError(Status.INVALID_ARGUMENT, "no endpoint to receive from")
        endpoints = [self._endpoint(slot) for slot in sources]
        if len(endpoints) == 1:
            poller = endpoints[0].epoll
        else:
            poller = self._wait_set(sources, endpoints)
            self._turn = (self._turn + 1) % len(endpoints)
            endpoints = endpoints[self._turn :] + endpoints[: self._turn]
        rounds = 0
        while True:
            rounds += 1
            begun = monotonic_ns()  # before the look: what comes after it is of the next
            self._fired = found = blocked = False
            for endpoint in endpoints:
                for link in self._ready(endpoint):
                    found = True
                    if not self._fits(link, size_max):
                        blocked = True
                        continue
                    message = self._take(link)
                    if message is not None:
                        return message
            if blocked:
                raise AbiError(Status.NO_SPACE, "no room for the capability of any message")
            late = self._fired or rounds > FRAMES_PER_TURN
            if deadline == NO_WAIT:
                if not found or late:
                    raise self._expired(deadline)
            elif late and begun >= deadline:
                raise self._expired(deadline)
            if not found:
                self._arm(deadline)
                self._port.flush()
                _ = poller.poll(-1, 1)

    def _wait_set(self, sources: tuple[Slot, ...], endpoints: list[Endpoint]) -> select.epoll:
        """The set that waits on several endpoints at once; a few are kept."""
        wait_set = self._wait_sets.get(sources)
        if wait_set is None:
            if len(self._wait_sets) == WAIT_SETS_MAX:
                self._wait_sets.pop(next(iter(self._wait_sets))).close()
            wait_set = select.epoll(flags=select.EPOLL_CLOEXEC)
            for endpoint in dict.fromkeys(endpoints):
                wait_set.register(endpoint.epoll.fileno(), select.EPOLLIN)
            self._wait_sets[sources] = wait_set
        return wait_set

    def _ready(self, endpoint: Endpoint) -> Iterator[OwnerLink]:
        """The links with something to take now, each once, in rotation: epoll puts what it
        reported at the end of its list. Serves the kernel and notes a fired timer on the way."""
        endpoint.batch.clear()
        seen: set[int] = set()
        while events := endpoint.epoll.poll(0, 1):
            descriptor = events[0][0]
            if descriptor in seen:
                return
            seen.add(descriptor)
            link = endpoint.links.get(descriptor)
            if link is not None:
                yield link
            elif descriptor == self._timer:
                self._fired = True
                self._disarm()
            else:
                _ = self._attend(endpoint, descriptor)

    def _poll(self, endpoint: Endpoint, deadline: int, rounds: int) -> None:
        """Wait until links of an endpoint are ready and make them its batch.

        Refuses: QueueEmpty, TimedOut.
        """
        if deadline == NO_WAIT:
            wait = 0
        else:
            wait = -1
            self._arm(deadline)
        if rounds > FRAMES_PER_TURN and monotonic_ns() >= deadline:
            raise self._expired(deadline)
        self._polled(endpoint, deadline, endpoint.poll(wait, EVENTS_PER_POLL))

    def _polled(self, endpoint: Endpoint, deadline: int, events: list[tuple[int, int]]) -> None:
        """Make a batch of what a poll found. Refuses: QueueEmpty, TimedOut."""
        links = endpoint.links
        ready = []
        fired = admitted = False
        for descriptor, _ in events:
            link = links.get(descriptor)
            if link is not None:
                ready.append(link)
            elif descriptor == self._timer:
                fired = True
                self._disarm()
            else:
                admitted |= self._attend(endpoint, descriptor)
        if ready:
            ready.reverse()
            endpoint.batch = ready
        elif admitted:
            return  # what the new callers have sent already wins over a past deadline
        elif deadline == NO_WAIT or (
            fired
            and monotonic_ns() >= deadline
            and not endpoint.poll(0, 1)  # the timer may be of an earlier deadline
        ):
            raise self._expired(deadline)

    def _attend(self, endpoint: Endpoint, descriptor: int) -> bool:
        """See to what is neither a link nor the timer: callers at a door, or the kernel.
        Returns whether there is a new caller."""
        if isinstance(endpoint, Door):
            listener = endpoint.listener
            if listener is not None and descriptor == listener.fileno():
                callers = len(endpoint.links)
                self._admit_callers(endpoint, listener)
                return len(endpoint.links) > callers
        self._port.serve()
        return False

    def _arm(self, deadline: int) -> None:
        """Let the timer fire at a deadline, unless it fires before that anyway."""
        if deadline < self._armed and deadline != NEVER:
            timerfd_arm(self._timer, deadline)
            self._armed = deadline

    def _disarm(self) -> None:
        """Take note that the timer fired."""
        try:
            _ = os.read(self._timer, 8)
        except BlockingIOError:
            return
        self._armed = NEVER

    def _expired(self, deadline: int) -> AbiError:
        """The refusal of a receive that found nothing in time."""
        if deadline == NO_WAIT:
            return AbiError(Status.QUEUE_EMPTY, "nothing is queued")
        self._timeouts += 1
        return AbiError(Status.TIMED_OUT, "the deadline has passed")

    def _receive_near(
        self, link: OwnerLink, deadline: int, size_max: int = MESSAGE_SIZE_MAX
    ) -> Message:
        """One message of one link, looked for without waiting and then waited for in select."""
        while True:
            if not self._fits(link, size_max):
                raise AbiError(Status.NO_SPACE, "no room for the capability of the message")
            begun = monotonic_ns()
            message = self._take(link)
            if message is not None:
                return message
            if self.links.get(link.link) is not link:
                raise AbiError(Status.NO_SUCH_ENDPOINT, f"link {link.link} is closed")
            if deadline == NO_WAIT or begun >= deadline:
                raise self._expired(deadline)
            self._port.flush()
            writes = isinstance(link, StreamLink) and link.awaits_writing
            self._wait_for(link.fileno, deadline, writes=writes)
            self._port.serve()

    def _wait_for(
        self, descriptor: int, deadline: int, step: int = -1, *, writes: bool = False
    ) -> None:
        """Wait until a descriptor is readable, or with `writes` writable, the kernel has news, a
        deadline passes, or for `step` milliseconds."""
        if step < 0 and descriptor < SELECT_MAX and not (self._port.root or writes):
            left = max(deadline - monotonic_ns(), 0) / 1_000_000_000
            _ = select.select((descriptor, self._port.fileno), (), (), left)
            return
        self._arm(deadline)
        self._idle.register(descriptor, select.EPOLLIN | (select.EPOLLOUT if writes else 0))
        try:
            events = self._idle.poll(step / 1000 if step >= 0 else -1)
        finally:
            self._idle.unregister(descriptor)
        if any(number == self._timer for number, _ in events):
            self._disarm()

    def _fits(self, link: OwnerLink, size_max: int) -> bool:
        """Whether the message at hand may be taken: look at it without taking it, where a
        capability might not fit or the caller's buffer is small.

        Refuses: InvalidArgument (larger than `size_max`).
        """
        if not self._tight and size_max == MESSAGE_SIZE_MAX:
            return True
        try:
            data, ancillary, flags, _ = link.recvmsg(RECEIVE_SIZE, LOOK_SIZE, LOOKING)
        except (BlockingIOError, ConnectionResetError):
            return True
        if isinstance(link, OutsideLink):
            if size_max < len(data) <= MESSAGE_SIZE_MAX:
                raise AbiError(Status.INVALID_ARGUMENT, f"the message is of {len(data)} bytes")
            return True
        if not data or not ancillary or data[0] >= RESERVED:
            return True
        # Not `_identify`: a link whose sender is known skips `_judge`, which marks it spoken.
        if flags & socket.MSG_TRUNC or self._sender_of(link, ancillary[0][2]) is None:
            return True  # to be refused when taken
        size = len(data)
        carries = bool(flags & socket.MSG_CTRUNC)
        if carries:
            size -= TRAILER_SIZE
        if size > size_max:
            raise AbiError(Status.INVALID_ARGUMENT, f"the message is of {size} bytes")
        return not carries or self._has_room(data)

    def _has_room(self, data: bytes) -> bool:
        """Whether the capability that comes with `data` fits the table and the budget."""
        trailer = unpack_trailer(data)
        if trailer is None:
            return True  # to be refused when taken
        size = trailer.length if trailer.kind is CapKind.VMO else LINK_END_SIZE
        return not self.table.full and size + SLOT_SIZE <= self.budget.free

    def _take(self, link: OwnerLink) -> Message | None:
        """The next message of a link, None if there is none now. Refuses: PeerGone."""
        for _ in range(FRAMES_PER_TURN):
            if self.links.get(link.link) is not link:
                return None
            try:
                data, ancillary, flags, _ = link.recvmsg(RECEIVE_SIZE, CONTROL_SIZE, AT_ONCE)
            except BlockingIOError:
                self._emptied(link)
                return None
            except ConnectionResetError:
                continue
            message = self._admit(link, data, ancillary, flags)
            if message is not None:
                return message
        return None

    def _admit(
        self, link: OwnerLink, data: bytes, ancillary: Ancillary, flags: int
    ) -> Message | None:
        """Judge what was taken from a link; None if it was not a message for the task.

        Refuses: PeerGone.
        """
        if isinstance(link, OutsideLink):
            return self._admit_outside(link, data, flags)
        if self._cells[EPOCH] == self._epoch:
            return self._judge(link, data, ancillary, flags)
        self._epoch = self._cells[EPOCH]
        for owned in self.links.values():
            owned.known.clear()
        try:
            return self._judge(link, data, ancillary, flags)
        finally:
            # Only now: what init says about dead tasks may free the row this message needed.
            self._port.serve()

    def _admit_outside(self, link: OutsideLink, data: bytes, flags: int) -> Message | None:
        """Judge what came from outside: what is no message ends the connection.

        Refuses: PeerGone.
        """
        if isinstance(link, StreamLink):
            return self._admit_stream(link, data, flags)
        reason = None
        if flags & socket.MSG_CTRUNC:
            reason = "several_caps"
        elif flags & socket.MSG_TRUNC or len(data) > MESSAGE_SIZE_MAX:
            reason = "oversize"
        if reason is None and data:
            return self._message(link, link.stamp, data, None)._replace(source=link.endpoint.slot)
        if reason is not None:
            self._refuse(reason, link, [])
        self.disown(link)
        raise PeerGone(link.link)

    def _admit_stream(self, link: StreamLink, data: bytes, flags: int) -> Message | None:
        """Judge what a stream port's connection had: bytes, room, or its end.

        Refuses: PeerGone.
        """
        if self.links.get(link.link) is not link:
            return None  # it gave its place to a caller meanwhile
        if link.lingers_until is not None:
            self.disown(link)
            return None
        if data or flags & ROOM:
            return self._message(link, link.stamp, data, None)._replace(source=link.endpoint.slot)
        number = link.link
        self._end_stream(link)
        raise PeerGone(number)

    def _end_stream(self, link: StreamLink) -> None:
        """Let the task know no more of a connection; what is queued is still sent for a while,
        under a number that it is never told."""
        if not link.linger(monotonic_ns()):
            self.disown(link)
            return
        del self.links[link.link]
        link.link = self._new_link()
        self.links[link.link] = link

    def _judge(
        self, link: OwnerLink, data: bytes, ancillary: Ancillary, flags: int
    ) -> Message | None:
        credentials: bytes | None = None
        descriptors: list[int] = []
        for _, kind, content in ancillary:
            if kind == socket.SCM_CREDENTIALS and credentials is None:
                credentials = content
            elif kind == socket.SCM_RIGHTS:
                whole = len(content) - len(content) % DESCRIPTOR.size
                descriptors += [number for (number,) in DESCRIPTOR.iter_unpack(content[:whole])]
        if credentials is None and not data:
            self._gone(link)
            return None
        fresh, link.fresh = link.fresh, False
        sender = None if credentials is None else self._identify(link, credentials)
        link.spoken |= not data or data[0] < RESERVED
        # Not before the sender is known: the confirmation may free its row.
        self._drained(link, len(data))
        reason = None
        if sender is None:
            reason = "identity"
        elif flags & socket.MSG_CTRUNC or len(descriptors) > 1:
            reason = "several_caps"
        elif flags & socket.MSG_TRUNC or not data:
            reason = "oversize"
        elif data[0] >= RESERVED:
            if not link.spoken:
                link.known.clear()  # a message of a known sender may skip what marks it spoken
            self._kernel_frame(link, sender, data, descriptors, fresh=fresh)
            return None
        elif descriptors:
            return self._accept(link, sender, data, descriptors[0])
        elif len(data) > MESSAGE_SIZE_MAX:
            reason = "oversize"
        if reason is not None or sender is None:
            self._refuse(reason or "identity", link, descriptors)
            return None
        return self._message(link, sender, data, None)

    def _message(self, link: OwnerLink, sender: Sender, data: bytes, cap: Slot | None) -> Message:
        self._received += 1
        self._received_size += len(data)
        now = Nanos(monotonic_ns())
        return Message(data, sender, link.link, cap, now, link.source)

    def _identify(self, link: OwnerLink, credentials: bytes) -> Sender | None:
        sender = link.known.get(credentials)
        if sender is None:
            sender = self._sender_of(link, credentials)
            if sender is not None:
                link.known[credentials] = sender
        return sender

    def _sender_of(self, link: OwnerLink, credentials: bytes) -> Sender | None:  # noqa: ARG002
        """Who sent a message: asked of the kernel's stamp alone, not of the link it came by."""
        return self._view.sender_of(credentials)

    def _refuse(self, reason: str, link: OwnerLink, descriptors: list[int]) -> None:
        """Drop a message that breaks the rules, and count it."""
        for descriptor in descriptors:
            os.close(descriptor)
        self._refused[reason] += 1
        self._note(EventKind.REFUSED, {"reason": reason, "link": int(link.link)})

    def _note(self, kind: EventKind, fields: Mapping[str, object]) -> None:
        if self._notes < NOTES_MAX:
            self._notes += 1
            self._port.note(kind, fields)

    def _accept(
        self, link: OwnerLink, sender: Sender, data: bytes, descriptor: int
    ) -> Message | None:
        """A message with one capability: classify the descriptor itself and fill a slot."""
        trailer = unpack_trailer(data)
        if trailer is None or len(data) > MESSAGE_SIZE_MAX + TRAILER_SIZE:
            self._refuse("several_caps" if trailer is None else "oversize", link, [descriptor])
            return None
        named = self._classify(descriptor, trailer)
        if named is None:
            self._refuse("several_caps", link, [descriptor])
            return None
        try:
            slot = self.put(named, Rights.SEND if isinstance(named, HolderLink) else Rights.MAP)
        except AbiError:
            # Not reached while `_fits` looks first; a capability without a slot is not kept.
            if isinstance(named, HolderLink):
                named.sock.close()
            else:
                os.close(named.descriptor)
            self._refuse("several_caps", link, [])
            return None
        if isinstance(named, Vmo):
            self._vmo_size += named.length
        return self._message(link, sender, data[:-TRAILER_SIZE], slot)

    def _classify(self, descriptor: int, trailer: Trailer) -> HolderLink | Vmo | None:
        """What a received descriptor is, by what the kernel says about it."""
        if _is_link(descriptor):
            end = adopt(descriptor)
            link = HolderLink(end, trailer.owner, trailer.terms, self._truesize)
            link.attached = trailer.attached
            self._localise(link)
            if link.local is not None and link.local.spoken:
                # Our copy of a near end that is in use would hide its holder's death from us;
                # a driver derives a fresh link from a used one.
                _ = end.detach()
                return None
            return link
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            return None  # no memory object
        sealed = seals & SEALS == SEALS
        shared = not sealed and seals & SHARED_SEALS == SHARED_SEALS
        length = os.lseek(descriptor, 0, os.SEEK_END)
        if not (sealed or shared) or not 0 < length <= VMO_SIZE_MAX or length != page_round(length):
            return None
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
            return None  # nothing maps it
        return Vmo(descriptor, length, sealed=sealed, shared=shared)

    # ------------------------------------------------------------------ the kernel's own frames

    def _kernel_frame(
        self,
        link: OwnerLink,
        sender: Sender,
        data: bytes,
        descriptors: list[int],
        *,
        fresh: bool,
    ) -> None:
        if data[0] == FRAME_ATTACH and descriptors:
            asked = unpack_attach(data)
            if asked is not None and _is_link(descriptors[0]):
                self._attach(link, sender, *asked, adopt(descriptors[0]))
                return
        elif data[0] == FRAME_VOID and fresh and not descriptors:
            link.void = True
            return
        self._refuse("excess_link", link, descriptors)

    def _attach(
        self,
        parent: OwnerLink,
        sender: Sender,
        terms: LinkTerms,
        cookie: bytes,
        far: socket.socket,
    ) -> None:
        """Let a derived link join, if its parent's terms and this task's share allow it."""
        if not self._may_attach(parent, terms):
            far.close()
            self._refuse("excess_link", parent, [])
            return
        try:
            owned = self.own(parent.endpoint, terms, far)
        except AbiError:
            far.close()
            self._refuse("excess_link", parent, [])
            self._detach(parent)
            return
        owned.parent = parent
        owned.maker = sender
        if sender.service == INIT_ID:
            # Believed of init alone: a lie would make a link to others look like one to us.
            owned.cookie = cookie
        parent.attached += 1
        for marks in self._undrained.values():
            unread = owned.unread_size()
            if unread:
                marks[owned.fileno] = unread

    def _may_attach(self, parent: OwnerLink, terms: LinkTerms) -> bool:
        """Whether the holder of a link may derive another one of these terms."""
        if parent.attached >= parent.delegations:
            return False
        if parent.managed:
            return True
        try:
            check_derived(terms, LinkTerms(parent.depth, parent.size, parent.delegations))
        except AbiError:
            return False
        return True

    def own(self, endpoint: Endpoint, terms: LinkTerms, far: socket.socket) -> OwnerLink:
        """Let a far end join an endpoint. Refuses: NoSpace (share, links)."""
        if len(self.links) - self._outside >= OWNED_LINKS_MAX:
            raise AbiError(Status.NO_SPACE, f"{OWNED_LINKS_MAX} links lead here")
        self.share.size.take(terms.size)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, RECEIVE_TIMEOUT)
        owned = OwnerLink(far, self._new_link(), endpoint, terms)
        endpoint.add(owned)
        self.links[owned.link] = owned
        return owned

    def _new_link(self) -> LinkId:
        number, self._next_link = self._next_link, self._next_link + 1
        return LinkId(number)

    def disown(self, link: OwnerLink) -> None:
        """Close a far end and give back what it had reserved."""
        self._emptied(link)
        link.endpoint.remove(link)
        del self.links[link.link]
        link.close()
        if isinstance(link, OutsideLink):
            self._outside -= 1
        self.share.size.give(link.size)
        parent = link.parent
        if parent is not None and self.links.get(parent.link) is parent:
            parent.attached -= 1
            self._detach(parent)

    def _detach(self, parent: OwnerLink) -> None:
        """Tell the holder of a link that one of its delegations came back."""
        try:
            _ = parent.sock.send(DETACH, DONT_WAIT)
        except OSError:
            return  # its holder is gone, or reads nothing: it has no use for the delegation

    def _gone(self, link: OwnerLink) -> None:
        """The holder closed or died, and everything it had sent has been taken.

        Refuses: PeerGone, unless nobody ever had the link.
        """
        void = link.void
        self.disown(link)
        if not void:
            raise PeerGone(link.link)

    # ------------------------------------------------------------------ the world outside

    def open_port(
        self, name: str, listening: socket.socket | None, role: StreamRole | None = None
    ) -> Slot:
        """Give a port the lowest free slot. Its socket does not block; root may call, and the
        user who runs init, whose child this is. Refuses: NoSpace."""
        uids = frozenset((ROOT_UID, self._view.uid_of(os.getppid())))
        return self.place(Door(name, listening, uids, role), rights=Rights.RECV)

    def hear_signals(self, link: SignalLink) -> None:
        """Let the signals that wait for the root task join its endpoint."""
        self._join_outside(link)

    def _join_outside(self, link: OutsideLink) -> None:
        link.endpoint.add(link)
        self.links[link.link] = link
        self._outside += 1
        if isinstance(link, StreamLink):
            link.interest()

    def _admit_callers(self, door: Door, listener: socket.socket) -> None:
        """Give those who wait at a door a connection, or turn them away."""
        for _ in range(CALLERS_PER_TURN):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # Linux itself is short of something; the caller waits, and is asked in again.
                self._refused["excess_link"] += 1
                return
            identity = _caller_of(door, sock)
            uid = identity.uid
            self._end_lingering(door)
            if not self._may_call(door, uid):
                self._turn_away(door, sock, "identity", uid)
            elif not self._room_for_caller(door):
                self._turn_away(door, sock, "excess_link", uid)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, RECEIVE_TIMEOUT)
                self._join_outside(door.caller(sock, self._new_link(), identity))

    def _may_call(self, door: Door, uid: int) -> bool:
        """Whether a user gets a connection: asked of Linux's stamp on the connection."""
        return uid in door.uids or door.role is StreamRole.TCP

    def _end_lingering(self, door: Door) -> None:
        """End what only lingers: where its time is over, and where its place is needed."""
        lingering = [
            (link.lingers_until, link)
            for link in door.links.values()
            if isinstance(link, StreamLink) and link.lingers_until is not None
        ]
        lingering.sort(key=lambda each: each[0])
        now = monotonic_ns()
        for until, link in lingering:
            if now >= until or len(door.links) >= PORT_PEERS_MAX:
                self.disown(link)

    def _room_for_caller(self, door: Door) -> bool:
        return len(door.links) < PORT_PEERS_MAX

    def _turn_away(self, door: Door, sock: socket.socket, reason: str, uid: int) -> None:
        sock.close()
        self._refused[reason] += 1
        self._note(EventKind.REFUSED, {"reason": reason, "port": door.name, "uid": uid})

    def _door(self, slot: Slot) -> Door:
        door = self.table.get(slot).object
        if not isinstance(door, Door):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot} is no port")
        return door

    def _peer(self, door: Door, link: LinkId) -> PeerLink:
        peer = self.links.get(link)
        if not isinstance(peer, PeerLink) or peer.endpoint is not door:
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"no connection {link} of this port")
        return peer

    def _port_send(self, trap: PortSend) -> None:
        door = self._door(trap.port)
        size = len(trap.data)
        if not 0 < size <= MESSAGE_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"a message of {size} bytes")
        peer = self._peer(door, trap.link)
        if isinstance(peer, StreamLink):
            peer.write(trap.data)
            self._sent += 1
            self._sent_size += size
            return
        try:
            _ = peer.sock.send(trap.data, DONT_WAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno in GONE_ERRORS:
                raise AbiError(Status.NO_SUCH_ENDPOINT, "the peer has closed") from None
            # EAGAIN; ENOBUFS and ENOMEM are Linux's own want of room for it.
            raise AbiError(Status.QUEUE_FULL, os.strerror(error.errno or 0)) from None
        self._sent += 1
        self._sent_size += size

    def _port_close(self, trap: PortClose) -> None:
        peer = self._peer(self._door(trap.port), trap.link)
        if isinstance(peer, StreamLink):
            self._end_stream(peer)
        else:
            self.disown(peer)

    def _port_dial(self, trap: PortDial) -> LinkId:
        door = self._door(trap.port)
        if door.role is not StreamRole.DIAL:
            raise AbiError(Status.INVALID_ARGUMENT, f"the port {door.name} does not dial")
        self._end_lingering(door)
        if not self._room_for_caller(door):
            raise AbiError(Status.NO_SPACE, f"{PORT_PEERS_MAX} connections are live")
        sock = self._port.dial(door.name)
        link = StreamLink(sock, self._new_link(), door, TCP_PEER, dialled=True)
        self._join_outside(link)
        return link.link

    def _port_peer(self, trap: PortPeer) -> PeerIdentity:
        return self._peer(self._door(trap.port), trap.link).identity

    # ------------------------------------------------------------------ dead tasks

    def peer_dead(self, pid: int) -> None:
        """Init says that a task died: confirm when nothing it sent can be queued here."""
        marks = {}
        for link in self.links.values():
            unread = 0 if isinstance(link, OutsideLink) else link.unread_size()
            if unread:
                marks[link.fileno] = unread
        self._undrained[pid] = marks
        self._careful = True
        self._confirmable(pid)

    def _drained(self, link: OwnerLink, size: int) -> None:
        for pid in list(self._undrained):
            marks = self._undrained[pid]
            if link.fileno in marks:
                marks[link.fileno] -= size
                if marks[link.fileno] <= 0:
                    del marks[link.fileno]
                    self._confirmable(pid)

    def _emptied(self, link: OwnerLink) -> None:
        """Nothing is queued on a link now, or it is being closed."""
        for pid in list(self._undrained):
            if self._undrained[pid].pop(link.fileno, None) is not None:
                self._confirmable(pid)

    def _confirmable(self, pid: int) -> None:
        if not self._undrained[pid]:
            del self._undrained[pid]
            self._measure()
            self._port.confirm(pid)

    # ------------------------------------------------------------------ sending

    def _send(self, trap: Send) -> None:
        link = self._senders.get(trap.slot)
        if link is None:
            link = self._sender_link(trap.slot)
        data = trap.data
        size = check_data(data)
        if trap.move is not None:
            self._send_moving(link, data, trap.move, trap.deadline)
            return
        while True:
            self._await_room(link, size, trap.deadline)
            try:
                _ = link.send(data, DONT_WAIT)
                break
            except BlockingIOError as error:
                self._await_wall(link, trap.deadline, error)
            except OSError as error:
                raise self._send_refusal(error) from None
        link.sent(size)
        self._sent += 1
        self._sent_size += size

    def _await_room(self, link: HolderLink, size: int, deadline: int) -> None:
        """Wait until a message fits. Refuses: QueueFull, NoSpace (NO_WAIT), TimedOut,
        NoSuchEndpoint."""
        while True:
            try:
                link.make_room(size)
            except AbiError as refusal:
                gone = refusal.status is Status.NO_SUCH_ENDPOINT
                if gone or deadline == NO_WAIT or size > link.size:
                    raise
                self._await_step(link, deadline, refusal)
            else:
                return

    def _await_wall(self, link: HolderLink, deadline: int, error: OSError) -> None:
        """The kernel's own bound is narrower than the link's for this mix of sizes: wait."""
        refusal = self._send_refusal(error)
        if deadline == NO_WAIT:
            raise refusal
        self._await_step(link, deadline, refusal)

    def _await_step(self, link: HolderLink, deadline: int, refusal: AbiError) -> None:
        if monotonic_ns() >= deadline:
            self._timeouts += 1
            raise AbiError(Status.TIMED_OUT, str(refusal))
        self._port.flush()
        self._wait_for(link.sock.fileno(), deadline, ROOM_STEP)
        self._port.serve()
        if not self._drain_reverse(link):
            raise AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint closed")

    def _drain_reverse(self, link: HolderLink) -> bool:
        """Take the kernel frames that came back; False once the owner has closed."""
        for _ in range(FRAMES_PER_TURN):
            try:
                data, ancillary, _, _ = link.sock.recvmsg(RECEIVE_SIZE, CONTROL_SIZE, AT_ONCE)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not ancillary:
                return False
            sender: Sender | None = None
            for _, kind, content in ancillary:
                if kind == socket.SCM_CREDENTIALS:
                    sender = self._view.sender_of(content)
                elif kind == socket.SCM_RIGHTS and len(content) >= DESCRIPTOR.size:
                    os.close(DESCRIPTOR.unpack_from(content)[0])
            if sender is None or sender.service != link.owner or data[:1] != DETACH:
                self._refused["identity"] += 1
            elif data[0] == FRAME_DETACH and link.attached:
                link.attached -= 1
        return True

    def _send_refusal(self, error: OSError) -> AbiError:
        """The status of a failed send; nothing was sent."""
        if error.errno in GONE_ERRORS:
            return AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint closed")
        # EAGAIN, EMSGSIZE: the kernel's bound. ETOOMANYREFS, ENOBUFS: its own limits.
        return AbiError(Status.NO_SPACE, os.strerror(error.errno or 0))

    def _send_moving(
        self, link: HolderLink, data: bytes | bytearray, move: Slot, deadline: int
    ) -> None:
        held = self.table.get(move)
        named = held.object
        if named is link:
            raise AbiError(Status.INVALID_ARGUMENT, "a link does not move over itself")
        _ = moved(_kind(named), held.rights)
        if isinstance(named, Vmo) and not (named.sealed or named.shared):
            raise AbiError(Status.PERMISSION_DENIED, "an unsealed VMO does not move")
        self._await_room(link, len(data), deadline)
        if isinstance(named, Vmo):
            trailer = Trailer(CapKind.VMO, length=named.length)
            self._pass(link, data, trailer, named.descriptor)
            self._passed(move)
            return
        assert isinstance(named, HolderLink), "endpoints do not move"
        if not named.used and self.table.aliases(named) == 1:
            trailer = Trailer(CapKind.LINK, named.terms, named.attached, named.owner)
            self._pass(link, data, trailer, named.sock.fileno())
            self._passed(move)
            return
        terms = LinkTerms(named.depth, named.size, 0)
        near, owned = self._derive(named, terms)
        if owned is not None:
            owned.cookie = cookie_of(near)
        trailer = Trailer(CapKind.LINK, terms, 0, named.owner)
        try:
            self._pass(link, data, trailer, near.fileno())
        except AbiError:
            _ = near.send(VOID, DONT_WAIT)
            near.close()
            raise
        self._let_go(near)
        self._passed(move)

    def _pass(
        self, link: HolderLink, data: bytes | bytearray, trailer: Trailer, descriptor: int
    ) -> None:
        """Send a message with a descriptor: all or nothing. Refuses as Send."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, DESCRIPTOR.pack(descriptor))]
        try:
            wire = link.sock.sendmsg((data, pack_trailer(trailer)), rights, DONT_WAIT)
        except OSError as error:
            raise self._send_refusal(error) from None
        if link.local is not None:
            link.local.endpoint.batch.clear()
        link.sent(wire, WITH_CAP)
        self._sent += 1
        self._sent_size += len(data)

    def _passed(self, slot: Slot) -> None:
        """Empty the slot of a capability that has left: only after the send succeeded."""
        named = self._empty(slot)
        assert not isinstance(named, (Endpoint, Device)), "neither endpoints nor devices move"
        if self.table.aliases(named):
            return
        if isinstance(named, HolderLink):
            self._let_go(named.sock)
        else:
            self._close_vmo(named)

    def _check_alive(self, link: HolderLink) -> None:
        """See that the owner has not closed. Refuses: NoSuchEndpoint."""
        if not self._drain_reverse(link):
            raise AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint closed")

    # ------------------------------------------------------------------ links and endpoints

    def _endpoint_create(self, trap: EndpointCreate) -> Slot:  # noqa: ARG002
        self.check_room()
        self.share.endpoints.take(1)
        try:
            return self.place(Endpoint())
        except AbiError:
            self.share.endpoints.give(1)
            raise

    def place(
        self,
        endpoint: Endpoint,
        at: Slot | None = None,
        rights: Rights = Rights.RECV | Rights.MANAGE,
    ) -> Slot:
        """Give an endpoint its slot and let it hear the timer and the kernel."""
        try:
            if at is None:
                slot = self.put(endpoint, rights)
            else:
                self._charge(SLOT_SIZE + ENDPOINT_SIZE)
                self.table.restore(at, Held(endpoint, rights))
                slot = at
        except AbiError:
            endpoint.epoll.close()
            raise
        endpoint.slot = slot
        for descriptor in (self._timer, self._port.fileno):
            endpoint.epoll.register(descriptor, select.EPOLLIN)
        return slot

    def _endpoint_close(self, trap: EndpointClose) -> None:
        held = self.table.require(trap.slot, Rights.MANAGE)
        if not isinstance(held.object, Endpoint):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {trap.slot} is no endpoint")
        self.drop(trap.slot)

    def _close_endpoint(self, endpoint: Endpoint) -> None:
        endpoint.closed = True
        for sources in [key for key in self._wait_sets if endpoint.slot in key]:
            self._wait_sets.pop(sources).close()
        for link in list(endpoint.links.values()):
            self.disown(link)
        endpoint.epoll.close()
        if isinstance(endpoint, Door):
            if endpoint.listener is not None:
                endpoint.listener.close()
        else:
            self.share.endpoints.give(1)

    def _link_create(self, trap: LinkCreate) -> NewLink:
        held = self.table.get(trap.slot)
        named = held.object
        derived: OwnerLink | None
        if isinstance(named, Endpoint):
            if not held.rights & Rights.MANAGE:
                raise AbiError(Status.PERMISSION_DENIED, "no MANAGE on the endpoint")
            check_terms(trap.terms)
            self.check_room()
            self._check_budget()
            link, derived = self._own_link(named, trap.terms)
        elif isinstance(named, HolderLink) and held.rights & Rights.SEND:
            check_terms(trap.terms)
            if not held.rights & Rights.MANAGE:
                check_derived(trap.terms, named.terms)
            self.check_room()
            self._check_budget()
            near, derived = self._derive(named, trap.terms)
            link = self.hold(near, named.owner, trap.terms, derived)
        else:
            raise AbiError(Status.PERMISSION_DENIED, f"no link comes from slot {trap.slot}")
        slot = self.put(link, Rights.SEND)
        self._port.note(
            EventKind.LINK, {"owner": link.owner, "depth": link.depth, "size": link.size}
        )
        return NewLink(slot, None if derived is None else derived.link)

    def _check_budget(self) -> None:
        """See that one more link can be charged. Refuses: NoSpace."""
        cost = SLOT_SIZE + LINK_END_SIZE
        self._charge(cost)
        self.budget.refund(cost)

    def _own_link(self, endpoint: Endpoint, terms: LinkTerms) -> tuple[HolderLink, OwnerLink]:
        """A fresh link into an own endpoint. Refuses: NoSpace."""
        near, far = make_pair(terms, wall=self.wall)
        try:
            owned = self.own(endpoint, terms, far)
        except AbiError:
            near.close()
            far.close()
            raise
        return self.hold(near, self.me.service, terms, owned), owned

    def hold(
        self, near: socket.socket, owner: ServiceId, terms: LinkTerms, owned: OwnerLink | None
    ) -> HolderLink:
        """The account of a near end; with `owned` the far end is this task's own."""
        link = HolderLink(near, owner, terms, self._truesize)
        if owned is not None:
            owned.cookie = cookie_of(near)
            self._localise(link)
        return link

    def _localise(self, link: HolderLink) -> None:
        """If the far end is this task's own, a send makes what a poll had found stale."""
        cookie = cookie_of(link.sock)
        for owned in self.links.values():
            if owned.cookie == cookie:
                link.local = owned
                link.send = _local_send(owned.endpoint, link.sock)
                return

    def _derive(self, held: HolderLink, terms: LinkTerms) -> tuple[socket.socket, OwnerLink | None]:
        """A fresh near end whose far end is with the owner of a held link.

        Refuses: NoSpace (delegations), NoSuchEndpoint.
        """
        if held.attached >= held.delegations:
            self._check_alive(held)
            if held.attached >= held.delegations:
                raise AbiError(Status.NO_SPACE, f"{held.delegations} links are delegated")
        near, far = make_pair(terms, wall=self.wall)
        if held.local is not None:
            return near, self._derive_local(held, terms, near, far)
        frame = pack_attach(terms, cookie_of(near))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, DESCRIPTOR.pack(far.fileno()))]
        try:
            _ = held.sock.sendmsg((frame,), rights, DONT_WAIT)
        except OSError as error:
            near.close()
            far.close()
            raise self._send_refusal(error) from None
        held.sent(len(frame), KERNEL_FRAME)
        held.attached += 1
        self._let_go(far)
        return near, None

    def _derive_local(
        self, held: HolderLink, terms: LinkTerms, near: socket.socket, far: socket.socket
    ) -> OwnerLink:
        parent = held.local
        assert parent is not None, "the caller has looked"
        alive = self.links.get(parent.link) is parent
        try:
            owned = self.own(parent.endpoint, terms, far) if alive else None
        except AbiError:
            near.close()
            far.close()
            raise
        if owned is None:
            near.close()
            far.close()
            raise AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint closed")
        owned.parent = parent
        owned.maker = self.me
        parent.attached += 1
        held.attached += 1
        return owned

    def _cap_clone(self, trap: CapClone) -> Slot:
        held = self.table.get(trap.slot)
        if isinstance(held.object, Endpoint):
            raise AbiError(Status.PERMISSION_DENIED, "an endpoint has one holder")
        return self.put(held.object, held.rights)

    def _cap_derive(self, trap: CapDerive) -> Slot:
        held = self.table.get(trap.slot)
        rights = derive(held.rights, trap.rights)
        if isinstance(held.object, Endpoint):
            raise AbiError(Status.PERMISSION_DENIED, "an endpoint has one holder")
        return self.put(held.object, rights)

    def _cap_close(self, trap: CapClose) -> None:
        _ = self.table.get(trap.slot)
        self.drop(trap.slot)

    def _cap_query(self, trap: CapQuery) -> CapInfo:
        held = self.table.require(trap.slot, Rights.MAP)
        assert isinstance(held.object, (Vmo, Device)), "nothing else has MAP"
        return CapInfo(_kind(held.object), held.rights, held.object.length)

    # ------------------------------------------------------------------ memory objects

    def _vmo_length(self, size: int) -> int:
        """The length of a memory object of that many bytes: whole pages."""
        return page_round(size)

    def _vmo_create(self, trap: VmoCreate) -> Slot:
        if not 1 <= trap.size <= VMO_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"a VMO of {trap.size} bytes")
        length = self._vmo_length(trap.size)
        self.check_room()
        descriptor = os.memfd_create("nexus-vmo", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, length)
            vmo = Vmo(descriptor, length)
            slot = self.put(vmo, Rights.MAP | Rights.MANAGE, asked=trap.size)
        except (AbiError, OSError):
            os.close(descriptor)
            raise
        self._vmo_size += length
        return slot

    def _vmo(self, slot: Slot) -> Vmo:
        named = self.table.get(slot).object
        if not isinstance(named, Vmo):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot} is no VMO")
        return named

    def _vmo_write(self, trap: VmoWrite) -> None:
        vmo = self._vmo(trap.slot)
        _ = self.table.require(trap.slot, Rights.MANAGE)
        if vmo.sealed or vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "the VMO is sealed, or shared")
        if trap.offset < 0 or trap.offset + len(trap.data) > vmo.length:
            raise AbiError(Status.INVALID_ARGUMENT, f"outside the {vmo.length} bytes")
        rest, offset = memoryview(trap.data), trap.offset
        while rest:
            written = os.pwrite(vmo.descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def _vmo_seal(self, trap: VmoSeal) -> None:
        vmo = self._vmo(trap.slot)
        _ = self.table.require(trap.slot, Rights.MANAGE)
        if vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "a shared VMO may change for ever")
        if not vmo.sealed:
            _ = fcntl.fcntl(vmo.descriptor, fcntl.F_ADD_SEALS, SEALS)
            vmo.sealed = True

    def _vmo_map(self, trap: VmoMap) -> memoryview:
        vmo = self._vmo(trap.slot)
        _ = self.table.require(trap.slot, Rights.MAP)
        if not vmo.sealed:
            raise AbiError(Status.PERMISSION_DENIED, "the VMO is not sealed")
        view = map_read_only(vmo.descriptor, vmo.length, lambda: self._view_ended(vmo))
        vmo.views += 1
        return view

    def _vmo_share(self, trap: VmoShare) -> memoryview:
        vmo = self._vmo(trap.slot)
        _ = self.table.require(trap.slot, Rights.MANAGE)
        if vmo.sealed or vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "the VMO is sealed, or shared")
        view = map_writable(vmo.descriptor, vmo.length, lambda: self._view_ended(vmo))
        vmo.views += 1
        # After the mapping, the last that may be written: without the seals there is no view.
        _ = fcntl.fcntl(vmo.descriptor, fcntl.F_ADD_SEALS, SHARED_SEALS)
        vmo.shared = True
        return view

    def _vmo_watch(self, trap: VmoWatch) -> memoryview:
        vmo = self._vmo(trap.slot)
        _ = self.table.require(trap.slot, Rights.MAP)
        if not vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "the VMO is not shared")
        view = map_read_only(vmo.descriptor, vmo.length, lambda: self._view_ended(vmo))
        vmo.views += 1
        return view

    def _join_barriers(self) -> bool:
        """Let the fences of others reach this process; False where Linux has none."""
        try:
            _ = membarrier(MEMBARRIER_REGISTER_GLOBAL_EXPEDITED)
        except OSError:
            return False
        return True

    def _fence(self, trap: Fence) -> None:  # noqa: ARG002
        if not self._fences:
            raise AbiError(Status.UNSUPPORTED, "there is no expedited membarrier")
        _ = membarrier(MEMBARRIER_GLOBAL_EXPEDITED)

    def _clock_map(self, trap: ClockMap) -> Clock:  # noqa: ARG002
        return MappedClock()

    def _view_ended(self, vmo: Vmo) -> None:
        """A mapping is gone; the last one of an object without a slot gives its pages back."""
        vmo.views -= 1
        if vmo.views == 0 and vmo.descriptor < 0:
            self._viewed.remove(vmo)
            self._vmo_size -= vmo.length
            self.budget.refund(vmo.length)
            self._measure()

    # ------------------------------------------------------------------ devices

    def take_device(self, device: Device) -> Slot:
        """Hold a device that init has granted. Refuses: NoSpace."""
        if isinstance(device, Block):
            device.on_failure = lambda error: self._note(
                EventKind.DEVICE, {"name": device.granted.name, "what": "failed", "error": error}
            )
        return self.put(device, Rights.MAP)

    def _device_query(self, trap: DeviceQuery) -> DeviceInfo:
        held = self.table.get(trap.slot)
        if not isinstance(held.object, Device):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {trap.slot} is no device")
        _ = self.table.require(trap.slot, Rights.MAP)
        return held.object.granted.info

    def _device_map(self, trap: DeviceMap) -> Registers:
        return self._window(trap.slot).map(trap.offset, execute=trap.execute)

    def _device_dma(self, trap: DeviceDma) -> DmaArea:
        return self._window(trap.slot).dma()

    def _window(self, slot: Slot) -> Window:
        named = self.table.require(slot, Rights.MAP).object
        if not isinstance(named, Window):
            raise AbiError(Status.PERMISSION_DENIED, f"slot {slot} is no register window")
        return named

    def _block(self, slot: Slot) -> Block:
        named = self.table.require(slot, Rights.MAP).object
        if not isinstance(named, Block):
            raise AbiError(Status.PERMISSION_DENIED, f"slot {slot} is no block device")
        return named

    def _block_read(self, trap: BlockRead) -> bytes:
        return self._block(trap.slot).read(trap.block, trap.count, trap.deadline)

    def _block_write(self, trap: BlockWrite) -> None:
        block = self._block(trap.slot)
        block.write(trap.block, trap.data, trap.deadline, durable=trap.durable)

    def _block_flush(self, trap: BlockFlush) -> None:
        self._block(trap.slot).flush(trap.deadline)

    def _entropy_draw(self, trap: EntropyDraw) -> bytes:
        named = self.table.require(trap.slot, Rights.MAP).object
        if not isinstance(named, Source):
            raise AbiError(Status.PERMISSION_DENIED, f"slot {trap.slot} is no entropy source")
        return named.draw(trap.size)

    # ------------------------------------------------------------------ the secret

    def _secret(self) -> Holding:
        if self.secret is None:
            raise AbiError(Status.PERMISSION_DENIED, "no grant of a secret")
        return self.secret

    def _secret_query(self, trap: SecretQuery) -> SecretBackend:  # noqa: ARG002
        return SecretBackend.NONE if self.secret is None else self.secret.backend

    def _secret_read(self, trap: SecretRead) -> bytes:  # noqa: ARG002
        return self._secret().read()

    def _secret_replace(self, trap: SecretReplace) -> None:
        secret = self._secret()
        if not 1 <= len(trap.data) <= SECRET_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"a secret of {len(trap.data)} bytes")
        secret.replace(trap.data)

    # ------------------------------------------------------------------ the rest

    def _exit(self, trap: Exit) -> NoReturn:
        if not 0 <= trap.code <= EXIT_CODE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"exit code {trap.code}")
        raise Exited(trap.code)

    def _spawn_last_error(self, trap: SpawnLastError) -> SpawnReason:  # noqa: ARG002
        return SpawnReason.NONE  # a task that may not spawn has failed at none

    def _root_only(self, trap: object) -> NoReturn:
        raise AbiError(Status.PERMISSION_DENIED, f"{type(trap).__name__} is the root task's")

    def _task_qos(self, trap: TaskQos) -> QosClass:  # noqa: ARG002
        return self._view.qos_of(self.me.pid)

    def _set_task_qos(self, trap: SetTaskQos) -> None:
        self._port.set_qos(self.me.pid if trap.pid is None else trap.pid, trap.qos)

    def _policy_read(self, trap: PolicyRead) -> PolicyWord:  # noqa: ARG002
        return unpack_policy(self._cells[POLICY])

    def _now(self, trap: Now) -> Nanos:  # noqa: ARG002
        return Nanos(monotonic_ns())

    def _sleep_until(self, trap: SleepUntil) -> Nanos:
        while (now := monotonic_ns()) < trap.deadline:
            self._arm(trap.deadline)
            self._port.flush()
            events = self._idle.poll(-1)
            if any(number == self._timer for number, _ in events):
                self._disarm()
            self._port.serve()
        return Nanos(now)

    def idle_until(self, deadline: int) -> None:
        """Wait until the kernel has news or a deadline passes, and serve the news."""
        self._arm(deadline)
        events = self._idle.poll(-1)
        if any(number == self._timer for number, _ in events):
            self._disarm()
        self._port.serve()

    def timed_out(self) -> AbiError:
        """Count a wait that ended by its deadline."""
        self._timeouts += 1
        return AbiError(Status.TIMED_OUT, "the deadline has passed")

    def _console_write(self, trap: ConsoleWrite) -> None:
        _ = check_console(trap.line, trap.evidence)
        self._port.console(trap.line, trap.evidence)

    def _task_stats(self, trap: TaskStats) -> TaskCounters:  # noqa: ARG002
        return self.counters()

    def counters(self) -> TaskCounters:
        """The account of the task."""
        queued = queued_size = 0
        links = [link for link in self.links.values() if not isinstance(link, OutsideLink)]
        for link in links:
            count, size = self._count_queued(link)
            queued += count
            queued_size += size
        endpoints = {id(link.endpoint) for link in links}
        endpoints |= {
            id(held.object)
            for held in self.table.entries.values()
            if isinstance(held.object, Endpoint) and not isinstance(held.object, Door)
        }
        return TaskCounters(
            slots=self.table.used,
            endpoints=len(endpoints),
            links=len(links),
            reserved_size=self.share.size.used,
            queued=queued,
            queued_size=queued_size,
            sent=self._sent,
            sent_size=self._sent_size,
            received=self._received,
            received_size=self._received_size,
            timeouts=self._timeouts,
            refused_identity=self._refused["identity"],
            refused_caps=self._refused["several_caps"],
            refused_oversize=self._refused["oversize"],
            refused_links=self._refused["excess_link"],
            budget_used=self.budget.used,
            budget_free=self.budget.free,
            budget_total=self.budget.total,
            refused_size=self.budget.refused_size,
            refused_align=self.budget.refused_align,
            vmo_size=self._vmo_size,
        )

    def audit(self) -> int:
        """What every object the task holds costs, counted one by one: what `budget` says."""
        held = {id(entry.object): entry.object for entry in self.table.entries.values()}
        return (
            SLOT_SIZE * self.table.used
            + sum(_cost(named) for named in held.values())
            + sum(vmo.length for vmo in self._viewed)
        )

    def _count_queued(self, link: OwnerLink) -> tuple[int, int]:
        """Messages and bytes that wait on a link, looked at one by one without taking them."""
        if not link.unread_size():
            return 0, 0
        count = size = 0
        link.sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        try:
            while count <= LINK_DEPTH_MAX:
                data, _, flags, _ = link.recvmsg(RECEIVE_SIZE, LOOK_SIZE, LOOKING)
                if not data:
                    break
                if data[0] < RESERVED:
                    count += 1
                    size += len(data) - (TRAILER_SIZE if flags & socket.MSG_CTRUNC else 0)
        except (BlockingIOError, ConnectionResetError):
            pass  # the end of the queue
        finally:
            link.sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        return count, size


def _cost(named: Named) -> int:
    if isinstance(named, Endpoint):
        return ENDPOINT_SIZE
    if isinstance(named, HolderLink):
        return LINK_END_SIZE
    return named.length if isinstance(named, Vmo) else DEVICE_SIZE


def _kind(named: Named) -> CapKind:
    if isinstance(named, Endpoint):
        return CapKind.ENDPOINT
    if isinstance(named, HolderLink):
        return CapKind.LINK
    return CapKind.VMO if isinstance(named, Vmo) else named.kind


def _caller_of(door: Door, sock: socket.socket) -> PeerIdentity:
    """Who has called, as Linux says."""
    if door.role is StreamRole.TCP:
        return TCP_PEER
    stamp = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, uid, _ = CREDENTIALS.unpack(stamp)
    return PeerIdentity(pid, uid)


def cookie_of(end: socket.socket) -> bytes:
    """The kernel's name of a socket, the same in every task that holds it."""
    return end.getsockopt(socket.SOL_SOCKET, SO_COOKIE, COOKIE_SIZE)


def _closed_set(error: OSError) -> AbiError:
    """A service sees the ABI's statuses alone: what Linux has run out of is NoSpace."""
    status = Status.NO_SPACE if error.errno in SHORT_ERRORS else Status.UNSUPPORTED
    return AbiError(status, str(error))


def _is_link(descriptor: int) -> bool:
    """Whether a descriptor is a UNIX SEQPACKET socket, asked of the kernel."""
    try:
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)
    except OSError:
        return False
    try:
        domain = probe.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
        kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    except OSError:
        return False
    finally:
        _ = probe.detach()
    return (domain, kind) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _local_send(endpoint: Endpoint, sock: socket.socket) -> Callable[[bytes | bytearray, int], int]:
    """Send into an own endpoint: what a poll had found ready is not all any more."""

    def send(data: bytes | bytearray, flags: int) -> int:
        endpoint.batch.clear()
        return sock.send(data, flags)

    return send
