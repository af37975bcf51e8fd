"""Who may set whose scheduling class, and the audit line of each decision (core.md 1.2)."""

from enum import StrEnum
from typing import Final, NamedTuple

from nexus.abi import INIT_NAME, Pid, QosClass, ServiceId, Status, service_id

QOS_PRIVILEGED: Final = frozenset(service_id(name) for name in (INIT_NAME, "execd", "policyd"))


class QosReason(StrEnum):
    """Why a request to set a class was decided as it was."""

    INVALID_QOS_CLASS = "invalid_qos_class"
    INVALID_TARGET_PID = "invalid_target_pid"
    UNAUTHORIZED_OTHER_PID = "unauthorized_other_pid"
    UNAUTHORIZED_ESCALATION = "unauthorized_escalation"
    SCHEDULER_QUEUE_FULL = "scheduler_queue_full"
    APPLIED = "applied"


QOS_STATUS: Final = {
    QosReason.INVALID_QOS_CLASS: Status.INVALID_ARGUMENT,
    QosReason.INVALID_TARGET_PID: Status.INVALID_ARGUMENT,
    QosReason.UNAUTHORIZED_OTHER_PID: Status.PERMISSION_DENIED,
    QosReason.UNAUTHORIZED_ESCALATION: Status.PERMISSION_DENIED,
    QosReason.SCHEDULER_QUEUE_FULL: Status.QUEUE_FULL,
}
_CLASSES: Final = {int(qos): qos for qos in QosClass}


class QosRequest(NamedTuple):
    """One request: who asks, for which task, which raw number; `current` is the class the
    target has now, None if there is no such task."""

    caller_service: ServiceId
    caller_pid: Pid
    target_pid: Pid
    raw: int
    current: QosClass | None


def qos_class(raw: int) -> QosClass | None:
    """The class of a raw number; None for a number that is no class. Never clamped."""
    return _CLASSES.get(raw)


def decide(request: QosRequest) -> QosReason:
    """The first check that fails, in the order of the ABI; APPLIED if the scheduler may try."""
    wanted = qos_class(request.raw)
    if wanted is None:
        return QosReason.INVALID_QOS_CLASS
    if request.current is None:
        return QosReason.INVALID_TARGET_PID
    if request.caller_service not in QOS_PRIVILEGED:
        if request.target_pid != request.caller_pid:
            return QosReason.UNAUTHORIZED_OTHER_PID
        if may_not_raise(request.current, wanted):
            return QosReason.UNAUTHORIZED_ESCALATION
    return QosReason.APPLIED


def may_not_raise(current: QosClass, wanted: QosClass) -> bool:
    """Whether a class is above the one a task has."""
    return wanted > current


def audit_line(request: QosRequest, reason: QosReason) -> str:
    """The audit text of one decision; the classes stand in it where both are known."""
    decision = "allow" if reason is QosReason.APPLIED else "deny"
    line = (
        f"QOS-AUDIT decision={decision} reason={reason.value} "
        f"caller_sid=0x{request.caller_service:016x} caller_pid={request.caller_pid} "
        f"target_pid={request.target_pid}"
    )
    wanted = qos_class(request.raw)
    if wanted is None or request.current is None:
        return line
    return f"{line} from={_label(request.current)} to={_label(wanted)}"


def _label(qos: QosClass) -> str:
    return qos.name.lower().replace("_", "")
