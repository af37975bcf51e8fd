"""The stores that bench/state compares, behind one face: ours in process, SQLite, lmdb, a flush.

Each durable put is on the disk when it returns. Ours runs on a preallocated file that stands for
the device; its driver here is three system calls, as the kernel's is.
"""

import os
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from nexus.abi import BLOCK_SIZE
from nexus.services.statefsd.engine import Change, Quota, Store, StoreLimits

KEYS: Final = 100_000
VALUE_SIZE: Final = 100  # bytes
GROUP: Final = 64  # puts made durable together
DEVICE_SIZE: Final = 64 * 1024 * 1024  # bytes; 1e5 records take a third of it
MAP_SIZE: Final = 1 << 28  # bytes lmdb may map
PIECE: Final = 1024 * 1024  # bytes; what is written at a time to make a file its own
LIMITS: Final = StoreLimits(
    quota=Quota(size=1 << 30, keys=1 << 30),
    quotas={},
    reserves={},
    areas_max=64,
    clients_kept=64,
    requests_kept=64,
    lost_kept=64,
)
ReplyT = TypeVar("ReplyT")
Pairs = Sequence[tuple[bytes, bytes]]


def key_of(number: int) -> bytes:
    """A key as services have them."""
    return b"/state/bench/key%06d" % number


def finished(work: Coroutine[Any, Any, ReplyT]) -> ReplyT:
    """What a coroutine returns that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        answer: ReplyT = stop.value
        return answer
    raise AssertionError("the device below never waits")


class Peer(Protocol):
    """A store under measurement."""

    def group(self, pairs: Pairs) -> None:
        """Put all of them, durably, in one commit."""
        ...

    def reads(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """A function that gets each of these keys once."""
        ...

    def tidy(self) -> None:
        """What it does when nobody asks."""
        ...

    def close(self) -> None:
        """End in order."""
        ...


class File:
    """A preallocated file as a block device."""

    writable = True

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.block_count = DEVICE_SIZE // BLOCK_SIZE
        if is_new:
            for at in range(0, DEVICE_SIZE, PIECE):
                _ = os.pwrite(self._fd, bytes(PIECE), at)
            os.fsync(self._fd)

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks."""
        return os.pread(self._fd, count * BLOCK_SIZE, block * BLOCK_SIZE)

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write blocks, durably with O_DSYNC's meaning."""
        _ = os.pwritev(self._fd, (data,), block * BLOCK_SIZE, os.RWF_DSYNC if durable else 0)

    async def flush(self) -> None:
        """Make everything durable."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Ours:
    """The engine of statefsd, in process."""

    def __init__(self, path: Path) -> None:
        self._file = File(path)
        self._store = finished(Store.open(self._file, LIMITS))

    def group(self, pairs: Pairs) -> None:
        """One batch, as a transaction is with the others."""
        _ = self._store.stage([Change(key, value) for key, value in pairs])
        finished(self._store.commit(True))

    def reads(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """A coroutine that awaits each."""
        get = self._store.get

        async def read() -> None:
            for key in keys:
                _ = await get(key)

        return lambda: finished(read())

    def tidy(self) -> None:
        """Checkpoints, as statefsd makes them when nobody asks."""
        while finished(self._store.maintain()):
            pass

    def close(self) -> None:
        """Seal and close."""
        finished(self._store.close())
        self._file.close()


class Sqlite:
    """SQLite, WAL, synchronous FULL."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        _ = self._database.execute("PRAGMA journal_mode = WAL")
        _ = self._database.execute("PRAGMA synchronous = FULL")
        _ = self._database.execute(
            "CREATE TABLE IF NOT EXISTS state (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
        )

    def group(self, pairs: Pairs) -> None:
        """One transaction."""
        _ = self._database.execute("BEGIN")
        _ = self._database.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", pairs)
        _ = self._database.execute("COMMIT")

    def reads(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """A prepared SELECT for each."""
        database = self._database

        def read() -> None:
            for key in keys:
                _ = database.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()

        return read

    def tidy(self) -> None:
        """It checkpoints by itself."""

    def close(self) -> None:
        """Close the database."""
        self._database.close()


class Lmdb:
    """lmdb, synchronous as it comes."""

    def __init__(self, path: Path) -> None:
        import lmdb

        self._environment: Any = lmdb.open(str(path), map_size=MAP_SIZE, subdir=False)

    def group(self, pairs: Pairs) -> None:
        """One transaction."""
        with self._environment.begin(write=True) as transaction:
            for key, value in pairs:
                _ = transaction.put(key, value)

    def reads(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """A transaction for each get, as a service that answers one request after the other."""
        begin = self._environment.begin

        def read() -> None:
            for key in keys:
                with begin() as transaction:
                    _ = transaction.get(key)

        return read

    def tidy(self) -> None:
        """It has nothing to tidy up."""

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()


class Flush:
    """The bare flush: as many bytes as ours writes, in one write that returns when they are on
    the disk, into a preallocated file."""

    def __init__(self, path: Path) -> None:
        self._file = File(path)
        self._block = 0

    def group(self, pairs: Pairs) -> None:
        """One write of as many blocks as the commit of ours takes."""
        size = sum(len(key) + len(value) + 40 for key, value in pairs) + 84
        blocks = -(-size // (BLOCK_SIZE - 4))
        self._block = (self._block + blocks) % 4096
        finished(self._file.write(self._block, bytes(blocks * BLOCK_SIZE), durable=True))

    def reads(self, keys: Sequence[bytes]) -> Callable[[], None]:
        """Nothing can be read."""
        raise NotImplementedError

    def tidy(self) -> None:
        """There is nothing."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


STORES: Final[dict[str, Callable[[Path], Peer]]] = {
    "flush": Flush,
    "ours": Ours,
    "sqlite": Sqlite,
    "lmdb": Lmdb,
}
