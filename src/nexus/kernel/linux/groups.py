"""Control groups (cgroup v2): what all of a service together may take, and one service's end when
it takes more.

    made, and entered by the child before anything else -> bounded when it is confined
        -> (over its memory) killed alone, as one -> read, removed

A group bounds what no limit of a process does: pages of objects that it has made, the kernel's own
memory for it, and processor time. Its memory is bounded when the child is confined: what it has
taken by then, which is the pages that it has in common with init and has written since, and what
the plan gives it from there on.

Used where a part of the tree is ours: where init is process 1, it is the root. Elsewhere somebody
has to delegate one, and NEXUS_CGROUP names it. Nobody may be in a group that has such below it, so
who is in a delegated one, init too, goes into a group beside those of the services.

Source: Documentation/admin-guide/cgroup-v2.rst.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import QosClass

FOLDER: Final = "nexus"  # below the part that is ours: one group for each service
LEAF: Final = "init"  # beside it, where somebody was in that part before: for them
MOUNT: Final = Path("/sys/fs/cgroup")
PLACE: Final = "NEXUS_CGROUP"  # in the environment: a path below it, or OWN
OWN: Final = "own"  # the group that we are in, as systemd has one for a unit with Delegate=yes
CONTROLLERS: Final = ("memory", "pids", "cpu")
COMMON_SPARE: Final = 24 * 1024 * 1024
"""Bytes of pages in common with init that a service may write later: a reference count is in the
page of its object, so reading writes. A forked service has written five to fifteen MiB of them when
it does its work (measured in a machine)."""
PERIOD: Final = 100_000  # us of cpu.max; Linux's default
SHARE: Final = 90  # percent of one CPU: a service that never ends leaves a tenth to init
WEIGHTS: Final = {  # cpu.weight; 100 is what a group begins with
    QosClass.IDLE: 10,
    QosClass.NORMAL: 100,
    QosClass.INTERACTIVE: 300,
    QosClass.PERF_BURST: 900,
}
FILE_SIZE_MAX: Final = 4096  # bytes of a file of a group


class Taken(NamedTuple):
    """What a group says of the memory of its service. `peak` is the most it had, in bytes, `total`
    what it might have, None for no bound; `kills` are those for being over it."""

    peak: int
    total: int | None
    kills: int

    def fields(self, name: str) -> dict[str, object]:
        """Of an event of kind HEAP. How much was asked for when it was too much, nobody says."""
        total = self.peak if self.total is None else self.total
        used = min(self.peak, total)
        return {
            "account": f"memory of {name}",
            "heap_budget_used": used,
            "heap_budget_free": total - used,
            "heap_budget_total": total,
            "size": UNKNOWN,
            "align": UNKNOWN,
        }


UNKNOWN: Final = "unknown"


class Spent(NamedTuple):
    """What a group says of the processor time of its service: microseconds of it, and in how many
    periods it had to wait for the next one."""

    usage: int
    throttled: int


class Group:
    """The group of one instance of a service."""

    __slots__ = ("_path", "_weight", "processes")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._weight = WEIGHTS[QosClass.NORMAL]
        self.processes = os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        """Descriptor by which a child enters."""

    @property
    def place(self) -> bytes:
        """The last of its path, as /proc/PID/cgroup ends with it."""
        return f"/{FOLDER}/{self._path.name}\n".encode()

    def bound(self, room: int, share: int | None = None) -> None:
        """From now on it may take `room` bytes, beside what is in common with init, and `share`
        percent of one CPU, None for what it had until now. Raises OSError."""
        taken = int(_read(f"{self._path}/memory.current"))
        _write(f"{self._path}/memory.max", taken + COMMON_SPARE + room)
        if share is not None:
            self.share(share)

    def share(self, percent: int) -> None:
        """From now on it may take so much of one CPU. Raises OSError."""
        _write(f"{self._path}/cpu.max", f"{percent * PERIOD // 100} {PERIOD}")

    def weigh(self, qos: QosClass) -> None:
        """Have it share its CPU by its class. Raises OSError."""
        weight = WEIGHTS[qos]
        if weight != self._weight:
            _write(f"{self._path}/cpu.weight", weight)
            self._weight = weight

    def kills(self) -> int:
        """How often somebody in it was killed for its memory. Raises OSError."""
        text = _read(f"{self._path}/memory.events")
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    def spent(self) -> Spent:
        """What it has spent so far. Raises OSError."""
        text = _read(f"{self._path}/cpu.stat")
        found = dict(line.split() for line in text.splitlines())
        return Spent(int(found["usage_usec"]), int(found["nr_throttled"]))

    def refusals(self) -> int:
        """How often a process or thread more was refused in it. Raises OSError."""
        text = _read(f"{self._path}/pids.events")
        return int(dict(line.split() for line in text.splitlines())["max"])

    def end(self) -> None:
        """Kill everybody in it. Raises OSError."""
        _write(f"{self._path}/cgroup.kill", 1)

    def taken(self) -> Taken:
        """What it has taken so far, or had when its service died. Raises OSError."""
        total = _read(f"{self._path}/memory.max")
        peak = int(_read(f"{self._path}/memory.peak"))
        return Taken(peak, None if total == "max" else int(total), self.kills())

    def remove(self) -> None:
        """Its service is gone. What it has left behind that others hold goes on to count above."""
        os.close(self.processes)
        with suppress(OSError):  # something of it lives yet: the next start finds it
            self._path.rmdir()


class Groups:
    """The part of the tree that is ours."""

    __slots__ = ("_root", "_swaps")

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._swaps = True  # whether this machine has anything to swap to

    def __bool__(self) -> bool:
        """Whether there is one."""
        return self._root is not None

    def begin(self) -> None:
        """Make the folder of the services' groups. Raises OSError."""
        if self._root is None:
            return
        if (self._root / "cgroup.type").exists():  # it is not the root of the whole tree
            leaf = self._root / LEAF
            leaf.mkdir(exist_ok=True)
            _move(self._root, leaf)
        wanted = " ".join(f"+{name}" for name in CONTROLLERS)
        _write(self._root / "cgroup.subtree_control", wanted)
        folder = self._root / FOLDER
        folder.mkdir(exist_ok=True)
        _write(folder / "cgroup.subtree_control", wanted)
        swaps = Path("/proc/swaps")
        self._swaps = swaps.exists() and len(swaps.read_text().splitlines()) > 1  # and a heading

    def make(self, name: str, generation: int, *, tasks: int, room: int | None) -> Group | None:
        """The group of a service that is to be started: `tasks` processes and threads at most, and
        `room` bytes until it is bounded, None for what our own code takes; None without a part of
        ours. Raises OSError."""
        if self._root is None:
            return None
        path = self._root / FOLDER / f"{name}.{generation}"
        path.mkdir(exist_ok=True)
        values: dict[str, int | str] = {
            "memory.oom.group": 1,
            "pids.max": tasks,
            "cpu.max": f"{SHARE * tasks * PERIOD // 100} {PERIOD}",
        }
        if room is not None:
            values["memory.max"] = room
        if self._swaps:
            values["memory.swap.max"] = 0
        for file, value in values.items():
            _write(f"{path}/{file}", value)
        return Group(path)

    def end(self) -> None:
        """Nobody is left in them."""
        if self._root is None:
            return
        for path in _folders(self._root / FOLDER):
            with suppress(OSError):
                path.rmdir()
        leaf = self._root / LEAF
        if leaf.is_dir():
            with suppress(OSError):  # as it was, for who is given it next
                unwanted = " ".join(f"-{name}" for name in CONTROLLERS)
                _write(self._root / "cgroup.subtree_control", unwanted)
                _move(leaf, self._root)
                leaf.rmdir()


