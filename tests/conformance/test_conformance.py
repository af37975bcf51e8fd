"""Every promise of design.md section 3 and every refusal of abi/traps.py, on both kernels."""

import inspect
import re

import pytest

from nexus.abi import (
    BootImage,
    Event,
    EventKind,
    Programs,
    Recorder,
    SpawnReason,
    Status,
    Trap,
)
from nexus.abi import traps as abi_traps
from nexus.kernel.core.limits import SystemLimits
from nexus.kernel.sim import SimKernel
from nexus.testing.conformance import (
    MODULES,
    PROMISES,
    CaseFunction,
    case_functions,
    case_name,
    conformance,
)
from nexus.testing.conformance.steps import ended, start
from nexus.testing.outside import Place, SimOutside
from nexus.testing.rig import EXIT_FAILED, SIM_LATENESS_MAX, Kernel, Rig, TaskFailed, kept_in


@pytest.mark.covers(
    "abi.PERMISSION_DENIED",
    "abi.NO_SUCH_ENDPOINT",
    "abi.QUEUE_FULL",
    "abi.QUEUE_EMPTY",
    "abi.NO_SPACE",
    "abi.TIMED_OUT",
    "abi.INVALID_ARGUMENT",
    "abi.UNSUPPORTED",
    "abi.DEVICE_FAILED",
)
@pytest.mark.parametrize("function", case_functions(), ids=case_name)
def test_kernel_keeps(function: CaseFunction, kernel: Rig) -> None:
    function(kernel)


def test_every_promise_has_cases() -> None:
    assert sorted(PROMISES) == list(range(1, 13))
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


CAMEL = {"".join(word.title() for word in status.name.split("_")): status for status in Status}
ROOT_ONLY = "Only the root task may"
ELSEWHERE = {
    ("EndpointClose", "NO_SUCH_ENDPOINT"): "what the others get, and not who closes",
    ("SetTaskQos", "QUEUE_FULL"): "needs a full run queue: tests/sim and the kernel's self test",
    ("SetTaskQos", "TIMED_OUT"): "only where init decides, and has stopped",
    ("ConsoleWrite", "QUEUE_FULL"): "the simulated console is never full",
    ("BlockWrite", "DEVICE_FAILED"): "needs a fault of the disk: tests/sim, tests/linux",
    ("BlockWrite", "NO_SPACE"): "needs a thin disk: tests/sim, tests/linux",
    ("EntropyDraw", "DEVICE_FAILED"): "the simulated source delivers, however badly",
    ("Fence", "UNSUPPORTED"): "needs a Linux without membarrier: tests/attack",
    ("SecretReplace", "NO_SPACE"): "needs a full disk: tests/sim, tests/linux",
}
"""Documented refusals that no case meets on the simulated kernel, and why."""


def _documented() -> set[tuple[str, str]]:
    """Trap and status of each refusal that a docstring of abi/traps.py names."""
    found = set()
    for trap in Trap.__subclasses__():
        if trap.__module__ != abi_traps.__name__:
            continue
        words = set(re.findall(r"\w+", str(trap.__doc__)))
        found |= {(trap.__name__, CAMEL[word].name) for word in words & CAMEL.keys()}
        if ROOT_ONLY in " ".join(str(trap.__doc__).split()):
            found.add((trap.__name__, Status.PERMISSION_DENIED.name))
    return found


def test_every_documented_refusal_is_met_by_a_case() -> None:
    met: set[tuple[str, str]] = set()

    def noting(recorder: Recorder) -> Recorder:
        def record(event: Event) -> None:
            if event.kind is EventKind.TRAP:
                met.add((str(event.fields["trap"]), str(event.fields["status"])))
            recorder(event)

        return record

    def make(programs: Programs, *, recorder: Recorder, limits: SystemLimits) -> Kernel:
        return SimKernel(
            programs, seed=7, recorder=noting(recorder), limits=limits, trace=True, boot_memory=None
        )

    def make_placed(
        programs: Programs, *, recorder: Recorder, limits: SystemLimits, place: Place
    ) -> Kernel:
        kernel = SimKernel(
            programs,
            seed=7,
            recorder=noting(recorder),
            limits=limits,
            trace=True,
            **kept_in(place),
        )
        place.current = SimOutside(kernel)
        return kernel

    suite = conformance(make, make_placed=make_placed, lateness_max=SIM_LATENESS_MAX)
    for case in suite:
        case.run()

    assert _documented() - met == set(ELSEWHERE)


def _make(programs: Programs, *, recorder: Recorder, limits: SystemLimits) -> Kernel:
    return SimKernel(programs, seed=7, recorder=recorder, limits=limits)


def test_the_suite_is_made_for_any_kernel_and_its_names_are_stable() -> None:
    suite = conformance(_make, lateness_max=SIM_LATENESS_MAX)

    names = [str(case) for case in suite]
    assert len(set(names)) == len(names) == len(case_functions())
    assert "queues.test_queue_full_comes_at_exactly_the_depth" in names
    next(case for case in suite if str(case).startswith("queues.")).run()


def test_a_kernel_that_forgets_an_identity_fails_the_suite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control experiment: a planted fault turns the case of its promise red."""

    def wrong(name: str) -> int:
        return len(name)

    monkeypatch.setattr("nexus.kernel.sim.kernel.service_id", wrong)
    suite = {str(case): case for case in conformance(_make, lateness_max=SIM_LATENESS_MAX)}

    with pytest.raises(TaskFailed):
        suite["identity.test_a_request_carries_the_kernels_word_about_its_sender"].run()
    suite["queues.test_queue_full_comes_at_exactly_the_depth"].run()


def test_the_traceback_of_a_task_reaches_the_test(kernel: Rig) -> None:
    async def child(boot: BootImage) -> None:
        raise ValueError(f"from inside {boot.name}")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "clumsy")
        assert (await ended(spawned)).code == EXIT_FAILED

    with pytest.raises(TaskFailed, match="ValueError: from inside clumsy") as failure:
        kernel.run(root, programs={"clumsy": child})
    assert "test_conformance.py" in str(failure.value)
