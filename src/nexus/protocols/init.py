"""init-lite protocol: routes for everybody; the state of the system for `proof.control`.

Spoken on the control link, whose other end is init's. Who asks is what the kernel stamped on
the message and the link it came by; a payload never says it. Everything but Route needs a right
that the policy gives (DENIED without it): SYSTEM_OBSERVE to look, SYSTEM_CONTROL to act,
`policy.authority` for the policy itself; PROOF_CONTROL stands for the first two, and is what
AwaitReady needs.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import (
    LINK_DEPTH_MAX,
    LINK_SIZE_MAX,
    SERVICE_NAME_SIZE_MAX,
    SLOTS_MAX,
    TASKS_MAX,
    QosClass,
)
from nexus.protocols.meta import COUNTERS_MAX, FACTS_MAX, SETTINGS_SIZE_MAX, Fact
from nexus.protocols.policy import POLICY_SIZE_MAX
from nexus.wire import I64, U8, U16, U32, U64, Blob, Bool, List, Message, Protocol, Request, Text

REPLY_NAME: Final = "@reply"  # Route's name for the caller's own inbox
PROOF_CONTROL: Final = "proof.control"  # AwaitReady, and what the next two allow
SYSTEM_OBSERVE: Final = "system.observe"  # the Get requests
SYSTEM_CONTROL: Final = "system.control"  # Restart, Shutdown, Reboot, LeaveSafeMode, ReloadSettings
SYSTEM_REBOOT: Final = "system.reboot"  # Reboot alone
PROC_SPAWN: Final = "proc.spawn"  # Launch, NoteDenied, EndTask, GetLaunched
INIT_SLOTS_SPARE: Final = 8  # of init's table: endpoint, inbox, and capabilities on their way
SERVICES_MAX: Final = (SLOTS_MAX - INIT_SLOTS_SPARE) // 2  # init holds two links per service
LINK_ROWS_MAX: Final = 24  # rows of one answer to GetLinks; it fits a control link
AUDIT_ROWS_MAX: Final = 16  # lines of one answer to GetAudit; it fits a control link
AUDIT_LINE_SIZE_MAX: Final = 192  # characters; core.md 1.2 gives at most 171
DELEGATIONS_MAX: Final = 32  # links one use may hand on at run time
REASON_SIZE_MAX: Final = 32  # characters
REASON_TEXT_SIZE_MAX: Final = 200  # characters of a sentence for people
BOOT_ID_SIZE: Final = 16  # bytes; random, so no two boots of all devices have one id

assert SERVICES_MAX < TASKS_MAX


class InitStatus(IntEnum):
    """Why init refuses. The numbers are wire format and are never reused."""

    ROUTE_NOT_FOUND = 16  # no service of that name in the system
    ROUTE_DENIED = 17  # the caller's entry does not use it
    ROUTE_DOWN = 18  # it is not up now; asking again later is harmless
    BAD_POLICY = 19  # what was given is no policy, or names a service that is not in the plan
    NOT_IN_SAFE_MODE = 20
    NOT_ON_DEMAND = 21  # no service of that name is started on demand
    RUNS = 22  # an instance of it runs
    SPAWN_REFUSED = 23  # the reason is in its ServiceRecord
    NO_SUCH_CHILD = 24
    BAD_SYSTEM_FILE = 25  # the file as it is now is no system, or another system
    BAD_PROGRAM = 26  # its files are not, or no longer, those of the checked plan
    NO_SLOTS = 27  # the system was booted out of no slot: nobody would boot it again


class TaskState(IntEnum):
    """What init knows of a service. STARTING becomes UP with the echo of its control link."""

    WAITING = 0  # not started yet
    STARTING = 1  # spawned; its echo is awaited
    UP = 2
    BACKING_OFF = 3  # it ended; the restart is due after its declared back-off
    STOPPED = 4  # ended for good: the system is going down, or it ends with this service
    FAILED = 5  # given up: it ended more often than its restart intensity allows
    LEFT_OUT = 6  # not started: the system is in safe mode and this service is not marked `safe`
    ON_DEMAND = 7  # no instance: it is started when the service says so that its entry names


class Health(IntEnum):
    """What the health probe of the present instance found."""

    UNKNOWN = 0
    OK = 1
    LATE = 2  # not answered with OK inside the declared deadline


class Routed(Message):
    """A fresh link into the service, moved with this reply; its terms, and the instance's name.

    `reply_depth` and `reply_size` are the planned terms of the link into the caller's inbox.
    For `@reply` the identity is the caller's own and no capability moves.
    """

    service: Annotated[int, U64()]
    generation: Annotated[int, U32()]
    depth: Annotated[int, U16(maximum=LINK_DEPTH_MAX)]
    size: Annotated[int, U32(maximum=LINK_SIZE_MAX)]
    delegations: Annotated[int, U8(maximum=DELEGATIONS_MAX)]
    reply_depth: Annotated[int, U16(maximum=LINK_DEPTH_MAX)]
    reply_size: Annotated[int, U32(maximum=LINK_SIZE_MAX)]


class Route(Request[Routed], op=1, idempotent=True, refuses=InitStatus, gives=True):
    """A link to the service `name`.

    *Refuses*: ROUTE_NOT_FOUND, ROUTE_DENIED, ROUTE_DOWN; BUSY when this instance of the caller
    already took as many links to that instance as the plan leaves room for.
    """

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]


class Ready(Message):
    """The plan that runs, and when every planned link existed (kernel clock)."""

    digest: Annotated[str, Text(size_max=64)]
    services: Annotated[int, U16()]
    links: Annotated[int, U16()]
    at: Annotated[int, U64()]


class AwaitReady(Request[Ready], op=2, idempotent=True):
    """Answered once `init: ready` was printed, every service answered its first health probe
    or missed its deadline, and the resource baseline is taken."""


class TaskRow(Message):
    """The kernel's row of a live task (pid, generation, class) and init's state of it.

    `pid` is 0 for a service that has no task now; init-lite has a row too.
    """

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    pid: Annotated[int, U32()]
    service: Annotated[int, U64()]
    generation: Annotated[int, U32()]
    qos: QosClass
    state: TaskState


class TaskRows(Message):
    """init-lite first, then every service in the order of the plan; `live` counts the
    kernel's rows."""

    live: Annotated[int, U16()]
    rows: Annotated[list[TaskRow], List(count_max=SERVICES_MAX + 1)]


