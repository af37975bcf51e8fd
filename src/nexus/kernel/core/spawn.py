"""What both kernels check before they start a task, and how a failed spawn is told.

The order is the same on both: shape of the request (invalid-payload), its placement
(map-failed), number of tasks (oom), a slot for the spawner's link (cap-table-full), endpoints
(endpoint-quota), link shares and budgets (oom), and the program itself (map-failed).
"""

from collections.abc import Collection
from typing import Final

from nexus.abi import (
    BUDGET_SIZE_DEFAULT,
    CONTROL_LINK_SIZE,
    CPU_SHARE_MAX,
    ENDPOINTS_PER_OWNER_MAX,
    MEMORY_SIZE_DEFAULT,
    MEMORY_SIZE_MAX,
    TASKS_MAX,
    AbiError,
    Program,
    Programs,
    QosClass,
    SpawnReason,
    SpawnSpec,
    Status,
)
from nexus.kernel.core.budget import BOOT_BUDGET_SIZE
from nexus.kernel.core.grants import (
    DEVICE_BUDGET_SIZE,
    PORT_BUDGET_SIZE,
    grants_problem,
    ports_count,
    ports_problem,
)
from nexus.kernel.core.name import name_is_valid

ARGUMENT_SIZE_MAX: Final = 16 * 1024  # bytes; a service's settings, not data
BUDGET_SIZE_MAX: Final = 16 * BUDGET_SIZE_DEFAULT  # bytes; above it a budget is a mistake
DELEGATIONS_MAX: Final = TASKS_MAX  # links; at most one for each task that can live

SPAWN_STATUS: Final = {
    SpawnReason.OOM: Status.NO_SPACE,
    SpawnReason.CAP_TABLE_FULL: Status.NO_SPACE,
    SpawnReason.ENDPOINT_QUOTA: Status.NO_SPACE,
    SpawnReason.MAP_FAILED: Status.UNSUPPORTED,
    SpawnReason.INVALID_PAYLOAD: Status.INVALID_ARGUMENT,
    SpawnReason.DENIED_BY_POLICY: Status.PERMISSION_DENIED,
}


class SpawnRefused(AbiError):
    """A spawn failed for `reason`; nothing was started or kept."""

    def __init__(self, reason: SpawnReason, detail: str) -> None:
        super().__init__(SPAWN_STATUS[reason], f"{reason.name.lower()}: {detail}")
        self.reason = reason


def check_spec(spec: SpawnSpec, programs: Programs, live_names: Collection[str]) -> Program:
    """The program to start. Refuses: SpawnRefused with invalid-payload."""
    problem = _problem_of(spec, live_names)
    if problem is None:
        program = programs.get(spec.program)
        if program is not None:
            return program
        problem = f"no program {spec.program!r}"
    raise SpawnRefused(SpawnReason.INVALID_PAYLOAD, problem)


def check_ports(spec: SpawnSpec, live_ports: Collection[str]) -> None:
    """Refuse a port that a live task has: SpawnRefused with invalid-payload."""
    problem = ports_problem(spec.grants, live_ports)
    if problem is not None:
        raise SpawnRefused(SpawnReason.INVALID_PAYLOAD, problem)


def check_cpu(spec: SpawnSpec, cpu_count: int) -> None:
    """Refuse a declared placement this machine does not have: SpawnRefused with map-failed."""
    if spec.cpu is not None and spec.cpu >= cpu_count:
        raise SpawnRefused(SpawnReason.MAP_FAILED, f"CPU {spec.cpu} of {cpu_count}")


def _problem_of(spec: SpawnSpec, live_names: Collection[str]) -> str | None:
    if not name_is_valid(spec.name):
        return f"bad name {spec.name!r}"
    if spec.name in live_names:
        return f"{spec.name} is alive"
    if spec.qos not in list(QosClass):
        return f"no class {spec.qos!r}"
    if spec.cpu is not None and spec.cpu < 0:
        return f"no CPU {spec.cpu}"
    problem = grants_problem(spec.grants)
    if problem is not None:
        return problem
    least_budget = BOOT_BUDGET_SIZE + PORT_BUDGET_SIZE * ports_count(spec.grants)
    least_budget += DEVICE_BUDGET_SIZE * len(spec.grants.hardware)
    ranges = (
        ("argument", len(spec.argument), 0, ARGUMENT_SIZE_MAX),
        ("owner_size", spec.owner_size, CONTROL_LINK_SIZE, 1 << 31),
        ("endpoints", spec.endpoints, 1, ENDPOINTS_PER_OWNER_MAX),
        ("budget", spec.budget, least_budget, BUDGET_SIZE_MAX),
        ("memory", spec.memory, MEMORY_SIZE_DEFAULT, MEMORY_SIZE_MAX),
        ("cpu_share", 1 if spec.cpu_share is None else spec.cpu_share, 1, CPU_SHARE_MAX),
        ("delegations", spec.delegations, 0, DELEGATIONS_MAX),
    )
    for field, value, least, most in ranges:
        if not least <= value <= most:
            return f"{field} {value} is not in {least}..{most}"
    return None
