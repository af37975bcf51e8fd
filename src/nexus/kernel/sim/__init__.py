"""The simulated kernel: the same ABI under a virtual clock, from one seed."""

from nexus.kernel.sim.faults import (
    DEVICE_POINTS,
    FAILURES,
    FaultPoint,
    Faults,
    Forge,
    Freeze,
    NthFailure,
    NthRequest,
    Plan,
)
from nexus.kernel.sim.kernel import SimKernel
from nexus.kernel.sim.ports import SimListener, SimPeer, SimPort
from nexus.kernel.sim.power import Cut, Moment

__all__ = [
    "DEVICE_POINTS",
    "FAILURES",
    "Cut",
    "FaultPoint",
    "Faults",
    "Forge",
    "Freeze",
    "Moment",
    "NthFailure",
    "NthRequest",
    "Plan",
    "SimKernel",
    "SimListener",
    "SimPeer",
    "SimPort",
]
