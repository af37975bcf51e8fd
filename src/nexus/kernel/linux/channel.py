"""The kernel channel: one SEQPACKET pair between init and each task, in nobody's table.

To init: the result of the child's preparation, console lines, requests to set a class,
confirmations, traces, notes about refusals, the traceback of a crash. To the task: go, dead
peers, answers. Init trusts nothing that comes over it but the kernel's stamp.
"""

import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from nexus.abi import (
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
    CapQuery,
    ClockMap,
    ConsoleWrite,
    DeviceDma,
    DeviceMap,
    DeviceQuery,
    EndpointClose,
    EndpointCreate,
    Entropy,
    EntropyDraw,
    EventKind,
    Exit,
    Fence,
    Kill,
    LinkCreate,
    Notify,
    Now,
    Pid,
    PolicyRaise,
    PolicyRead,
    PortClose,
    PortDial,
    PortPeer,
    PortSend,
    Recv,
    ReplyRecv,
    SecretQuery,
    SecretRead,
    SecretReplace,
    Send,
    SetTaskQos,
    SleepUntil,
    Spawn,
    SpawnLastError,
    Status,
    TaskQos,
    TaskStats,
    TaskTable,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
    Wait,
)
from nexus.kernel.linux.native import MSG_CMSG_CLOEXEC

FRAME_SIZE_MAX: Final = 8 * 1024  # bytes
CRASH_SIZE_MAX: Final = 4096  # bytes of traceback: the end of it tells most
NOTE_SIZE_MAX: Final = 1024  # bytes of JSON
STEPS_MAX: Final = 32  # steps a child may say it could not take: there are fewer
STEP_SIZE_MAX: Final = 64  # characters of such a step's name

# First byte of a frame to init.
PREPARED: Final = 1
CONSOLE: Final = 2
SET_QOS: Final = 3
CONFIRM: Final = 4
TRACE: Final = 5
CRASH: Final = 6
NOTE: Final = 7
DIAL: Final = 8
# First byte of a frame to the task.
GO: Final = 1
PEER_DEAD: Final = 2
QOS_ANSWER: Final = 3
DIAL_ANSWER: Final = 4  # and a status; with 0 a socket comes along

NOTABLE: Final = (EventKind.LINK, EventKind.REFUSED, EventKind.HEAP, EventKind.DEVICE)

PID_FRAME: Final = struct.Struct("<BI")
QOS_FRAME: Final = struct.Struct("<Bqq")
CONSOLE_HEAD: Final = struct.Struct("<BH")
TRACE_HEAD: Final = struct.Struct("<BI")
TRACE_RECORD: Final = struct.Struct("<BBI")

TRACES_PER_FRAME: Final = 500
TRACE_PATIENCE: Final = 2_000_000_000  # nanoseconds a traced task waits for init before it drops

QOS_PATIENCE: Final = 5_000_000_000  # nanoseconds a task waits for a decision of init
DIAL_PATIENCE: Final = 5_000_000_000  # nanoseconds a task waits for a socket of init
# Room for the stamp that the channel asks of Linux, and one descriptor.
ANSWER_CONTROL_SIZE: Final = socket.CMSG_SPACE(12) + socket.CMSG_LEN(4)
ANSWER_FLAGS: Final = MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
GO_PATIENCE: Final = 10_000_000_000  # nanoseconds a prepared task waits to be let go

TRAPS: Final[tuple[type, ...]] = (
    EndpointCreate,
    EndpointClose,
    LinkCreate,
    Send,
    Recv,
    Call,
    ReplyRecv,
    CapClone,
    CapDerive,
    CapClose,
    CapQuery,
    VmoCreate,
    VmoWrite,
    VmoSeal,
    VmoMap,
    VmoShare,
    VmoWatch,
    Fence,
    ClockMap,
    Spawn,
    SpawnLastError,
    Wait,
    Kill,
    Exit,
    TaskTable,
    TaskQos,
    SetTaskQos,
    Now,
    SleepUntil,
    Entropy,
    ConsoleWrite,
    TaskStats,
    AuditLog,
    PolicyRead,
    PolicyRaise,
    BootMemoryRead,
    BootMemoryReplace,
    Notify,
    PortSend,
    PortClose,
    PortPeer,
    PortDial,
    BusScan,
    DeviceQuery,
    DeviceMap,
    DeviceDma,
    BlockRead,
    BlockWrite,
    BlockFlush,
    EntropyDraw,
    SecretQuery,
    SecretRead,
    SecretReplace,
)
TRAP_NUMBER: Final = {kind: number for number, kind in enumerate(TRAPS)}

