"""The rigs the conformance suite runs on."""

import pytest

pytest.register_assert_rewrite("nexus.testing.conformance", "nexus.testing.rig")

from nexus.testing.rig import Rig, linux_rigs, sim_rig  # noqa: E402 (rewriting comes first)

SIM_RIGS = tuple(
    sim_rig(seed=seed, cpu_count=cpu_count) for seed, cpu_count in ((1, 1), (2, 2), (3, 1), (4, 2))
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand the fixture `kernel` every rig, so that one test is one promise on one kernel."""
    if "kernel" in metafunc.fixturenames:
        rigs: tuple[Rig, ...] = (*SIM_RIGS, *linux_rigs())
        marked = [
            pytest.param(rig, id=rig.name, marks=[pytest.mark.linux] if rig.forked else [])
            for rig in rigs
        ]
        metafunc.parametrize("kernel", marked)
