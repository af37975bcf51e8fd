"""The conformance suite: one set of cases for every kernel.

A case is a function whose name is a sentence and whose argument is a Rig. Each module holds the
cases of one promise of design.md section 3, or of one family of traps:

identity (1), moves (2), queues (3), deadlines (4), endings (5), receiving (6), and the closed set
of statuses (7) as it falls to memory, capabilities, tasks, qos and console. Three modules hold
what is said about the world outside: policy (the policy page, 8), root (signals, boot memory and
notices, 9), ports and streams (10) and devices (devices of the bus map and secrets, 11). sharing
(12) is what is read without a message: shared memory objects, fences and clocks.

Use it from pytest:

    @pytest.mark.parametrize("case", conformance(make_kernel, lateness_max=...), ids=str)
    def test_my_kernel(case):
        case.run()
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nexus.abi import Nanos
from nexus.testing.conformance import (
    capabilities,
    console,
    deadlines,
    devices,
    endings,
    identity,
    memory,
    moves,
    policy,
    ports,
    qos,
    queues,
    receiving,
    root,
    sharing,
    streams,
    tasks,
)
from nexus.testing.rig import MakeKernel, MakePlacedKernel, Rig

MODULES: Final = (
    identity,
    moves,
    queues,
    deadlines,
    endings,
    receiving,
    memory,
    capabilities,
    tasks,
    qos,
    console,
    policy,
    root,
    ports,
    streams,
    devices,
    sharing,
)
PROMISES: Final = {
    1: (identity,),
    2: (moves,),
    3: (queues,),
    4: (deadlines,),
    5: (endings,),
    6: (receiving,),
    7: (memory, capabilities, tasks, qos, console),
    8: (policy,),
    9: (root,),
    10: (ports, streams),
    11: (devices,),
    12: (sharing,),
}

CaseFunction = Callable[[Rig], None]


@dataclass(frozen=True)
class Case:
    """One case of the suite; `str` is its stable name, `module.test_sentence`."""

    function: CaseFunction
    rig: Rig

    def run(self) -> None:
        """Raise AssertionError when the kernel does not keep what the case says."""
        self.function(self.rig)

    def __str__(self) -> str:
        return case_name(self.function)


def case_name(function: CaseFunction) -> str:
    """The stable name of a case."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def case_functions() -> tuple[CaseFunction, ...]:
    """Every case, in the order of the modules and of the source."""
    return tuple(
        function
        for module in MODULES
        for name, function in vars(module).items()
        if name.startswith("test_")
    )


def cases(rig: Rig) -> tuple[Case, ...]:
    """The suite for one rig."""
    return tuple(Case(function, rig) for function in case_functions())


def conformance(
    make_kernel: MakeKernel,
    *,
    lateness_max: Nanos,
    make_placed: MakePlacedKernel | None = None,
    name: str = "kernel",
    forked: bool = False,
) -> tuple[Case, ...]:
    """The suite for a kernel; `forked` when running it takes over the calling process.

    The cases of promises 9 to 11 need a kernel in a place: `make_placed`.
    """
    rig = Rig(
        name=name,
        make_kernel=make_kernel,
        make_placed=make_placed,
        lateness_max=lateness_max,
        forked=forked,
    )
    return cases(rig)
