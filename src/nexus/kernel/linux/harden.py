"""What a forked child does to itself before it runs anything of a service, in a fixed order.

Steps that this machine or user cannot take are reported by name, never passed over in silence.
Each step is a method looked up when it is taken.
"""

import faulthandler
import fcntl
import gc
import importlib
import os
import random  # noqa: TID251 (the child's own generator is made different from its siblings')
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import VMO_SIZE_MAX
from nexus.kernel.linux import landlock, seccomp
from nexus.kernel.linux.driver import DESCRIPTORS_MAX
from nexus.kernel.linux.native import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWUTS,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    close_descriptors_except,
    drop_capabilities,
    prctl,
    set_name,
    setns,
    unshare,
)

UID_FIRST: Final = 61_000  # one uid per row of the identity table; unused on common systems
GC_THRESHOLD: Final = 50_000  # allocations: what init made is frozen, a service makes few cycles

# bytes beside what a task inherits and its budget; generous, not measured: Python asks Linux for
# 1 MiB at a time, and a traceback needs room too.
MEMORY_MARGIN: Final = 64 * 1024 * 1024
HOLDER_TIME: Final = 5_000  # milliseconds the maker of the namespaces may take
STATM_SIZE: Final = 0  # fields of /proc/self/statm, proc_pid_statm(5)
STATM_DATA: Final = 5

# What a service may need later and could not open any more: modules and codecs that Python
# imports at first use. The services' own imports are init's to make before it forks.
PRELOADED: Final = (
    "_strptime",
    "codecs",
    "collections.abc",
    "contextlib",
    "encodings.ascii",
    "encodings.hex_codec",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.unicode_escape",
    "encodings.utf_16",
    "encodings.utf_8",
    "json",
    "linecache",
    "logging",
    "tokenize",
    "traceback",
    "warnings",
)

PRIVATE_NAMESPACES: Final = ("net", "ipc", "uts")


def preload() -> None:
    """Import what a confined child cannot import any more."""
    for name in PRELOADED:
        _ = importlib.import_module(name)


