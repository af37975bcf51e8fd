"""Which of the promises about a service's confinement this machine and user can keep, tried.

`nexus doctor` shows it. A child goes through the very steps every service goes through, tells
which it could take, and tries to get out (`escapes`); another one does without the system call
filter, to show what stands behind it; and a whole kernel runs services that try, forked and in an
interpreter of their own, without grants and with. The rest is looked up.
"""

import errno
import fcntl
import json
import mmap
import os
import select
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from nexus.abi import (
    BLOCK_SIZE,
    HEAP_SIZE,
    INIT_NAME,
    PAGE_SIZE,
    VMO_SIZE_MAX,
    AbiError,
    BootImage,
    Event,
    EventKind,
    Grants,
    Isolation,
    Nanos,
    Program,
    SecretBackend,
    Send,
    Spawn,
    SpawnSpec,
    Trap,
)
from nexus.kernel.linux import escapes, groups_tried, landlock, seccomp, trespass
from nexus.kernel.linux.devices import HWRNG
from nexus.kernel.linux.driver import SHARED_SEALS
from nexus.kernel.linux.escapes import DONE, MANY_OBJECTS, OBJECTS_MANY, Wall
from nexus.kernel.linux.harden import (
    PRIVATE_NAMESPACES,
    UID_FIRST,
    Confinement,
    Hardening,
    Namespaces,
    preload,
    readable,
)
from nexus.kernel.linux.hardware import HWRNG_PATH, Bus
from nexus.kernel.linux.kernel import LinuxKernel, enough_descriptors, may_renice
from nexus.kernel.linux.native import (
    MACHINE,
    MEMBARRIER_GLOBAL_EXPEDITED,
    MEMBARRIER_QUERY,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    membarrier,
    prctl,
)
from nexus.kernel.linux.secrets import DIRECTORY, NAME, find_key, forget_keys, key_name
from nexus.kernel.linux.sight import bounds, seen

PID_MAX_LARGE: Final = 1 << 22  # the largest Linux has: a number comes again late
ANSWER_TIME: Final = 5_000  # milliseconds the child may take
RUN_TIME: Final = 60_000  # milliseconds a whole kernel with three interpreters may take
ANSWER_SIZE_MAX: Final = 4096  # bytes of one read
PORT_GRANTED: Final = 10  # a TCP port that the attempts do not try; nobody connects to it


OBJECTS_ROW: Final = "memory_objects"


class State(StrEnum):
    """How far a guarantee holds."""

    HELD = "held"
    DEGRADED = "degraded"
    ABSENT = "absent"


class Guarantee(NamedTuple):
    """One guarantee: what it gives, and why it does not hold fully where it does not."""

    name: str
    state: State
    gives: str
    why: str = ""


# Name of a step, what it gives, and what is left where it cannot be taken.
STEPS: Final = (
    ("limits", "descriptors, core dumps, processes and locked memory are bounded", State.ABSENT),
    ("memory", "memory, mappings and a memory object are bounded by the plan", State.ABSENT),
    ("namespaces", "no network, no host name, no System V objects in sight", State.ABSENT),
    ("ids", "a user id of its own: no signal to, no trace of another service", State.DEGRADED),
    ("capabilities", "no capability: a sender's pid cannot be forged", State.ABSENT),
    ("not_dumpable", "memory and descriptors are closed to processes of the same id", State.ABSENT),
    ("landlock", "no file can be opened by path", State.ABSENT),
    ("landlock_scope", "no abstract socket and no signal outside", State.DEGRADED),
    ("seccomp", "only the listed system calls", State.ABSENT),
)


# Which attempts show a step at work, where it was taken: in a process with the filter, and in
# one without it.
FILTERED: Final = {
    "seccomp": tuple(one.name for one in escapes.ATTEMPTS if one.wall is Wall.FILTER),
    "limits": ("descriptors without end",),
    "memory": ("memory without end", "shared memory without end", "an object too large"),
    "capabilities": ("forge credentials", "become root"),
}
UNFILTERED: Final = {
    "limits": ("fork", "thread"),
    "landlock": (
        "open a path",
        "list a directory",
        "open a sibling's memory",
        "a sibling's environment",
    ),
    "landlock_scope": ("signal a sibling",),
    "not_dumpable": ("trace a sibling", "read a sibling"),
}


