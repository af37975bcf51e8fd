"""The conformance scenario: independent of the schedule in sim, and equal on both grounds."""

import pytest

from nexus.abi import Event, Nanos
from nexus.kernel.sim import SimKernel
from nexus.proof import scenario
from nexus.proof.compare import Log, as_text, compare, exit_code, normalise
from nexus.proof.request import Comparison
from nexus.proof.trace import Trace
from nexus.protocols.ladder import Ground


def _log(seed: int, cpu_count: int) -> Log:
    events: list[Event] = []
    kernel = SimKernel(
        scenario.programs(), seed=seed, recorder=events.append, cpu_count=cpu_count, trace=True
    )
    ended = kernel.run(scenario.root(), b"", until=Nanos(kernel.now + 60 * 10**9))
    assert ended.code == 0, kernel.crashes
    return normalise(Trace(tuple(events)))


@pytest.mark.sim
def test_what_each_task_sees_depends_on_neither_seed_nor_cpus() -> None:
    expected = _log(1, 1)

    assert len(expected["client", 1].traps) > 100
    assert len(expected["client", 1].classes) == 6
    assert len(expected["client", 0].links) > 3
    for seed in range(2, 12):
        assert _log(seed, 1 + seed % 4) == expected


@pytest.mark.linux
@pytest.mark.slow
def test_both_grounds_show_every_task_the_same() -> None:
    comparison = Comparison(
        grounds=(Ground.SIM, Ground.LINUX),
        scenario="conformance",
        seed=1,
        timeout=60 * 10**9,
        json=False,
    )

    results = compare(comparison)

    assert [result.grounds for result in results] == [(Ground.SIM, Ground.LINUX)]
    assert exit_code(results) == 0, as_text(results)
