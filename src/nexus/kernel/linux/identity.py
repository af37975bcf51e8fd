"""The identity table: which service a pid is, written by init alone, read by every task.

A memfd of fixed rows, indexed by pid modulo the number of rows, with the full pid in the row.
It is sealed against every future write; init's writable mapping is not inherited by a fork.

A row is published before its task runs and cleared only when no message of the task can be
queued any more, so a reader sees it complete or not at all: the pid cell is written last and
cleared first, and the sequence cell tells a reader that the row was used again meanwhile. The
class is one cell, changed by one store. Ordering between CPUs: a reader learns a pid from a
message, which was sent after the row was written.

The policy page is one cell of row 0, so that asking it costs a task no call and no message.
"""

import fcntl
import mmap
import os
import struct
from typing import Final

from nexus.abi import Pid, PolicyWord, QosClass, Sender, ServiceId
from nexus.kernel.core import qos_class
from nexus.kernel.linux.native import F_SEAL_FUTURE_WRITE, map_read_only

ROWS: Final = 4096  # sixteen times the tasks that can live, so burned numbers rarely collide
CELLS: Final = 8  # of 8 bytes per row; row 0 holds the epoch and the policy page
TABLE_SIZE: Final = (ROWS + 1) * CELLS * 8 + 4096 - (ROWS + 1) * CELLS * 8 % 4096

EPOCH: Final = 0  # cell that changes with every row, and when the kernel channel has news
POLICY: Final = 1  # cell of the policy page: twice the generation, plus one while available
SEQUENCE: Final = 0  # cells of a row
PID: Final = 1
SERVICE: Final = 2
GENERATION: Final = 3
QOS: Final = 4
UID: Final = 5
GID: Final = 6

NO_ID: Final = 0xFFFF_FFFF  # no user's and no group's: Linux keeps it for "unchanged"

READS_MAX: Final = 8  # a row changes only after its task is gone: a second read is rare

CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def row_of(pid: int) -> int:
    """The first cell of the row that a pid belongs to."""
    return (1 + pid % ROWS) * CELLS


class IdentityTable:
    """Init's side: the only writable mapping. Close it when the run ends."""

    __slots__ = ("_cells", "_map", "descriptor")

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("nexus-identity", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, TABLE_SIZE)
        self._map = mmap.mmap(self.descriptor, TABLE_SIZE)
        self._map.madvise(mmap.MADV_DONTFORK)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        _ = fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
        self._cells = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Unmap and close."""
        self._cells.release()
        self._map.close()
        os.close(self.descriptor)

    def burned(self, pid: int) -> bool:
        """Whether a number may not be given to a new task: its row is in use."""
        return self._cells[row_of(pid) + PID] != 0

    def publish(self, sender: Sender, uid: int, gid: int) -> None:
        """Enter a task before it runs."""
        assert not self.burned(sender.pid), "a row is cleared before it is used again"
        cells, row = self._cells, row_of(sender.pid)
        cells[row + SEQUENCE] += 1
        cells[row + SERVICE] = sender.service
        cells[row + GENERATION] = sender.generation
        cells[row + QOS] = sender.qos
        cells[row + UID] = uid
        cells[row + GID] = gid
        cells[row + PID] = sender.pid
        self.pulse()

    def set_ids(self, pid: int, uid: int, gid: int) -> None:
        """Enter the ids of a task that was published with none: until now nobody believed a
        message of it, and there can have been none."""
        row = row_of(pid)
        assert self._cells[row + PID] == pid, "only a task in the table has ids"
        self._cells[row + UID] = uid
        self._cells[row + GID] = gid
        self.pulse()

    def set_qos(self, pid: int, qos: QosClass) -> None:
        """Change the class of a task."""
        assert self._cells[row_of(pid) + PID] == pid, "only a task in the table has a class"
        self._cells[row_of(pid) + QOS] = qos
        self.pulse()

    def clear(self, pid: int) -> None:
        """Forget a task: no message of it is queued anywhere."""
        assert self._cells[row_of(pid) + PID] == pid, "only a task in the table is forgotten"
        self._cells[row_of(pid) + PID] = 0
        self.pulse()

    def pulse(self) -> None:
        """Make every reader look at the table and at its kernel channel again."""
        self._cells[EPOCH] = (self._cells[EPOCH] + 1) & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def policy(self) -> PolicyWord:
        """What every task reads."""
        return unpack_policy(self._cells[POLICY])

    def raise_policy(self, *, available: bool) -> PolicyWord:
        """Raise the generation by one. One store of one aligned cell: a reader sees the former
        word or this one, never a generation with the other's availability."""
        word = PolicyWord(self.policy.generation + 1, available)
        self._cells[POLICY] = word.generation << 1 | word.available
        return word


def unpack_policy(cell: int) -> PolicyWord:
    """The meaning of the policy cell; zero before the first raise."""
    return PolicyWord(cell >> 1, bool(cell & 1))


class IdentityView:
    """A task's read-only side."""

    __slots__ = ("cells",)

    def __init__(self, descriptor: int) -> None:
        self.cells = map_read_only(descriptor, TABLE_SIZE).cast("Q")

    def close(self) -> None:
        """Unmap."""
        self.cells.release()

    def qos_of(self, pid: int) -> QosClass:
        """The class of a live task."""
        assert self.cells[row_of(pid) + PID] == pid, "a live task is in the table"
        return QosClass(self.cells[row_of(pid) + QOS])

    def uid_of(self, pid: int) -> int:
        """The user id that a live task runs under."""
        assert self.cells[row_of(pid) + PID] == pid, "a live task is in the table"
        return self.cells[row_of(pid) + UID]

    def sender_of(self, credentials: bytes) -> Sender | None:
        """The task that the kernel says sent a message; None for pid 0, a pid that is not in
        the table, or a task with other ids than init gave it."""
        pid, uid, gid = CREDENTIALS.unpack(credentials)
        if pid <= 0:
            return None
        cells, row = self.cells, row_of(pid)
        for _ in range(READS_MAX):
            sequence = cells[row + SEQUENCE]
            if cells[row + PID] != pid:
                return None
            service, generation, qos, row_uid, row_gid = cells[row + SERVICE : row + GID + 1]
            if cells[row + PID] != pid or cells[row + SEQUENCE] != sequence:
                continue
            if (uid, gid) != (row_uid, row_gid):
                return None
            known = qos_class(qos)
            assert known is not None, "init writes only classes"
            return Sender(ServiceId(service), Pid(pid), generation, known)
        return None