# Limits of a child that are zero, by Linux's name.
ZERO_LIMITS: Final = ("Max core file size", "Max locked memory")


class Found(NamedTuple):
    """What a child found: steps it could not take, and what came of its attempts; and the steps
    that Linux's own account of it denies."""

    refused: dict[str, str]
    outcomes: dict[str, str]
    denied: dict[str, str]


class Service(NamedTuple):
    """What a service found that tried to get out, or why it could not be started."""

    failed: str
    degraded: tuple[str, ...]
    report: dict[str, Any]


def hardening_report() -> tuple[Guarantee, ...]:
    """The state of each guarantee on this machine, for this user."""
    preload()
    groups = groups_tried.tried()
    return (
        *_with_groups(step_rows(), groups),
        *tried_rows(_try_in_a_run()),
        *secret_rows(_try_secrets()),
        *device_rows(),
        *sharing_rows(),
        _process_handles(),
        *_looked_up_rows(),
        *group_rows(groups),
    )


def step_rows() -> list[Guarantee]:
    """The steps of a forked service without grants, and what they leave open."""
    with _sibling() as sibling:
        found = _try_in_a_child(sibling, filtered=True)
        behind = _try_in_a_child(sibling, filtered=False)
    refused = found.denied | found.refused
    for step, names in FILTERED.items():
        _ = refused.setdefault(step, _open(names, found.outcomes, "refusal"))
    for step, names in UNFILTERED.items():
        left = _open(names, behind.outcomes, "beyond")
        if not refused.get(step) and left:
            refused[step] = f"{left}, without the filter"
    refused = {step: why for step, why in refused.items() if why}
    rows = [
        Guarantee(name, left if name in refused else State.HELD, gives, refused.get(name, ""))
        for name, gives, left in STEPS
    ]
    if "landlock" in refused:
        index = [row.name for row in rows].index("landlock_scope")
        rows[index] = rows[index]._replace(state=State.ABSENT, why=refused["landlock"])
    rows.append(_many_objects(found.outcomes.get(MANY_OBJECTS.name)))
    return rows


def _many_objects(outcome: str | None) -> Guarantee:
    gives = "all memory objects of a service together are bounded"
    if outcome is None:
        return Guarantee(OBJECTS_ROW, State.ABSENT, gives, "not tried")
    mib = 1 << 20
    why = (
        f"each of {VMO_SIZE_MAX // mib} MiB at most, as many as a task has descriptors "
        "(for the holder of a disk's image each as long as the image, for Linux has one limit, "
        "RLIMIT_FSIZE, for both): "
        f"{OBJECTS_MANY * VMO_SIZE_MAX // mib} MiB were there to take"
    )
    if outcome == DONE:
        return Guarantee(OBJECTS_ROW, State.DEGRADED, gives, why)
    return Guarantee(OBJECTS_ROW, State.HELD, gives)


def _open(names: tuple[str, ...], outcomes: dict[str, str], field: str) -> str:
    """The attempts that were not refused as they should, for a reader; empty if all were."""
    expected = {one.name: getattr(one, field) for one in escapes.ATTEMPTS}
    wrong = [name for name in names if outcomes.get(name, "not tried") != expected[name]]
    return ", ".join(f"{name}: {outcomes.get(name, 'not tried')}" for name in wrong)