class Namespaces:
    """Empty network, IPC and host-name namespaces, one set for all services of a run.

    No service can make a socket or an IPC object, so sharing them shares nothing; making a set
    for each would cost 4 ms per spawn. Held by descriptors; `problem` says why there are none.
    """

    __slots__ = ("descriptors", "problem")

    def __init__(self) -> None:
        self.descriptors: tuple[int, ...] = ()
        self.problem = ""
        ready, told = os.pipe()
        holder = os.fork()
        if holder == 0:
            _hold_namespaces(ready, told)
        os.close(told)
        try:
            if not readable(ready, HOLDER_TIME):
                self.problem = "unshare took too long"
            elif os.read(ready, 1):
                # By path: a namespace has no other name.
                self.descriptors = tuple(
                    os.open(f"/proc/{holder}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
                    for name in PRIVATE_NAMESPACES
                )
            else:
                self.problem = "unshare refused"
        except OSError as error:
            self.problem = str(error)
        finally:
            os.close(ready)
            os.kill(holder, signal.SIGKILL)
            _ = os.waitpid(holder, 0)

    def close(self) -> None:
        """Let the namespaces go with the last process in them."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


def readable(descriptor: int, span: int) -> bool:
    """Whether a descriptor has something to read within `span` milliseconds."""
    look = select.poll()
    look.register(descriptor, select.POLLIN)
    return bool(look.poll(span))


def _hold_namespaces(ready: int, told: int) -> None:
    """The holder's life: make the namespaces, say so, wait to be killed."""
    try:
        os.close(ready)
        _ = prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        _ = os.write(told, b"1")
        signal.pause()
    finally:
        os._exit(0)


class Confinement(NamedTuple):
    """What a child needs to know to confine itself."""

    parent: int  # pid of init
    uid: int | None  # to change to; None keeps the ids
    keep: tuple[int, ...]  # descriptors
    null: int  # descriptor of /dev/null
    namespaces: tuple[int, ...]
    enabled: bool  # False: only what correctness needs
    name: str  # for ps
    budget: int  # bytes of objects the service may hold


class Hardening:
    """Takes the steps; `why` names those that could not be taken, with the reason."""

    def __init__(self, confinement: Confinement) -> None:
        self.confinement = confinement
        self.why: dict[str, str] = {}

    def before_identity(self) -> tuple[int, ...]:
        """Signals, descriptors, limits, namespaces, ids; returns the kept descriptors under
        their new, low numbers. Raises OSError where a step is not optional."""
        self._signals()
        kept = self._descriptors()
        if self.confinement.enabled:
            self._try("limits", self._limits)
            self._try("memory", self._memory)
            self._try("namespaces", self._namespaces)
            self._try("ids", self._ids)
            self._try("capabilities", drop_capabilities)
        self._die_with_parent()
        return kept

    def finish(self) -> None:
        """The rest, after what is still to be opened was opened."""
        set_name(self.confinement.name)
        self._reseed()
        if self.confinement.enabled:
            self._try("not_dumpable", self._not_dumpable)
            self._try("landlock", self._landlock)
            self._try("seccomp", self._seccomp)
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()

    def _try(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except (OSError, KeyError, ValueError) as error:
            self.why[name] = str(error)

    def _signals(self) -> None:
        """All blocked: an interrupted recvmsg would wait its whole time again (PEP 475). The
        fault handler would write to a descriptor number that will be somebody's link."""
        faulthandler.disable()
        _ = signal.set_wakeup_fd(-1)
        _ = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
            _ = signal.signal(number, signal.SIG_DFL)
        _ = signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _descriptors(self) -> tuple[int, ...]:
        confinement = self.confinement
        if confinement.enabled:
            for number in range(3):
                _ = os.dup2(confinement.null, number)
        close_descriptors_except((*confinement.keep, *confinement.namespaces))
        moved = []
        for number in confinement.keep:
            # Low numbers, whatever init's table looks like: select takes none above 1023.
            moved.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3))
            os.close(number)
        return tuple(moved)

    def _limits(self) -> None:
        for kind, limit in (
            (resource.RLIMIT_NOFILE, DESCRIPTORS_MAX),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            _, hard = resource.getrlimit(kind)
            if hard != resource.RLIM_INFINITY:
                limit = min(limit, hard)
            resource.setrlimit(kind, (limit, limit))
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < DESCRIPTORS_MAX:
            raise OSError("fewer descriptors than a full table and all links need")

    def _memory(self) -> None:
        """Bound what raw calls can take: private memory, all mappings (shared anonymous ones
        are no private data), and the length of a memory object."""
        statm = Path("/proc/self/statm").read_text().split()
        page = os.sysconf("SC_PAGE_SIZE")
        data, size = (int(statm[field]) * page for field in (STATM_DATA, STATM_SIZE))
        room = self.confinement.budget + MEMORY_MARGIN
        for kind, limit in (
            (resource.RLIMIT_DATA, data + room),
            (resource.RLIMIT_AS, size + room + self.confinement.budget),  # views of its objects
            (resource.RLIMIT_FSIZE, VMO_SIZE_MAX),
        ):
            _, hard = resource.getrlimit(kind)
            if hard != resource.RLIM_INFINITY:
                limit = min(limit, hard)
            resource.setrlimit(kind, (limit, limit))

    def _namespaces(self) -> None:
        if not self.confinement.namespaces:
            raise OSError("no namespaces of our own")
        for descriptor in self.confinement.namespaces:
            setns(descriptor)
            os.close(descriptor)

    def _ids(self) -> None:
        uid = self.confinement.uid
        if uid is None:
            raise OSError("the services share the user's id")
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    def _die_with_parent(self) -> None:
        """After the change of ids, which clears it."""
        _ = prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.confinement.parent:
            os._exit(0)  # init died before we could ask to die with it

    def _not_dumpable(self) -> None:
        _ = prctl(PR_SET_DUMPABLE, 0)

    def _reseed(self) -> None:
        random.seed()

    def _landlock(self) -> None:
        abi = landlock.version()
        if abi == 0:
            raise OSError("no Landlock in this kernel")
        os.close(landlock.restrict(abi))
        if abi < landlock.SCOPE_SINCE:
            self.why["landlock_scope"] = f"Landlock ABI {abi}, {landlock.SCOPE_SINCE} is needed"

    def _seccomp(self) -> None:
        seccomp.install()
