"""The simulated kernel: the same ABI under a virtual clock, from one seed."""

from nexus.kernel.sim.faults import FAILURES, FaultPoint, Faults, Forge, NthFailure, Plan
from nexus.kernel.sim.kernel import SimKernel

__all__ = ["FAILURES", "FaultPoint", "Faults", "Forge", "NthFailure", "Plan", "SimKernel"]