def tried_rows(services: dict[str, Service]) -> list[Guarantee]:
    """What whole services found."""
    forked, executed = services["fork"], services["exec"]
    rows = []

    def row(name: str, gives: str, why: str, degraded: str = "") -> None:
        state = State.ABSENT if why else State.DEGRADED if degraded else State.HELD
        rows.append(Guarantee(name, state, gives, why or degraded))

    def attempts(service: Service, **expected: str) -> str:
        """Why a service's attempts do not show it; `expected` in place of the table's word."""
        if service.failed:
            return service.failed
        words = {name.replace("_", " "): outcome for name, outcome in expected.items()}
        outcomes = service.report["outcomes"]
        wrong = [name for name, outcome in words.items() if outcomes[name] != outcome]
        return ", ".join(f"{name}: {outcomes[name]}" for name in wrong)

    row(
        "environment",
        "a service sees nothing of the environment that the system was started with",
        forked.failed or ", ".join(forked.report["environment"]),
    )
    row(
        "identity_table",
        "only init can write who is who",
        attempts(forked, write_the_identity_table="EACCES"),
    )
    row(
        "policy_page",
        "only init can write the word of the policy page",
        attempts(forked, write_the_policy_page="EACCES"),
    )
    row(
        "credentials",
        "each message carries who sent it, from Linux itself",
        attempts(forked, forge_credentials="EPERM") or forked.report["sender"],
    )
    names = tuple(one.name for one in escapes.ATTEMPTS)
    left = executed.failed or forked.failed
    if not left and not _differ(forked, executed):
        left = "layout and hash seed are init's"
    left = left or _open(names, executed.report["outcomes"], "refusal")
    reading = "import_reading" in executed.degraded
    row(
        "exec_isolation",
        "an interpreter of its own: other layout, other hash seed, nothing of init's memory",
        left,
        "only root may read the interpreter: an import reads its path as root would" * reading,
    )
    threads = services["threads"]
    row(
        "threads",
        "a grant of threads lets a service start that many, and no process",
        attempts(threads, thread=DONE, fork="EPERM"),
        "Linux counts all processes of the user: only memory bounds how many"
        * ("threads" in threads.degraded),
    )
    row(
        "streams",
        "a grant of streams opens stream pairs, through which nothing else is reached",
        attempts(
            services["streams"], stream_pair=DONE, datagram_to_a_path="EPERM", UDP_socket="EPERM"
        ),
    )
    row(
        "network",
        "a grant of TCP ports opens these, and no other port or protocol",
        attempts(services["network"], TCP_connection="EACCES", UDP_socket="EPERM"),
    )
    return rows


def secret_rows(services: dict[str, Service]) -> list[Guarantee]:
    """What the holders of secrets found, and somebody else who tried to get at them."""
    stranger = services["stranger"]
    rows = []
    shared = "" if os.geteuid() == 0 else "whatever else the user runs has the same id"
    if not shared and "keyrings" in stranger.degraded:
        shared = "services are in init's session, and possess the keys that it does"

    def row(name: str, gives: str, holder: Service, others: tuple[str, ...]) -> None:
        why = holder.failed or stranger.failed
        if not why and holder.report["kept"] != DONE:
            why = holder.report["kept"]
        if not why:
            backend = SECRETS[name]
            meant = {one.name: one.refusal for one in trespass.BY[backend]}
            wrong = _unlike(meant, holder.report["outcomes"])
            foreign = {one.name: one.refusal for one in trespass.STRANGER if one.name in others}
            why = ", ".join([*wrong, *_unlike(foreign, stranger.report["outcomes"])])
        state = State.ABSENT if why else State.DEGRADED if shared else State.HELD
        rows.append(Guarantee(name, state, gives, why or shared))

    row(
        "secret_directory",
        "a secret in a file: its service alone opens that, and nothing beside it",
        services["secret_directory"],
        ("open another's secret", "list another's secrets"),
    )
    row(
        "keyring",
        "a secret in the kernel's keyring, for its service alone, until the power goes",
        services["keyring"],
        ("read another's key", "possess another's key"),
    )
    return rows


def _unlike(expected: dict[str, str], outcomes: dict[str, str]) -> list[str]:
    return [
        f"{name}: {outcomes.get(name, 'not tried')}"
        for name, outcome in expected.items()
        if outcomes.get(name) != outcome
    ]


def device_rows() -> list[Guarantee]:
    """What this machine has for devices of the kinds that a system needs."""
    source = Bus((), None).source()
    hardware = source.backing == HWRNG
    return [
        Guarantee(
            "entropy",
            State.HELD if hardware else State.DEGRADED,
            "fresh entropy comes from a hardware generator",
            "" if hardware else f"no {HWRNG_PATH} that delivers: the source is {source.backing}",
        ),
        _durable_writes(),
    ]