class GetTasks(Request[TaskRows], op=3, idempotent=True):
    """The task list."""


class LinkRow(Message):
    """One planned link and what became of it.

    `taken` is how often the present instance of the client took it from the present instance
    of the server; 0 means that it does not exist now. The generations are those of the latest.
    """

    client: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    server: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    depth: Annotated[int, U16(maximum=LINK_DEPTH_MAX)]
    size: Annotated[int, U32(maximum=LINK_SIZE_MAX)]
    delegations: Annotated[int, U8(maximum=DELEGATIONS_MAX)]
    client_generation: Annotated[int, U32()]
    server_generation: Annotated[int, U32()]
    taken: Annotated[int, U16()]


class LinkRows(Message):
    """Rows from `first` on; `total` is the number of planned links, `grants` of device grants."""

    total: Annotated[int, U16()]
    grants: Annotated[int, U16()]
    rows: Annotated[list[LinkRow], List(count_max=LINK_ROWS_MAX)]


class GetLinks(Request[LinkRows], op=4, idempotent=True):
    """The link table, a page at a time."""

    first: Annotated[int, U16()]


class RouteCounts(Message):
    """How init answered the Route requests of one asker, over all its instances."""

    ok: Annotated[int, U32()]
    not_found: Annotated[int, U32()]
    denied: Annotated[int, U32()]
    down: Annotated[int, U32()]
    busy: Annotated[int, U32()]
    malformed: Annotated[int, U32()]


class GetRouteCounts(Request[RouteCounts], op=5, idempotent=True, refuses=InitStatus):
    """The route counters of the service `name`."""

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]


class Restarting(Message):
    """The instance that was killed, and its number."""

    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]


class Restart(Request[Restarting], op=6, idempotent=False, refuses=InitStatus):
    """Kill the running instance of `name`, as SIGKILL does; init restarts it after its back-off.

    *Refuses*: ROUTE_NOT_FOUND (no such service), ROUTE_DOWN (no running instance).
    """

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]


class ServiceRecord(Message):
    """What init keeps of one service. Times are the kernel's clock; 0 where nothing happened.

    `exit_code` and `exit_signal` are the last instance's that ended, and `died` is when init
    learnt of it. `spawn_refused` counts refused spawns, `spawn_reason` says why the last was.
    """

    state: TaskState
    health: Health
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    restarts: Annotated[int, U32()]
    died: Annotated[int, U64()]
    exit_code: Annotated[int, I64()]
    exit_signal: Annotated[int, U16()]
    reason: Annotated[str, Text(size_max=REASON_SIZE_MAX)]
    spawn_refused: Annotated[int, U32()]
    spawn_reason: Annotated[int, U8()]
    probe_nonce: Annotated[int, U64()]
    program_digest: Annotated[str, Text(size_max=64)]


class GetService(Request[ServiceRecord], op=7, idempotent=True, refuses=InitStatus):
    """init's record of the service `name`."""

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]


