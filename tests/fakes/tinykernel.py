"""A kernel of a few traps in one process: enough for ipc and runtime, with a clock of its own.

Tasks are plain coroutines. A task runs until it has to wait; links are served in order of their
making; the clock moves only when everybody waits. It keeps the promises of abi/traps.py for the
traps it has, in the simplest form that is true, and counts traps by name.
"""

import itertools
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NEVER,
    NO_WAIT,
    SLOTS_MAX,
    AbiError,
    BootImage,
    Call,
    CapClone,
    CapClose,
    CapInfo,
    CapKind,
    CapQuery,
    ClockMap,
    ConsoleWrite,
    EndpointCreate,
    Fence,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    NewLink,
    Now,
    PeerGone,
    Pid,
    PolicyRaise,
    PolicyRead,
    PolicyWord,
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
    SleepUntil,
    Slot,
    Status,
    TaskCounters,
    TaskStats,
    Trap,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
    service_id,
)


@dataclass(eq=False)
class Vmo:
    """Bytes, until sealed; or shared, and then living memory for ever."""

    data: bytearray
    sealed: bool = False
    shared: bool = False


@dataclass(eq=False)
class Endpoint:
    """A set of links."""

    owner: "Task"
    links: "list[Link]" = field(default_factory=list)
    closed: bool = False


@dataclass(eq=False)
class Link:
    """A queue with one holder; `slots` counts the holder's references."""

    id: LinkId
    endpoint: Endpoint
    terms: LinkTerms
    queue: deque[tuple[bytes, Sender, Any]] = field(default_factory=deque)
    slots: int = 1
    gone_told: bool = False

    @property
    def size(self) -> int:
        return sum(len(data) for data, _, _ in self.queue)


@dataclass(eq=False)
class Cap:
    """What a slot holds."""

    target: Any
    rights: Rights


class Task:
    """A coroutine with an identity and a capability table."""

    def __init__(self, name: str, pid: int, generation: int) -> None:
        self.name = name
        self.sender = Sender(service_id(name), Pid(pid), generation, QosClass.NORMAL)
        self.table: dict[Slot, Cap] = {}
        self.program: Coroutine[Any, Any, Any] | None = None
        self.waiting: Trap[Any] | None = None
        self.result: Any = None
        self.failure: BaseException | None = None
        self.over = False
        self.begun = False
        self.half_done = False  # a fused trap has sent and now waits

    def put(self, cap: Cap) -> Slot:
        for number in range(SLOTS_MAX):
            if Slot(number) not in self.table:
                self.table[Slot(number)] = cap
                return Slot(number)
        raise AbiError(Status.NO_SPACE, "slots")

    def get(self, slot: Slot, rights: Rights) -> Any:
        cap = self.table.get(slot)
        if cap is None:
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot}")
        if rights not in cap.rights:
            raise AbiError(Status.PERMISSION_DENIED, f"slot {slot}")
        return cap.target


class TinyClock:
    """The kernel's clock, and a machine's that began at 1970 with it."""

    def __init__(self, kernel: "TinyKernel") -> None:
        self._kernel = kernel

    def monotonic(self) -> Nanos:
        """What Now gives."""
        return self._kernel.now

    def wall(self) -> int:
        """The same."""
        return self._kernel.now


class Blocked(Exception):
    """The trap has to wait, until its deadline at most."""


