"""Every promise of design.md section 3 and every refusal of abi/traps.py, on both kernels."""

import inspect

import pytest

from nexus.abi import SpawnReason, Status
from nexus.testing.conformance import MODULES, PROMISES, CaseFunction, case_functions, case_name
from nexus.testing.rig import Rig


@pytest.mark.covers(
    "abi.PERMISSION_DENIED",
    "abi.NO_SUCH_ENDPOINT",
    "abi.QUEUE_FULL",
    "abi.QUEUE_EMPTY",
    "abi.NO_SPACE",
    "abi.TIMED_OUT",
    "abi.INVALID_ARGUMENT",
    "abi.UNSUPPORTED",
)
@pytest.mark.parametrize("function", case_functions(), ids=case_name)
def test_kernel_keeps(function: CaseFunction, kernel: Rig) -> None:
    function(kernel)


def test_every_promise_has_cases() -> None:
    assert sorted(PROMISES) == [1, 2, 3, 4, 5, 6, 7]
    covered = {module for modules in PROMISES.values() for module in modules}
    assert covered == set(MODULES)
    for module in MODULES:
        assert any(function.__module__ == module.__name__ for function in case_functions())


def test_every_status_is_demanded_by_a_case() -> None:
    source = "".join(inspect.getsource(function) for function in case_functions())
    source += "".join(inspect.getsource(module) for module in MODULES)

    missing = [status.name for status in Status if f"Status.{status.name}" not in source]

    assert missing == []


def test_every_spawn_reason_that_a_kernel_has_is_demanded_by_a_case() -> None:
    source = "".join(inspect.getsource(module) for module in MODULES)

    missing = {reason for reason in SpawnReason if f"SpawnReason.{reason.name}" not in source}

    # Policy is policyd's and execd's, not the kernel's.
    assert missing == {SpawnReason.DENIED_BY_POLICY}
