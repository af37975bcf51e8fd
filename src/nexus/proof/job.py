"""What a boot is asked for: in a module of its own, as a guest reads its job before all else."""

from dataclasses import dataclass
from typing import Final

from nexus.bootctl.handover import EXIT_REBOOT, EXIT_SLOT_FAILED

EXIT_RUN_OVER: Final = 103  # the root task had not exited at the bound of the kernel's clock
EXIT_HANG: Final = 104
EXIT_POWER_CUT: Final = 105  # where the job said


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the child process has to boot. `limit` bounds its kernel clock, in nanoseconds.

    `state` is the directory of what lasts from one boot of the run to the next. With `cut_at` the
    power is cut (sim) inside the `cut_write`th write of a disk after selftest-client printed that
    line. A device with slots (`slots`) is booted by the loader, which says in `slot` what it chose.
    One that is `ahead` (vm) is started while the boot before it still runs, and waits for its end.
    """

    ground: str
    system: str
    smp: int
    seed: int
    limit: int
    boot: int = 0
    state: str | None = None
    slots: bool = False
    slot: str = ""
    cut_at: str = ""
    cut_write: int = 0
    runner: int = 0  # process that started it, filled in by run_boot
    saboteur: int | None = None
    scenario: str | None = None
    trace: bool = False
    log: str | None = None
    ahead: bool = False


assert {EXIT_RUN_OVER, EXIT_HANG, EXIT_POWER_CUT}.isdisjoint({EXIT_REBOOT, EXIT_SLOT_FAILED})