def _durable_writes() -> Guarantee:
    """Tried on a file system of this machine; the image's own may be another."""
    why = ""
    with tempfile.TemporaryFile() as file:
        try:
            _ = os.pwritev(file.fileno(), (bytes(BLOCK_SIZE),), 0, os.RWF_DSYNC)
        except OSError as error:
            why = f"{error.strerror}: each one is a write and a sync of everything"
    return Guarantee(
        "durable_writes",
        State.DEGRADED if why else State.HELD,
        "a durable write to a block device is one call and syncs its own bytes",
        why,
    )


def _process_handles() -> Guarantee:
    """Tried as init uses them: end a child by its handle, wait by it, and try it once more."""
    gives = "who is ended and waited for is that very process, and never another of its number"
    child = os.fork()
    if child == 0:
        try:
            _ = select.poll().poll(ANSWER_TIME)
        finally:
            os._exit(0)
    try:
        handle = os.pidfd_open(child)
    except OSError as error:
        os.kill(child, signal.SIGKILL)
        _ = os.waitpid(child, 0)
        return Guarantee("pidfd", State.ABSENT, gives, f"{error.strerror}: no service is started")
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        ended = os.waitid(os.P_PIDFD, handle, os.WEXITED)
        again = _refusal(lambda: signal.pidfd_send_signal(handle, signal.SIGKILL))
    finally:
        os.close(handle)
    why = "" if ended is not None and ended.si_pid == child else "its end was another's"
    if not why and again != "ESRCH":
        why = f"a handle of a process that is gone: {again}"
    return Guarantee("pidfd", State.ABSENT if why else State.HELD, gives, why)


def sharing_rows() -> list[Guarantee]:
    """What this machine has for memory that one task writes and others watch."""
    return [_shared_memory(), _fences()]


def _shared_memory() -> Guarantee:
    """Tried as VmoShare does it: every way to a second writer, and to another length."""
    gives = "who watches shared memory cannot write it, and nobody can change its length"
    descriptor = os.memfd_create("nexus-doctor", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, PAGE_SIZE)
        with mmap.mmap(descriptor, PAGE_SIZE) as written:
            try:
                _ = fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SHARED_SEALS)
            except OSError as error:
                why = f"{error.strerror}: a VmoShare is refused, no service has a log of its own"
                return Guarantee("shared_memory", State.ABSENT, gives, why)
            written[0] = 1
        ways: dict[str, Callable[[], object]] = {
            "map it to write": lambda: mmap.mmap(descriptor, PAGE_SIZE),
            "write it": lambda: os.pwrite(descriptor, b"x", 0),
            "cut it": lambda: os.ftruncate(descriptor, 0),
            "lengthen it": lambda: os.ftruncate(descriptor, 2 * PAGE_SIZE),
            "seal it": lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        }
        wrong = [f"{way}: {outcome}" for way in ways if (outcome := _refusal(ways[way])) != "EPERM"]
    finally:
        os.close(descriptor)
    state = State.ABSENT if wrong else State.HELD
    return Guarantee("shared_memory", state, gives, ", ".join(wrong))


def _refusal(work: Callable[[], object]) -> str:
    try:
        _ = work()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return DONE


def _fences() -> Guarantee:
    gives = "a reader of shared memory orders what a writer on another CPU has written"
    try:
        known = membarrier(MEMBARRIER_QUERY)
    except OSError:
        known = 0
    if known & MEMBARRIER_GLOBAL_EXPEDITED:
        return Guarantee("fences", State.HELD, gives)
    why = "no expedited membarrier: a Fence is refused"
    if MACHINE == "x86_64":
        why += "; this processor keeps the order of writes by itself"
        return Guarantee("fences", State.DEGRADED, gives, why)
    return Guarantee("fences", State.ABSENT, gives, why)


def _differ(one: Service, other: Service) -> bool:
    return all(one.report[what] != other.report[what] for what in ("hash", "layout"))


