"""The proof ladder as data: every claim this project makes about a running system.

One row is one rung: the console line that reports it, who may print that line, the rungs it
comes after, where it can be proved and what it needs, and in words the claim, the evidence
compared and the fault that must turn exactly this rung red. Rows are never renumbered.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final

from nexus.abi import INIT_NAME


@unique
class Ground(StrEnum):
    """Where a system runs."""

    SIM = "sim"
    LINUX = "linux"
    VM = "vm"


@unique
class Phase(StrEnum):
    """Which verdict a rung belongs to. Declared in the order of a run."""

    BRING_UP = "bring-up"
    SMP = "smp"
    DEVICES = "devices"
    IPC = "ipc"
    POLICY = "policy"
    EXEC = "exec"
    STATE = "state"
    OBSERVE = "observe"
    OTA = "ota"
    MMIO = "mmio"
    END = "end"


@unique
class Boot(StrEnum):
    """In which boot of a run the check of a rung is made."""

    START = "0 start"
    RESTART = "1 orderly restart"
    POWER_CUT = "2 power cut"  # linux: a second orderly restart
    SLOT_B = "3 first boot of slot B"
    BAD_A = "4 a bad set in slot A"
    BACK_IN_B = "5 back in B"
    BEFORE_OTA = "last before ota"  # 2 where there is one, else 1, else 0
    LAST = "last"  # of the boots the run makes


@unique
class Mechanism(StrEnum):
    """What a row needs besides services; the value completes "needs ..."."""

    DISK = "a block device that keeps its content between boots"
    VIRTIO = "virtio devices on a bus"
    RESTART = "a second boot in one run"
    POWER_CUT = "a disk that can lose power"
    SLOTS = "two slots of signed system sets"
    DOCTOR = "`nexus doctor`, which says what this host can hold back"
    WATCHDOG = "a watchdog for tasks that stop answering"
    LOG_STREAMS = "log rings read by logd"
    METRIC_PAGES = "metric pages read by metricsd"
    WHY = "`nexus why`, which keeps the reason of a rollback"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One claim. `needs` are services of the system file besides the printer, `devices` kinds of
    its bus map ("legacy": a transport of register version 1).

    `marker` is the whole line, or with `prefix` its beginning: the values that follow are
    checked. `after` are numbers of rungs whose lines come earlier in the same boot, or in an
    earlier one.
    """

    number: int
    phase: Phase
    marker: str
    printer: str
    grounds: frozenset[Ground]
    claim: str
    fault: str
    after: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    mechanisms: tuple[Mechanism, ...] = ()
    boot: Boot = Boot.START
    prefix: bool = False

    @property
    def services(self) -> tuple[str, ...]:
        """Every service that has to be in the system for this rung to be run."""
        if self.printer in {KERNEL, INIT_NAME} or self.printer in self.needs:
            return self.needs
        return (self.printer, *self.needs)

    def matches(self, line: str) -> bool:
        """Whether `line` is this rung's marker."""
        if self.prefix:
            return line.startswith(self.marker) and line != self.marker
        return line == self.marker

    def is_failure(self, line: str) -> bool:
        """Whether `line` says that this rung failed: its stem, FAIL, and perhaps why."""
        stem = f"{self.marker.removesuffix(' ok')} FAIL"
        return line == stem or line.startswith((f"{stem} ", f"{stem}:"))


_NUMBERED: Final = {
    Boot.START: 0,
    Boot.RESTART: 1,
    Boot.POWER_CUT: 2,
    Boot.SLOT_B: 3,
    Boot.BAD_A: 4,
    Boot.BACK_IN_B: 5,
}
_BEFORE_OTA_MAX: Final = 2  # the boots from 3 on are ota's own
BAD_BOOT: Final = _NUMBERED[Boot.BAD_A]  # which no rung is climbed in: init ends it by itself


def last_boot(rungs: Iterable[Rung]) -> int:
    """The number of the last boot that a run which climbs these rungs makes."""
    return max((_NUMBERED.get(rung.boot, 0) for rung in rungs), default=0)


def boot_of(rung: Rung, last: int) -> int:
    """The boot in which `rung` is met, in a run whose last boot is `last`."""
    if rung.boot is Boot.LAST:
        return last
    if rung.boot is Boot.BEFORE_OTA:
        return min(last, _BEFORE_OTA_MAX)
    return _NUMBERED[rung.boot]


KERNEL: Final = "kernel"  # printer of the kernel's self-test
SELFTEST: Final = "selftest-client"
ALL: Final = frozenset(Ground)
SIM_ONLY: Final = frozenset({Ground.SIM})  # a kernel's inside is not forced or seen on Linux
SIM_VM: Final = frozenset({Ground.SIM, Ground.VM})  # needs virtio, or a disk that loses power
LINUX_VM: Final = frozenset({Ground.LINUX, Ground.VM})  # needs system calls

CLAIMED_PREFIXES: Final = ("SELFTEST:", "KSELFTEST:", "KINIT:")
"""A line that begins so and is no row's marker turns a run red."""

