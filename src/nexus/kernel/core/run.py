"""How a run of a kernel can end other than by the root task's exit."""

from nexus.abi import Nanos, Pid


class Hang(Exception):
    """A task did not reach its next trap within the host-side limit."""

    def __init__(self, name: str, pid: Pid) -> None:
        super().__init__(f"task {name} (pid {pid}) never reached its next trap")
        self.name = name
        self.pid = pid


class RunOver(Exception):
    """The kernel clock passed the bound of the run and the root task had not exited."""

    def __init__(self, until: Nanos) -> None:
        super().__init__(f"the root task had not exited at {until} ns")
        self.until = until


class PowerCut(Exception):
    """The power was cut at `at`, on the kernel clock: what was not durable by then is lost."""

    def __init__(self, at: Nanos, why: str) -> None:
        super().__init__(f"the power was cut at {at} ns: {why}")
        self.at = at
        self.why = why


class CannotRun(Exception):
    """A kernel cannot serve a run in this process; the sentence says why and what to do."""
