"""Command line and environment of `nexus prove`."""

from pathlib import Path

import pytest

from nexus.proof.request import Comparison, Request, Sweep, UsageError, check_smp, duration, parse
from nexus.protocols.ladder import Ground, Phase


def _request(*argv: str, **environ: str) -> Request:
    request = parse(argv, environ)
    assert isinstance(request, Request)
    return request


def test_without_arguments_the_selftest_system_runs_to_its_end_in_sim() -> None:
    request = _request()

    assert request.ground is Ground.SIM
    assert request.system == Path("systems/selftest.toml")
    assert (request.smp, request.phase, request.until) == (None, Phase.END, None)
    assert request.timeout == 190 * 10**9


def test_the_environment_of_the_mission_is_understood() -> None:
    request = _request(RUN_PHASE="mmio", RUN_UNTIL_MARKER="1", RUN_TIMEOUT="90s", SMP="2")

    assert request.phase is Phase.MMIO
    assert (request.until, request.timeout, request.smp) == ("", 90 * 10**9, 2)


def test_the_command_line_wins_over_the_environment() -> None:
    request = _request("--smp", "4", "--timeout", "5s", SMP="2", RUN_TIMEOUT="90s")

    assert (request.smp, request.timeout) == (4, 5 * 10**9)


@pytest.mark.parametrize(("alias", "phase"), [("routing", Phase.IPC), ("logd", Phase.OBSERVE)])
def test_phases_of_the_reference_have_aliases(alias: str, phase: Phase) -> None:
    assert _request(RUN_PHASE=alias).phase is phase


def test_vfs_is_refused_with_a_sentence_that_names_the_phases() -> None:
    with pytest.raises(UsageError, match="no virtual file system, choose one of bring-up smp"):
        parse((), {"RUN_PHASE": "vfs"})


def test_any_other_marker_is_a_whole_line_to_stop_at() -> None:
    assert _request(RUN_UNTIL_MARKER="SELFTEST: ipc routing ok").until == "SELFTEST: ipc routing ok"
    assert _request(RUN_UNTIL_MARKER="0").until is None


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        ((), {"RUN_PHASE": "nonsense"}),
        ((), {"SMP": "0"}),
        ((), {"SMP": "5"}),
        ((), {"SMP": "two"}),
        ((), {"REQUIRE_SMP": "yes", "SMP": "2"}),
        (("--ground", "vm", "--log", "x"), {}),
        (("--compare", "sim,sim"), {}),
        (("--ground", "moon"), {}),
        (("--ground", "linux", "--log", "x"), {}),
        ((), {"RUN_TIMEOUT": "soon"}),
        ((), {"RUN_TIMEOUT": "0s"}),
        ((), {"RUN_TIMEOUT": "2000m"}),
        (("--seed", "-1"), {}),
        (("--compare", "sim"), {}),
        (("--compare", "sim,moon"), {}),
        (("--saboteur", "x"), {}),
        (("--no-such-option",), {}),
    ],
)
def test_what_is_not_understood_is_a_usage_error(
    argv: tuple[str, ...], environ: dict[str, str]
) -> None:
    with pytest.raises(UsageError):
        parse(argv, environ)


def test_require_smp_is_content_with_two_cpus_of_a_simulated_or_virtual_machine_only() -> None:
    check_smp(_request(REQUIRE_SMP="1"), 2)

    with pytest.raises(UsageError, match="SMP=2 or more"):
        check_smp(_request(REQUIRE_SMP="1"), 1)
    with pytest.raises(UsageError, match="ground linux has none"):
        check_smp(_request("--ground", "linux", REQUIRE_SMP="1"), 2)
    check_smp(_request("--ground", "vm", REQUIRE_SMP="1"), 2)
    with pytest.raises(UsageError, match="SMP=2 or more"):
        check_smp(_request("--ground", "vm", REQUIRE_SMP="1"), 1)


def test_a_sweep_and_a_comparison_are_requests_of_their_own() -> None:
    sweep = parse(("--saboteurs", "--ground", "linux"), {})
    comparison = parse(("--compare", "sim,linux"), {})

    assert isinstance(sweep, Sweep)
    assert (sweep.base.ground, sweep.sample) == (Ground.LINUX, False)
    assert parse(("--saboteurs", "sample"), {}) == Sweep(base=_request(), sample=True)
    with pytest.raises(UsageError, match="invalid choice"):
        _ = parse(("--saboteurs", "some"), {})
    assert isinstance(comparison, Comparison)
    assert comparison.grounds == (Ground.SIM, Ground.LINUX)
    three = parse(("--compare", "sim,linux,vm"), {})
    assert isinstance(three, Comparison)
    assert (three.grounds, three.scenario) == (tuple(Ground), "ladder")
    bare = parse(("--compare", "sim,linux", "--scenario", "conformance"), {})
    assert isinstance(bare, Comparison)
    assert bare.scenario == "conformance"


def test_durations_have_units() -> None:
    assert [duration(text) for text in ("1500ms", "190s", "3m")] == [
        1_500_000_000,
        190_000_000_000,
        180_000_000_000,
    ]
