"""What a child does to itself before it runs anything of a service, in a fixed order.

A forked service takes all steps at once. One with an interpreter of its own takes them in two
stages, `before_exec` in the forked child and the rest in the new interpreter: between them it
imports the program, so the first stage leaves it to read files of the import path and nothing
else of the outside.

Steps that this machine or user cannot take are reported by name, never passed over in silence.
Each step is a method looked up when it is taken.
"""

import ctypes
import faulthandler
import fcntl
import gc
import importlib
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import (
    MEMORY_SIZE_DEFAULT,
    VMO_SIZE_MAX,
    Grants,
    Isolation,
    SecretBackend,
    SpawnSpec,
)
from nexus.kernel.linux import landlock, seccomp
from nexus.kernel.linux.driver import DESCRIPTORS_MAX
from nexus.kernel.linux.native import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWUTS,
    LIBC,
    PR_SET_DUMPABLE,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    close_descriptors_except,
    drop_capabilities,
    environment_strings,
    keep_read_capability,
    prctl,
    set_name,
    setns,
    unshare,
)
from nexus.kernel.linux.secrets import (
    NO_SECRET,
    Secret,
    give_directory,
    leave_keys,
    take_key,
)

UID_FIRST: Final = 61_000  # one uid per row of the identity table; unused on common systems
GC_THRESHOLD: Final = 50_000  # allocations: what init made is frozen, a service makes few cycles

# bytes per granted thread: a stack of 8 MiB, and what the C library keeps for it
THREAD_MARGIN: Final = 16 * 1024 * 1024
# bytes an interpreter of its own may take while it imports; afterwards the margin counts from
# what it has then. Large libraries take under 300 MiB, and map far more than they touch.
IMPORT_DATA_MAX: Final = 512 * 1024 * 1024
IMPORT_ADDRESSES_MAX: Final = 4 * 1024 * 1024 * 1024
ORDINARY_DESCRIPTORS: Final = 64  # an event loop's own and TCP connections
SECRET_DESCRIPTORS: Final = 2  # the directory, and the file that is written or read
# Beside the import path and the interpreter: shared libraries, and what the C library reads.
SYSTEM_PATHS: Final = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/urandom",
)
# A control group counts pages that are there, these limits count addresses: where there is a group
# they only stop what it does not see, memory that is asked for and never touched.
GROUPED_FACTOR: Final = 2
HOLDER_TIME: Final = 5_000  # milliseconds the maker of the namespaces may take
STATM_SIZE_MAX: Final = 256  # bytes of /proc/self/statm
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


def import_paths() -> list[str]:
    """The directories and archives that init imports from, without relative ones."""
    return [path for path in sys.path if Path(path).is_absolute()]


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
    grants: Grants
    # bytes of the longest file it may write to: a memory object, or the image of its disk. Linux
    # has one limit for both, so a disk's holder may make memory objects as long as that.
    file_size: int = VMO_SIZE_MAX
    # bytes of private memory beside its objects and what the task inherits
    memory: int = MEMORY_SIZE_DEFAULT
    secret: Secret = NO_SECRET  # the directory is init's to open, the key is the child's to take
    key_name: str = ""  # of the secret's key
    grouped: bool = False  # a control group bounds its memory


