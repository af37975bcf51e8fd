"""Links and endpoints: what may be sent, what is received, and what a close or a death means.

Every decision stands in a small method of its own that is looked up when it is needed.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn

from nexus.abi import (
    KERNEL,
    LINK_SIZE_MAX,
    MESSAGE_KIND_RESERVED,
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    AbiError,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    NewLink,
    PeerGone,
    Pid,
    QosClass,
    Rights,
    Sender,
    Signal,
    Slot,
    Status,
)
from nexus.kernel.core import (
    LINK_END_SIZE,
    MESSAGE_SIZE,
    Held,
    check_data,
    check_derived,
    check_terms,
    moved,
)
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.heap import Heap
from nexus.kernel.sim.log import GONE, SENT, SIGNAL, EventLog
from nexus.kernel.sim.objects import (
    BLOCKED,
    WAIT_RECEIVE,
    WAIT_SEND,
    Blocked,
    Connection,
    Endpoint,
    Entry,
    KernelObject,
    Link,
    Port,
    Task,
    Vmo,
)
from nexus.kernel.sim.sched import Scheduler

ENDPOINT_RIGHTS: Final = Rights.RECV | Rights.MANAGE

_SEND: Final = int(Rights.SEND)
_MANAGE: Final = int(Rights.MANAGE)
_OVERHEAD: Final = MESSAGE_SIZE
_new_message: Final = tuple.__new__  # a third of the time of Message(...)

OnLink = Callable[[Link, Task], None]
OnRefused = Callable[[Task, str], None]

_KERNEL_SENDER: Final = Sender(KERNEL, Pid(0), 0, QosClass.NORMAL)
_KERNEL_LINK: Final = LinkId(0)  # links of a task are counted from 1
_KERNEL_STAMP: Final = Pid(-(1 << 40))  # no task has it, and no connection
_SIGNAL_ORDER: Final = tuple(name.encode() for name in (Signal.HUP, Signal.INT, Signal.TERM))

assert len(_SIGNAL_ORDER) == len(Signal), "each signal has its place"


class NoRoom(AbiError):
    """A send met a full queue: waiting may help."""


class Ipc:
    """The rules of links and endpoints over the kernel's objects."""

    copy_in: Callable[[bytes | bytearray], bytes] = bytes  # the kernel's own copy of a message

    __slots__ = (
        "account",
        "clock",
        "endpoints_alive",
        "event_log",
        "heap",
        "identities",
        "identity_of",
        "kernel_link",
        "on_connection_end",
        "on_link",
        "on_port_end",
        "on_refused",
        "scheduler",
        "serial",
    )

    def __init__(
        self,
        clock: Clock,
        scheduler: Scheduler,
        heap: Heap,
        event_log: EventLog,
        *,
        on_link: OnLink,
        on_refused: OnRefused,
    ) -> None:
        self.clock = clock
        self.scheduler = scheduler
        self.heap = heap
        self.account = heap.account
        self.event_log = event_log
        self.on_link = on_link
        self.on_refused = on_refused
        self.on_port_end: Callable[[Port], None] = _no_ports
        self.on_connection_end: Callable[[Connection], None] = _no_ports
        self.kernel_link: Link | None = None  # into the root task's own endpoint
        self.endpoints_alive = 0
        self.serial = 0  # links ever made, for the log
        # Rows are overwritten when a pid is given again, never deleted: what a dead task had
        # sent is still received under its identity.
        self.identities: dict[Pid, Sender] = {}
        self.identity_of = self.make_lookup()

    # ---- endpoints

    def create_endpoint(self, task: Task, at: Slot | None = None) -> Endpoint:
        """Make an endpoint in the lowest free slot, or in this one. Refuses: NoSpace."""
        if task.table.full:
            raise AbiError(Status.NO_SPACE, "every slot is used")
        task.share.endpoints.take(1)
        endpoint = Endpoint(task)
        try:
            self.heap.charge(task, endpoint.cost)
            try:
                endpoint.slot = self.heap.hold(task, endpoint, ENDPOINT_RIGHTS, at=at)
            except AbiError:
                self.heap.refund(endpoint.cost)
                raise
        except AbiError:
            task.share.endpoints.give(1)
            raise
        task.endpoints[endpoint.slot] = endpoint
        self.endpoints_alive += 1
        return endpoint

    def close_endpoint(self, endpoint: Endpoint) -> None:
        """Close an endpoint for everybody; its slot has been emptied already."""
        self.wake_all(self.shut(endpoint))

    def shut(self, endpoint: Endpoint) -> list[Task]:
        """Drop an endpoint's queues and give back what it had; the tasks to wake."""
        task = endpoint.owner
        endpoint.alive = False
        self.endpoints_alive -= 1
        del task.endpoints[endpoint.slot]
        woken: list[Task] = []
        for link in list(endpoint.links.values()):
            if link.waiter is not None:
                woken.append(link.waiter)
            entries = list(link.queue)
            link.queue.clear()
            link.queued_size = 0
            self.forget(link)
            for data, _, cap in entries:
                self.heap.refund(_OVERHEAD + len(data))
                if cap is not None:
                    woken += self.drop_moved(cap.object)
        endpoint.ready.clear()
        self.drop_signals(endpoint)
        task.share.endpoints.give(1)
        self.heap.refund(endpoint.cost)
        return woken

    def forget(self, link: Link) -> None:
        """End a link on its owner's side: its share and its delegation are free again."""
        endpoint = link.endpoint
        task = endpoint.owner
        del endpoint.links[link.id]
        del task.links[link.id]
        task.share.size.give(link.size)
        self.heap.refund(LINK_END_SIZE)
        if link.parent is not None:
            link.parent.derived -= 1

    def forget_connection(self, connection: Connection) -> None:
        """End a connection for both of its sides; its id is dead."""
        port = connection.endpoint
        if connection.listed:
            port.ready.remove(connection)
            connection.listed = False
        del port.links[connection.id]
        self.on_connection_end(connection)

    # ---- making links

    def create_link(self, task: Task, held: Held[KernelObject], terms: LinkTerms) -> NewLink:
        """Make a link into an own endpoint, or derive one from a held link. Refuses as the trap."""
        source = held.object
        if isinstance(source, Endpoint):
            if not held.bits & _MANAGE:
                raise AbiError(Status.PERMISSION_DENIED, "an endpoint without MANAGE")
            check_terms(terms)
            link = self._make(source, terms, task, parent=None)
        elif isinstance(source, Link) and held.bits & _SEND:
            check_terms(terms)
            if not held.bits & _MANAGE:
                check_derived(terms, source.terms)
            link = self._derive(source, terms, task)
        else:
            raise AbiError(Status.PERMISSION_DENIED, "links come from endpoints and links")
        try:
            slot = self.heap.hold(task, link, Rights.SEND)
        except AbiError:
            self._unmake(link)
            raise
        self.on_link(link, task)
        owner = link.endpoint.owner
        return NewLink(slot, link.id if owner is task else None)

    def _derive(self, source: Link, terms: LinkTerms, task: Task) -> Link:
        if not source.endpoint.alive:
            raise AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint is closed")
        if source.derived >= source.delegations:
            raise AbiError(Status.NO_SPACE, f"{source.delegations} delegations are used")
        return self._make(source.endpoint, terms, task, parent=source)

    def _make(self, endpoint: Endpoint, terms: LinkTerms, maker: Task, parent: Link | None) -> Link:
        owner = endpoint.owner
        owner.share.size.take(terms.size)
        try:
            self.heap.charge(maker, 2 * LINK_END_SIZE)
        except AbiError:
            owner.share.size.give(terms.size)
            raise
        self.serial += 1
        owner.links_made += 1
        link = Link(
            endpoint,
            terms,
            LinkId(owner.links_made),
            serial=self.serial,
            maker_pid=maker.pid,
            parent=parent,
        )
        if parent is not None:
            parent.derived += 1
        endpoint.links[link.id] = link
        owner.links[link.id] = link
        return link

    def _unmake(self, link: Link) -> None:
        # The holder's end was never placed, so the owner has nothing to hear about it.
        self.forget(link)
        self.heap.refund(LINK_END_SIZE)

    def place_link(
        self, endpoint: Endpoint, terms: LinkTerms, holder: Task, rights: Rights
    ) -> tuple[Slot, Link]:
        """Make a link for another task than the owner: the control links of a spawn."""
        link = self._make(endpoint, terms, holder, parent=None)
        try:
            slot = self.heap.hold(holder, link, rights)
        except AbiError:
            self._unmake(link)
            raise
        self.on_link(link, holder)
        return slot, link

    # ---- closing the holder's end

    def close_slot(self, task: Task, slot: Slot) -> None:
        """Drop a slot; the last slot of an object lets go of the object."""
        held = self.heap.unhold(task, slot)
        object_ = held.object
        if isinstance(object_, Endpoint) and not isinstance(object_, Port):
            self.close_endpoint(object_)
        elif not task.table.aliases(object_):
            self.wake_all(self.drop(object_))

    def drop(self, object_: KernelObject) -> list[Task]:
        """Let go of an object whose last slot or message is gone; the tasks to wake."""
        if isinstance(object_, Link):
            return self._close_link(object_)
        if isinstance(object_, Vmo):
            self.heap.free_if_unused(object_)
        elif isinstance(object_, Port):
            self.on_port_end(object_)
        return []

    def drop_moved(self, object_: KernelObject) -> list[Task]:
        """Let go of what a dropped message carried; the tasks to wake."""
        if isinstance(object_, Vmo):
            object_.references -= 1
        return self.drop(object_)

    def _close_link(self, link: Link) -> list[Task]:
        link.closed = True
        self.heap.refund(LINK_END_SIZE)
        endpoint = link.endpoint
        if not endpoint.alive:
            return []
        if not link.listed and not link.delayed:
            link.listed = True
            endpoint.ready.append(link)
        owner = endpoint.owner
        return [owner] if self.listens(owner, link) else []

    def listens(self, owner: Task, link: Link) -> bool:
        """Whether a task waits for what this link brings."""
        return owner.state == WAIT_RECEIVE and (
            owner.filter is link or (owner.filter is None and link.endpoint in owner.sources)
        )

    def wake_all(self, tasks: list[Task]) -> None:
        """Wake every task in the list: none of them may wait for what is gone."""
        for task in tasks:
            if task.state in (WAIT_RECEIVE, WAIT_SEND):
                self.wake(task)

    def wake(self, task: Task) -> None:
        """A waiting task goes on: its trap is tried again when it is picked."""
        link = task.wait_link
        if link is not None:
            link.waiter = None
            task.wait_link = None
        self.scheduler.ready(task)

    # ---- sending

    def send(
        self, task: Task, slot: Slot, data: bytes | bytearray, move: Slot | None = None
    ) -> None:
        """Queue one message, or refuse and change nothing. NoRoom where waiting may help."""
        held = task.entries.get(slot)
        if held is None:
            _refuse_slot(slot)
        if not held.bits & _SEND:
            _refuse_right(slot)
        size = len(data)
        if not 0 < size <= MESSAGE_SIZE_MAX or data[0] >= MESSAGE_KIND_RESERVED:
            _ = check_data(data)
        link: Link = held.object  # type: ignore[assignment]  # SEND is a right of links alone
        cap = None if move is None else self.movable(task, move, link)
        endpoint = link.endpoint
        if not endpoint.alive:
            raise AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint is closed")
        full = self.room(link, size)
        if full is not None:
            self._refuse_room(link, size, full)
        copy = self.copy_in(data)  # fails before anything is charged, if these are no bytes
        account = self.account
        charge = _OVERHEAD + size
        if charge > account.total - account.used:
            self.heap.charge(task, charge)
        account.used += charge
        if cap is not None and move is not None:
            try:
                cap = self.move_out(task, move, cap)
            except AbiError:
                account.used -= charge
                raise
        link.queue.append((copy, self.stamp(task, link), cap))
        link.queued_size += size
        link.used = True
        task.sent += 1
        task.sent_size += size
        self.event_log.records += (self.clock.now, task.tag | SENT, link.serial << 16 | size)
        self.deliver(link)

    def deliver(self, link: Link) -> None:
        """Make a queued message seen, and wake the receiver if it waits for it."""
        endpoint = link.endpoint
        owner = endpoint.owner
        if owner.state == WAIT_RECEIVE:
            wanted = owner.filter
            if wanted is link:
                self.scheduler.ready(owner)  # it takes from the link itself, listed or not
                return
            if wanted is None and endpoint in owner.sources:
                self.scheduler.ready(owner)
        if not link.listed:
            link.listed = True
            endpoint.ready.append(link)

    def room(self, link: Link, size: int) -> Status | None:
        """Why a message of this size does not fit into the queue now; None if it does."""
        if len(link.queue) >= link.depth:
            return Status.QUEUE_FULL
        if link.queued_size + size > link.size:
            return Status.NO_SPACE
        return None

    def stamp(self, task: Task, link: Link) -> Pid:  # noqa: ARG002 (a saboteur stamps by the link)
        """The pid a message is stamped with: that of the task that sends it."""
        return task.pid

    def _refuse_room(self, link: Link, size: int, status: Status) -> NoReturn:
        if size > link.size:  # never fits: waiting would not help
            raise AbiError(Status.NO_SPACE, f"{size} bytes, the link holds {link.size}")
        raise NoRoom(status, f"{len(link.queue)} messages, {link.queued_size} bytes queued")

    # ---- moving a capability

    def movable(self, task: Task, move: Slot, over: Link) -> Held[KernelObject]:
        """Check that a capability may move over a link. Nothing changes here."""
        held = task.table.get(move)
        object_ = held.object
        if object_ is over:
            raise AbiError(Status.INVALID_ARGUMENT, "a link does not move over itself")
        _ = moved(object_.kind, held.rights)
        if isinstance(object_, Vmo) and not (object_.sealed or object_.shared):
            raise AbiError(Status.PERMISSION_DENIED, "an unsealed VMO does not move")
        return held

    def move_out(self, task: Task, move: Slot, held: Held[KernelObject]) -> Held[KernelObject]:
        """Take the capability out of the sender's slot; the send cannot fail any more after this.

        A link that was used or is held twice stays what it is for its owner, and a fresh one
        derived from it moves. Refuses: NoSpace, NoSuchEndpoint; the slot is as it was.
        """
        object_ = held.object
        rights = moved(object_.kind, held.rights)
        if isinstance(object_, Link) and (object_.used or task.table.aliases(object_) > 1):
            terms = LinkTerms(object_.depth, object_.size, 0)
            fresh = self._derive(object_, terms, task)
            self.on_link(fresh, task)
            self.close_slot(task, move)
            return Held(fresh, rights)
        if isinstance(object_, Vmo):
            object_.references += 1  # of the message
        _ = self.heap.unhold(task, move)
        return Held(object_, rights)

    def move_in(self, task: Task, cap: Held[KernelObject]) -> Slot:
        """Place a received capability into the lowest free slot."""
        if isinstance(cap.object, Vmo):
            slot = self.heap.hold(task, cap.object, cap.rights)
            cap.object.references -= 1  # of the message
            return slot
        return self.heap.hold(task, cap.object, cap.rights)

    # ---- receiving

    def listen(
        self, task: Task, sources: tuple[Slot, ...], link_id: LinkId | None, size_max: int
    ) -> None:
        """Resolve what a receive looks at. Refuses as Recv does for its arguments."""
        entries = task.entries
        if len(sources) == 1:
            held = entries.get(sources[0])
            if held is None or held.object.__class__ is not Endpoint:
                task.sources = self._resolve(task, sources)
            else:
                task.sources = (held.object,)
        else:
            task.sources = self._resolve(task, sources)
        task.size_max = size_max
        if link_id is None:
            task.filter = None
            return
        link = task.links.get(link_id)
        if link is None:
            link = self._other_link(task, link_id)
        if link is None or link.endpoint not in task.sources:
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"no link {link_id}")
        task.filter = link

    def _other_link(self, task: Task, link_id: LinkId) -> Link | None:
        if link_id == _KERNEL_LINK:
            return task.kernel_link
        found = (port.links.get(link_id) for port in task.ports.values())
        return next((link for link in found if link is not None), None)

    def _resolve(self, task: Task, sources: tuple[Slot, ...]) -> tuple[Endpoint, ...]:
        if not sources:
            raise AbiError(Status.INVALID_ARGUMENT, "nothing to receive from")
        endpoints: list[Endpoint] = []
        for slot in sources:
            held = task.entries.get(slot)
            if held is None or not isinstance(held.object, Endpoint):
                self._refuse_source(slot, held)
            endpoints.append(held.object)
        return tuple(endpoints)

    def _refuse_source(self, slot: Slot, held: Held[KernelObject] | None) -> NoReturn:
        if held is None:
            _refuse_slot(slot)
        _refuse_right(slot)

    def receive(self, task: Task) -> Message | Blocked:
        """Take what is at hand, or wait until the deadline. Tried again at every wake-up."""
        message = self.take(task)
        return self.wait(task) if message is None else message

    def wait(self, task: Task) -> Blocked:
        """Wait for a message until the deadline; refuse if that has come."""
        deadline = task.deadline
        if deadline <= self.clock.now:
            status = self.empty_status(deadline)
            if status is Status.TIMED_OUT:
                task.timeouts += 1
            raise AbiError(status)
        task.state = WAIT_RECEIVE
        task.resume = self.receive
        if deadline < task.timer_at:
            self.clock.arm(task)
        return BLOCKED

    def empty_status(self, deadline: Nanos) -> Status:
        """What an empty queue is called: QueueEmpty without a wait, TimedOut after one."""
        return Status.QUEUE_EMPTY if deadline == NO_WAIT else Status.TIMED_OUT

    def take(self, task: Task) -> Message | None:
        """The next message of what the task listens to, None if there is none.

        Refuses: PeerGone, NoSpace, InvalidArgument; then no message was taken.
        """
        while True:
            link = task.filter
            if link is None:
                # Of all tasks only the root has a link from the kernel.
                link = None if task.kernel_link is None else self.first_signal(task)
                if link is None:
                    link = self.next_link(task)
                if link is None:
                    return None
            else:
                if not link.queue or link.delayed:
                    if link.closed and not link.queue:
                        self.gone(link)
                    return None
                if link.queue[0][2] is not None or len(link.queue[0][0]) > task.size_max:
                    self._list(link)
                    self.check_take(task, link.queue[0])
            data, pid, cap = link.queue.popleft()
            size = len(data)
            link.queued_size -= size
            self.account.used -= _OVERHEAD + size
            endpoint = link.endpoint
            if link.queue or link.closed:
                self._turn(link)
            elif link.listed and endpoint.ready[0] is link:
                _ = endpoint.ready.popleft()
                link.listed = False
            if link.waiter is not None:
                self._room_made(link)
            sender = self.identity_of(pid)
            if sender is None:
                self._refuse_sender(task, cap)
                continue
            task.received += 1
            task.received_size += size
            task.took = link.serial << 16 | size
            now = self.clock.now
            slot = None if cap is None else self.move_in(task, cap)
            return _new_message(Message, (data, sender, link.id, slot, now, endpoint.slot))

    def next_link(self, task: Task) -> Link | None:
        """The next link in rotation whose first message may be taken, None if all are empty.

        Refuses: PeerGone; NoSpace if only capabilities are at hand and the table is full.
        """
        sources = task.sources
        count = len(sources)
        if count > 1:
            task.turn = (task.turn + 1) % count
            sources = sources[task.turn :] + sources[: task.turn]
        refused: AbiError | None = None
        for endpoint in sources:
            ready = endpoint.ready
            for _ in range(len(ready)):
                link = ready[0]
                if link.queue and not link.delayed:
                    first = link.queue[0]
                    if first[2] is not None or len(first[0]) > task.size_max:
                        try:
                            self.check_take(task, first)
                        except AbiError as refusal:
                            if refusal.status is not Status.NO_SPACE:
                                raise
                            refused = refusal
                            ready.rotate(-1)
                            continue
                    return link
                if link.closed and not link.queue:
                    self.gone(link)
                _ = ready.popleft()  # emptied by a filtered receive, or held back
                link.listed = False
        if refused is not None:
            raise refused
        return None

    def _list(self, link: Link) -> None:
        # Whoever looks at the endpoint next must find the link.
        if not link.listed:
            link.listed = True
            link.endpoint.ready.append(link)

    def _turn(self, link: Link) -> None:
        # A link that still has something goes behind the others.
        ready = link.endpoint.ready
        if link.listed and ready[0] is link:
            if len(ready) > 1:
                ready.rotate(-1)
        else:
            self._list(link)

    def check_take(self, task: Task, entry: Entry) -> None:
        """Look at the buffer and the table before the message is taken from its queue.

        Refuses: InvalidArgument (larger than `size_max`), NoSpace (no slot or no budget for the
        capability); the message stays first.
        """
        data, _, cap = entry
        if len(data) > task.size_max:
            raise AbiError(Status.INVALID_ARGUMENT, f"{len(data)} bytes at hand")
        if cap is not None and not self.heap.may_hold(task, cap.object):
            raise AbiError(Status.NO_SPACE, "no room for the capability at hand")

    # ---- signals

    def hear_signals(self, endpoint: Endpoint) -> None:
        """Make a root task's own endpoint the one that signals come to."""
        terms = LinkTerms(len(Signal), LINK_SIZE_MAX, 0)
        link = Link(endpoint, terms, _KERNEL_LINK, serial=0, maker_pid=Pid(0), parent=None)
        self.kernel_link = endpoint.owner.kernel_link = link
        self.identities[_KERNEL_STAMP] = _KERNEL_SENDER

    def signal(self, signal: Signal) -> None:
        """Keep a signal for the root task until it receives, and wake it if it does.

        One that is kept already is not kept twice, as on linux.
        """
        link = self.kernel_link
        data = signal.encode()
        if link is None or not link.endpoint.alive or any(data == each[0] for each in link.queue):
            return
        link.queue.append((data, _KERNEL_STAMP, None))
        link.queue = deque(sorted(link.queue, key=lambda entry: _SIGNAL_ORDER.index(entry[0])))
        link.queued_size += len(data)
        self.account.used += _OVERHEAD + len(data)
        owner = link.endpoint.owner
        records = self.event_log.records
        records += (self.clock.now, owner.tag | SIGNAL, _SIGNAL_ORDER.index(data))
        records += (self.clock.now, SENT, len(data))  # on link 0, by no task
        self.deliver(link)

    def drop_signals(self, endpoint: Endpoint) -> None:
        """Drop what nobody will receive: the endpoint is closed."""
        link = self.kernel_link
        if link is None or link.endpoint is not endpoint:
            return
        self.heap.refund(_OVERHEAD * len(link.queue) + link.queued_size)
        link.queue.clear()
        link.queued_size = 0
        self.kernel_link = endpoint.owner.kernel_link = None

    def first_signal(self, task: Task) -> Link | None:
        """The kernel's link if it has something for this receive: it goes before all others.

        Refuses: InvalidArgument.
        """
        link = self.kernel_link
        if link is None or not link.queue or link.delayed or link.endpoint not in task.sources:
            return None
        self.check_take(task, link.queue[0])
        return link

    # ---- who spoke, and who is gone

    def make_lookup(self) -> Callable[[Pid], Sender | None]:
        """What tells who a stamped pid is, by the kernel's table; None if it is not in it."""
        return self.identities.get

    def _refuse_sender(self, task: Task, cap: Held[KernelObject] | None) -> None:
        task.refused_identity += 1
        self.on_refused(task, "identity")
        if cap is not None:
            self.wake_all(self.drop_moved(cap.object))

    def _room_made(self, link: Link) -> None:
        waiter = link.waiter
        if waiter is not None and waiter.state == WAIT_SEND:
            size = len(waiter.trap.data)
            if self.room(link, size) is None:
                self.wake(waiter)

    def gone(self, link: Link) -> NoReturn:
        """Tell the owner, once, that the other end of a drained link is closed."""
        endpoint = link.endpoint
        if isinstance(link, Connection):
            self.forget_connection(link)
        else:
            if link.listed:
                endpoint.ready.remove(link)
                link.listed = False
            self.forget(link)
        owner = endpoint.owner
        self.event_log.records += (self.clock.now, owner.tag | GONE, link.serial)
        raise PeerGone(link.id)


def _no_ports(*_: object) -> NoReturn:
    raise AssertionError("ports are made by Ports, which is told of their ends")


def _refuse_slot(slot: Slot) -> NoReturn:
    raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot} holds nothing")


def _refuse_right(slot: Slot) -> NoReturn:
    raise AbiError(Status.PERMISSION_DENIED, f"slot {slot} lacks the right")