assert TRACE_HEAD.size + TRACES_PER_FRAME * TRACE_RECORD.size <= FRAME_SIZE_MAX


class Prepared(NamedTuple):
    """What a child says before it is let go: its ids, and what it could not do."""

    uid: int
    gid: int
    degraded: tuple[str, ...]
    failed: str  # empty if it may run


def pack_prepared(prepared: Prepared) -> bytes:
    """The first frame of a child."""
    return bytes((PREPARED,)) + json.dumps(prepared).encode()


def unpack_prepared(frame: bytes) -> Prepared:
    """Read it; what a service imports may have written it. Raises ValueError, TypeError,
    OverflowError or RecursionError."""
    if frame[:1] != bytes((PREPARED,)):
        raise ValueError("another frame")
    uid, gid, degraded, failed = json.loads(frame[1:])
    steps = tuple(_printable(str(step), STEP_SIZE_MAX) for step in degraded[:STEPS_MAX])
    return Prepared(int(uid), int(gid), steps, _printable(str(failed), NOTE_SIZE_MAX))


def _printable(text: str, size_max: int) -> str:
    """At most so many characters, of one line and without what a terminal obeys."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:size_max]
    )


class TraceBuffer:
    """Records of traps, handed over in batches."""

    __slots__ = ("_lost", "_put", "records")

    def __init__(self, put: Callable[[bytes], bool]) -> None:
        self._put = put
        self._lost = 0
        self.records: list[tuple[int, int, int]] = []

    def add(self, trap: type, status: int, size: int) -> None:
        """Keep one record; a full batch is handed over."""
        self.records.append((TRAP_NUMBER[trap], status, size))
        if len(self.records) >= TRACES_PER_FRAME:
            self.flush()

    def flush(self) -> None:
        """Hand over what is kept; what the receiver does not take is counted and dropped."""
        if not self.records:
            return
        records, self.records = self.records, []
        body = b"".join(TRACE_RECORD.pack(*record) for record in records)
        if self._put(TRACE_HEAD.pack(TRACE, self._lost) + body):
            self._lost = 0
        else:
            self._lost += len(records)


class InitIsGone(Exception):
    """The other end of the kernel channel is closed: there is nothing left to run for."""


class TaskPort:
    """A service's side of its kernel channel."""

    root = False

    def __init__(self, sock: socket.socket) -> None:
        self.fileno = sock.fileno()
        self.peer_dead: Callable[[int], None] = _nobody_listens
        self._sock = sock
        self._traces = TraceBuffer(self._put_patiently)
        self._unconfirmed: list[int] = []
        self._answers: list[int] = []
        self._late = 0  # answers nobody waits for any more
        self._dialled: list[socket.socket | int] = []  # a socket, or why there is none
        self._late_dials = 0

    def serve(self) -> None:
        """Take what init has sent; never blocks."""
        while self._unconfirmed and self._put(PID_FRAME.pack(CONFIRM, self._unconfirmed[0])):
            del self._unconfirmed[0]
        while True:
            try:
                frame, ancillary, _, _ = self._sock.recvmsg(
                    FRAME_SIZE_MAX, ANSWER_CONTROL_SIZE, ANSWER_FLAGS
                )
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue
            self._take(frame, _descriptor_of(ancillary))

    def _take(self, frame: bytes, descriptor: int) -> None:
        if not frame:
            raise InitIsGone
        if descriptor >= 0:
            self._take_dialled(socket.socket(fileno=descriptor))
            return
        if frame[0] == PEER_DEAD:
            self.peer_dead(PID_FRAME.unpack(frame)[1])
        elif frame[0] == QOS_ANSWER:
            if self._late:
                self._late -= 1
            else:
                self._answers.append(frame[1])
        elif frame[0] == DIAL_ANSWER:
            self._take_dialled(frame[1])

    def _take_dialled(self, answer: "socket.socket | int") -> None:
        if not self._late_dials:
            self._dialled.append(answer)
            return
        self._late_dials -= 1
        if isinstance(answer, socket.socket):
            answer.close()

    def _put(self, frame: bytes) -> bool:
        try:
            return self._sock.send(frame, socket.MSG_DONTWAIT) > 0
        except BlockingIOError:
            return False
        except OSError:
            raise InitIsGone from None

    def _put_patiently(self, frame: bytes) -> bool:
        give_up = time.monotonic_ns() + TRACE_PATIENCE
        while not self._put(frame):
            if time.monotonic_ns() >= give_up:
                return False
            time.sleep(0.001)  # noqa: TID251 (a kernel's wait; only while tracing)
        return True

    def console(self, line: str, evidence: bytes) -> None:
        """Print a checked line. Refuses: QueueFull."""
        text = line.encode()
        if not self._put(CONSOLE_HEAD.pack(CONSOLE, len(text)) + text + evidence):
            raise AbiError(Status.QUEUE_FULL, "the console has no room")

    def set_qos(self, pid: Pid, raw: int) -> None:
        """Ask init, and wait for its answer. Refuses as SetTaskQos, and TimedOut."""
        # A number that is no class or no pid stays one when it is cut.
        number = int(raw) if abs(raw) < 1 << 63 else -1
        target = int(pid) if abs(pid) < 1 << 63 else -1
        answers = self._answers
        answers.clear()
        give_up = time.monotonic_ns() + QOS_PATIENCE
        while not self._put(QOS_FRAME.pack(SET_QOS, target, number)):
            if not self._ready(select.POLLOUT, give_up):
                raise AbiError(Status.TIMED_OUT, "init takes nothing")
        while not answers:
            if not self._ready(select.POLLIN, give_up):
                self._late += 1
                raise AbiError(Status.TIMED_OUT, "init does not answer")
            self.serve()
        if answers[0]:
            raise AbiError(Status(answers[0]))

    def dial(self, name: str) -> socket.socket:
        """Ask init for a connection that a grant of this name allows. Refuses: NoSpace, TimedOut,
        PermissionDenied."""
        give_up = time.monotonic_ns() + DIAL_PATIENCE
        if not self._put(bytes((DIAL,)) + name.encode()):
            raise AbiError(Status.NO_SPACE, "init takes nothing")
        while not self._dialled:
            if not self._ready(select.POLLIN, give_up):
                self._late_dials += 1
                raise AbiError(Status.TIMED_OUT, "init does not answer")
            self.serve()
        answer = self._dialled.pop()
        if isinstance(answer, socket.socket):
            return answer
        raise AbiError(Status(answer), f"no connection for {name}")

    def _ready(self, event: int, deadline: int) -> bool:
        """Wait until the channel is ready; False once the deadline has passed."""
        look = select.poll()
        look.register(self._sock, event)
        left = deadline - time.monotonic_ns()
        return left > 0 and bool(look.poll(left / 1_000_000))

    def note(self, kind: EventKind, fields: Mapping[str, object]) -> None:
        """Have an event recorded, if there is room."""
        body = json.dumps(fields).encode()
        if len(body) <= NOTE_SIZE_MAX:
            _ = self._put(bytes((NOTE, NOTABLE.index(kind))) + body)

    def confirm(self, pid: int) -> None:
        """Tell init that nothing of a dead task is queued here."""
        self._unconfirmed.append(pid)
        while self._unconfirmed and self._put(PID_FRAME.pack(CONFIRM, self._unconfirmed[0])):
            del self._unconfirmed[0]

    def trace(self, trap: type, status: int, size: int) -> None:
        """Record a trap."""
        self._traces.add(trap, status, size)

    def flush(self) -> None:
        """Hand over recorded traps."""
        self._traces.flush()

    def crashed(self, text: str) -> None:
        """Leave a traceback behind, if there is room."""
        _ = self._put(bytes((CRASH,)) + text.encode(errors="replace")[-CRASH_SIZE_MAX:])

    def prepared(self, prepared: Prepared) -> None:
        """Say how the preparation went, then wait to be let go or not."""
        failed = prepared.failed[:NOTE_SIZE_MAX]
        _ = self._put(pack_prepared(prepared._replace(failed=failed)))
        let_go = self._ready(select.POLLIN, time.monotonic_ns() + GO_PATIENCE)
        frame = self._sock.recv(FRAME_SIZE_MAX, socket.MSG_DONTWAIT) if let_go else b""
        if frame[:1] != bytes((GO,)):
            os._exit(0)  # this number is burned, or the spawn was given up: nothing has run


def _descriptor_of(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The descriptor that came with a frame of init's, -1 if none did."""
    for _, kind, content in ancillary:
        if kind == socket.SCM_RIGHTS:
            return int.from_bytes(content[:4], "little")
    return -1


def _nobody_listens(pid: int) -> None:
    raise AssertionError(f"news of {pid} before there is a driver")
