"""The system file: every service of a system, its links, rights and budgets, as TOML.

`SYSTEM_FILE` declares what may stand in one; `load` reads it and refuses the rest with a
SystemFileError that names file and line. What the values mean together (sums, providers,
identities) is `nexus.init.plan`'s to say.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from nexus.abi import (
    BLOCK_SIZE,
    BUDGET_SIZE_DEFAULT,
    CPU_SHARE_MAX,
    ENDPOINTS_PER_OWNER_MAX,
    HARDWARE_MAX,
    LINK_DEPTH_DEFAULT,
    LINK_DEPTH_MAX,
    LINK_SIZE_MAX,
    MEMORY_SIZE_DEFAULT,
    MEMORY_SIZE_MAX,
    OWNER_SIZE_DEFAULT,
    PAGE_SIZE,
    PORTS_MAX,
    SERVICE_NAME_SIZE_MAX,
    STREAM_PORTS_MAX,
    THREADS_MAX,
    TOTAL_SIZE_DEFAULT,
    DeviceGrant,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    ListenGrant,
    Nanos,
    QosClass,
    SecretBackend,
    StreamGrant,
    StreamRole,
)
from nexus.init.declare import (
    DURATION_UNITS,
    SIZE_UNITS,
    Address,
    Choice,
    Either,
    Flag,
    Integer,
    Key,
    ListOf,
    MapOf,
    MisplacedKey,
    Scalar,
    Table,
    Word,
    WrongKey,
    WrongValue,
    amount_text,
    cut,
    duration,
    size,
)
from nexus.init.errors import SystemFileError
from nexus.init.files import WrongFile, read_whole
from nexus.init.lines import KEY_PARTS_MAX, KeyLines, KeyPath, too_many_parts
from nexus.kernel.core.budget import BOOT_BUDGET_SIZE
from nexus.kernel.core.hardware import Hardware
from nexus.kernel.core.spawn import BUDGET_SIZE_MAX
from nexus.protocols.init import DELEGATIONS_MAX, SERVICES_MAX
from nexus.protocols.logd import RING_SIZE_MAX
from nexus.protocols.metricsd import METRICS_PAGE_MAX
from nexus.protocols.policy import BOUND, RIGHT_PATTERN, RIGHT_SIZE_MAX, TARGET_SIZE_MAX

FILE_SIZE_MAX: Final = 256 * 1024  # bytes; a device of 44 services needs a tenth
ENDPOINTS_DEFAULT: Final = 8  # its own, its reply inbox, and a few it makes at run time
CPUS_MAX: Final = 4  # design.md section 3
OWNER_SIZE_MAX: Final = 16 * 1024**2  # bytes of link shares
TOTAL_SIZE_MAX: Final = 256 * 1024**2
SETTINGS_MAX: Final = 32  # entries
SETTING_SIZE_MAX: Final = 256  # characters
CAPABILITIES_MAX: Final = 32
BACKOFF_DEFAULT: Final = Nanos(50_000_000)  # ns; long enough not to spin, short for a person
BACKOFF_MAX: Final = Nanos(60_000_000_000)
HEALTH_DEADLINE_DEFAULT: Final = Nanos(2_000_000_000)  # the reference's route deadline
HEALTH_DEADLINE_MAX: Final = Nanos(60_000_000_000)
BACKOFF_MAX_DEFAULT: Final = Nanos(5_000_000_000)  # ns; a person still waits for the next try
BACKOFF_RESET_DEFAULT: Final = Nanos(10_000_000_000)  # ns; twice the largest wait
PROBE_EVERY_DEFAULT: Final = Nanos(1_000_000_000)
PROBE_LEAST: Final = Nanos(10_000_000)  # ns; below it the probes are a load of their own
POLICY_PROBE_EVERY: Final = Nanos(250_000_000)  # policyd's defaults: together they stay below
POLICY_PROBE_ANSWER: Final = Nanos(500_000_000)  # POLICY_STALE_DEFAULT on a loaded machine too
POLICY_STALE_DEFAULT: Final = Nanos(1_000_000_000)  # design.md section 5
STOP_DEFAULT: Final = Nanos(1_000_000_000)
STABLE_DEFAULT: Final = Nanos(10_000_000_000)
TRIAL_SETTLE_DEFAULT: Final = Nanos(2_000_000_000)  # ns; two rounds of later probes
SPAN_MAX: Final = Nanos(3600_000_000_000)  # ns; an hour: spans of time that count restarts
SAFE_AFTER_DEFAULT: Final = 3  # boots
SAFE_AFTER_MAX: Final = 100
RESTARTS_DEFAULT: Final = 5  # of a declared group, within WITHIN_DEFAULT
RESTARTS_MAX: Final = 1000
WITHIN_DEFAULT: Final = Nanos(30_000_000_000)
OWN_RESTARTS: Final = 10  # of a service in no declared group, within OWN_WITHIN
OWN_WITHIN: Final = Nanos(60_000_000_000)
MISSES_MAX: Final = 100  # probes in a row
LATE_MAX: Final = 1_000_000  # requests between two probes
POLICY_FILES_MAX: Final = 16
PATHS_MAX: Final = 8
PATH_SIZE_MAX: Final = 256  # characters
DEVICES_MAX: Final = 16  # grants of one service
LISTEN_MAX: Final = 8
CONNECT_MAX: Final = 16
BUS_MAX: Final = 16  # devices of a system; a virtual machine has room for no fewer
DISK_SIZE_MIN: Final = 64 * 1024  # bytes; less holds no journal and its checkpoint
DISK_SIZE_MAX: Final = 64 * 1024**3  # bytes
# bytes of memory for a byte of a disk: statefsd keeps a checkpoint in memory, and the next one
# while it makes it; the rest is for the changes behind it.
DISK_MEMORY: Final = 3
LISTEN_ADDRESS: Final = "127.0.0.1"
ENTRY_SIZE_MAX: Final = 128  # characters
GROUPS_MAX: Final = SERVICES_MAX
LOG_RING_DEFAULT: Final = 64 * 1024  # bytes; a burst of about 500 lines
METRICS_PAGE_DEFAULT: Final = 32 * 1024  # bytes; a few hundred series and the latest spans

NAME: Final = Word(
    pattern=r"[a-z][a-z0-9]*([.-][a-z0-9]+)*",
    what=f"a name of at most {SERVICE_NAME_SIZE_MAX} small letters, digits, dots and hyphens",
    size_max=SERVICE_NAME_SIZE_MAX,
)
RIGHT: Final = Word(
    pattern=RIGHT_PATTERN.removeprefix("^").removesuffix(r"\Z"),
    what="a right such as proof.control",
    size_max=RIGHT_SIZE_MAX,
)
BOUND_RIGHT: Final = Word(
    pattern=rf"(?![^{BOUND}]{{{RIGHT_SIZE_MAX + 1}}})"
    + RIGHT.pattern
    + rf"({BOUND}(?=.{{1,{TARGET_SIZE_MAX}}}$)[!-~]([ -~]*[!-~])?)?",
    what=f"a right such as proof.control, alone or bound to at most {TARGET_SIZE_MAX} characters"
    " as in statefs.read:/state/plant/",
    size_max=RIGHT_SIZE_MAX + len(BOUND) + TARGET_SIZE_MAX,
)
_SETTING: Final = Word(
    pattern=r"[a-z][a-z0-9_]*", what="a setting in small letters, digits and _", size_max=48
)
_GRANT: Final = Word(
    pattern=r"[a-z][a-z0-9]*([._-][a-z0-9]+)*",
    what="a name of at most 48 small letters, digits, dots, hyphens and _",
    size_max=48,
)
_ENTRY: Final = Word(
    pattern=r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*",
    what='a module and a name in it such as "plant.valve:Valve"',
    size_max=ENTRY_SIZE_MAX,
)
_MODULE: Final = Word(
    pattern=r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*",
    what='a module such as "plant.protocol"',
    size_max=ENTRY_SIZE_MAX,
)
_PLACE: Final = Word(
    pattern=r"[^\x00-\x1f\x7f]+",
    what=f"a path of at most {PATH_SIZE_MAX} characters",
    size_max=PATH_SIZE_MAX,
)
_INSIDE: Final = Word(
    pattern=r"(?!/)(?!.*(^|/)\.\.(/|$))[^\x00-\x1f\x7f]+",
    what=f"a path below the system file, without .., of at most {PATH_SIZE_MAX} characters",
    size_max=PATH_SIZE_MAX,
)
_DEVICE_PATH: Final = Word(
    pattern=r"(?!.*/\.{0,2}(/|$))/[^\x00-\x1f\x7f]+",
    what="the whole path of a device such as /dev/ttyUSB0",
    size_max=PATH_SIZE_MAX,
)
_DISK_PATH: Final = Word(
    pattern=_DEVICE_PATH.pattern,
    what="the whole path of a device or of a file such as /dev/disk/by-label/state",
    size_max=PATH_SIZE_MAX,
)
_NETWORK_PORT: Final = Integer(minimum=1, maximum=65535)
_DEPTH: Final = Integer(minimum=1, maximum=LINK_DEPTH_MAX)
_DELEGATIONS: Final = Integer(minimum=0, maximum=DELEGATIONS_MAX)
_LINK_SIZE: Final = size(1, LINK_SIZE_MAX, "16KiB")
_LINK_KEYS: Final = {
    "depth": Key(kind=_DEPTH, doc="messages that may wait in the link"),
    "size": Key(kind=_LINK_SIZE, doc="bytes that may wait; only less than its protocol needs"),
    "delegations": Key(kind=_DELEGATIONS, doc="links the client may hand on at run time"),
}
_USE_KEYS: Final = {
    **_LINK_KEYS,
    "sync": Key(
        kind=Flag(),
        doc="whether the client waits for answers; false for posts, which alone may go in"
        " circles; default true",
    ),
}
_QOS: Final = {
    "idle": QosClass.IDLE,
    "normal": QosClass.NORMAL,
    "interactive": QosClass.INTERACTIVE,
    "perf-burst": QosClass.PERF_BURST,
}
_ISOLATION: Final = {"fork": Isolation.FORK, "exec": Isolation.EXEC}
_STREAM: Final = {
    "unix": StreamRole.UNIX,
    "tcp": StreamRole.TCP,
    "dial": StreamRole.DIAL,
}
_SECRET: Final = {"file": SecretBackend.FILE, "keyring": SecretBackend.KEYRING}
HARDWARE_KINDS: Final = {
    "block": HardwareKind.BLOCK,
    "entropy": HardwareKind.ENTROPY,
    "empty": HardwareKind.EMPTY,
}

GRANT_KEYS: Final = {
    "isolation": Key(
        kind=Choice(words=tuple(_ISOLATION)),
        doc="how its process is made on linux: forked from init, or an interpreter of its own;"
        " default fork",
    ),
    "threads": Key(
        kind=Integer(minimum=0, maximum=THREADS_MAX),
        doc="how many further threads it may start; with its own that is also how many processes"
        " and threads its control group may have at a time (`nexus doctor`: cgroup_tasks);"
        " default 0",
    ),
    "ports": Key(
        kind=ListOf(item=_GRANT, count_max=PORTS_MAX, unique="port"),
        doc="its sockets in the runtime directory, for people and scripts outside",
    ),
    "streams": Key(
        kind=MapOf(
            key=_GRANT,
            item=Table(
                doc="One port whose connections are byte streams.",
                keys={
                    "role": Key(
                        kind=Choice(words=tuple(_STREAM)),
                        doc="unix: callers come to a socket in the runtime directory; tcp: to a"
                        " loopback address; dial: the service connects to one address",
                        required=True,
                    ),
                    "address": Key(kind=Address(), doc='of tcp and dial; default "127.0.0.1"'),
                    "port": Key(kind=_NETWORK_PORT, doc="TCP port of tcp and dial"),
                },
            ),
            count_max=STREAM_PORTS_MAX,
        ),
        doc="its byte streams to and from the outside, by the name the service knows them by;"
        " no socket call comes with them",
    ),
    "hardware": Key(
        kind=ListOf(item=_GRANT, count_max=HARDWARE_MAX, unique="device"),
        doc="devices of [device] that are its own while it lives",
    ),
    "secret": Key(
        kind=Choice(words=tuple(_SECRET)),
        doc="where the kernel keeps a secret that this service alone may read and replace;"
        ' needs isolation "exec"',
    ),
    "devices": Key(
        kind=MapOf(
            key=_GRANT,
            item=Table(
                doc="One device, opened before the start.",
                keys={
                    "path": Key(kind=_DEVICE_PATH, doc="where it is", required=True),
                    "writable": Key(kind=Flag(), doc="opened for writing too; default false"),
                },
            ),
            count_max=DEVICES_MAX,
        ),
        doc="character devices for ordinary libraries, by the name the service knows them by;"
        ' needs isolation "exec"',
    ),
    "listen": Key(
        kind=MapOf(
            key=_GRANT,
            item=Table(
                doc="One listening TCP socket, bound before the start.",
                keys={
                    "address": Key(kind=Address(), doc='default "127.0.0.1"'),
                    "port": Key(kind=_NETWORK_PORT, doc="TCP port", required=True),
                },
            ),
            count_max=LISTEN_MAX,
        ),
        doc='listening sockets by the name the service knows them by; needs isolation "exec"',
    ),
    "connect": Key(
        kind=ListOf(item=_NETWORK_PORT, count_max=CONNECT_MAX, unique="port"),
        doc='TCP ports it may connect to; needs isolation "exec"',
    ),
}
PROGRAM_KEYS: Final = {
    "program": Key(kind=NAME, doc="the program it runs, one of those Nexus has"),
    "module": Key(kind=_ENTRY, doc="the class of your own that it runs, as package.module:Class"),
    "protocol": Key(kind=_MODULE, doc="the module whose PROTOCOL your class serves"),
    "ordinary": Key(
        kind=Flag(),
        doc="whether `module` names a coroutine function that uses ordinary libraries under"
        " asyncio; default false",
    ),
    "double": Key(
        kind=_ENTRY, doc="the class that stands for an ordinary program in the simulator"
    ),
}

SERVICE: Final = Table(
    doc="One service: what it is, what it may reach and what it may cost.",
    one_of=("program", "module"),
    beside={
        "module": "protocol",
        "protocol": "module",
        "ordinary": "module",
        "double": "ordinary",
    },
    keys={
        **PROGRAM_KEYS,
        **GRANT_KEYS,
        "stage": Key(
            kind=Choice(words=("core", "rest")),
            doc="when it starts: policyd, then core, then the rest; default rest",
        ),
        "safe": Key(kind=Flag(), doc="whether it runs in safe mode too; default false"),
        "group": Key(kind=NAME, doc="the group it is restarted with; default one of its own"),
        "qos": Key(kind=Choice(words=tuple(_QOS)), doc="scheduling class; default normal"),
        "cpu": Key(kind=Integer(minimum=0, maximum=CPUS_MAX - 1), doc="the CPU it is placed on"),
        "budget": Key(
            kind=size(BOOT_BUDGET_SIZE, BUDGET_SIZE_MAX, "1792KiB"),
            doc="bytes of kernel objects it may hold",
        ),
        "memory": Key(
            kind=size(MEMORY_SIZE_DEFAULT, MEMORY_SIZE_MAX, "96MiB"),
            doc="bytes of private memory it may take on linux beside its program and its kernel"
            f" objects; default 64MiB and {DISK_MEMORY} times its disks",
        ),
        "cpu_share": Key(
            kind=Integer(minimum=1, maximum=CPU_SHARE_MAX),
            doc="percent of one CPU that it may take in each tenth of a second, where control"
            " groups hold it (`nexus doctor`: cgroup_cpu); default there 90 for it and for each of"
            " its threads",
        ),
        "owner_size": Key(
            kind=size(4096, OWNER_SIZE_MAX, "256KiB"),
            doc="bytes of link shares its endpoints may reserve; default the system's",
        ),
        "endpoints": Key(
            kind=Integer(minimum=2, maximum=ENDPOINTS_PER_OWNER_MAX),
            doc="endpoints it may have at a time: its own, its reply inbox, and what it makes",
        ),
        "capabilities": Key(
            kind=ListOf(item=BOUND_RIGHT, count_max=CAPABILITIES_MAX, unique="capability"),
            doc="its rights by name, the first layer of the policy",
        ),
        "uses": Key(
            kind=Either(
                array=ListOf(
                    item=Table(
                        doc="One link to another service.",
                        keys={
                            "name": Key(kind=NAME, doc="the service used", required=True),
                            **_USE_KEYS,
                        },
                    ),
                    count_max=SERVICES_MAX,
                ),
                table=MapOf(
                    key=NAME,
                    item=Table(doc="One link to another service.", keys=_USE_KEYS),
                    count_max=SERVICES_MAX,
                ),
            ),
            doc="the services it may call, as an array or as a table by name",
        ),
        "restart": Key(
            kind=Table(
                doc="What happens when it ends.",
                keys={
                    "backoff": Key(
                        kind=duration(Nanos(1_000_000), BACKOFF_MAX, "50ms"),
                        doc="wait before the next start; doubles with each restart",
                    ),
                    "backoff_max": Key(
                        kind=duration(Nanos(1_000_000), BACKOFF_MAX, "5s"),
                        doc="the longest wait; default 5s, or `backoff` if that is more",
                    ),
                    "reset": Key(
                        kind=duration(Nanos(1_000_000), SPAN_MAX, "10s"),
                        doc="how long an instance must live for the wait to be `backoff` again",
                    ),
                },
            ),
            doc="restart after an exit",
        ),
        "health": Key(
            kind=Table(
                doc="How its readiness and its health are probed.",
                keys={
                    "deadline": Key(
                        kind=duration(Nanos(1_000_000), HEALTH_DEADLINE_MAX, "2s"),
                        doc="time to answer the first probe, from its start",
                    ),
                    "every": Key(
                        kind=duration(Nanos(0), SPAN_MAX, "1s"),
                        doc='time from an answer to the next probe; "0s" for the first probe only',
                    ),
                    "answer": Key(
                        kind=duration(Nanos(1_000_000), HEALTH_DEADLINE_MAX, "2s"),
                        doc="time to answer each later probe; default `deadline`",
                    ),
                    "misses": Key(
                        kind=Integer(minimum=1, maximum=MISSES_MAX),
                        doc="missed probes in a row after which it is restarted; default 1",
                    ),
                    "late_max": Key(
                        kind=Integer(minimum=0, maximum=LATE_MAX),
                        doc="requests that may expire between two probes before it counts as a"
                        " missed one; default 0: not watched",
                    ),
                },
            ),
            doc="health probe",
        ),
        "stop": Key(
            kind=duration(Nanos(1_000_000), HEALTH_DEADLINE_MAX, "1s"),
            doc="time it has to end when the system shuts down",
        ),
        "start": Key(
            kind=Choice(words=("boot", "demand")),
            doc="when it starts: with the system, or when the service `by` is asked to start it;"
            " default boot",
        ),
        "by": Key(
            kind=NAME,
            doc='the service that starts it: one that runs execd; needs start = "demand"',
        ),
        "log_ring": Key(
            kind=size(PAGE_SIZE, RING_SIZE_MAX, "64KiB"),
            doc="bytes of memory that its lines wait in for logd; default 64KiB",
        ),
        "metrics_page": Key(
            kind=size(PAGE_SIZE, METRICS_PAGE_MAX, "32KiB"),
            doc="bytes of memory that its series and spans are in, if it uses metricsd; default"
            " 32KiB",
        ),
        "settings": Key(
            kind=MapOf(
                key=_SETTING, item=Scalar(text_size_max=SETTING_SIZE_MAX), count_max=SETTINGS_MAX
            ),
            doc="values the program reads",
        ),
    },
)
GROUP: Final = Table(
    doc="Services that are restarted together, and how often.",
    keys={
        "strategy": Key(
            kind=Choice(words=("one", "all", "rest")),
            doc="who is restarted when one ends: that one, all, or it and those started after"
            " it; default one",
        ),
        "restarts": Key(
            kind=Integer(minimum=1, maximum=RESTARTS_MAX),
            doc="restarts that are allowed within `within`; default 5",
        ),
        "within": Key(
            kind=duration(Nanos(1_000_000), SPAN_MAX, "30s"), doc="see restarts; default 30s"
        ),
        "exceeded": Key(
            kind=Choice(words=("give-up", "safe-mode", "shut-down")),
            doc="what happens when it is more; default safe-mode",
        ),
    },
)
DEVICE: Final = Table(
    doc="One device of the machine. One service at a time may have it.",
    keys={
        "kind": Key(
            kind=Choice(words=tuple(HARDWARE_KINDS)),
            doc="a disk, a source of entropy, or a transport with nothing behind it",
            required=True,
        ),
        "size": Key(
            kind=size(DISK_SIZE_MIN, DISK_SIZE_MAX, "16MiB"),
            doc=f"bytes of a disk, a multiple of {BLOCK_SIZE}",
        ),
        "path": Key(
            kind=_DISK_PATH,
            doc="where it is on linux; default NAME.img in the state directory for a disk, which is"
            " made before the first boot, and whatever source the machine has for entropy",
        ),
        "legacy": Key(
            kind=Flag(),
            doc="whether the simulated machine gives it the old register layout, which is"
            " granted to nobody; other machines leave it out; default false",
        ),
        "read_only": Key(
            kind=Flag(),
            doc="whether a disk is opened for reading alone, also where it could be written;"
            " default false",
        ),
    },
)
SYSTEM: Final = Table(
    doc="What holds for the whole system.",
    keys={
        "name": Key(kind=NAME, doc="name of the system", required=True),
        "smp": Key(
            kind=Integer(minimum=1, maximum=CPUS_MAX),
            doc="CPUs of the simulated machine; default 1",
        ),
        "total_size": Key(
            kind=size(4096, TOTAL_SIZE_MAX, "1MiB"),
            doc="bytes of link shares of all services and init together",
        ),
        "owner_size": Key(
            kind=size(4096, OWNER_SIZE_MAX, "256KiB"),
            doc="bytes of link shares of a service that does not say its own",
        ),
        "link": Key(
            kind=Table(
                doc="Defaults of every link.",
                keys={name: _LINK_KEYS[name] for name in ("depth", "size")},
            ),
            doc="defaults of every link",
        ),
        "ends_with": Key(kind=NAME, doc="the service with whose end the system shuts down"),
        "policy": Key(
            kind=ListOf(item=_INSIDE, count_max=POLICY_FILES_MAX, unique="policy file"),
            doc="policy files; a later one replaces what an earlier one says of a service",
        ),
        "path": Key(
            kind=ListOf(item=_PLACE, count_max=PATHS_MAX, unique="folder"),
            doc="folders in which `module`, `protocol` and `double` are looked for first",
        ),
        "state_dir": Key(kind=_PLACE, doc="folder of what survives a boot"),
        "runtime_dir": Key(kind=_PLACE, doc="folder of sockets and of the present boot"),
        "log_dir": Key(kind=_PLACE, doc="folder of logd's files"),
        "stable": Key(
            kind=duration(Nanos(1_000_000), SPAN_MAX, "10s"),
            doc="how long a boot must go well to count as stable; default 10s",
        ),
        "trial_settle": Key(
            kind=duration(Nanos(0), SPAN_MAX, "2s"),
            doc="how long every service of a new set must stay healthy before the set is committed;"
            " default 2s",
        ),
        "safe_after": Key(
            kind=Integer(minimum=0, maximum=SAFE_AFTER_MAX),
            doc="boots in a row that did not become stable, after which the next is in safe"
            " mode; default 3, 0 is never",
        ),
        "policy_stale_max": Key(
            kind=duration(PROBE_LEAST, HEALTH_DEADLINE_MAX, "1s"),
            doc="how long a decision may hold while policyd is silent; default 1s",
        ),
    },
)
SYSTEM_FILE: Final = Table(
    doc="A Nexus system: the file that names every service and what it may do.",
    keys={
        "system": Key(kind=SYSTEM, doc="the system", required=True),
        "group": Key(kind=MapOf(key=NAME, item=GROUP, count_max=GROUPS_MAX), doc="groups by name"),
        "device": Key(
            kind=MapOf(key=_GRANT, item=DEVICE, count_max=BUS_MAX),
            doc="the devices of the machine by name",
        ),
        "service": Key(
            kind=MapOf(key=NAME, item=SERVICE, count_max=SERVICES_MAX),
            doc="the services by name, in the order of their start within a stage",
            required=True,
        ),
    },
)


class Strategy(StrEnum):
    """Who is restarted when a service of a group ends."""

    ONE = "one"
    ALL = "all"
    REST = "rest"  # it, and those of the group that start after it


class Exceeded(StrEnum):
    """What happens when a group is restarted more often than it may be."""

    GIVE_UP = "give-up"  # its services stay down
    SAFE_MODE = "safe-mode"
    SHUT_DOWN = "shut-down"


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One link a service asks for; `size` None leaves it to the protocol. `path` is its key."""

    name: str
    depth: int
    size: int | None
    delegations: int
    sync: bool
    path: KeyPath


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One service as the file declares it, defaults filled in.

    `program` is empty for a service with an `entry` of its own, and the other way round; an
    absent `group` is one of its own; `probe_every` and `probe_answer` None are left to the plan;
    `by` is empty for a service that starts with the system.
    """

    name: str
    program: str
    entry: str
    protocol: str
    ordinary: bool
    double: str
    grants: Grants
    core: bool
    safe: bool
    group: str | None
    qos: QosClass
    cpu: int | None
    budget: int
    memory: int
    cpu_share: int | None
    owner_size: int
    endpoints: int
    capabilities: tuple[str, ...]
    uses: tuple[Use, ...]
    backoff: Nanos
    backoff_max: Nanos
    backoff_reset: Nanos
    health_deadline: Nanos
    probe_every: Nanos | None
    probe_answer: Nanos | None
    probe_misses: int
    late_max: int
    stop_max: Nanos
    settings: tuple[tuple[str, str | int | bool], ...]
    by: str
    log_ring: int
    metrics_page: int
    path: KeyPath


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One declared group."""

    name: str
    strategy: Strategy
    restarts: int
    within: Nanos
    exceeded: Exceeded
    path: KeyPath


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A system file, read. Its values are each within their bounds; their sums are unchecked."""

    file: Path
    lines: KeyLines
    name: str
    smp: int
    total_size: int
    owner_size: int
    ends_with: str | None
    policy: tuple[str, ...]
    path: tuple[str, ...]
    state_dir: str | None
    runtime_dir: str | None
    log_dir: str | None
    stable: Nanos
    trial_settle: Nanos
    safe_after: int
    policy_stale_max: Nanos
    groups: tuple[Group, ...]
    services: tuple[Service, ...]
    hardware: tuple[Hardware, ...] = ()

    def wrong(self, path: KeyPath, expected: str, found: str) -> SystemFileError:
        """The error about the value at `path`."""
        return SystemFileError(self.file, self.lines.line(path), expected, found)

    def with_services(self, services: tuple[Service, ...]) -> "System":
        """The same system of other services, for tests that leave some out."""
        return replace(self, services=services)


def load(file: Path) -> System:
    """Read a system file. Raises SystemFileError."""
    try:
        data = read_whole(file, FILE_SIZE_MAX)
    except WrongFile as wrong:
        raise SystemFileError(file, 1, f"a file {wrong.rule}", wrong.found) from wrong
    return parse(data, file)


def parse(data: bytes, file: Path) -> System:
    """Read the bytes of a system file. Raises SystemFileError; `file` is what it names."""
    document, lines = read_toml(data, file, FILE_SIZE_MAX)
    try:
        return _system(SYSTEM_FILE.read(document, ()), file, lines)
    except WrongValue as wrong:
        raise SystemFileError(file, lines.line(wrong.path), wrong.expected, wrong.found) from wrong


def read_toml(data: bytes, file: Path, size_max: int) -> tuple[dict[str, Any], KeyLines]:
    """The document in `data`, and the lines of its keys. Raises SystemFileError."""
    if len(data) > size_max:
        raise SystemFileError(file, 1, f"at most {size_max} bytes", str(len(data)))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SystemFileError(file, line, "UTF-8", f"byte 0x{data[error.start]:02x}") from error
    line_found = too_many_parts(text)
    if line_found is not None:
        expected = f"a key of at most {KEY_PARTS_MAX} parts"
        raise SystemFileError(file, line_found, expected, "more dots in a line")
    try:
        return tomllib.loads(text), KeyLines(text)
    except ValueError as error:  # TOMLDecodeError is one; a number too long for int() another
        raise SystemFileError(file, _toml_line(error, text), "TOML", cut(str(error))) from error
    except RecursionError as error:
        raise SystemFileError(file, 1, "TOML", "tables nested too deeply") from error


def _toml_line(error: ValueError, text: str) -> int:
    """Where tomllib says the error is: a line, the end, or nowhere, and then it is line 1."""
    found = re.search(r"\(at line (\d+), column \d+\)$", str(error))
    if found:
        return int(found[1])
    return text.count("\n") + 1 if isinstance(error, tomllib.TOMLDecodeError) else 1


def _system(document: Mapping[str, Any], file: Path, lines: KeyLines) -> System:
    head = document["system"]
    owner_size = head.get("owner_size", OWNER_SIZE_DEFAULT)
    link = head.get("link", {})
    hardware = tuple(_device(name, entry) for name, entry in document.get("device", {}).items())
    by_name = {device.name: device for device in hardware}
    services = tuple(
        _service(name, entry, owner_size, link, by_name)
        for name, entry in document["service"].items()
    )
    if not services:
        raise WrongValue(("service",), "at least one service", "none")
    groups = tuple(_group(name, entry) for name, entry in document.get("group", {}).items())
    return System(
        file=file,
        lines=lines,
        name=head["name"],
        smp=head.get("smp", 1),
        total_size=head.get("total_size", TOTAL_SIZE_DEFAULT),
        owner_size=owner_size,
        ends_with=head.get("ends_with"),
        policy=tuple(head.get("policy", ())),
        path=tuple(head.get("path", ())),
        state_dir=head.get("state_dir"),
        runtime_dir=head.get("runtime_dir"),
        log_dir=head.get("log_dir"),
        stable=Nanos(head.get("stable", STABLE_DEFAULT)),
        trial_settle=Nanos(head.get("trial_settle", TRIAL_SETTLE_DEFAULT)),
        safe_after=head.get("safe_after", SAFE_AFTER_DEFAULT),
        policy_stale_max=Nanos(head.get("policy_stale_max", POLICY_STALE_DEFAULT)),
        groups=groups,
        services=services,
        hardware=hardware,
    )


def _device(name: str, entry: Mapping[str, Any]) -> Hardware:
    """A disk has a size, and nothing else has one; what is not there has no path."""
    path: KeyPath = ("device", name)
    kind = HARDWARE_KINDS[entry["kind"]]
    amount = entry.get("size", 0)
    if kind is HardwareKind.BLOCK and "size" not in entry:
        raise WrongKey(path, 'the key "size" of a block device', "none")
    if kind is not HardwareKind.BLOCK and "size" in entry:
        raise MisplacedKey(path, "size", 'kind = "block" beside "size"', f'"{entry["kind"]}"')
    if amount % BLOCK_SIZE:
        found = f'"{amount_text(amount, SIZE_UNITS)}"'
        raise WrongValue((*path, "size"), f"a multiple of {BLOCK_SIZE}B", found)
    if kind is HardwareKind.EMPTY and "path" in entry:
        raise MisplacedKey(path, "path", 'kind = "block" or "entropy" beside "path"', '"empty"')
    if entry.get("legacy") and "path" in entry:
        raise MisplacedKey(path, "path", 'no "path" beside "legacy"', "both")
    if kind is not HardwareKind.BLOCK and "read_only" in entry:
        raise MisplacedKey(
            path, "read_only", 'kind = "block" beside "read_only"', f'"{entry["kind"]}"'
        )
    return Hardware(
        name,
        kind,
        amount,
        entry.get("path", ""),
        entry.get("legacy", False),
        entry.get("read_only", False),
    )


def _service(
    name: str,
    entry: Mapping[str, Any],
    owner_size: int,
    link: Mapping[str, Any],
    hardware: Mapping[str, Hardware],
) -> Service:
    path: KeyPath = ("service", name)
    ordinary = entry.get("ordinary", False)
    if ordinary and "double" not in entry:
        raise WrongKey(path, 'the key "double" beside "ordinary"', "none")
    if not ordinary and "double" in entry:
        raise WrongValue((*path, "ordinary"), 'true beside "double"', "false")
    restart = entry.get("restart", {})
    health = entry.get("health", {})
    backoff = restart.get("backoff", BACKOFF_DEFAULT)
    backoff_max = restart.get("backoff_max", max(backoff, BACKOFF_MAX_DEFAULT))
    if backoff_max < backoff:
        least = amount_text(backoff, DURATION_UNITS)
        found = f'"{amount_text(backoff_max, DURATION_UNITS)}"'
        raise WrongValue((*path, "restart", "backoff_max"), f"at least backoff, {least}", found)
    every = health.get("every")
    if every is not None and 0 < every < PROBE_LEAST:
        expected = f'"0s" or at least {amount_text(PROBE_LEAST, DURATION_UNITS)}'
        found = f'"{amount_text(every, DURATION_UNITS)}"'
        raise WrongValue((*path, "health", "every"), expected, found)
    grants = _grants(entry, path, hardware)
    return Service(
        name=name,
        program=entry.get("program", ""),
        entry=entry.get("module", ""),
        protocol=entry.get("protocol", ""),
        ordinary=ordinary,
        double=entry.get("double", ""),
        grants=grants,
        core=entry.get("stage") == "core",
        safe=entry.get("safe", False),
        group=entry.get("group"),
        qos=_QOS[entry.get("qos", "normal")],
        cpu=entry.get("cpu"),
        budget=entry.get("budget", BUDGET_SIZE_DEFAULT),
        memory=entry.get("memory", memory_of(grants, hardware)),
        cpu_share=entry.get("cpu_share"),
        owner_size=entry.get("owner_size", owner_size),
        endpoints=entry.get("endpoints", ENDPOINTS_DEFAULT),
        capabilities=tuple(entry.get("capabilities", ())),
        uses=_uses(entry.get("uses", ()), (*path, "uses"), link),
        backoff=Nanos(backoff),
        backoff_max=Nanos(backoff_max),
        backoff_reset=Nanos(restart.get("reset", BACKOFF_RESET_DEFAULT)),
        health_deadline=Nanos(health.get("deadline", HEALTH_DEADLINE_DEFAULT)),
        probe_every=every,
        probe_answer=health.get("answer"),
        probe_misses=health.get("misses", 1),
        late_max=health.get("late_max", 0),
        stop_max=Nanos(entry.get("stop", STOP_DEFAULT)),
        settings=tuple(sorted(entry.get("settings", {}).items())),
        by=_starter(entry, path),
        log_ring=entry.get("log_ring", LOG_RING_DEFAULT),
        metrics_page=entry.get("metrics_page", METRICS_PAGE_DEFAULT),
        path=path,
    )


def _starter(entry: Mapping[str, Any], path: KeyPath) -> str:
    """Who starts it on demand; empty for a service that starts with the system."""
    demand = entry.get("start") == "demand"
    if demand and "by" not in entry:
        raise WrongKey(path, 'the key "by" beside start = "demand"', "none")
    if not demand and "by" in entry:
        raise MisplacedKey(path, "by", 'start = "demand" beside "by"', '"boot"')
    for key in ("group", "stage"):
        if demand and key in entry:
            raise MisplacedKey(path, key, f'no "{key}" beside start = "demand"', f'"{entry[key]}"')
    starter: str = entry.get("by", "")
    return starter


def memory_of(grants: Grants, hardware: Mapping[str, Hardware]) -> int:
    """Bytes of private memory for the holder of such devices, unless the file says another."""
    disks = sum(hardware[each.name].size for each in grants.hardware)
    return min(MEMORY_SIZE_DEFAULT + DISK_MEMORY * disks, MEMORY_SIZE_MAX)


def _grants(entry: Mapping[str, Any], path: KeyPath, known: Mapping[str, Hardware]) -> Grants:
    """What the service may do beyond the ABI; what needs a process of its own has one."""
    isolation = _ISOLATION[entry.get("isolation", "fork")]
    ordinary = entry.get("ordinary", False)
    if isolation is not Isolation.EXEC:
        for key in ("ordinary", "secret", "devices", "listen", "connect"):
            if entry.get(key):
                raise MisplacedKey(path, key, f'isolation = "exec" beside "{key}"', "fork")
    devices = entry.get("devices", {})
    listen = entry.get("listen", {})
    for name in listen:
        if name in devices:
            raise WrongValue(
                (*path, "listen", name), "another name than a device's", f'"{name}" for both'
            )
    streams = tuple(
        _stream(name, stream, (*path, "streams", name))
        for name, stream in entry.get("streams", {}).items()
    )
    for name in entry.get("streams", {}):
        if name in entry.get("ports", ()):
            raise WrongValue(
                (*path, "streams", name), "another name than a port's", f'"{name}" for both'
            )
    hardware = entry.get("hardware", ())
    for index, name in enumerate(hardware):
        if name not in known:
            listed = ", ".join(known) or "none"
            raise WrongValue(
                (*path, "hardware", index), f"a device of this system ({listed})", f'"{name}"'
            )
    return Grants(
        isolation=isolation,
        threads=entry.get("threads", 0),
        ports=tuple(entry.get("ports", ())),
        devices=tuple(
            DeviceGrant(name, device["path"], device.get("writable", False))
            for name, device in devices.items()
        ),
        listen=tuple(
            ListenGrant(name, socket.get("address", LISTEN_ADDRESS), socket["port"])
            for name, socket in listen.items()
        ),
        connect=tuple(entry.get("connect", ())),
        streams=ordinary,  # asyncio wakes itself up over such a pair
        hardware=tuple(HardwareGrant(name, known[name].kind) for name in hardware),
        secret=_SECRET[entry["secret"]] if "secret" in entry else SecretBackend.NONE,
        stream_ports=streams,
    )


def _stream(name: str, entry: Mapping[str, Any], path: KeyPath) -> StreamGrant:
    role = _STREAM[entry["role"]]
    if role is StreamRole.UNIX:
        for key in ("address", "port"):
            if key in entry:
                raise MisplacedKey(path, key, f'role "tcp" or "dial" beside "{key}"', '"unix"')
        return StreamGrant(name, role)
    if "port" not in entry:
        raise WrongKey(path, 'the key "port"', "none")
    address = entry.get("address", LISTEN_ADDRESS)
    if role is StreamRole.TCP and not ip_address(address).is_loopback:
        raise WrongValue((*path, "address"), "a loopback address of this machine", f'"{address}"')
    return StreamGrant(name, role, address, entry["port"])


def _group(name: str, entry: Mapping[str, Any]) -> Group:
    return Group(
        name=name,
        strategy=Strategy(entry.get("strategy", Strategy.ONE)),
        restarts=entry.get("restarts", RESTARTS_DEFAULT),
        within=Nanos(entry.get("within", WITHIN_DEFAULT)),
        exceeded=Exceeded(entry.get("exceeded", Exceeded.SAFE_MODE)),
        path=("group", name),
    )


def _uses(declared: Any, path: KeyPath, link: Mapping[str, Any]) -> tuple[Use, ...]:
    """Both forms of `uses`, as one."""
    if isinstance(declared, Mapping):
        items: list[tuple[KeyPath, str, Mapping[str, Any]]] = [
            ((*path, name), name, use) for name, use in declared.items()
        ]
    else:
        items = [((*path, index), use["name"], use) for index, use in enumerate(declared)]
    return tuple(
        Use(
            name=name,
            depth=use.get("depth", link.get("depth", LINK_DEPTH_DEFAULT)),
            size=use.get("size", link.get("size")),
            delegations=use.get("delegations", 0),
            sync=use.get("sync", True),
            path=use_path,
        )
        for use_path, name, use in items
    )


def schema_text() -> str:
    """The schema as it is published: docs/reference/system-file.schema.json."""
    return published("Nexus system file", SYSTEM_FILE)


def published(title: str, table: Table) -> str:
    """The JSON schema of a file (JSON Schema 2020-12), as text."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **table.schema(),
    }
    return json.dumps(schema, indent=2) + "\n"
