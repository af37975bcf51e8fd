"""What init keeps of each service, from one instance to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from nexus.abi import ExitInfo, LinkId, Nanos, Pid, Sender, Slot, Spawned, SpawnReason, StreamRole
from nexus.bootctl.handover import SlotBoot
from nexus.init.plan import PlannedService
from nexus.protocols.init import Account, Health, TaskState
from nexus.runtime import ServiceConfig

STATEFSD_PROGRAM: Final = "statefsd"
REFRESH_SETTING: Final = "refresh"  # of statefsd, as the next
RESTORE_SETTING: Final = "restore"
NO_PID: Final = Pid(0)
NEVER_YET: Final = Nanos(0)
NO_ACCOUNT: Final = Account(generation=0, counters=[], facts=[])


@dataclass(slots=True)
class RouteTally:
    """How the Route requests of one asker were answered."""

    ok: int = 0
    not_found: int = 0
    denied: int = 0
    down: int = 0
    busy: int = 0
    malformed: int = 0


@dataclass(slots=True)
class Exit:
    """How an instance ended, and when init learnt of it."""

    info: ExitInfo
    died: Nanos


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """For whom a service was started on demand, and how.

    `settings` are added to its own; with `restarts` it is started again when it crashes;
    `generation` is its first instance, 0 before that has started.
    """

    requester: str
    settings: Mapping[str, Any]
    restarts: bool
    generation: int = 0


@dataclass(slots=True)
class Record:
    """A service: its present instance, and what happened to the earlier ones.

    `slot` leads to the instance's endpoint and `replies` to its inbox; the instance is known by
    `control` on init's endpoint and by `answers` in init's inbox. All four are None without one.
    """

    planned: PlannedService
    state: TaskState = TaskState.WAITING
    health: Health = Health.UNKNOWN
    pid: Pid = NO_PID
    generation: int = 0
    slot: Slot | None = None
    replies: Slot | None = None
    control: LinkId | None = None
    answers: LinkId | None = None
    argument: bytes = b""
    hardware: tuple[str, ...] = ()  # the devices that the present or last instance was granted
    started: Nanos = NEVER_YET  # when the present instance was spawned
    leaving: Nanos | None = None  # its control link closed at this time; it is not yet reaped
    died: Nanos = NEVER_YET  # when its control link closed, kept from then on
    due: Nanos | None = None  # when the next start is to be tried
    first_started: Nanos | None = None  # when its start was first tried
    was_up: bool = False  # an instance answered its echo
    is_settled: bool = False  # it was healthy, or missed its first readiness deadline
    kill_reason: str = ""  # why init killed it, if init did
    reason: str = ""  # why the last instance ended, or none was started
    delay: Nanos = NEVER_YET  # the back-off of its last unexpected end
    probe_nonce: int = 0
    probe_again: Nanos | None = None  # when to ask next
    probing: bool = False  # a Health or GetStatus is unanswered
    probe_begun: Nanos | None = None  # when the present later probe was first tried
    answered: Nanos | None = None  # its first OK; how it is was not told yet
    well_since: Nanos | None = None  # when this instance was first healthy
    misses: int = 0  # later probes in a row that were not answered as they should
    expired: int = 0  # requests that had expired in its queue, by its last probe
    deaf: Nanos | None = None  # since when its link into init's inbox is closed
    faltered: bool = False  # an instance ended after `init: ready` and before the baseline
    restarts: int = 0
    spawn_refused: int = 0
    spawn_reason: SpawnReason = SpawnReason.NONE
    last_exit: Exit | None = None
    launch: Launch | None = None  # of a service on demand, until it has ended for good
    routes: RouteTally = field(default_factory=RouteTally)
    at_ready: Account = NO_ACCOUNT

    @property
    def name(self) -> str:
        """The name of the service."""
        return self.planned.name

    @property
    def is_demanded(self) -> bool:
        """Whether it starts on demand: nobody waits for it, and it may end."""
        return bool(self.planned.by)

    @property
    def lives(self) -> bool:
        """Whether there is a task that has not been reaped."""
        return self.pid != NO_PID

    @property
    def is_up(self) -> bool:
        """Whether links into it may be given out."""
        return self.state is TaskState.UP and self.leaving is None

    @property
    def is_out(self) -> bool:
        """Whether it neither runs nor is to run: nothing waits for it."""
        return self.state in _OUT

    @property
    def argument_digest(self) -> str:
        """What a healthy instance says it was started with."""
        return sha256(self.argument).hexdigest()

    def begin_instance(self, spawned: Spawned, now: Nanos) -> None:
        """A new instance was spawned: forget the health of the former."""
        self.state = TaskState.STARTING
        self.health = Health.UNKNOWN
        self.pid = spawned.pid
        self.generation = spawned.generation
        self.slot = spawned.slot
        self.control = spawned.link
        self.started = now
        self.leaving = self.deaf = None
        self.kill_reason = ""
        self.probing = False
        self.probe_again = self.probe_begun = None
        self.answered = self.well_since = None
        self.misses = self.expired = 0

    def is_sender(self, sender: Sender) -> bool:
        """Whether the kernel's word about a sender names the present instance."""
        return (
            sender.service == self.planned.service
            and sender.generation == self.generation
            and sender.pid == self.pid
        )


_OUT: Final = (TaskState.STOPPED, TaskState.FAILED, TaskState.LEFT_OUT, TaskState.ON_DEMAND)


def resting_state(planned: PlannedService) -> TaskState:
    """What a service is that could be started and has not been."""
    return TaskState.ON_DEMAND if planned.by else TaskState.WAITING


def config_of(
    planned: PlannedService,
    trace_seed: bytes,
    boot: int,
    boot_id: bytes,
    launch: Launch | None = None,
    slot_boot: SlotBoot | None = None,
) -> ServiceConfig:
    """What a service is told when it starts."""
    return ServiceConfig(
        uses=[link.server for link in planned.uses],
        posts=list(planned.posts),
        settings={
            **dict(planned.settings),
            **({} if launch is None else launch.settings),
            **_restoring(planned, slot_boot),
        },
        trace_seed=trace_seed,
        boot=boot,
        boot_id=boot_id,
        starts=dict(planned.starts),
        log_ring=planned.log_ring,
        metrics_page=planned.metrics_page,
        streams={
            each.name: StreamRole(each.role).name.lower() for each in planned.grants.stream_ports
        },
        names=list(planned.names),
        slot="" if slot_boot is None else slot_boot.slot,
        set_version=0 if slot_boot is None else slot_boot.version,
        set_digest="" if slot_boot is None else slot_boot.digest,
    )


def _restoring(planned: PlannedService, slot_boot: SlotBoot | None) -> Mapping[str, int]:
    """What statefsd does with the snapshot before it serves: after a rollback it goes back to it,
    and for a trial of a set that migrates data it takes it again."""
    if slot_boot is None or not slot_boot.snapshot or planned.program != STATEFSD_PROGRAM:
        return {}
    if slot_boot.restore:
        return {RESTORE_SETTING: slot_boot.snapshot}
    return {REFRESH_SETTING: slot_boot.snapshot} if slot_boot.trial else {}