RUNGS: Final = (
    Rung(
        number=1,
        phase=Phase.BRING_UP,
        marker="KSELFTEST: spawn reasons ok",
        printer=KERNEL,
        grounds=ALL,
        claim=(
            "Reasons 1-5 (oom, cap-table-full, endpoint-quota, map-failed, invalid-payload) each "
            "come from a spawn that really fails; `spawn_last_error` gives the code once, then "
            "0; the kernel's task count is unchanged. Reason 6 is proved by #93."
        ),
        fault="cap-table-full recorded as invalid-payload",
    ),
    Rung(
        number=2,
        phase=Phase.BRING_UP,
        marker="KSELFTEST: resource sentinel ok",
        printer=KERNEL,
        grounds=ALL,
        claim=(
            "Capability table filled to 96 slots and one owner's endpoints to 96, each up to the "
            "first NoSpace, then 64 spawn and exit cycles: slots, endpoints, queued bytes and "
            "tasks end equal to the counters taken before (linux, vm: also descriptors and "
            "children of init)."
        ),
        fault="task exit does not give back its last endpoint",
    ),
    Rung(
        number=3,
        phase=Phase.BRING_UP,
        marker="KSELFTEST: heap budget report ok",
        printer=KERNEL,
        grounds=ALL,
        claim=(
            "A request over the budget is refused and reported with "
            "`heap_budget_used/free/total` and the size and alignment asked for: used + free = "
            "total, used = the kernel's own account, size = the request; a smaller request then "
            "succeeds. sim: kernel heap, 1792 KiB; linux, vm: our own object budget (VMO, "
            "endpoint, capability), the only allocator that knows a size."
        ),
        fault="one charged object is missing from `used`",
    ),
    Rung(
        number=4,
        phase=Phase.BRING_UP,
        marker="KSELFTEST: set_task_qos rollback ok",
        printer=KERNEL,
        grounds=SIM_ONLY,
        claim=(
            "Task in the middle of Normal, 64 tasks in Interactive: set_task_qos gives "
            "QueueFull, Interactive stays at 64, the task has its old class and index, and the "
            "next picks come in the old order."
        ),
        fault="the task is put back at the tail",
    ),
    Rung(
        number=5,
        phase=Phase.BRING_UP,
        marker="init: start",
        printer=INIT_NAME,
        grounds=ALL,
        claim=(
            "init runs on a checked plan: the plan digest and service count in its record equal "
            "those `nexus check` computes from the same system file outside the run."
        ),
        fault="init skips the plan check and leaves the digest empty",
    ),
    Rung(
        number=6,
        phase=Phase.BRING_UP,
        marker="init: start policyd",
        printer=INIT_NAME,
        after=(5,),
        grounds=ALL,
        needs=("policyd",),
        claim=(
            "The start of this service follows the line: the kernel's spawn log shows one "
            "request with this name and the program digest of the plan."
        ),
        fault="policyd is missing from the start list",
    ),
    Rung(
        number=7,
        phase=Phase.BRING_UP,
        marker="init: up policyd",
        printer=INIT_NAME,
        after=(6,),
        grounds=ALL,
        needs=("policyd",),
        claim=(
            "The task exists, its identity (pid, service id, generation) is published and its "
            "control link is placed; readiness is not claimed. Compared: kernel task list, "
            "identity table, and a control echo with its nonce."
        ),
        fault="the identity entry of policyd is withheld",
    ),
    Rung(
        number=8,
        phase=Phase.BRING_UP,
        marker="policyd: ready",
        printer="policyd",
        after=(7,),
        grounds=ALL,
        needs=("policyd",),
        claim=(
            "Endpoints bound, policy loaded: init's health probe is answered on the service's "
            "own endpoint with its nonce, and the policy digest in the answer equals that of the "
            "plan's policy files."
        ),
        fault="line printed, endpoint bound after the readiness deadline",
    ),
    Rung(
        number=9,
        phase=Phase.BRING_UP,
        marker="init: start logd",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("logd",),
        claim="As #6, for logd.",
        fault="logd is missing from the start list",
    ),
    Rung(
        number=10,
        phase=Phase.BRING_UP,
        marker="init: up logd",
        printer=INIT_NAME,
        after=(9,),
        grounds=ALL,
        needs=("logd",),
        claim="As #7, for logd.",
        fault="the identity entry of logd is withheld",
    ),
    Rung(
        number=11,
        phase=Phase.BRING_UP,
        marker="init: start metricsd",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("metricsd",),
        claim="As #6, for metricsd.",
        fault="metricsd is missing from the start list",
    ),
    Rung(
        number=12,
        phase=Phase.BRING_UP,
        marker="init: up metricsd",
        printer=INIT_NAME,
        after=(11,),
        grounds=ALL,
        needs=("metricsd",),
        claim="As #7, for metricsd.",
        fault="the identity entry of metricsd is withheld",
    ),
    Rung(
        number=13,
        phase=Phase.BRING_UP,
        marker="init: start timed",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("timed",),
        claim="As #6, for timed.",
        fault="timed is missing from the start list",
    ),
    Rung(
        number=14,
        phase=Phase.BRING_UP,
        marker="init: up timed",
        printer=INIT_NAME,
        after=(13,),
        grounds=ALL,
        needs=("timed",),
        claim="As #7, for timed.",
        fault="the identity entry of timed is withheld",
    ),
    Rung(
        number=15,
        phase=Phase.BRING_UP,
        marker="init: start rngd",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("rngd",),
        claim="As #6, for rngd.",
        fault="rngd is missing from the start list",
    ),
    Rung(
        number=16,
        phase=Phase.BRING_UP,
        marker="init: up rngd",
        printer=INIT_NAME,
        after=(15,),
        grounds=ALL,
        needs=("rngd",),
        claim="As #7, for rngd.",
        fault="the identity entry of rngd is withheld",
    ),
    Rung(
        number=17,
        phase=Phase.BRING_UP,
        marker="init: start keystored",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("keystored",),
        claim="As #6, for keystored.",
        fault="keystored is missing from the start list",
    ),
    Rung(
        number=18,
        phase=Phase.BRING_UP,
        marker="init: up keystored",
        printer=INIT_NAME,
        after=(17,),
        grounds=ALL,
        needs=("keystored",),
        claim="As #7, for keystored.",
        fault="the identity entry of keystored is withheld",
    ),
    Rung(
        number=19,
        phase=Phase.BRING_UP,
        marker="init: start statefsd",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("statefsd",),
        claim="As #6, for statefsd.",
        fault="statefsd is missing from the start list",
    ),
    Rung(
        number=20,
        phase=Phase.BRING_UP,
        marker="init: up statefsd",
        printer=INIT_NAME,
        after=(19,),
        grounds=ALL,
        needs=("statefsd",),
        claim="As #7, for statefsd.",
        fault="the identity entry of statefsd is withheld",
    ),
    Rung(
        number=21,
        phase=Phase.BRING_UP,
        marker="init: start updated",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("updated",),
        claim="As #6, for updated.",
        fault="updated is missing from the start list",
    ),
    Rung(
        number=22,
        phase=Phase.BRING_UP,
        marker="init: up updated",
        printer=INIT_NAME,
        after=(21,),
        grounds=ALL,
        needs=("updated",),
        claim="As #7, for updated.",
        fault="the identity entry of updated is withheld",
    ),
    Rung(
        number=23,
        phase=Phase.BRING_UP,
        marker="init: start execd",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("execd",),
        claim="As #6, for execd.",
        fault="execd is missing from the start list",
    ),
    Rung(
        number=24,
        phase=Phase.BRING_UP,
        marker="init: up execd",
        printer=INIT_NAME,
        after=(23,),
        grounds=ALL,
        needs=("execd",),
        claim="As #7, for execd.",
        fault="the identity entry of execd is withheld",
    ),
    Rung(
        number=25,
        phase=Phase.BRING_UP,
        marker="init: start exportd",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("exportd",),
        claim="As #6, for exportd.",
        fault="exportd is missing from the start list",
    ),
    Rung(
        number=26,
        phase=Phase.BRING_UP,
        marker="init: up exportd",
        printer=INIT_NAME,
        after=(25,),
        grounds=ALL,
        needs=("exportd",),
        claim="As #7, for exportd.",
        fault="the identity entry of exportd is withheld",
    ),
    Rung(
        number=27,
        phase=Phase.BRING_UP,
        marker="init: start selftest-client",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("selftest-client",),
        claim="As #6, for selftest-client.",
        fault="selftest-client is missing from the start list",
    ),
    Rung(
        number=28,
        phase=Phase.BRING_UP,
        marker="init: up selftest-client",
        printer=INIT_NAME,
        after=(27,),
        grounds=ALL,
        needs=("selftest-client",),
        claim="As #7, for selftest-client.",
        fault="the identity entry of selftest-client is withheld",
    ),
    Rung(
        number=29,
        phase=Phase.BRING_UP,
        marker="init: ready",
        printer=INIT_NAME,
        after=(7, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28),
        grounds=ALL,
        claim=(
            "Every planned service is up, every planned link exists and every device grant is "
            "decided: init's link and grant tables equal the plan item by item, and, with "
            "policyd in the system, its decision counter shows one decision per grant. Service "
            "readiness is separate."
        ),
        fault="one planned link is left out",
    ),
    Rung(
        number=30,
        phase=Phase.BRING_UP,
        marker="logd: ready",
        printer="logd",
        after=(10,),
        grounds=ALL,
        claim=(
            "Health probe answered with its nonce; STATS gives the record and byte capacity of "
            "the system file."
        ),
        fault="endpoint bound after the readiness deadline",
    ),
    Rung(
        number=31,
        phase=Phase.BRING_UP,
        marker="metricsd: ready",
        printer="metricsd",
        after=(10, 12),  # its sink is logd: it is ready when it has found that
        grounds=ALL,
        claim=(
            "Health probe answered; its status gives the configured log sink and the limits, "
            "equal to the system file."
        ),
        fault="limits are compiled-in defaults, not the file's",
    ),
    Rung(
        number=32,
        phase=Phase.BRING_UP,
        marker="timed: ready",
        printer="timed",
        after=(14,),
        grounds=ALL,
        claim=(
            "Health probe answered; init's route table holds its endpoint with the same "
            "generation; 0 live timers."
        ),
        fault="endpoint bound after the readiness deadline",
    ),
    Rung(
        number=33,
        phase=Phase.BRING_UP,
        marker="rngd: ready",
        printer="rngd",
        after=(16,),
        grounds=ALL,
        claim=(
            "Health probe answered; status names the entropy source (virtio window, hardware "
            "source or getrandom) and a passed start-up health test; the source equals init's "
            "grant table."
        ),
        fault="status names getrandom whatever the source is",
    ),
    Rung(
        number=34,
        phase=Phase.BRING_UP,
        marker="statefsd: ready",
        printer="statefsd",
        after=(20,),
        grounds=ALL,
        devices=("block",),
        mechanisms=(Mechanism.DISK,),
        claim=(
            "The store is open on the granted device, never on RAM: epoch and sequence number in "
            "its status equal those the runner decodes from the disk image."
        ),
        fault="after probing the disk the store is opened on RAM",
    ),
    Rung(
        number=35,
        phase=Phase.BRING_UP,
        marker="keystored: ready",
        printer="keystored",
        after=(18, 34),
        grounds=ALL,
        needs=("statefsd",),
        mechanisms=(Mechanism.DISK,),
        claim=(
            "Health probe answered; status names statefsd (with generation) as store and the "
            "wrapping back end in use; statefsd's per-client counter shows the opening read."
        ),
        fault="the opening read fails and keystored falls back to memory",
    ),
    Rung(
        number=36,
        phase=Phase.BRING_UP,
        marker="updated: ready (statefs)",
        printer="updated",
        after=(22, 34),
        grounds=ALL,
        needs=("statefsd",),
        mechanisms=(Mechanism.DISK, Mechanism.SLOTS),
        claim=(
            "Boot-control record read from the boot device and update history opened through "
            "statefsd: slot and sequence number equal the runner's own decoding of the disk; "
            "statefsd counted the read."
        ),
        fault="the history read fails and is ignored",
    ),
    Rung(
        number=37,
        phase=Phase.BRING_UP,
        marker="execd: ready",
        printer="execd",
        after=(24,),
        grounds=ALL,
        claim=(
            "Health probe answered; its program table (names, digests) equals that of the active "
            "set's manifest (in a system without updated: of the checked plan, which `nexus "
            "check` prints)."
        ),
        fault="program table left empty",
    ),
    Rung(
        number=38,
        phase=Phase.BRING_UP,
        marker="exportd: ready",
        printer="exportd",
        after=(26, 30, 31),
        grounds=ALL,
        needs=("metricsd", "logd"),
        claim=(
            "Health probe answered; listening only on the declared address; init's link table "
            "gives it metricsd and logd and nothing else."
        ),
        fault="endpoint bound after the readiness deadline",
    ),
    Rung(
        number=39,
        phase=Phase.SMP,
        marker="KINIT: cpu1 online",
        printer=KERNEL,
        grounds=SIM_VM,
        claim=(
            "A second CPU really runs. sim: CPU 1's own tick counter grows; vm: the kernel's "
            "list of online CPUs holds 1 and QMP counts `SMP` CPUs. One line per further CPU; "
            "this one is the rung."
        ),
        fault="sim: CPU 0 sets the bit, CPU 1 never runs; vm: QEMU started with one CPU",
    ),
    Rung(
        number=40,
        phase=Phase.SMP,
        marker="KSELFTEST: smp online ok",
        printer=KERNEL,
        after=(39,),
        grounds=SIM_VM,
        claim=(
            "sim: online mask = 2^SMP - 1, read by a task on another CPU; vm: the last-run CPU "
            "of the service processes shows services on CPU 0 and on CPU 1, as placed by the "
            "system file."
        ),
        fault="sim: the mask is a constant; vm: every service is pinned to CPU 0",
    ),
    Rung(
        number=41,
        phase=Phase.SMP,
        marker="KSELFTEST: ipi counterfactual ok",
        printer=KERNEL,
        after=(40,),
        grounds=SIM_ONLY,
        claim=(
            "With sends forced to fail: request +1, while sent, taken and acknowledged stay "
            "unchanged for 200 000 ticks."
        ),
        fault="a failed send still counts as sent",
    ),
    Rung(
        number=42,
        phase=Phase.SMP,
        marker="KSELFTEST: ipi resched ok",
        printer=KERNEL,
        after=(40,),
        grounds=SIM_VM,
        claim=(
            "sim: request, sent, taken, acknowledged each +1, in that order, the last two by the "
            "target CPU; vm: the kernel's rescheduling interrupts grow on both CPUs during 1000 "
            "calls between services on different CPUs, and by more than in an equally long "
            "pause."
        ),
        fault=(
            "sim: the sender counts the acknowledgement; vm: the interrupt counters are read "
            "once and reused"
        ),
    ),
    Rung(
        number=43,
        phase=Phase.SMP,
        marker="KSELFTEST: test_reject_invalid_ipi_target_cpu ok",
        printer=KERNEL,
        after=(40,),
        grounds=SIM_ONLY,
        claim=(
            "A request for CPU 4 (of 4 possible) is InvalidArgument; all four counters unchanged."
        ),
        fault="bound tested with > instead of >=",
    ),
    Rung(
        number=44,
        phase=Phase.SMP,
        marker="KSELFTEST: test_reject_offline_cpu_resched ok",
        printer=KERNEL,
        after=(40,),
        grounds=SIM_ONLY,
        claim="A request for a CPU that is not online is refused; all four counters unchanged.",
        fault="the online test is left out",
    ),
    Rung(
        number=45,
        phase=Phase.SMP,
        marker="KSELFTEST: work stealing ok",
        printer=KERNEL,
        after=(40,),
        grounds=SIM_ONLY,
        claim=(
            "A task queued only on CPU 1 is run by CPU 0's pick path; steal counter +1; the "
            "event log shows the task on CPU 0."
        ),
        fault="the counter grows without a steal",
    ),
    Rung(
        number=46,
        phase=Phase.SMP,
        marker="KSELFTEST: test_reject_steal_above_bound ok",
        printer=KERNEL,
        after=(45,),
        grounds=SIM_ONLY,
        claim="Two tasks on CPU 1, one tick on CPU 0: exactly one is left on CPU 1.",
        fault="bound of two tasks per tick",
    ),
    Rung(
        number=47,
        phase=Phase.SMP,
        marker="KSELFTEST: test_reject_steal_higher_qos ok",
        printer=KERNEL,
        after=(45,),
        grounds=SIM_ONLY,
        claim=(
            "Victim holds only Interactive tasks, thief is limited to Normal: nothing moves, "
            "counter unchanged."
        ),
        fault="the class limit is ignored",
    ),
    Rung(
        number=48,
        phase=Phase.DEVICES,
        marker="init: mmio policy deny ok",
        printer=INIT_NAME,
        after=(8,),
        grounds=ALL,
        needs=("policyd", "timed"),
        claim=(
            "Before any grant init asks, as proxy, whether timed has `device.mmio.blk`: DENY, "
            "reason policy, nonce echoed, within 1 s; an error or time-out is red, not a denial. "
            "Compared: policyd's deny counter +1 and an empty grant table at that moment."
        ),
        fault="the policy gives timed `device.mmio.blk`",
    ),
    Rung(
        number=49,
        phase=Phase.DEVICES,
        marker="init: legacy transport refused ok",
        printer=INIT_NAME,
        after=(29,),
        grounds=SIM_ONLY,
        devices=("legacy",),
        mechanisms=(Mechanism.VIRTIO,),
        claim=(
            "A transport with register version 1 stands on the bus: it is listed as refused, "
            "granted to nobody, and the device's own register log shows no status write but 0."
        ),
        fault="version 1 is accepted",
    ),
    Rung(
        number=50,
        phase=Phase.DEVICES,
        marker="blk: virtio-blk up",
        printer="statefsd",
        after=(20,),
        grounds=SIM_VM,
        needs=("statefsd",),
        devices=("block",),
        mechanisms=(Mechanism.DISK, Mechanism.VIRTIO),
        claim=(
            "Modern transport in use: register version 2, device id 2, VERSION_1 negotiated, "
            "capacity = image size, read on the device's side (sim: device model; vm: sysfs "
            "features read by init, image size by the runner), and statefsd's first sector "
            "equals the image's."
        ),
        fault="VERSION_1 is not negotiated, the line still printed",
    ),
    Rung(
        number=51,
        phase=Phase.DEVICES,
        marker="rngd: mmio window mapped ok",
        printer="rngd",
        after=(16,),
        grounds=SIM_VM,
        needs=("rngd",),
        devices=("entropy",),
        mechanisms=(Mechanism.VIRTIO,),
        claim=(
            "rngd alone holds the window (magic 0x74726976, version 2, device id 4) and made one "
            "full draw with the delivered length checked. sim: the device counted one request; "
            "vm: init finds the page in rngd's memory map and in no other service's."
        ),
        fault="rngd draws from another source and never touches the window",
    ),
    Rung(
        number=52,
        phase=Phase.IPC,
        marker="SELFTEST: ipc routing keystored ok",
        printer=SELFTEST,
        after=(29, 35),
        grounds=ALL,
        needs=("keystored",),
        claim=(
            "Name resolved through init with the nonce matched, then a keystored round trip on "
            "that link; init's route counter +1, generation equal to init's entry."
        ),
        fault="init hands out a link to logd for this name",
    ),
    Rung(
        number=53,
        phase=Phase.IPC,
        marker="SELFTEST: ipc routing policyd ok",
        printer=SELFTEST,
        after=(8, 29),
        grounds=ALL,
        needs=("policyd",),
        claim="As #52, for policyd.",
        fault="init hands out a link to logd for this name",
    ),
    Rung(
        number=54,
        phase=Phase.IPC,
        marker="SELFTEST: ipc routing updated ok",
        printer=SELFTEST,
        after=(29, 36),
        grounds=ALL,
        needs=("updated",),
        claim="As #52, for updated.",
        fault="init hands out a link to logd for this name",
    ),
    Rung(
        number=55,
        phase=Phase.IPC,
        marker="SELFTEST: ipc routing execd ok",
        printer=SELFTEST,
        after=(29, 37),
        grounds=ALL,
        needs=("execd",),
        claim="As #52, for execd.",
        fault="init hands out a link to logd for this name",
    ),
    Rung(
        number=56,
        phase=Phase.IPC,
        marker="SELFTEST: ipc routing ok",
        printer=SELFTEST,
        after=(29, 30, 32),
        grounds=ALL,
        needs=("timed", "demo.testsvc"),
        claim=(
            "timed and, where present, logd (else demo.testsvc) resolved by name with nonces "
            "matched and used once each; `@reply` gives selftest's own inbox; an unknown name is "
            "NotFound with its nonce, not a time-out. init's route counters: 3 OK, 1 NotFound."
        ),
        fault="unknown names are answered with logd's link",
    ),
    Rung(
        number=57,
        phase=Phase.IPC,
        marker="SELFTEST: ipc payload roundtrip ok",
        printer=SELFTEST,
        after=(29,),
        grounds=ALL,
        claim=(
            "0, 1 and 8192 bytes come back with equal bytes, type and length; 8193 is "
            "InvalidArgument; the kernel's byte counter grows by the sum."
        ),
        fault="the last byte of an 8192-byte payload is lost",
    ),
    Rung(
        number=58,
        phase=Phase.IPC,
        marker="SELFTEST: nexus-ipc kernel loopback ok",
        printer=SELFTEST,
        after=(57,),
        grounds=ALL,
        claim=(
            "The library's client and server over an endpoint selftest made itself: reply nonce "
            "= request nonce, the server saw the absolute deadline sent; live endpoints at the "
            "kernel return to the count before."
        ),
        fault="the server answers with nonce + 1",
    ),
    Rung(
        number=59,
        phase=Phase.IPC,
        marker="SELFTEST: ipc deadline timeout ok",
        printer=SELFTEST,
        after=(57,),
        grounds=ALL,
        claim=(
            "A receive with a past deadline on an empty queue gives TimedOut at once; with a "
            "message queued it gives the message. Kernel time-out counter +1."
        ),
        fault="a past receive deadline is reported as QueueEmpty",
    ),
    Rung(
        number=60,
        phase=Phase.IPC,
        marker="SELFTEST: ipc deadline fires ok",
        printer=SELFTEST,
        after=(59,),
        grounds=ALL,
        claim=(
            "A receive 50 ms ahead returns TimedOut by itself while no other task waits or sends "
            "(linux, vm: all others idle): never early; sim exactly at the deadline with no "
            "other trap in the event log, linux within 1 ms on an idle CPU, vm within 50 ms."
        ),
        fault="expired waiters are looked at only when another task waits",
    ),
    Rung(
        number=61,
        phase=Phase.IPC,
        marker="SELFTEST: ipc sender pid ok",
        printer=SELFTEST,
        after=(56,),
        grounds=ALL,
        needs=("timed",),
        claim=(
            "timed echoes the pid its kernel gave with the message; it equals selftest's entry "
            "in init's task list, though the payload claims another pid."
        ),
        fault="the echo takes the pid from the payload",
    ),
    Rung(
        number=62,
        phase=Phase.IPC,
        marker="SELFTEST: ipc sender service_id ok",
        printer=SELFTEST,
        after=(56,),
        grounds=ALL,
        needs=("timed",),
        claim=(
            "timed echoes the service id its kernel gave: exactly 0x52c6c4a34ffb3f69, recomputed "
            "as FNV-1a 64 of `selftest-client`; the payload claims another name; no second id is "
            "accepted."
        ),
        fault="the echo takes the id from the payload",
    ),
    Rung(
        number=63,
        phase=Phase.IPC,
        marker="SELFTEST: ipc forged identity refused ok",
        printer=SELFTEST,
        after=(61, 62),
        grounds=ALL,
        needs=("demo.testsvc",),
        claim=(
            "demo.testsvc tries a payload name, another sender's header and (linux, vm) foreign "
            "credentials; the runner's fault point adds pid 0 and a pid outside the identity "
            "table: each is refused, the receiver's counter for that reason is +1, its state "
            "unchanged."
        ),
        fault="a sender that is not in the table is taken as id 0",
    ),
    Rung(
        number=64,
        phase=Phase.IPC,
        marker="SELFTEST: ipc moved link sender ok",
        printer=SELFTEST,
        after=(63,),
        grounds=ALL,
        needs=("timed", "demo.testsvc"),
        claim=(
            "selftest gives its send capability for timed to demo.testsvc: requests over it "
            "arrive with demo.testsvc's id and pid (timed's echo and counters per sender), never "
            "with selftest's."
        ),
        fault="the id is that of the capability's first holder",
    ),
    Rung(
        number=65,
        phase=Phase.IPC,
        marker="SELFTEST: ipc cap move reply ok",
        printer=SELFTEST,
        after=(56,),
        grounds=ALL,
        needs=("timed",),
        claim=(
            "A reply comes back over a SEND capability moved with the request, into the shared "
            "reply inbox: selftest's slot is empty after the send, and timed's capability count "
            "is back after the reply."
        ),
        fault="timed keeps the moved capability",
    ),
    Rung(
        number=66,
        phase=Phase.IPC,
        marker="SELFTEST: ipc cap move rollback ok",
        printer=SELFTEST,
        after=(65,),
        grounds=ALL,
        claim=(
            "A moving send fails by QueueFull, past deadline and closed endpoint: each time the "
            "capability is in its old slot with its old rights and still works; the receiver's "
            "table never grew."
        ),
        fault="the slot is emptied before the send is known to succeed",
    ),
    Rung(
        number=67,
        phase=Phase.IPC,
        marker="SELFTEST: ipc full table keeps message ok",
        printer=SELFTEST,
        after=(65,),
        grounds=ALL,
        claim=(
            "Receiver at 96 slots gets NoSpace and the message stays first; with one slot freed "
            "the same message and capability arrive. A receive into a 16-byte buffer is "
            "InvalidArgument and loses neither bytes nor capability. Queue counters of the "
            "kernel agree."
        ),
        fault="the message is taken out before the table is looked at",
    ),
    Rung(
        number=68,
        phase=Phase.IPC,
        marker="SELFTEST: ipc peer death wakes ok",
        printer=SELFTEST,
        after=(2, 56),
        grounds=ALL,
        needs=("demo.testsvc",),
        claim=(
            "demo.testsvc is killed while two tasks wait on it, deadline 5 s: both get "
            "NoSuchEndpoint within 100 ms (vm 1 s) of the death init recorded; what it had sent "
            "is received first, under its id; endpoints and links of the dead owner: 0."
        ),
        fault="only the first waiter is woken",
    ),
    Rung(
        number=69,
        phase=Phase.IPC,
        marker="SELFTEST: ipc nonce mismatch counted ok",
        printer=SELFTEST,
        after=(65,),
        grounds=ALL,
        needs=("timed", "demo.testsvc"),
        claim=(
            "On the shared inbox demo.testsvc places a stale, a duplicate and a foreign reply "
            "(right nonce, not the service asked) before timed's true one: the true one is "
            "taken, the three counters are 1 each, two calls answered in reverse order both end "
            "well, overflow of the bounded buffer is counted; 65 mismatches end in "
            "MismatchBudgetExceeded."
        ),
        fault="replies are taken in order of arrival",
    ),
    Rung(
        number=70,
        phase=Phase.IPC,
        marker="SELFTEST: ipc route outcomes ok",
        printer=SELFTEST,
        after=(56, 59, 69),
        grounds=ALL,
        needs=("demo.testsvc",),
        claim=(
            "`route_with_nonce_budgeted` yields Routed, Denied, NotFound, Malformed, TimedOut, "
            "MismatchBudgetExceeded and Closed, each provoked once, and a call cut off after the "
            "send is Unknown; time and attempts stay inside the budget; init's counter per route "
            "status and the script of the answering peer agree."
        ),
        fault="Denied folded into NotFound",
    ),
    Rung(
        number=71,
        phase=Phase.IPC,
        marker="SELFTEST: ipc rebind generation ok",
        printer=SELFTEST,
        after=(56,),
        grounds=ALL,
        needs=("timed",),
        claim=(
            "timed is killed and restarted by init: the kept route gives Stale once, one "
            "re-resolve, then calls succeed; the new generation is old + 1 in init's table and "
            "in timed's own status."
        ),
        fault="the generation is not raised at restart",
    ),
    Rung(
        number=72,
        phase=Phase.IPC,
        marker="SELFTEST: ipc flood isolation ok",
        printer=SELFTEST,
        after=(56,),
        grounds=ALL,
        needs=("timed", "demo.testsvc"),
        claim=(
            "demo.testsvc floods timed for 1 s and meets QueueFull at the 9th message, NoSpace "
            "beyond its link's 16 KiB; 200 calls of selftest meanwhile all end inside their "
            "deadline (50 ms, vm 1 s); timed's queued bytes and memory account stay within the "
            "declared budget."
        ),
        fault="all clients share one queue",
    ),
    Rung(
        number=73,
        phase=Phase.IPC,
        marker="SELFTEST: wire strict decode ok",
        printer=SELFTEST,
        after=(31, 33, 34, 52, 53, 54, 55, 56),
        grounds=ALL,
        needs=("timed",),
        claim=(
            "To each service selftest has a link to: unknown version, short header, trailing "
            "byte, extra array element, non-minimal integer, oversize field. Each is answered as "
            "malformed or unsupported with its nonce; the malformed counter grows by 6, state is "
            "unchanged, the health probe still works."
        ),
        fault="extra array elements are ignored",
    ),
    Rung(
        number=74,
        phase=Phase.IPC,
        marker="SELFTEST: ipc nested deadline ok",
        printer=SELFTEST,
        after=(34, 52, 59),
        grounds=ALL,
        needs=("keystored", "statefsd"),
        claim=(
            "selftest calls keystored, keystored calls statefsd: statefsd's record of that call "
            "shows a deadline not later than selftest's, the same trace id and keystored's span "
            "as parent; with a deadline too short the outer call ends by it."
        ),
        fault="the inner call gets a fresh deadline",
    ),
    Rung(
        number=75,
        phase=Phase.IPC,
        marker="SELFTEST: qos ok",
        printer=SELFTEST,
        after=(29,),
        grounds=ALL,
        claim=(
            "Own class reads Normal, setting Normal succeeds, Interactive is PermissionDenied, "
            "class 255 is InvalidArgument; the class held by the kernel (linux, vm: by init) is "
            "unchanged and the kernel's audit record says unauthorized_escalation."
        ),
        fault="a task may raise its own class",
    ),
    Rung(
        number=76,
        phase=Phase.IPC,
        marker="SELFTEST: timed coalesce ok",
        printer=SELFTEST,
        after=(56,),
        grounds=ALL,
        needs=("timed", "demo.interactive"),
        claim=(
            "now + 20.5 ms at Normal is rounded up to a multiple of 4 ms (1 ms for an "
            "Interactive helper, class taken from the kernel), fires not before it; a sleeper "
            "delays nobody; 64 timers, the 65th over limit; after cancel and a client's death "
            "timed's table shows 0."
        ),
        fault="deadlines are rounded down",
    ),
    Rung(
        number=77,
        phase=Phase.POLICY,
        marker="SELFTEST: policy allow ok",
        printer=SELFTEST,
        after=(30, 53),
        grounds=ALL,
        needs=("policyd", "logd"),
        claim=(
            "CHECK of `proof.probe`, held only by selftest: ALLOW with the nonce; the audit "
            "record in logd has selftest's id, the action and decision allow."
        ),
        fault="`proof.probe` is missing from the loaded policy",
    ),
    Rung(
        number=78,
        phase=Phase.POLICY,
        marker="SELFTEST: policy deny ok",
        printer=SELFTEST,
        after=(30, 53),
        grounds=ALL,
        needs=("policyd", "logd"),
        claim=(
            "CHECK of `crypto.sign`: the reply is parsed and is DENY, reason policy; the audit "
            "agrees. A transport error or time-out is red, not a denial."
        ),
        fault="the policy gives selftest `crypto.sign`",
    ),
    Rung(
        number=79,
        phase=Phase.POLICY,
        marker="SELFTEST: policyd requester spoof denied ok",
        printer=SELFTEST,
        after=(30, 53),
        grounds=ALL,
        needs=("policyd", "logd", "demo.testsvc"),
        claim=(
            "A ROUTE request naming demo.testsvc is DENY with the same nonce; audited with "
            "reason identity and selftest's kernel id as sender. So is a CHECK_FOR about "
            "demo.testsvc, for selftest may not ask in another's place; and init answers what "
            "demo.testsvc asks of it without a right, up to its shutdown, with DENIED."
        ),
        fault="the requester field is believed",
    ),
    Rung(
        number=80,
        phase=Phase.POLICY,
        marker="SELFTEST: policy malformed ok",
        printer=SELFTEST,
        after=(53,),
        grounds=ALL,
        needs=("policyd",),
        claim=(
            "A bad body gives status MALFORMED; policyd's malformed counter +1, allow and deny "
            "counters unchanged."
        ),
        fault="malformed is answered as DENY",
    ),
    Rung(
        number=81,
        phase=Phase.POLICY,
        marker="SELFTEST: policy deny reasons ok",
        printer=SELFTEST,
        after=(34, 71, 77, 78, 79, 80),
        grounds=ALL,
        needs=("policyd", "logd", "statefsd"),
        claim=(
            "Denied for the right reason: policy, identity, malformed and unavailable (policyd "
            "held, late, restarted: an uncached request is denied by statefsd inside its "
            "declared budget, a cached allow is denied after policy_stale_max) all reach the "
            "caller and the audit with subject, action and target; decisions = audit records + "
            "counted drops."
        ),
        fault="unavailable is recorded as policy",
    ),
    Rung(
        number=82,
        phase=Phase.POLICY,
        marker="SELFTEST: policy subject normalization ok",
        printer=SELFTEST,
        after=(35, 71, 78),
        grounds=ALL,
        needs=("policyd", "keystored"),
        claim=(
            "Delegated checks: a restarted instance of keystored counts as keystored because "
            "init issued it; an id init never issued is DENY, reason identity; a caller without "
            "`policy.delegate` is DENY. Compared with init's identity table."
        ),
        fault="an id that init never issued is mapped to keystored",
    ),
    Rung(
        number=83,
        phase=Phase.POLICY,
        marker="SELFTEST: policy generation ok",
        printer=SELFTEST,
        after=(34, 77),
        grounds=ALL,
        needs=("policyd", "statefsd", "demo.testsvc"),
        claim=(
            "A right of demo.testsvc on statefsd is used (decision cached), then taken away by a "
            "policy reload: its very next request is DENY, without a restart; the generation in "
            "the sealed page, in policyd's status and in the audit record is old + 1."
        ),
        fault="the generation is not raised at a reload",
    ),
    Rung(
        number=84,
        phase=Phase.EXEC,
        marker="execd: elf load ok",
        printer="execd",
        after=(55,),
        grounds=ALL,
        needs=("execd", "demo.hello", "demo.copy"),
        claim=(
            "execd took demo.hello from the active set, checked its digest and started it: the "
            "kernel's spawn log shows the digest of the set's manifest (without updated: of the "
            "checked plan); a copy with one byte changed is refused. The string is historical, "
            "the program need not be ELF."
        ),
        fault="the digest is not compared",
    ),
    Rung(
        number=85,
        phase=Phase.EXEC,
        marker="child: hello-elf",
        printer="demo.hello",
        after=(84,),
        grounds=ALL,
        needs=("execd", "demo.hello"),
        claim=(
            "The program itself printed it: the line's stamped sender is the pid execd answered, "
            "which is a child of execd's request in the task list."
        ),
        fault="execd prints the line for the child",
    ),
    Rung(
        number=86,
        phase=Phase.EXEC,
        marker="SELFTEST: e2e exec-elf ok",
        printer=SELFTEST,
        after=(85,),
        grounds=ALL,
        needs=("execd", "demo.hello"),
        claim=(
            "EXEC answered OK with a pid, and a call to the child on the link its manifest "
            "grants came back with that pid from the kernel."
        ),
        fault="EXEC answers OK with a pid that was never started",
    ),
    Rung(
        number=87,
        phase=Phase.EXEC,
        marker="child: exit0 start",
        printer="demo.exit0",
        after=(55,),
        grounds=ALL,
        needs=("execd", "demo.exit0"),
        claim="As #85, for demo.exit0.",
        fault="execd prints the line for the child",
    ),
    Rung(
        number=88,
        phase=Phase.EXEC,
        marker="execd: child exited",
        prefix=True,
        printer="execd",
        after=(87,),
        grounds=ALL,
        needs=("execd", "demo.exit0", "demo.hello", "demo.testsvc"),
        claim=(
            "execd reaped demo.exit0; pid and code on the line equal the exit the kernel "
            "recorded; no zombie is left; another client's call is served while execd waits."
        ),
        fault="the line is printed before the child is reaped",
    ),
    Rung(
        number=89,
        phase=Phase.EXEC,
        marker="SELFTEST: child exit ok",
        printer=SELFTEST,
        after=(88,),
        grounds=ALL,
        needs=("execd", "demo.exit0"),
        claim=(
            "WAIT gives status OK, that pid and code 0; a failed wait (-1) or another pid is red."
        ),
        fault="WAIT answers code 0 for an unknown pid",
    ),
    Rung(
        number=90,
        phase=Phase.EXEC,
        marker="child: exit42 start",
        printer="demo.exit42",
        after=(55,),
        grounds=ALL,
        needs=("execd", "demo.exit42"),
        claim="As #85, for demo.exit42.",
        fault="execd prints the line for the child",
    ),
    Rung(
        number=91,
        phase=Phase.EXEC,
        marker="execd: crash report pid=",
        prefix=True,
        printer="execd",
        after=(90,),
        grounds=ALL,
        needs=("execd", "demo.exit42"),
        claim=(
            "pid, code=42 and name=demo.exit42 on the line equal the kernel's exit record; a "
            "REPORT_EXIT by selftest, not the parent, is refused."
        ),
        fault="any client may report an exit",
    ),
    Rung(
        number=92,
        phase=Phase.EXEC,
        marker="SELFTEST: crash report ok",
        printer=SELFTEST,
        after=(30, 91),
        grounds=ALL,
        needs=("execd", "logd", "demo.exit42"),
        claim=(
            "One logd record, from execd's id, with event=crash.v1, this pid, code 42, this "
            "name, build id and duration, found by record id."
        ),
        fault="the record carries the pid of another child",
    ),
    Rung(
        number=93,
        phase=Phase.EXEC,
        marker="SELFTEST: exec denied ok",
        printer=SELFTEST,
        after=(30, 55),
        grounds=ALL,
        needs=("execd", "logd", "policyd", "demo.testsvc", "demo.exit0"),
        claim=(
            "EXEC naming demo.testsvc as requester is DENIED; `spawn_last_error` is 6 "
            "(denied-by-policy), task count and spawn log unchanged, audit reason identity."
        ),
        fault="denial is answered after the child was started",
    ),
    Rung(
        number=94,
        phase=Phase.EXEC,
        marker="SELFTEST: execd malformed ok",
        printer=SELFTEST,
        after=(55,),
        grounds=ALL,
        needs=("execd", "demo.hello"),
        claim=(
            "A bad body is answered as malformed with its nonce; malformed counter +1; no child, "
            "and the next EXEC works."
        ),
        fault="malformed frames are dropped without an answer",
    ),
    Rung(
        number=95,
        phase=Phase.EXEC,
        marker="SELFTEST: sandbox escape refused ok",
        printer=SELFTEST,
        after=(29,),
        grounds=LINUX_VM,
        needs=("demo.testsvc",),
        mechanisms=(Mechanism.DOCTOR,),
        claim=(
            "demo.testsvc tries by raw system calls: a path, a socket, fork, execve, ptrace and "
            "the memory of another service, writing the identity table, reading init's "
            "environment. All fail; init reads "
            "from outside: no-new-privs, seccomp filter, no capabilities, not dumpable, only "
            "granted descriptors; all as `nexus doctor` lists them. What doctor lists as absent "
            "is reported, not claimed."
        ),
        fault="the process stays dumpable",
    ),
    Rung(
        number=96,
        phase=Phase.EXEC,
        marker="SELFTEST: watchdog restart ok",
        printer=SELFTEST,
        after=(71,),
        grounds=ALL,
        needs=("demo.testsvc",),
        mechanisms=(Mechanism.WATCHDOG,),
        claim=(
            "demo.testsvc stops answering its health probe without exiting: init ends and "
            "restarts it inside the declared deadline, generation + 1, back-off applied, reason "
            "hang in init's record; every other service keeps its pid. Then policyd, where there "
            "is one, is killed: the policy page is raised for its death and again for the next "
            "one's health, and nothing is allowed in between."
        ),
        fault="only exits are watched",
    ),
    Rung(
        number=97,
        phase=Phase.STATE,
        marker="rngd: policy allow",
        printer="rngd",
        after=(33, 77),
        grounds=ALL,
        needs=("policyd", "rngd", "logd", SELFTEST),
        claim=(
            "The first entropy request of selftest (nothing cached) was allowed by policyd: "
            "audit record with subject selftest-client (not rngd), action `rng.entropy`, asked "
            "by rngd, same trace id."
        ),
        fault="rngd decides by itself and never asks",
    ),
    Rung(
        number=98,
        phase=Phase.STATE,
        marker="SELFTEST: rng entropy ok",
        printer=SELFTEST,
        after=(51, 97),
        grounds=ALL,
        needs=("rngd", "policyd"),
        claim=(
            "Two draws of 32 bytes: status OK, nonces matched, not equal, not constant; the "
            "source's own count of delivered bytes covers them (sim: device model; linux, vm: "
            "rngd's source counter). The bytes appear in no log or record."
        ),
        fault="a zero-length delivery is returned as a cleared buffer",
    ),
    Rung(
        number=99,
        phase=Phase.STATE,
        marker="SELFTEST: rng entropy oversized ok",
        printer=SELFTEST,
        after=(97,),
        grounds=ALL,
        needs=("rngd", "policyd"),
        claim=(
            "0 and 257 bytes are OVERSIZED, 256 is OK; the count of delivered bytes does not "
            "move for the refused ones."
        ),
        fault="bound of 257",
    ),
    Rung(
        number=100,
        phase=Phase.STATE,
        marker="SELFTEST: statefs put ok",
        printer=SELFTEST,
        after=(34, 56),
        grounds=ALL,
        needs=("statefsd",),
        claim=(
            "PUT with class durable, sent twice with one request id, GET equal, LIST holds the "
            "key once; statefsd's sequence number grows by 1 and its byte account for selftest "
            "by the record's size."
        ),
        fault="LIST leaves the newest key out",
    ),
    Rung(
        number=101,
        phase=Phase.STATE,
        marker="SELFTEST: statefs unauthorized access rejected",
        printer=SELFTEST,
        after=(34, 56, 78),
        grounds=ALL,
        needs=("statefsd", "policyd", "logd"),
        claim=(
            "GET under /state/keystore/ is ACCESS_DENIED, audited with path and selftest's id; "
            "LIST of /state/ shows no key-store path. Whole line compared: its FAIL form begins "
            "the same way."
        ),
        fault="LIST shows paths the caller may not read",
    ),
    Rung(
        number=102,
        phase=Phase.STATE,
        marker="SELFTEST: statefs bulk vmo ok",
        printer=SELFTEST,
        after=(100,),
        grounds=ALL,
        needs=("statefsd",),
        claim=(
            "A 64 KiB value goes in and out as a sealed VMO, digest equal; unsealed, wrong kind, "
            "missing MAP and offset + length beyond the end are refused before mapping, "
            "statefsd's mapping count unchanged."
        ),
        fault="the bounds test ignores the offset",
    ),
    Rung(
        number=103,
        phase=Phase.STATE,
        marker="SELFTEST: statefs persist ok",
        printer=SELFTEST,
        after=(71, 100),
        grounds=ALL,
        needs=("statefsd",),
        mechanisms=(Mechanism.DISK,),
        claim=(
            "Service restart: after a durable PUT statefsd is killed, init starts it with a new "
            "pid and generation + 1, GET over the rebound link gives the value; the runner finds "
            "the record, same sequence number, in the disk image."
        ),
        fault="durable is answered while the record is only in memory",
    ),
    Rung(
        number=104,
        phase=Phase.STATE,
        marker="SELFTEST: statefs persist reboot ok",
        printer=SELFTEST,
        after=(103,),
        grounds=ALL,
        needs=("statefsd",),
        mechanisms=(Mechanism.DISK, Mechanism.RESTART),
        boot=Boot.RESTART,
        claim=(
            "System restart (boot 1): new boot id, all pids new, value and sequence number as "
            "before; the runner read the same record from the image between the boots."
        ),
        fault="the store is made anew at boot",
    ),
    Rung(
        number=105,
        phase=Phase.STATE,
        marker="SELFTEST: statefs persist power cut ok",
        printer=SELFTEST,
        after=(104,),
        grounds=SIM_VM,
        needs=("statefsd",),
        mechanisms=(Mechanism.DISK, Mechanism.RESTART, Mechanism.POWER_CUT),
        boot=Boot.POWER_CUT,
        claim=(
            "Power cut (boot 2) just after an answered durable batch and inside a later one: the "
            "first is complete, the second wholly there or wholly absent. sim: volatile cache "
            "dropped; vm: disk rebuilt from the write log at the last finished flush."
        ),
        fault="the flush before the answer is left out",
    ),
    Rung(
        number=106,
        phase=Phase.STATE,
        marker="SELFTEST: statefs corruption quarantined ok",
        printer=SELFTEST,
        after=(104,),
        grounds=ALL,
        needs=("statefsd", "logd"),
        mechanisms=(Mechanism.DISK, Mechanism.RESTART),
        boot=Boot.POWER_CUT,
        claim=(
            "The runner flips one byte of one record while the system is down (boot 2): statefsd "
            "starts, that record is quarantined and named (key, offset) in its status and in "
            "logd, all other keys are equal; nothing falls back to RAM."
        ),
        fault="the record checksum is not compared",
    ),
    Rung(
        number=107,
        phase=Phase.STATE,
        marker="SELFTEST: keystored v1 ok",
        printer=SELFTEST,
        after=(52,),
        grounds=ALL,
        needs=("keystored", "statefsd", "demo.testsvc"),
        claim=(
            "put, get, delete, miss and malformed each with the specified status; demo.testsvc "
            "cannot read selftest's key under the same name; statefsd's counters show "
            "keystored's writes."
        ),
        fault="the key space is not bound to the caller",
    ),
    Rung(
        number=108,
        phase=Phase.STATE,
        marker="SELFTEST: device key pubkey ok",
        printer=SELFTEST,
        after=(52, 98),
        grounds=ALL,
        needs=("keystored", "rngd"),
        claim=(
            "Keygen draws 32 bytes from rngd (rngd's count for keystored +32), gives a 32-byte "
            "public key and a device id equal to its digest; a second keygen is KEY_EXISTS. In "
            "sim the key is the one the run's seed yields."
        ),
        fault="the seed comes from the process's own random source",
    ),
    Rung(
        number=109,
        phase=Phase.STATE,
        marker="SELFTEST: device key private export rejected ok",
        printer=SELFTEST,
        after=(108,),
        grounds=ALL,
        needs=("keystored", "logd"),
        claim=(
            "Export gives its own refusal status with an empty value, audited; the runner's scan "
            "finds no clear seed in disk image, logs or record (sim: the seed is known to the "
            "runner; linux, vm: a planted canary key)."
        ),
        fault="export answers with the stored blob",
    ),
    Rung(
        number=110,
        phase=Phase.STATE,
        marker="SELFTEST: device key persist ok",
        printer=SELFTEST,
        after=(71, 104, 108),
        grounds=ALL,
        needs=("keystored", "statefsd"),
        mechanisms=(Mechanism.DISK, Mechanism.RESTART),
        boot=Boot.RESTART,
        claim=(
            "Same public key and device id after keystored was killed and restarted, and again "
            "after boot 1; keystored's keygen counter stays 0 in that boot."
        ),
        fault="a failed load makes a new key",
    ),
    Rung(
        number=111,
        phase=Phase.OBSERVE,
        marker="logd: reject invalid_args",
        printer="logd",
        after=(30, 56),
        grounds=ALL,
        needs=("logd", SELFTEST),
        boot=Boot.BEFORE_OTA,
        claim=(
            "A message with an identity claim in its fields was refused: selftest holds status "
            "invalid_args, STATS counts 1 for this reason and sender, no record id was used. "
            "Printed once per reason."
        ),
        fault="the claim is stored as an ordinary field",
    ),
    Rung(
        number=112,
        phase=Phase.OBSERVE,
        marker="logd: reject over_limit",
        printer="logd",
        after=(30, 56),
        grounds=ALL,
        needs=("logd", SELFTEST),
        boot=Boot.BEFORE_OTA,
        claim=(
            "513 bytes of fields were refused, 512 accepted: statuses at selftest, STATS +1 for "
            "over_limit."
        ),
        fault="bound of 513",
    ),
    Rung(
        number=113,
        phase=Phase.OBSERVE,
        marker="logd: reject rate_limited",
        printer="logd",
        after=(30, 56),
        grounds=ALL,
        needs=("logd", "policyd", SELFTEST),
        boot=Boot.BEFORE_OTA,
        claim=(
            "The 25th message of one sender inside 1 s was refused, another sender's accepted in "
            "the same second; STATS +1 for rate_limited and this sender."
        ),
        fault="the limit counts all senders together",
    ),
    Rung(
        number=114,
        phase=Phase.OBSERVE,
        marker="SELFTEST: logd hardening rejects ok",
        printer=SELFTEST,
        after=(111, 112, 113),
        grounds=ALL,
        needs=("logd",),
        mechanisms=(Mechanism.LOG_STREAMS,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "The statuses 4, 5 and 6 were received by the client and a good record is accepted "
            "after the window; opening a log stream is held to the same three rules."
        ),
        fault="opening a stream is not rate limited",
    ),
    Rung(
        number=115,
        phase=Phase.OBSERVE,
        marker="SELFTEST: logd stats probe ok",
        printer=SELFTEST,
        after=(69, 114),
        grounds=ALL,
        needs=("logd",),
        mechanisms=(Mechanism.LOG_STREAMS,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "STATS by moved reply capability and nonce on the shared inbox, a foreign reply "
            "waiting there: over a burst larger than selftest's ring, accepted + dropped = sent, "
            "per reason and for this sender; no reading is 0; older records of other senders are "
            "still found."
        ),
        fault="overwritten ring records are not counted",
    ),
    Rung(
        number=116,
        phase=Phase.OBSERVE,
        marker="SELFTEST: log query ok",
        printer=SELFTEST,
        after=(30, 56),
        grounds=ALL,
        needs=("logd", "policyd", "demo.testsvc"),
        boot=Boot.BEFORE_OTA,
        claim=(
            "A record with a fresh token was acknowledged with a record id and is found once, by "
            "that id and by field filter, with selftest's kernel id; paging over 200 records of "
            "mixed size skips none; a client without the reading capability is refused."
        ),
        fault="QUERY skips a record that does not fit on the page",
    ),
    Rung(
        number=117,
        phase=Phase.OBSERVE,
        marker="SELFTEST: nexus-log sink-logd ok",
        printer=SELFTEST,
        after=(116,),
        grounds=ALL,
        needs=("logd",),
        boot=Boot.BEFORE_OTA,
        claim=(
            "One record over `configure_sink_logd_slots`, one over routed discovery (`logd` + "
            "`@reply`) after invalid slots were refused; both found once by query; selftest's "
            "capability count is unchanged."
        ),
        fault="the cloned reply capability is not closed",
    ),
    Rung(
        number=118,
        phase=Phase.OBSERVE,
        marker="SELFTEST: core services log ok",
        printer=SELFTEST,
        after=(116,),
        grounds=ALL,
        needs=("logd", "policyd", "statefsd", "timed"),
        mechanisms=(Mechanism.LOG_STREAMS,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "policyd, statefsd and timed each append their own probe: three records under three "
            "kernel ids found by query, and each sender's total +1."
        ),
        fault="timed's probe is written by selftest",
    ),
    Rung(
        number=119,
        phase=Phase.OBSERVE,
        marker="metricsd: reject invalid_args",
        printer="metricsd",
        after=(31, 56),
        grounds=ALL,
        needs=("metricsd", SELFTEST),
        mechanisms=(Mechanism.METRIC_PAGES,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "On the message path a span id that is not bound to the sender, at series creation a "
            "label key on the secret list: both refused, status at selftest, metricsd's counter "
            "for the reason +2, no series or span made. Printed once per reason."
        ),
        fault="span ids of others are accepted",
    ),
    Rung(
        number=120,
        phase=Phase.OBSERVE,
        marker="metricsd: reject over_limit",
        printer="metricsd",
        after=(31, 56),
        grounds=ALL,
        needs=("metricsd", SELFTEST),
        mechanisms=(Mechanism.METRIC_PAGES,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "The 17th series of one metric is refused at creation, the 16th works; series count "
            "at metricsd stays 16 and the visible overflow series counts 1."
        ),
        fault="per-metric cap of 17",
    ),
    Rung(
        number=121,
        phase=Phase.OBSERVE,
        marker="metricsd: reject rate_limited",
        printer="metricsd",
        after=(31, 56),
        grounds=ALL,
        needs=("metricsd", SELFTEST),
        mechanisms=(Mechanism.LOG_STREAMS, Mechanism.METRIC_PAGES),
        boot=Boot.BEFORE_OTA,
        claim=(
            "More than 64 creations, stream openings and messages of one sender inside 1 s are "
            "refused from the 65th; another sender is served in that second."
        ),
        fault="stream openings are not counted",
    ),
    Rung(
        number=122,
        phase=Phase.OBSERVE,
        marker="SELFTEST: metrics security rejects ok",
        printer=SELFTEST,
        after=(119, 120, 121),
        grounds=ALL,
        needs=("metricsd",),
        mechanisms=(Mechanism.METRIC_PAGES,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "The client received all three statuses; after the window a series is created and a "
            "span starts and ends; a write beyond its own page's slots is counted and seen by "
            "nobody else."
        ),
        fault="the window never reopens for a refused sender",
    ),
    Rung(
        number=123,
        phase=Phase.OBSERVE,
        marker="SELFTEST: metrics counters ok",
        printer=SELFTEST,
        after=(31, 56, 116),
        grounds=ALL,
        needs=("metricsd", "logd"),
        mechanisms=(Mechanism.METRIC_PAGES,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "Adding 3 and 4 reads as 7 in metricsd's query, and in the record metricsd sent "
            "through nexus-log to logd, found under metricsd's kernel id."
        ),
        fault="metricsd's log export leaves out the last update",
    ),
    Rung(
        number=124,
        phase=Phase.OBSERVE,
        marker="SELFTEST: metrics gauges ok",
        printer=SELFTEST,
        after=(31, 56),
        grounds=ALL,
        needs=("metricsd",),
        mechanisms=(Mechanism.METRIC_PAGES,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "Set to 5, then -3: metricsd's query gives -3; the page word read by the runner's "
            "decoder is the same."
        ),
        fault="gauges are stored unsigned",
    ),
    Rung(
        number=125,
        phase=Phase.OBSERVE,
        marker="SELFTEST: metrics histograms ok",
        printer=SELFTEST,
        after=(31, 56),
        grounds=ALL,
        needs=("metricsd",),
        mechanisms=(Mechanism.METRIC_PAGES,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "0.5, 3, 15, 50 and 500 ms give one count per bucket and their sum; in 1000 "
            "snapshots read while the writer runs, once halted in the middle of an update, count "
            "= sum of buckets (a torn page is read again and counted)."
        ),
        fault="the reader ignores the page's sequence word",
    ),
    Rung(
        number=126,
        phase=Phase.OBSERVE,
        marker="SELFTEST: tracing spans ok",
        printer=SELFTEST,
        after=(31, 76),
        grounds=ALL,
        needs=("metricsd", "timed"),
        boot=Boot.BEFORE_OTA,
        claim=(
            "A span around a 5 ms sleep at timed: duration not below 5 ms by the kernel's clock, "
            "timed's child span has it as parent and the same trace id, both read back from "
            "metricsd."
        ),
        fault="the span ends at time 0",
    ),
    Rung(
        number=127,
        phase=Phase.OBSERVE,
        marker="[INFO metricsd] retention wal active",
        printer="metricsd",
        after=(31, 103),
        grounds=ALL,
        needs=("metricsd", "statefsd"),
        mechanisms=(Mechanism.DISK,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "The first segment was acknowledged as durable and read back: statefsd lists the "
            "segment key for metricsd's id, and the runner decodes its first record from the "
            "disk image."
        ),
        fault="the line follows the send, not the acknowledgement",
    ),
    Rung(
        number=128,
        phase=Phase.OBSERVE,
        marker="SELFTEST: metrics retention ok",
        printer=SELFTEST,
        after=(71, 123, 127),
        grounds=ALL,
        needs=("metricsd", "statefsd"),
        mechanisms=(Mechanism.DISK,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "metricsd is killed and restarted: the counter's history from before is read back, "
            "the short and long roll-ups (10 s and 60 s, scaled down in the selftest system) "
            "match count, sum, min, max; segments and windows never exceed their bounds."
        ),
        fault="the segments are not read back at start",
    ),
    Rung(
        number=129,
        phase=Phase.OBSERVE,
        marker="SELFTEST: last words ok",
        printer=SELFTEST,
        after=(92, 116),
        grounds=ALL,
        needs=("execd", "logd", "demo.copy"),
        mechanisms=(Mechanism.LOG_STREAMS,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "A copy of demo.testsvc under execd writes a token into its own log ring and is "
            "killed before any doorbell: the crash record of that pid (signal 9) ends with that "
            "token, read from the ring after the death; no message with it was ever sent."
        ),
        fault="the ring is freed at exit, before it is read",
    ),
    Rung(
        number=130,
        phase=Phase.OBSERVE,
        marker="SELFTEST: export scrape ok",
        printer=SELFTEST,
        after=(38, 123),
        grounds=ALL,
        needs=("exportd", "metricsd"),
        mechanisms=(Mechanism.METRIC_PAGES,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "The OpenMetrics text from exportd's socket, parsed by the `prometheus_client` "
            "parser in the runner, holds the counter with `_total` and value 7 and the declared "
            "content type."
        ),
        fault="exportd serves a page from before the last update",
    ),
    Rung(
        number=131,
        phase=Phase.OTA,
        marker="SELFTEST: ota stage ok",
        printer=SELFTEST,
        after=(54, 102),
        grounds=ALL,
        needs=("updated",),
        mechanisms=(Mechanism.SLOTS,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "A signed set goes to the standby slot in VMO chunks and verifies: the runner's "
            "digest of slot B on disk equals the set's, slot A's is unchanged."
        ),
        fault="one chunk is written at a wrong offset",
    ),
    Rung(
        number=132,
        phase=Phase.OTA,
        marker="SELFTEST: ota untrusted set refused ok",
        printer=SELFTEST,
        after=(54,),
        grounds=ALL,
        needs=("updated",),
        mechanisms=(Mechanism.SLOTS,),
        boot=Boot.BEFORE_OTA,
        claim=(
            "Unknown key, flipped byte, version below the floor, mixed metadata, metadata "
            "expired before the stored time floor: each refused with its own status; standby "
            "digest and floors on disk unchanged. A freeze newer than the time floor is not "
            "claimed without a trusted clock."
        ),
        fault="the version floor is not compared",
    ),
    Rung(
        number=133,
        phase=Phase.OTA,
        marker="SELFTEST: ota switch ok",
        printer=SELFTEST,
        after=(8, 131),
        grounds=ALL,
        needs=("updated",),
        mechanisms=(Mechanism.SLOTS, Mechanism.RESTART),
        boot=Boot.SLOT_B,
        claim=(
            "Pending B, tries 2, written before acting: between the boots the runner decodes "
            "that from the boot device; boot 3 comes up in B and updated reports the attempt."
        ),
        fault="pending is kept in memory only",
    ),
    Rung(
        number=134,
        phase=Phase.OTA,
        marker="SELFTEST: ota running set ok",
        printer=SELFTEST,
        after=(133,),
        grounds=ALL,
        needs=("updated",),
        mechanisms=(Mechanism.SLOTS, Mechanism.RESTART),
        boot=Boot.SLOT_B,
        claim=(
            "Boot 3: set version and digest of every running service equal B's manifest, none "
            "A's. linux, vm: taken from the running processes; sim: from the spawn records, "
            "which proves plan and system file, since sim runs one copy of the code."
        ),
        fault="one service is started from slot A",
    ),
    Rung(
        number=135,
        phase=Phase.OTA,
        marker="SELFTEST: ota health ok",
        printer=SELFTEST,
        after=(133,),
        grounds=ALL,
        needs=("updated",),
        mechanisms=(Mechanism.SLOTS, Mechanism.RESTART),
        boot=Boot.SLOT_B,
        claim=(
            "init's nonce-correlated health gate reached updated after all declared health "
            "answers, not by word of selftest; B is committed on disk; staging was refused while "
            "B was unproven."
        ),
        fault="commit before the last service has answered",
    ),
    Rung(
        number=136,
        phase=Phase.OTA,
        marker="SELFTEST: ota rollback ok",
        printer=SELFTEST,
        after=(134, 135),
        grounds=ALL,
        needs=("updated",),
        mechanisms=(Mechanism.SLOTS, Mechanism.RESTART),
        boot=Boot.BACK_IN_B,
        claim=(
            "A set whose service never becomes ready goes to A with 1 try: boot 4 fails, boot 5 "
            "runs exactly B again (boot-control record and running digests), A is marked bad."
        ),
        fault="the try is not counted down before the attempt",
    ),
    Rung(
        number=137,
        phase=Phase.OTA,
        marker="SELFTEST: rollback reason ok",
        printer=SELFTEST,
        after=(104, 136),
        grounds=ALL,
        needs=("updated", "logd"),
        mechanisms=(Mechanism.SLOTS, Mechanism.RESTART, Mechanism.WHY),
        boot=Boot.BACK_IN_B,
        claim=(
            "In boot 5 `nexus why` names the service, the missed readiness deadline, the log "
            "tail and trace id of boot 4, equal to the fault the runner planted; the reason "
            "record was on disk before boot 4's risky step."
        ),
        fault="the reason is written only after the switch",
    ),
    Rung(
        number=138,
        phase=Phase.OTA,
        marker="SELFTEST: bootctl persist ok",
        printer=SELFTEST,
        after=(136,),
        grounds=ALL,
        needs=("updated",),
        mechanisms=(Mechanism.SLOTS, Mechanism.RESTART),
        boot=Boot.BACK_IN_B,
        claim=(
            "After boot 5: versioned record in two copies, each with sequence number and CRC, "
            "both decoded from disk by the runner and equal to updated's status; the sequence "
            "number is higher after each of boots 3, 4 and 5."
        ),
        fault="the second copy is never written",
    ),
    Rung(
        number=139,
        phase=Phase.MMIO,
        marker="SELFTEST: mmio policy deny ok",
        printer=SELFTEST,
        after=(48, 116),
        grounds=ALL,
        needs=("policyd", "logd", "timed"),
        boot=Boot.LAST,
        claim=(
            "init's proxy query for timed and `device.mmio.blk` is in logd as DENY, reason "
            "policy, subject timed (neither init nor selftest), target the window; timed's grant "
            "list is empty."
        ),
        fault="the audit names init as subject",
    ),
    Rung(
        number=140,
        phase=Phase.MMIO,
        marker="SELFTEST: mmio map ok",
        printer=SELFTEST,
        after=(29,),
        grounds=SIM_VM,
        devices=("empty",),
        mechanisms=(Mechanism.VIRTIO,),
        boot=Boot.LAST,
        claim=(
            "selftest owns one empty virtio-mmio transport in a page of its own: magic "
            "0x74726976, version 2, device id 0, as in the bus map of the run; offset = length, "
            "missing MAP and an executable mapping are refused."
        ),
        fault="selftest is handed the block device's window",
    ),
    Rung(
        number=141,
        phase=Phase.MMIO,
        marker="SELFTEST: cap query mmio ok",
        printer=SELFTEST,
        after=(140,),
        grounds=SIM_VM,
        devices=("empty",),
        mechanisms=(Mechanism.VIRTIO,),
        boot=Boot.LAST,
        claim=(
            "cap_query of that window: kind 2, length 4096; no field of the answer holds the "
            "physical base the runner knows."
        ),
        fault="the answer carries the base",
    ),
    Rung(
        number=142,
        phase=Phase.MMIO,
        marker="SELFTEST: cap query vmo ok",
        printer=SELFTEST,
        after=(29,),
        grounds=ALL,
        boot=Boot.LAST,
        claim=(
            "cap_query of a 5000-byte VMO: kind 1, length 8192, rights as derived; an endpoint "
            "is PermissionDenied; the kernel's byte account grew by the same length."
        ),
        fault="the length is not rounded to pages",
    ),
    Rung(
        number=143,
        phase=Phase.END,
        marker="SELFTEST: no resource left behind ok",
        printer=SELFTEST,
        after=(2, 29, 65, 117),
        grounds=ALL,
        boot=Boot.LAST,
        claim=(
            "For each boot of the run, at its end: capabilities, endpoints, queued bytes, VMOs, "
            "timers, log streams, children equal the counters at that boot's `init: ready` "
            "(linux, vm: also descriptors and processes, counted by init from outside)."
        ),
        fault="one VMO of a finished call stays mapped",
    ),
    Rung(
        number=144,
        phase=Phase.END,
        marker="SELFTEST: end",
        printer=SELFTEST,
        after=tuple(range(1, 144)),
        grounds=ALL,
        boot=Boot.LAST,
        claim=(
            "Every rung of the ground is decided, none red or blocked, no FAIL line in the "
            "stream. The runner finds the same in the run record."
        ),
        fault="one FAIL line is written",
    ),
)


def rung(number: int) -> Rung:
    """The row with this number."""
    return RUNGS[number - 1]


assert all(row.number == index for index, row in enumerate(RUNGS, start=1)), "no gaps"
assert len({row.marker for row in RUNGS}) == len(RUNGS), "a marker names one rung"
assert all(previous < row.number for row in RUNGS for previous in row.after), "no cycle"
