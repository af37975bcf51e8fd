"""The simulated kernel: the same ABI under a virtual clock, from one seed."""

from nexus.kernel.sim.faults import (
    FAILURES,
    FaultPoint,
    Faults,
    Forge,
    Freeze,
    NthFailure,
    Plan,
)
from nexus.kernel.sim.kernel import SimKernel
from nexus.kernel.sim.ports import SimPeer, SimPort

__all__ = [
    "FAILURES",
    "FaultPoint",
    "Faults",
    "Forge",
    "Freeze",
    "NthFailure",
    "Plan",
    "SimKernel",
    "SimPeer",
    "SimPort",
]