def _folders(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        return ()
    return [*(each for each in folder.iterdir() if each.is_dir()), folder]


def _move(source: Path, target: Path) -> None:
    """Everybody who is in the one into the other. Raises OSError."""
    for pid in (source / "cgroup.procs").read_text("ascii").split():  # however many they are
        with suppress(ProcessLookupError):  # it has just ended
            _write(f"{target}/cgroup.procs", pid)


def delegated(environ: Mapping[str, str], mount: Path = MOUNT) -> Path | None:
    """The part of the tree that we are given, None if we are given none. Raises OSError where it is
    of no use: nothing takes its place."""
    named = environ.get(PLACE, "")
    if not named:
        return None
    root = Path(named)
    if named == OWN:
        *_, line = _read("/proc/self/cgroup").splitlines()
        root = mount / line.removeprefix("0::").lstrip("/")
    why = usable(root)
    if why:
        raise OSError(f"{PLACE}={named}: {why}")
    return root


def usable(root: Path) -> str:
    """Why this part of a tree is of no use to us, or ""."""
    try:
        there = _read(f"{root}/cgroup.controllers").split()
    except OSError as error:
        return f"no cgroup v2 at {root}: {error.strerror or error}"
    missing = [name for name in CONTROLLERS if name not in there]
    if missing:
        return f"no {', '.join(missing)} controller at {root}"
    if not os.access(root / "cgroup.subtree_control", os.W_OK):
        return f"{root} is not ours to write: nobody has delegated it"
    return ""


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, FILE_SIZE_MAX).decode().strip()
    finally:
        os.close(descriptor)


def _write(path: Path | str, value: int | str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _ = os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)