class TinyKernel:
    """Runs tasks until a chosen one is over."""

    def __init__(self) -> None:
        self.now = Nanos(1_000)
        self.tasks: list[Task] = []
        self.console: list[tuple[str, str, bytes]] = []
        self.traps: Counter[str] = Counter()
        self.page = PolicyWord(0, available=False)
        self.secrets: dict[str, bytes] = {}  # of the tasks that have the grant, by name
        self.secret_faults: set[str] = set()  # names of traps that the backend fails now
        self._pids = itertools.count(10)
        self._links = itertools.count(1)
        self.generations: Counter[str] = Counter()

    # ------------------------------------------------------------ set up

    def task(self, name: str) -> Task:
        self.generations[name] += 1
        task = Task(name, next(self._pids), self.generations[name])
        self.tasks.append(task)
        return task

    def boot(self, task: Task, parent: "Task | None" = None, argument: bytes = b"") -> BootImage:
        """Slots 0 and 1 of `task`: a link to `parent`'s first endpoint, an endpoint of its own."""
        control = None
        if parent is not None:
            upward = self.endpoint_of(parent)
            control = self.link(upward, task, LinkTerms(8, 4096, 0))
        endpoint = Endpoint(task)
        own = Slot(1)
        task.table[own] = Cap(endpoint, Rights.RECV | Rights.MANAGE)
        return BootImage(
            name=task.name,
            service=task.sender.service,
            pid=task.sender.pid,
            generation=task.sender.generation,
            control=control,
            endpoint=own,
            now=self.now,
            argument=argument,
        )

    def endpoint_of(self, task: Task) -> Endpoint:
        return next(cap.target for cap in task.table.values() if isinstance(cap.target, Endpoint))

    def link(self, endpoint: Endpoint, holder: Task, terms: LinkTerms = LinkTerms()) -> Slot:  # noqa: B008
        link = Link(LinkId(next(self._links)), endpoint, terms)
        endpoint.links.append(link)
        return holder.put(Cap(link, Rights.SEND))

    def start(self, task: Task, program: Coroutine[Any, Any, Any]) -> Task:
        task.program = program
        task.waiting = Now()
        return task

    def end(self, task: Task) -> None:
        """Kill: own endpoints close, held links close."""
        task.over = True
        task.waiting = None
        if task.program is not None:
            task.program.close()
        for slot in list(task.table):
            self.close(task, slot)

    def inject(self, sender: Task, endpoint: Endpoint, data: bytes | bytearray) -> LinkId:
        """Let `sender` put a message into `endpoint` over a link of its own."""
        slot = self.link(endpoint, sender)
        self._send(sender, slot, data, None, NO_WAIT)
        link: Link = sender.table[slot].target
        return link.id

    # ------------------------------------------------------------ run

    def run(self, task: Task, until: int = 60_000_000_000) -> Any:
        """Drive everybody until `task` is over; its result, or its exception."""
        while not task.over:
            if not self._round():
                self._advance(until)
        if task.failure is not None:
            raise task.failure
        return task.result

    def settle(self) -> None:
        """Drive everybody until nobody can go on without the clock; who failed meanwhile is not
        taken for somebody who waits."""
        before = {each for each in self.tasks if each.failure is not None}
        while self._round():
            pass
        for task in self.tasks:
            if task.failure is not None and task not in before:
                raise task.failure

    def _round(self) -> bool:
        """Everybody's turn once; whether anybody could use it."""
        moved = [self._progress(each) for each in list(self.tasks)]
        return any(moved)

    def _advance(self, until: int) -> None:
        times = [
            self._deadline(each.waiting)
            for each in self.tasks
            if each.waiting is not None and not each.over
        ]
        future = [time for time in times if self.now < time < NEVER]
        assert future, f"a hang: {[(each.name, each.waiting) for each in self.tasks]}"
        self.now = Nanos(min(future))
        assert self.now < until, "the run is over its time"

    def _deadline(self, trap: Trap[Any]) -> int:
        return getattr(trap, "deadline", 0)

    def _progress(self, task: Task) -> bool:
        if task.over or task.waiting is None or task.program is None:
            return False
        trap = task.waiting
        half_done = task.half_done
        try:
            value = self._do(task, trap)
        except Blocked:
            deadline = self._deadline(trap)
            if deadline == NO_WAIT:
                self._resume(task, trap, error=AbiError(Status.QUEUE_EMPTY))
            elif deadline <= self.now:
                self._resume(task, trap, error=AbiError(Status.TIMED_OUT))
            else:
                return task.half_done is not half_done
        except AbiError as error:
            self._resume(task, trap, error=error)
        else:
            self._resume(task, trap, value)
        return True

    def _resume(
        self, task: Task, trap: Trap[Any], value: Any = None, error: AbiError | None = None
    ) -> None:
        assert task.program is not None
        self.traps[type(trap).__name__] += 1
        task.half_done = False
        begun, task.begun = task.begun, True
        try:
            task.waiting = (
                task.program.throw(error)
                if error is not None
                else task.program.send(value if begun else None)
            )
        except StopIteration as stop:
            task.result = stop.value
            self.end(task)
        except BaseException as failure:  # noqa: BLE001 (a task's failure is given to the test)
            task.failure = failure
            self.end(task)

    # ------------------------------------------------------------ traps

    def _do(self, task: Task, trap: Trap[Any]) -> Any:
        match trap:
            case Call():
                return self._call(task, trap)
            case ReplyRecv():
                return self._reply_recv(task, trap)
            case Send():
                return self._send(task, trap.slot, trap.data, trap.move, trap.deadline)
            case Recv():
                return self._recv(task, trap.sources, trap.link, trap.size_max)
            case EndpointCreate():
                return task.put(Cap(Endpoint(task), Rights.RECV | Rights.MANAGE))
            case LinkCreate():
                endpoint = task.get(trap.slot, Rights.MANAGE)
                slot = self.link(endpoint, task, trap.terms)
                return NewLink(slot, task.table[slot].target.id)
            case CapClone():
                cap = task.table[trap.slot]
                if isinstance(cap.target, Link):
                    cap.target.slots += 1
                return task.put(Cap(cap.target, cap.rights))
            case CapClose():
                return self.close(task, trap.slot)
            case CapQuery():
                vmo = task.get(trap.slot, Rights.MAP)
                return CapInfo(CapKind.VMO, task.table[trap.slot].rights, len(vmo.data))
            case VmoCreate():
                pages = -(-trap.size // 4096) * 4096
                return task.put(Cap(Vmo(bytearray(pages)), Rights.MAP | Rights.MANAGE))
            case VmoWrite():
                vmo = task.get(trap.slot, Rights.MANAGE)
                if vmo.sealed or vmo.shared:
                    raise AbiError(Status.PERMISSION_DENIED)
                vmo.data[trap.offset : trap.offset + len(trap.data)] = trap.data
                return None
            case VmoSeal():
                vmo = task.get(trap.slot, Rights.MANAGE)
                if vmo.shared:
                    raise AbiError(Status.PERMISSION_DENIED)
                vmo.sealed = True
                return None
            case VmoMap():
                vmo = task.get(trap.slot, Rights.MAP)
                if not vmo.sealed:
                    raise AbiError(Status.PERMISSION_DENIED)
                return memoryview(bytes(vmo.data))
            case VmoShare():
                vmo = task.get(trap.slot, Rights.MANAGE)
                if vmo.sealed or vmo.shared:
                    raise AbiError(Status.PERMISSION_DENIED)
                vmo.shared = True
                return memoryview(vmo.data)
            case VmoWatch():
                vmo = task.get(trap.slot, Rights.MAP)
                if not vmo.shared:
                    raise AbiError(Status.PERMISSION_DENIED)
                return memoryview(vmo.data).toreadonly()
            case Fence():
                return None
            case ClockMap():
                return TinyClock(self)
            case Now():
                return self.now
            case SleepUntil():
                if self.now < trap.deadline:
                    raise Blocked
                return self.now
            case ConsoleWrite():
                self.console.append((task.name, trap.line, trap.evidence))
                return None
            case PolicyRead():
                return self.page
            case PolicyRaise():
                self.page = PolicyWord(self.page.generation + 1, trap.available)
                return self.page
            case SecretQuery():
                return SecretBackend.FILE if task.name in self.secrets else SecretBackend.NONE
            case SecretRead() | SecretReplace():
                return self._secret(task, trap)
            case TaskStats():
                return TaskCounters(*([len(task.table)] + [0] * 20))
            case _:
                raise AssertionError(f"{trap!r} is beyond this kernel")

    def _secret(self, task: Task, trap: SecretRead | SecretReplace) -> bytes | None:
        if task.name not in self.secrets:
            raise AbiError(Status.PERMISSION_DENIED)
        if type(trap).__name__ in self.secret_faults:
            raise AbiError(Status.DEVICE_FAILED)
        if isinstance(trap, SecretRead):
            return self.secrets[task.name]
        self.secrets[task.name] = trap.data
        return None

    def _call(self, task: Task, trap: Call) -> Message:
        if not task.half_done:
            trap.sent = False
            self._send(task, trap.slot, trap.data, None, NO_WAIT)
            trap.sent = True
            task.half_done = True
        return self._recv(task, (trap.inbox,), trap.link, MESSAGE_SIZE_MAX)

    def _reply_recv(self, task: Task, trap: ReplyRecv) -> Message:
        if not task.half_done and trap.slot is not None:
            trap.reply_status = None
            try:
                self._send(task, trap.slot, trap.data, None, NO_WAIT)
            except AbiError as error:
                trap.reply_status = error.status
            task.half_done = True
        return self._recv(task, trap.sources, None, MESSAGE_SIZE_MAX)

    def _send(
        self, task: Task, slot: Slot, data: bytes | bytearray, move: Slot | None, deadline: int
    ) -> None:
        link = task.get(slot, Rights.SEND)
        if not 1 <= len(data) <= MESSAGE_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"{len(data)} bytes")
        if link.endpoint.closed:
            raise AbiError(Status.NO_SUCH_ENDPOINT)
        full = len(link.queue) >= link.terms.depth
        if full or link.size + len(data) > link.terms.size:
            if deadline == NO_WAIT:
                raise AbiError(Status.QUEUE_FULL if full else Status.NO_SPACE)
            raise Blocked
        moved = None
        if move is not None:
            held = task.table[move]
            if isinstance(held.target, Vmo) and not (held.target.sealed or held.target.shared):
                raise AbiError(Status.PERMISSION_DENIED)
            moved = Cap(held.target, held.rights & (Rights.SEND | Rights.MAP))
            del task.table[move]
        link.queue.append((bytes(data), task.sender, moved))

    def _recv(
        self, task: Task, sources: tuple[Slot, ...], only: LinkId | None, size_max: int
    ) -> Message:
        found = [link.id for source in sources for link in task.get(source, Rights.RECV).links]
        if only is not None and only not in found:
            raise AbiError(Status.NO_SUCH_ENDPOINT, f"link {only}")
        for source in sources:
            endpoint = task.get(source, Rights.RECV)
            if endpoint.closed:
                raise AbiError(Status.NO_SUCH_ENDPOINT)
            for link in list(endpoint.links):
                if only is not None and link.id != only:
                    continue
                if link.queue:
                    data, sender, moved = link.queue[0]
                    if len(data) > size_max:
                        raise AbiError(Status.INVALID_ARGUMENT)
                    cap = None if moved is None else task.put(moved)
                    link.queue.popleft()
                    return Message(data, sender, link.id, cap, self.now, source)
                if link.slots == 0:
                    endpoint.links.remove(link)
                    raise PeerGone(link.id)
        raise Blocked

    def close(self, task: Task, slot: Slot) -> None:
        if slot not in task.table:
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot}")
        target = task.table.pop(slot).target
        if isinstance(target, Link):
            target.slots -= 1
        elif isinstance(target, Endpoint):
            target.closed = True
            for link in target.links:
                for _, _, moved in link.queue:
                    if moved is not None and isinstance(moved.target, Link):
                        moved.target.slots -= 1
                link.queue.clear()
