"""The totals of a system, given to a kernel when it is made."""

from dataclasses import dataclass

from nexus.abi import (
    CONTROL_LINK_SIZE,
    ENDPOINTS_PER_OWNER_MAX,
    ENDPOINTS_TOTAL_MAX,
    OWNER_SIZE_DEFAULT,
    TASKS_MAX,
    TOTAL_SIZE_DEFAULT,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemLimits:
    """What all tasks together may reserve.

    The root task is an owner like the others: `root_size` and `root_endpoints` come out of the
    totals before the first spawn. `tasks` counts live tasks, the root included.
    """

    total_size: int = TOTAL_SIZE_DEFAULT  # bytes of link shares
    endpoints: int = ENDPOINTS_TOTAL_MAX
    tasks: int = TASKS_MAX
    root_size: int = OWNER_SIZE_DEFAULT  # bytes of link shares into the root's endpoints
    root_endpoints: int = ENDPOINTS_PER_OWNER_MAX

    def __post_init__(self) -> None:
        """Refuse totals that the root task alone would exceed; the caller is at fault."""
        assert 1 <= self.tasks <= TASKS_MAX, "a system has a root task"
        assert CONTROL_LINK_SIZE <= self.root_size <= self.total_size, "the root fits the total"
        assert 1 <= self.root_endpoints <= self.endpoints, "the root fits the total"
        assert self.root_endpoints <= ENDPOINTS_PER_OWNER_MAX, "one owner's limit"