class AuditRows(Message):
    """QoS audit lines as the kernel wrote them, from index `first` on.

    init numbers the lines of a boot from 0 and keeps the latest; `total` is one more than the
    last number, `dropped` is how many the kernel could not keep until init took them.
    """

    first: Annotated[int, U32()]
    total: Annotated[int, U32()]
    dropped: Annotated[int, U32()]
    lines: Annotated[
        list[Annotated[str, Text(size_max=AUDIT_LINE_SIZE_MAX)]], List(count_max=AUDIT_ROWS_MAX)
    ]


class GetAudit(Request[AuditRows], op=8, idempotent=True):
    """The audit lines from index `first` on, or from the oldest kept one."""

    first: Annotated[int, U32()]


class Account(Message):
    """What one task held at one moment: its kernel's TaskCounters in the order of their
    declaration, and its own facts. `generation` is 0 when it did not answer."""

    generation: Annotated[int, U32()]
    counters: Annotated[list[Annotated[int, U64()]], List(count_max=COUNTERS_MAX)]
    facts: Annotated[list[Fact], List(count_max=FACTS_MAX)]


class Resources(Message):
    """The account of one task at `init: ready` and now, and the number of live tasks."""

    ready: Account
    now: Account
    tasks_ready: Annotated[int, U16()]
    tasks_now: Annotated[int, U16()]


class GetResources(Request[Resources], op=9, idempotent=True, refuses=InitStatus):
    """The accounts of `name`, a service or `init-lite`; its present account is asked for now."""

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]


class ShuttingDown(Message):
    """init is about to stop every service, in reverse order; `services` are running now."""

    services: Annotated[int, U16()]


class Shutdown(Request[ShuttingDown], op=10, idempotent=True):
    """End the run in order."""


class PolicyGiven(Message):
    """The policy in force moves with this reply as a sealed VMO, of which it is the first `size`
    bytes; `generation` is the policy page's."""

    size: Annotated[int, U32(maximum=POLICY_SIZE_MAX)]
    generation: Annotated[int, U32()]


class GetPolicy(Request[PolicyGiven], op=11, idempotent=True, refuses=InitStatus, gives=True):
    """The policy: the plan's, or the last one that was set. Needs `policy.authority`."""


class PolicyTaken(Message):
    """The policy is kept, and the policy page has this new generation."""

    generation: Annotated[int, U32()]


class SetPolicy(Request[PolicyTaken], op=12, idempotent=True, refuses=InitStatus, moves=True):
    """Keep this policy instead: the first `size` bytes of the sealed VMO that moves along.

    Kept until the end of the boot, also over a restart of policyd. Needs `policy.authority`.
    *Refuses*: BAD_POLICY.
    """

    size: Annotated[int, U32(minimum=1, maximum=POLICY_SIZE_MAX)]


class SystemState(IntEnum):
    """Where the whole system is."""

    STARTING = 0
    READY = 1  # every planned link exists
    SAFE = 2  # only the services marked `safe` run
    STOPPING = 3


class TrialState(IntEnum):
    """How far the trial of the slot that was booted is."""

    NONE = 0  # this boot is no trial
    JUDGING = 1
    COMMITTED = 2
    FAILED = 3  # the system is going down for it


class SystemInfo(Message):
    """The system as a whole. `why` is the reason of safe mode; times are the kernel's clock.

    `boots` counts the boots of this state directory, this one included; services know it as their
    configuration's `boot`, which is one less. `boot_id` is random, and another in each boot.
    `slot`, `set_version` and `set_digest` are of the slot that was booted: empty and 0 without one.
    """

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    digest: Annotated[str, Text(size_max=64)]
    state: SystemState
    why: Annotated[str, Text(size_max=REASON_TEXT_SIZE_MAX)]
    started: Annotated[int, U64()]
    ready: Annotated[int, U64()]
    now: Annotated[int, U64()]
    boots: Annotated[int, U32()]
    boot_id: Annotated[bytes, Blob(size_min=BOOT_ID_SIZE, size_max=BOOT_ID_SIZE)]
    policy_generation: Annotated[int, U32()]
    policy_digest: Annotated[str, Text(size_max=64)]
    policy_available: bool
    slot: Annotated[str, Text(size_max=1)]
    set_version: Annotated[int, U64()]
    set_digest: Annotated[str, Text(size_max=64)]
    trial: TrialState


class GetSystem(Request[SystemInfo], op=13, idempotent=True):
    """The state of the system."""


class SafeModeLeft(Message):
    """Safe mode is over: so many services are being started now."""

    services: Annotated[int, U16()]


class LeaveSafeMode(Request[SafeModeLeft], op=14, idempotent=True, refuses=InitStatus):
    """Forget the crashes and start what safe mode left out. *Refuses*: NOT_IN_SAFE_MODE."""


class Launched(Message):
    """The task that was started, by the digest that its program's files have now."""

    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    digest: Annotated[str, Text(size_max=64)]