def _looked_up_rows() -> list[Guarantee]:
    root = os.geteuid() == 0
    rows = []
    renice = may_renice()
    rows.append(
        Guarantee(
            "qos",
            State.HELD if renice else State.ABSENT,
            "Linux schedules a service by its class",
            "" if renice else "a priority once lowered could not be raised again",
        )
    )
    enough = enough_descriptors()
    rows.append(
        Guarantee(
            "descriptors",
            State.HELD if enough else State.DEGRADED,
            "init has a descriptor for everything that may be live at once",
            "" if enough else "the hard limit of open files is lower: spawns fail earlier",
        )
    )
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    why = "" if root else "pid_max is the machine's, not ours to raise"
    if pid_max < PID_MAX_LARGE:
        why = f"pid_max is {pid_max}: it comes again soon"
    rows.append(
        Guarantee(
            "pid_reuse",
            State.DEGRADED if why else State.HELD,
            "a pid never means two services; two colluding ones cannot wait for it to come again",
            why,
        )
    )
    return rows


GROUPS: Final = {
    "cgroup_memory": "all memory of a service together is bounded; over it, it is killed alone",
    "cgroup_tasks": "processes and threads of a service together are bounded, whoever it makes",
    "cgroup_cpu": "a service that never rests has its share of processor time, and no more",
}
WITHOUT_GROUPS: Final = {
    "cgroup_memory": "memory is bounded per process",
    "cgroup_tasks": "processes are bounded per user id",
    "cgroup_cpu": "cpu_share of the system file bounds nothing",
}


def group_rows(found: groups_tried.Tried) -> list[Guarantee]:
    """What control groups hold."""
    rows = []
    tried = zip(GROUPS, (found.memory or found.objects, found.tasks, found.cpu), strict=True)
    for name, why in tried:
        state = State.ABSENT if why else State.HELD
        left = f"{WITHOUT_GROUPS[name]}: no control groups are used, {why}" if why else ""
        rows.append(Guarantee(name, state, GROUPS[name], left))
    return rows


def _with_groups(rows: list[Guarantee], found: groups_tried.Tried) -> list[Guarantee]:
    """The rows where a group bounds what no limit of a process does."""
    if found.objects:
        return rows
    return [
        row._replace(state=State.HELD, why="") if row.name == OBJECTS_ROW else row for row in rows
    ]


def _in_a_child(
    work: Callable[[int], object], time: int, look: Callable[[int], object] | None = None
) -> Any:
    """Do `work` in a forked child and return the JSON it writes to the descriptor it is handed;
    None if there was none within `time` milliseconds. `look` is handed the child's pid when it
    has answered and closed that descriptor. The child is dead then."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _ = work(writer)
        finally:
            os._exit(0)
    os.close(writer)
    answer = b""
    # A part at a time, each bounded: the child writes once.
    while readable(reader, time) and (part := os.read(reader, ANSWER_SIZE_MAX)):
        answer += part
    os.close(reader)
    try:
        if answer and look is not None:
            _ = look(child)
    finally:
        os.kill(child, signal.SIGKILL)
        _ = os.waitpid(child, 0)
    return json.loads(answer) if answer else None


@contextmanager
def _sibling() -> Iterator[int]:
    """A process of the id that a confined child has, outside of its walls: the pid."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(UID_FIRST, UID_FIRST, UID_FIRST)
                os.setresuid(UID_FIRST, UID_FIRST, UID_FIRST)
            _ = prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _ = prctl(PR_SET_DUMPABLE, 0)  # as every service
            _ = os.write(told, b"1")
            signal.pause()
        finally:
            os._exit(0)
    os.close(told)
    try:
        _ = readable(ready, ANSWER_TIME)
        yield child
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        _ = os.waitpid(child, 0)


