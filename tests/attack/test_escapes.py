"""Every way out of a service, tried by one: each is refused by the wall meant to refuse it.

As root-started and as user-started, forked and in an interpreter of its own; then without the
filter, where the next wall stands; then without any, where they succeed.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    BootImage,
    DeviceGrant,
    EventKind,
    Grants,
    Isolation,
    ListenGrant,
    Pid,
    Send,
)
from nexus.kernel.linux import landlock
from nexus.kernel.linux.escapes import ATTEMPTS, DONE, Wall, collect
from nexus.kernel.linux.escapes import main as hostile
from nexus.kernel.linux.harden import UID_FIRST, Hardening
from nexus.proof.escapes import escape
from nexus.testing.conformance.steps import ended_well, start
from nexus.testing.rig import Rig, linux_rig, program
from tests.attack.grounds import EVERYWHERE, EXEC, FORK, in_new_interpreters, with_programs

pytestmark = pytest.mark.linux

HOSTILE: Final = dataclasses.replace(
    program("hostile", hostile), entry="nexus.kernel.linux.escapes:main"
)
IMPORTING: Final = dataclasses.replace(
    program("importing", hostile), entry="nexus.kernel.linux.escapes:importing -"
)


def tried(rig: Rig, grants: Grants, name: str = "hostile") -> dict[str, Any]:
    """The report of a hostile service with a sibling of its kind."""

    async def root(boot: BootImage) -> dict[str, Any]:
        prey = await start(boot, "prey", program="hostile", grants=FORK)
        victim = str(prey.pid).encode()
        spawned = await start(boot, "attacker", program=name, grants=grants, argument=victim)
        report = await collect(boot.endpoint, spawned.link, spawned.service)
        await ended_well(spawned)
        await Send(prey.slot, b"end")
        await ended_well(prey)
        return report

    report: dict[str, Any] = with_programs(rig, HOSTILE, IMPORTING).run(root)
    return report


def named(field: str) -> dict[str, str]:
    return {attempt.name: getattr(attempt, field) for attempt in ATTEMPTS}


@EVERYWHERE
def test_every_way_out_is_refused_by_the_wall_meant_to(linux: Rig, grants: Grants) -> None:
    report = tried(linux, grants)

    assert report["outcomes"] == named("refusal")
    assert report["environment"] == []


@EVERYWHERE
def test_without_the_filter_the_next_wall_refuses(
    linux: Rig, grants: Grants, monkeypatch: pytest.MonkeyPatch
) -> None:
    if landlock.version() < landlock.SCOPE_SINCE:
        pytest.skip("the next wall is not whole on this machine")
    monkeypatch.setattr(Hardening, "_seccomp", lambda _hardening: None)
    monkeypatch.setattr(Hardening, "_import_seccomp", lambda _hardening, _stage: None)
    in_new_interpreters(monkeypatch, "unwalled.without('_seccomp', '_import_seccomp')")

    expected = named("beyond")
    if linux.user is not None or os.getuid():
        expected["a sibling's limits"] = DONE  # of the same user: only the filter refuses it
    assert tried(linux, grants)["outcomes"] == expected


@EVERYWHERE
def test_without_any_wall_the_attempts_succeed(grants: Grants) -> None:
    if os.getuid():
        pytest.skip("an ordinary user is refused some of them anyway")
    report = tried(linux_rig(harden=False), grants)

    sealed = {one.name for one in ATTEMPTS if one.wall is Wall.SEALS}  # no step, and always there
    outcomes = report["outcomes"]
    assert outcomes.pop("reconnect a pair") == "ENOENT", "the address has been looked for"
    assert {name for name, outcome in outcomes.items() if outcome != DONE} == sealed
    assert bool(report["environment"]) is (grants == FORK), "an exec begins with an empty one"


def test_what_is_imported_is_confined_already(linux: Rig) -> None:
    outcomes = tried(linux, EXEC, "importing")["outcomes"]

    allowed = {
        # The import path may be read, and a library's code mapped; Landlock refuses other paths.
        "open a path": "EACCES",
        "list a directory": "EACCES",
        "open a sibling's memory": "EACCES",
        "a sibling's environment": "EACCES",
        "executable memory": DONE,
        "lift a limit": DONE,  # to what it is: raising it is refused by Linux
    }
    expected = {
        one.name: allowed.get(one.name, one.refusal)
        for one in ATTEMPTS
        if one.wall is not Wall.SEALS
    }
    assert outcomes == expected


EVERYTHING: Final = Grants(
    isolation=Isolation.EXEC,
    threads=2,
    streams=True,
    devices=(DeviceGrant("zero", "/dev/zero", writable=False),),
    listen=(ListenGrant("web", "127.0.0.1", 18_411),),
    connect=(18_412,),
)


def test_grants_open_what_they_name_and_nothing_else(linux: Rig) -> None:
    """All of them at once: what is not granted is refused as before."""
    if landlock.version() < landlock.NET_SINCE:
        pytest.skip("network grants need Landlock's TCP rules")
    outcomes = tried(linux, EVERYTHING)["outcomes"]

    granted = {"thread": DONE, "stream pair": DONE, "TCP connection": "EACCES"}
    assert outcomes == named("refusal") | granted | {"reconnect a pair": "ENOENT"}


@EVERYWHERE
def test_init_sees_the_confinement_from_outside(linux: Rig, grants: Grants) -> None:
    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "seen", program="hostile", grants=grants)
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

    events = with_programs(linux, HOSTILE).observe(root).fields(EventKind.SPAWN)
    (event,) = (fields for fields in events if fields["name"] == "seen")
    outside = event["outside"]

    assert isinstance(outside, dict)
    confined = ("no_new_privs", "seccomp", "cap_eff", "cap_prm", "dumpable")
    assert [outside[name] for name in confined] == [1, 2, 0, 0, False]
    if linux.user is None and os.getuid() == 0:
        assert outside["descriptors"] == outside["granted"]
        assert outside["uid"] >= UID_FIRST
    else:
        assert outside["descriptors"] is None, "an ordinary user may not list them"


def test_init_sees_that_a_process_is_not_confined() -> None:
    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

    run = with_programs(linux_rig(harden=False), HOSTILE).observe(root)
    outside = run.fields(EventKind.SPAWN)[1]["outside"]

    assert isinstance(outside, dict)
    own_filters = int("Seccomp:\t0" not in Path("/proc/self/status").read_text())
    assert bool(outside["seccomp"]) is bool(own_filters)
    assert outside["uid"] == os.getuid()


def test_the_proof_counts_no_open_door(linux: Rig) -> None:
    async def attacked(boot: BootImage) -> None:
        result = await escape(Pid(os.getppid()))
        assert len(result.lines) == len([*ATTEMPTS, "environment"])
        assert result.open_doors == 0, result.lines

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "attacked"))

    linux.run(root, programs={"attacked": attacked})