class Launch(Request[Launched], op=15, idempotent=False, refuses=InitStatus):
    """Start the service `name`, which is `start = "demand"` and `by` the caller, for `requester`.

    Its program has the digest `digest`, in the plan and in its files as they are now. `settings` is
    MessagePack of a table that is added to its own settings. With `restarts` it is started again
    when it crashes, as its entry says. Needs PROC_SPAWN for `name`, and policyd's EXEC of
    `requester`: else DENIED.

    *Refuses*: ROUTE_NOT_FOUND, NOT_ON_DEMAND, RUNS, BAD_PROGRAM, SPAWN_REFUSED; BUSY when too many
    answers wait.
    """

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]
    requester: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]
    digest: Annotated[str, Text(size_max=64)]
    settings: Annotated[bytes, Blob(size_max=SETTINGS_SIZE_MAX)]
    restarts: Annotated[bool, Bool()]


class Noted(Message):
    """The service's record says so."""


class NoteDenied(Request[Noted], op=16, idempotent=True, refuses=InitStatus):
    """Somebody may not have the service `name` started: its record says so, as of a refused spawn.

    Needs PROC_SPAWN for `name`. *Refuses*: ROUTE_NOT_FOUND, NOT_ON_DEMAND.
    """

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]


class Ending(Message):
    """The task is being ended, as SIGKILL does, or is not started again."""


class EndTask(Request[Ending], op=17, idempotent=True, refuses=InitStatus):
    """End the launched service `name`: the instance that runs, if it is `generation` or was started
    in its place, and it is not started again. Needs PROC_SPAWN for `name`.

    *Refuses*: NO_SUCH_CHILD.
    """

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]
    generation: Annotated[int, U32()]


class ReloadOutcome(IntEnum):
    """What became of the changed settings of one service."""

    IN_FORCE = 1
    NEEDS_RESTART = 2  # it cannot change them while it runs; its next instance has them
    REFUSED = 3  # they are not what it takes; the old ones stay in force
    NO_ANSWER = 4  # it was told and did not answer; its next instance has them
    AT_START = 5  # it does not run; its next instance has them


class ReloadRow(Message):
    """A service whose settings have changed."""

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX, size_min=1)]
    outcome: ReloadOutcome


class Reloading(Message):
    """The system file was read again: so many services were told of new settings, so many others
    have changed otherwise, which takes a restart of the system. A row for each of the former, and
    for those that will have them when they start."""

    told: Annotated[int, U16()]
    ignored: Annotated[int, U16()]
    services: Annotated[list[ReloadRow], List(count_max=SERVICES_MAX)]


class ReloadSettings(Request[Reloading], op=18, idempotent=True, refuses=InitStatus):
    """Read the system file again and give services their changed settings (meta.Configure). Needs
    SYSTEM_CONTROL. Answered when they have. *Refuses*: BAD_SYSTEM_FILE."""


class LaunchedRow(Message):
    """A launched service that runs, or is about to be started again; `generation` is the launched
    one, `pid` the present one's or 0."""

    name: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    requester: Annotated[str, Text(size_max=SERVICE_NAME_SIZE_MAX)]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]


class LaunchedRows(Message):
    """Every launched service that the caller started and that has not ended for good."""

    rows: Annotated[list[LaunchedRow], List(count_max=SERVICES_MAX)]


class GetLaunched(Request[LaunchedRows], op=19, idempotent=True):
    """Whom have I started? Asked by a starter that was restarted itself. Needs PROC_SPAWN."""


class Rebooting(Message):
    """init is about to stop every service and be booted again; `services` are running now."""

    services: Annotated[int, U16()]


class Reboot(Request[Rebooting], op=20, idempotent=True, refuses=InitStatus):
    """End the run in order, and have the loader boot again. Needs SYSTEM_REBOOT or SYSTEM_CONTROL.

    *Refuses*: NO_SLOTS.
    """


InitRequest: TypeAlias = (
    Route
    | AwaitReady
    | GetTasks
    | GetLinks
    | GetRouteCounts
    | Restart
    | GetService
    | GetAudit
    | GetResources
    | Shutdown
    | GetPolicy
    | SetPolicy
    | GetSystem
    | LeaveSafeMode
    | Launch
    | NoteDenied
    | EndTask
    | ReloadSettings
    | GetLaunched
    | Reboot
)
PROTOCOL: Final = Protocol(
    "init",
    number=1,
    version=5,
    requests=(
        Route,
        AwaitReady,
        GetTasks,
        GetLinks,
        GetRouteCounts,
        Restart,
        GetService,
        GetAudit,
        GetResources,
        Shutdown,
        GetPolicy,
        SetPolicy,
        GetSystem,
        LeaveSafeMode,
        Launch,
        NoteDenied,
        EndTask,
        ReloadSettings,
        GetLaunched,
        Reboot,
    ),
)