def _try_in_a_child(sibling: int, *, filtered: bool) -> Found:
    """Confine a child, learn which steps it could not take, let it try to get out, and look at
    it from outside."""
    namespaces = Namespaces() if os.geteuid() == 0 else None
    parent = os.getpid()
    denied: dict[str, str] = {}

    def work(writer: int) -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        confinement = Confinement(
            parent=parent,
            uid=UID_FIRST if os.geteuid() == 0 else None,
            keep=(writer,),
            null=null,
            namespaces=() if namespaces is None else namespaces.descriptors,
            enabled=True,
            name="doctor",
            budget=HEAP_SIZE,
            grants=Grants(),
        )
        hardening = Hardening(confinement) if filtered else _Unfiltered(confinement)
        (writer,) = hardening.before_identity()
        hardening.finish()
        target = escapes.Target(sibling)
        tried = {
            one.name: escapes.outcome(one, target)
            for one in (*escapes.ATTEMPTS, MANY_OBJECTS)
            if one.wall is not Wall.SEALS
        }
        _ = os.write(writer, json.dumps((hardening.why, tried)).encode())
        os.close(writer)
        _ = select.poll().poll(ANSWER_TIME)  # to be looked at

    found = _in_a_child(work, ANSWER_TIME, lambda pid: denied.update(_denied(pid)))
    if namespaces is not None:
        namespaces.close()
    if found is None:
        return Found({name: "the confined child ended" for name, _, _ in STEPS}, {}, {})
    refused, outcomes = found
    return Found(refused, outcomes, denied)


def _denied(pid: int) -> dict[str, str]:
    """The steps that a confined child has not taken, as Linux shows it, and what it shows."""
    outside = seen(pid, 0)
    limits = bounds(pid)
    shown = {
        "limits": [
            f"{name} is {hard}" for name in ZERO_LIMITS for hard in limits[name] if hard != "0"
        ],
        "capabilities": [
            f"{name} is {outside[name]:#x}" for name in ("cap_eff", "cap_prm") if outside[name]
        ],
        "not_dumpable": ["it can be dumped"] * (outside["dumpable"] is True),
        "seccomp": [
            f"{name} is {outside[name]}"
            for name, taken in (("no_new_privs", 1), ("seccomp", 2))
            if outside[name] != taken
        ],
    }
    shown["ids"] = ["it has init's id"] * (outside["uid"] == os.geteuid())
    if os.geteuid() == 0:
        shown["ids"] += [f"it is in groups {outside['groups']}"] * bool(outside["groups"])
        shown["namespaces"] = [
            f"it has init's {name}" for name in PRIVATE_NAMESPACES if _shared(pid, name)
        ]
    return {step: ", ".join(wrong) for step, wrong in shown.items() if wrong}


def _shared(pid: int, namespace: str) -> bool:
    here, there = (Path(f"/proc/{process}/ns/{namespace}") for process in ("self", pid))
    return here.readlink() == there.readlink()


class _Unfiltered(Hardening):
    """Everything but the filter, to see what stands behind it."""

    def _seccomp(self) -> None:
        """Not taken."""


def _try_in_a_run() -> dict[str, Service]:
    """Run a kernel whose services try to get out."""

    def work(writer: int) -> None:
        found = _run_services()
        text = memoryview(json.dumps(found).encode())
        while text:
            text = text[os.write(writer, text) :]

    found = _in_a_child(work, RUN_TIME)
    if found is None:
        found = {name: ("the kernel did not run", (), {}) for name in SERVICES}
    return {name: Service(*fields) for name, fields in found.items()}


EXECUTED: Final = Grants(isolation=Isolation.EXEC)
DIGEST: Final = "0" * 64  # of programs; nobody asks for it
SERVICES: Final = {
    "fork": Grants(),
    "exec": EXECUTED,
    "threads": Grants(threads=1),
    "streams": EXECUTED._replace(streams=True),
    "network": EXECUTED._replace(connect=(PORT_GRANTED,)),
}


def _run_services() -> dict[str, Service]:
    hostile = _program("hostile", escapes.main)
    events: list[Event] = []
    found: dict[str, Service] = {}

    async def root(boot: BootImage) -> None:
        prey = await Spawn(SpawnSpec("prey", "hostile", boot.endpoint, endpoints=1))
        for name, grants in SERVICES.items():
            argument = str(prey.pid).encode()
            spec = SpawnSpec(name, "hostile", boot.endpoint, argument, endpoints=1, grants=grants)
            found[name] = await _ran(spec, events)
        await Send(prey.slot, b"end")

    kernel = LinuxKernel({"hostile": hostile}, recorder=events.append)
    until = Nanos(kernel.now + RUN_TIME * 1_000_000)
    _ = kernel.run(Program(name=INIT_NAME, main=root, digest=DIGEST), b"", until=until)
    return found