class Hardening:
    """Takes the steps; `why` names those that could not be taken, with the reason."""

    def __init__(self, confinement: Confinement, why: dict[str, str] | None = None) -> None:
        self.confinement = confinement
        self.why: dict[str, str] = {} if why is None else why

    def before_identity(self) -> tuple[int, ...]:
        """Signals, descriptors, limits, namespaces, ids; returns the kept descriptors under
        their new, low numbers. Raises OSError where a step is not optional."""
        self._signals()
        kept = self._descriptors(self.confinement.keep)
        if self.confinement.enabled:
            self._environment()
            self._try("limits", self._limits)
            self._try("memory", self._memory)
            self._try("namespaces", self._namespaces)
            self._try("ids", self._ids)
            self._try("keyrings", self._keyrings)
            self._try("capabilities", drop_capabilities)
        self._die_with_parent()
        return kept

    def finish(self) -> None:
        """The rest, after what is still to be opened was opened."""
        set_name(self.confinement.name)
        if self.confinement.enabled:
            self._try("not_dumpable", self._not_dumpable)
            self._try("landlock", self._landlock)
            self._try("seccomp", self._seccomp)
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()

    # ------------------------------------------------------------------ the two stages of EXEC

    def before_exec(self, readable: Iterable[str]) -> tuple[int, ...]:
        """All that can be done before an interpreter starts and reads the files of the import
        path; returns the kept descriptors, which the interpreter inherits, the last one to
        measure its memory with. `confinement` knows the secret afterwards. Raises OSError where
        a step is not optional."""
        self._signals()
        statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        directory = self.confinement.secret.directory
        secret = () if directory < 0 else (directory,)
        kept = self._descriptors((*self.confinement.keep, statm, *secret))
        for number in kept:
            os.set_inheritable(number, True)
        if secret:
            directory = kept[-1]
            kept = kept[:-1]
        self._secret(directory)
        if self.confinement.enabled:
            self._try("limits", self._limits)
            self._try("memory", self._import_memory)
            self._try("namespaces", self._namespaces)
            self._try("ids", self._ids)
            self._try("keyrings", self._keyrings)
            self._try("capabilities", self._import_capabilities)
            self._try("landlock", lambda: self._import_landlock(readable))
            _ = prctl(PR_SET_NO_NEW_PRIVS, 1)
        self._die_with_parent()
        if self.confinement.enabled:
            self._try("seccomp", lambda: self._import_seccomp(seccomp.Stage.START))
        return kept

    def before_import(self) -> None:
        """In the new interpreter, which is not dumpable already and has loaded this module."""
        self._signals()
        os.environ.clear()  # the C library's locale, which Python sets
        if self.confinement.enabled:
            self._try("not_dumpable", self._not_dumpable)
            self._try("seccomp", lambda: self._import_seccomp(seccomp.Stage.IMPORT))

    def after_import(self, statm: int) -> None:
        """The program is imported and nothing is opened any more."""
        set_name(self.confinement.name)
        if self.confinement.enabled:
            text = os.pread(statm, STATM_SIZE_MAX, 0).decode()
            self._try("memory", lambda: self._bound_memory(text))
            self._try("capabilities", drop_capabilities)
        os.close(statm)
        self._die_with_parent()
        if self.confinement.enabled:
            self._try("landlock", self._landlock)
            self._try("seccomp", self._seccomp)
            grants = self.confinement.grants
            for step in ("landlock", "seccomp"):
                if step in self.why and (grants.listen or grants.connect):
                    raise OSError(f"no bound on TCP connections, {step}: {self.why[step]}")
                if step in self.why and grants.secret is SecretBackend.FILE:
                    raise OSError(f"no bound on the secret's directory, {step}: {self.why[step]}")
        gc.freeze()  # without a look for garbage first: it takes longer than half the imports
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()

    # ------------------------------------------------------------------ the steps

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

    def _environment(self) -> None:
        """Overwrite init's environment in this process's copy of it. What init's own objects
        have taken from it stays: init is given no secrets that way."""
        for text in environment_strings():
            _ = ctypes.memset(text, 0, len(ctypes.string_at(text)))
        _ = LIBC.clearenv()
        vars(os.environ)["_data"].clear()  # `clear()` unsets one by one: a millisecond

    def _descriptors(self, keep: tuple[int, ...]) -> tuple[int, ...]:
        confinement = self.confinement
        if confinement.enabled:
            for number in range(3):
                _ = os.dup2(confinement.null, number)
        close_descriptors_except((*keep, *confinement.namespaces))
        moved = []
        for number in keep:
            # Low numbers, whatever init's table looks like: select takes none above 1023.
            moved.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3))
            os.close(number)
        return tuple(moved)

    def _limits(self) -> None:
        for kind, limit in (
            (resource.RLIMIT_NOFILE, self._descriptors_max()),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            _lower(kind, limit)
        processes = self._processes_max()
        if processes is None:
            self.why["threads"] = "Linux counts all processes of the user, so nothing counts ours"
        else:
            _lower(resource.RLIMIT_NPROC, processes)
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < DESCRIPTORS_MAX:
            raise OSError("fewer descriptors than a full table and all links need")

    def _descriptors_max(self) -> int:
        grants = self.confinement.grants
        granted = len(grants.devices) + len(grants.listen) + len(grants.hardware)
        granted += SECRET_DESCRIPTORS if grants.secret else 0
        ordinary = bool(grants.streams or grants.listen or grants.connect)
        return DESCRIPTORS_MAX + granted + ORDINARY_DESCRIPTORS * ordinary

    def _processes_max(self) -> int | None:
        """RLIMIT_NPROC counts the processes and threads of an id, the one that asks included;
        None where the service has no id of its own and is granted threads.

        An exec after a change of ids is refused above it, so an exec needs a limit of one.
        """
        grants = self.confinement.grants
        if self.confinement.uid is not None and (grants.threads or grants.isolation):
            return 1 + grants.threads
        return None if grants.threads else 0

    def _memory(self) -> None:
        """Bound what raw calls can take: private memory, all mappings (shared anonymous ones
        are no private data), and the length of a memory object."""
        self._bound_memory(Path("/proc/self/statm").read_text())

    def _bound_memory(self, statm: str) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        fields = statm.split()
        data, size = (int(fields[field]) * page for field in (STATM_DATA, STATM_SIZE))
        confinement = self.confinement
        budget = confinement.budget
        room = _room(budget, confinement.memory, confinement.grants)
        if confinement.grouped:
            room *= GROUPED_FACTOR
        _lower(resource.RLIMIT_DATA, data + room)
        _lower(resource.RLIMIT_AS, size + room + budget)  # views of its objects
        _lower(resource.RLIMIT_FSIZE, self.confinement.file_size)

    def _import_memory(self) -> None:
        _lower(resource.RLIMIT_DATA, IMPORT_DATA_MAX)
        _lower(resource.RLIMIT_AS, IMPORT_ADDRESSES_MAX)
        _lower(resource.RLIMIT_FSIZE, self.confinement.file_size)

    def _namespaces(self) -> None:
        if not self.confinement.namespaces:
            raise OSError("no namespaces of our own")
        grants = self.confinement.grants
        for name, descriptor in zip(PRIVATE_NAMESPACES, self.confinement.namespaces, strict=True):
            if name != "net" or not (grants.listen or grants.connect):
                setns(descriptor)
            os.close(descriptor)

    def _ids(self) -> None:
        uid = self.confinement.uid
        if uid is None:
            raise OSError("the services share the user's id")
        if self.confinement.grants.isolation is Isolation.EXEC:
            _ = prctl(PR_SET_KEEPCAPS, 1)  # until `_import_capabilities`; an exec clears it
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    def _keyrings(self) -> None:
        """A session keyring is inherited, and who has init's possesses the keys of its user."""
        if self.confinement.grants.secret is not SecretBackend.KEYRING:  # it has one by now
            leave_keys()

    def _import_capabilities(self) -> None:
        """None, unless only root may read the interpreter or the import path: then reading goes
        on until the import is over, and Landlock says what."""
        needed = (sys.executable, os.__file__, __file__)
        if all(map(_may_read, needed)) or not landlock.version():
            drop_capabilities()
        elif self.confinement.uid is not None:
            keep_read_capability()
            self.why["import_reading"] = f"only root may read {sys.executable} or its modules"

    def _import_landlock(self, readable: Iterable[str]) -> None:
        abi = landlock.version()
        if abi == 0:
            raise OSError("no Landlock in this kernel")
        paths = (sys.prefix, sys.base_prefix, *SYSTEM_PATHS, *readable)
        connect = self.confinement.grants.connect if abi >= landlock.NET_SINCE else ()
        ruleset = landlock.restrict(
            abi,
            connect=connect,
            readable=dict.fromkeys(paths),
            replaceable=self._secret_directories(),
        )
        os.close(ruleset)

    def _import_seccomp(self, stage: seccomp.Stage) -> None:
        seccomp.install(self.confinement.grants, stage, self.confinement.secret)

    def _secret(self, directory: int) -> None:
        """Find or make what the service's secret is kept in, while that is still allowed, and
        give it to the id that the service will have."""
        secret = Secret(directory)
        uid = self.confinement.uid if self.confinement.enabled else None
        if directory >= 0:
            give_directory(directory, os.geteuid() if uid is None else uid)
        if self.confinement.grants.secret is SecretBackend.KEYRING:
            try:
                secret = Secret(key=take_key(self.confinement.key_name))
            except OSError as error:
                self.why["keyring"] = str(error)  # the service is told so when it asks
        self.confinement = self.confinement._replace(secret=secret)

    def _secret_directories(self) -> tuple[int, ...]:
        directory = self.confinement.secret.directory
        return () if directory < 0 else (directory,)

    def _die_with_parent(self) -> None:
        """After the change of ids, which clears it."""
        _ = prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.confinement.parent:
            os._exit(0)  # init died before we could ask to die with it

    def _not_dumpable(self) -> None:
        _ = prctl(PR_SET_DUMPABLE, 0)

    def _landlock(self) -> None:
        abi = landlock.version()
        if abi == 0:
            raise OSError("no Landlock in this kernel")
        grants = self.confinement.grants
        if abi < landlock.NET_SINCE and (grants.listen or grants.connect):
            raise OSError(f"Landlock ABI {abi} knows no TCP ports, {landlock.NET_SINCE} is needed")
        replaceable = self._secret_directories()
        os.close(landlock.restrict(abi, connect=grants.connect, replaceable=replaceable))
        if abi < landlock.SCOPE_SINCE:
            self.why["landlock_scope"] = f"Landlock ABI {abi}, {landlock.SCOPE_SINCE} is needed"

    def _seccomp(self) -> None:
        seccomp.install(self.confinement.grants, secret=self.confinement.secret)


def memory_room(spec: SpawnSpec) -> int:
    """Bytes of memory of its own that a task may take, its objects among them."""
    return _room(spec.budget, spec.memory, spec.grants)


def _room(budget: int, memory: int, grants: Grants) -> int:
    return budget + memory + THREAD_MARGIN * grants.threads


def _may_read(path: str) -> bool:
    """Whether a module's file may be read; of a library without source that is the compiled one."""
    return os.access(path, os.R_OK) or os.access(f"{path}c", os.R_OK)


def _lower(kind: int, limit: int) -> None:
    """Set a limit for ever, never above what it is."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(kind, (limit, limit))
