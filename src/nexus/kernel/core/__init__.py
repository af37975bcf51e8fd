"""The pure rules both kernels share: tables, rights, shares, budgets, authority, checks."""

from nexus.kernel.core.budget import (
    BOOT_BUDGET_SIZE,
    ENDPOINT_SIZE,
    LINK_END_SIZE,
    MESSAGE_SIZE,
    OBJECT_ALIGN,
    SLOT_SIZE,
    TASK_SIZE,
    TIMER_SIZE,
    WAITER_SIZE,
    Account,
    page_round,
)
from nexus.kernel.core.captable import CapTable, Held
from nexus.kernel.core.console import EVIDENCE_DEPTH_MAX, check_console, parse_evidence
from nexus.kernel.core.ending import (
    EXIT_CODE_MAX,
    EXIT_CRASH,
    NoExitCode,
    end_coroutine,
    exit_code,
)
from nexus.kernel.core.grants import (
    DEVICE_BUDGET_SIZE,
    DEVICE_SIZE,
    PORT_SIZE,
    door_of,
    doors_of,
    grants_fields,
    ports_count,
)
from nexus.kernel.core.hardware import (
    VIRTIO_MAGIC,
    VIRTIO_VERSION,
    WINDOW_SIZE,
    Hardware,
    check_bus,
    find_hardware,
)
from nexus.kernel.core.limits import SystemLimits
from nexus.kernel.core.message import check_data, check_derived, check_terms
from nexus.kernel.core.name import name_is_valid
from nexus.kernel.core.notice import check_boot_memory, check_notice
from nexus.kernel.core.qos import (
    QOS_PRIVILEGED,
    QOS_STATUS,
    QosReason,
    QosRequest,
    audit_line,
    decide,
    qos_class,
)
from nexus.kernel.core.rights import derive, moved
from nexus.kernel.core.run import CannotRun, Hang, PowerCut, RunOver
from nexus.kernel.core.shape import well_typed
from nexus.kernel.core.share import OwnerShare, Pool, SystemShares
from nexus.kernel.core.spawn import (
    ARGUMENT_SIZE_MAX,
    DELEGATIONS_MAX,
    SPAWN_STATUS,
    SpawnRefused,
    check_cpu,
    check_ports,
    check_spec,
)

__all__ = [
    "ARGUMENT_SIZE_MAX",
    "BOOT_BUDGET_SIZE",
    "DELEGATIONS_MAX",
    "DEVICE_BUDGET_SIZE",
    "DEVICE_SIZE",
    "ENDPOINT_SIZE",
    "EVIDENCE_DEPTH_MAX",
    "EXIT_CODE_MAX",
    "EXIT_CRASH",
    "LINK_END_SIZE",
    "MESSAGE_SIZE",
    "OBJECT_ALIGN",
    "PORT_SIZE",
    "QOS_PRIVILEGED",
    "QOS_STATUS",
    "SLOT_SIZE",
    "SPAWN_STATUS",
    "TASK_SIZE",
    "TIMER_SIZE",
    "VIRTIO_MAGIC",
    "VIRTIO_VERSION",
    "WAITER_SIZE",
    "WINDOW_SIZE",
    "Account",
    "CannotRun",
    "CapTable",
    "Hang",
    "Hardware",
    "Held",
    "NoExitCode",
    "OwnerShare",
    "Pool",
    "PowerCut",
    "QosReason",
    "QosRequest",
    "RunOver",
    "SpawnRefused",
    "SystemLimits",
    "SystemShares",
    "audit_line",
    "check_boot_memory",
    "check_bus",
    "check_console",
    "check_cpu",
    "check_data",
    "check_derived",
    "check_notice",
    "check_ports",
    "check_spec",
    "check_terms",
    "decide",
    "derive",
    "door_of",
    "doors_of",
    "end_coroutine",
    "exit_code",
    "find_hardware",
    "grants_fields",
    "moved",
    "name_is_valid",
    "page_round",
    "parse_evidence",
    "ports_count",
    "qos_class",
    "well_typed",
]