def _program(
    name: str, main: Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
) -> Program:
    """A program that can be run forked and in an interpreter of its own."""
    entry = f"{main.__module__}:{main.__qualname__}"
    return Program(name=name, main=main, digest=DIGEST, entry=entry)


async def _ran(spec: SpawnSpec, events: list[Event]) -> Service:
    """Start a service and take its report; `events` are those of the run."""
    try:
        spawned = await Spawn(spec)
        report = await escapes.collect(spec.control, spawned.link, spawned.service)
    except AbiError as refusal:
        return Service(_failure(events, spec.name) or str(refusal), (), {})
    return Service("", _degraded(events, spec.name), report)


SECRETS: Final = {
    "secret_directory": SecretBackend.FILE,
    "keyring": SecretBackend.KEYRING,
    "stranger": SecretBackend.NONE,
}


def _try_secrets() -> dict[str, Service]:
    """Run a kernel with services that keep secrets, and one that is after them."""

    def work(writer: int) -> None:
        with tempfile.TemporaryDirectory(prefix="nexus-doctor-") as place:
            _ = os.write(writer, json.dumps(_run_secrets(Path(place))).encode())

    found = _in_a_child(work, RUN_TIME)
    if found is None:
        found = {name: ("the kernel did not run", (), {}) for name in SECRETS}
    return {name: Service(*fields) for name, fields in found.items()}


def _run_secrets(place: Path) -> dict[str, Service]:
    keeper = _program("keeper", trespass.main)
    events: list[Event] = []
    found: dict[str, Service] = {}
    neighbour = place / "neighbour"
    neighbour.touch(mode=0o600)
    key = key_name(place, "keyring")

    async def root(boot: BootImage) -> None:
        for name, backend in SECRETS.items():
            prey = trespass.Prey(
                image=str(neighbour),
                secret=str(place / DIRECTORY / "secret_directory" / NAME),
                neighbour=f"../../{neighbour.name}",
                key=_key_there(key),
            )
            grants = EXECUTED._replace(secret=backend) if backend else Grants()
            argument = json.dumps(prey).encode()
            spec = SpawnSpec(name, "keeper", boot.endpoint, argument, endpoints=1, grants=grants)
            found[name] = await _ran(spec, events)

    kernel = LinuxKernel({"keeper": keeper}, recorder=events.append, state_dir=place)
    until = Nanos(kernel.now + RUN_TIME * 1_000_000)
    try:
        _ = kernel.run(Program(name=INIT_NAME, main=root, digest=DIGEST), b"", until=until)
    finally:
        with suppress(OSError):  # this kernel has no keyrings
            _ = forget_keys(place)
    return found


def _key_there(name: str) -> int:
    """The serial number of a key; one that nobody has where this kernel has no keyrings."""
    with suppress(OSError):
        return find_key(name)
    return 0


def _failure(events: list[Event], name: str) -> str:
    """Why a service never ran, as the kernel says; empty if it does not say."""
    for event in events:
        if event.kind is EventKind.SPAWN_FAILED and event.fields["name"] == name:
            return str(event.fields["detail"])
    return ""


def _degraded(events: list[Event], name: str) -> tuple[str, ...]:
    for event in events:
        if event.kind is EventKind.SPAWN and event.fields["name"] == name:
            listed = event.fields["degraded"]
            assert isinstance(listed, list), "the kernel's own event"
            return tuple(listed)
    raise AssertionError(f"{name} has been started")


def kernel_facts() -> dict[str, int | str]:
    """What the report rests on, for the record."""
    return {
        "landlock_abi": landlock.version(),
        "seccomp_calls": len(seccomp.allowed_calls(MACHINE)) if MACHINE in seccomp.MACHINES else 0,
        "machine": MACHINE,
        "release": os.uname().release,
    }
