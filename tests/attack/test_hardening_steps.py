"""Each wall by itself, forked and in an interpreter of its own; next to runs without it."""

import errno
import json
import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, EventKind, Grants, PeerGone, Send
from nexus.kernel.core.limits import SystemLimits
from nexus.kernel.linux import landlock
from nexus.kernel.linux.harden import PRIVATE_NAMESPACES, Hardening, Namespaces, preload
from nexus.kernel.linux.sight import bounds
from nexus.testing import rig as rigs
from nexus.testing.conformance.steps import ended_well, start, take
from nexus.testing.rig import Rig, linux_rig
from tests.attack.grounds import EVERYWHERE, EXEC, FORK, in_new_interpreters, with_programs
from tests.attack.hostile import report

pytestmark = pytest.mark.linux

GONE_MAX: Final = 10_000  # milliseconds a service may outlive init, on a busy machine
ALIVE: Final = 1_000  # milliseconds after which one outlives it that was to die at once
SPINNING_MAX: Final = 60_000  # milliseconds until a service spins
ROOMY: Final = 512 << 20  # bytes; above what a test's init has, with any margin
PORT: Final = 18_413
SUPPLEMENTARY: Final = 4  # a group that only an init started with it has


def _no_step(_hardening: Hardening) -> None:
    """A step of the hardening that does nothing."""


def _opened(rig: Rig, grants: Grants) -> dict[str, int]:
    """The errnos of a service's attempts to open paths."""

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "opens_paths", grants=grants)
        await Send(spawned.slot, b"{}")
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        return outcome

    outcome: dict[str, int] = with_programs(rig).run(root)
    return outcome


def without(monkeypatch: pytest.MonkeyPatch, *steps: str) -> None:
    """Take steps away from forked services and from new interpreters."""
    for step in steps:
        monkeypatch.setattr(Hardening, step, lambda *_: None)
    in_new_interpreters(monkeypatch, f"unwalled.without(*{steps})")


@pytest.fixture
def unfiltered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services start without their system call filters; needs a Linux that has Landlock."""
    if landlock.version() == 0:
        pytest.skip("this Linux kernel has no Landlock")
    without(monkeypatch, "_seccomp", "_import_seccomp")


@EVERYWHERE
@pytest.mark.usefixtures("unfiltered")
def test_landlock_alone_refuses_every_path(linux: Rig, grants: Grants) -> None:
    refused = errno.EACCES

    assert _opened(linux, grants) == {"read": refused, "list": refused, "importable": refused}


@pytest.mark.usefixtures("unfiltered")
def test_without_landlock_and_filter_the_paths_open(
    linux: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardening, "_landlock", _no_step)

    found = _opened(linux, FORK)

    assert (found["read"], found["list"]) == (0, 0)


def test_without_landlock_and_filter_an_interpreter_opens_what_its_import_did(
    linux: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if landlock.version() == 0:
        pytest.skip("this Linux kernel has no Landlock")
    without(monkeypatch, "_seccomp", "_import_seccomp", "_landlock")

    refused = errno.EACCES
    assert _opened(linux, EXEC) == {"read": refused, "list": refused, "importable": 0}


# ---- a wall that is needed


@pytest.mark.parametrize("step", ["landlock", "seccomp"])
def test_a_grant_of_tcp_ports_needs_what_bounds_it(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has it, so the grant is not refused before; the interpreter cannot take it."""
    if landlock.version() < landlock.NET_SINCE:
        pytest.skip("network grants need Landlock's TCP rules")
    in_new_interpreters(monkeypatch, f"unwalled.refused({f'_{step}'!r})")
    grants = EXEC._replace(connect=(PORT,))

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "draws", grants=grants)
        with pytest.raises(PeerGone):
            await take(boot.endpoint, link=spawned.link)

    (event,) = with_programs(linux_rig()).observe(root).fields(EventKind.SPAWN_FAILED)

    reason = f"no bound on TCP connections, {step}: not on this machine"
    assert reason in str(event["detail"])


def test_without_a_grant_of_tcp_ports_the_same_is_told_as_degraded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control experiment."""
    in_new_interpreters(monkeypatch, "unwalled.refused('_landlock')")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "draws", grants=EXEC)
        await take(boot.endpoint, link=spawned.link)
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

    events = with_programs(linux_rig()).observe(root).fields(EventKind.SPAWN)
    (event,) = (fields for fields in events if fields["name"] == "draws")

    degraded = event["degraded"]
    assert isinstance(degraded, list)
    assert "landlock" in degraded


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not"])
def test_an_interpreter_is_filtered_before_it_imports_anything(
    taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not taken:
        monkeypatch.setattr(Hardening, "_import_seccomp", lambda _hardening, _stage: None)
    in_new_interpreters(monkeypatch, "unwalled.expect_filter()")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "draws", grants=EXEC)
        with suppress(PeerGone):
            await take(boot.endpoint, link=spawned.link)
            await Send(spawned.slot, b"end")

    events = with_programs(linux_rig()).observe(root).fields(EventKind.SPAWN_FAILED)

    assert [str(event["detail"]).endswith("LookupError: no filter yet") for event in events] == (
        [] if taken else [True]
    )


# ---- what others see of a service


def _namespaces(grants: Grants) -> dict[str, bool]:
    """For each private namespace, whether a service is in another one than init."""

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "draws", grants=grants)
        await take(boot.endpoint, link=spawned.link)
        apart = {
            name: Path(f"/proc/{spawned.pid}/ns/{name}").readlink()
            != Path(f"/proc/self/ns/{name}").readlink()
            for name in PRIVATE_NAMESPACES
        }
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return apart

    apart: dict[str, bool] = with_programs(linux_rig()).run(root)
    return apart


@pytest.fixture
def as_root() -> None:
    """Namespaces are root's to make, where the machine lets root make them."""
    if os.geteuid() != 0:
        pytest.skip("only root gives services namespaces of their own")
    namespaces = Namespaces()
    namespaces.close()
    if namespaces.problem:
        pytest.skip(f"this machine makes no namespaces: {namespaces.problem}")


@EVERYWHERE
@pytest.mark.usefixtures("as_root")
def test_a_service_is_in_other_namespaces_than_init(grants: Grants) -> None:
    assert _namespaces(grants) == {"net": True, "ipc": True, "uts": True}


@EVERYWHERE
@pytest.mark.usefixtures("as_root")
def test_without_the_step_a_service_shares_inits_namespaces(
    grants: Grants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardening, "_namespaces", _no_step)

    assert _namespaces(grants) == {"net": False, "ipc": False, "uts": False}


def _seen(rig: Rig, grants: Grants) -> tuple[dict[str, tuple[str, str]], object]:
    """A running service's limits, and its groups as init's record has them."""

    async def root(boot: BootImage) -> Any:
        if os.geteuid() == 0:
            os.setgroups([SUPPLEMENTARY])  # in the process of this run
        spawned = await start(boot, "draws", grants=grants)
        await take(boot.endpoint, link=spawned.link)
        limits = bounds(spawned.pid)
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return limits

    run = with_programs(rig).observe(root)
    (event,) = (fields for fields in run.fields(EventKind.SPAWN) if fields["name"] == "draws")
    outside = event["outside"]
    assert isinstance(outside, dict)
    return run.result, outside["groups"]


@EVERYWHERE
def test_a_services_limits_are_set_and_it_is_in_no_group(linux: Rig, grants: Grants) -> None:
    limits, groups = _seen(linux, grants)

    assert limits["Max core file size"] == ("0", "0")
    assert limits["Max locked memory"] == ("0", "0")
    for name in ("Max data size", "Max address space"):
        assert int(limits[name][1]) < ROOMY, name  # soft is hard: nothing raises it
        assert limits[name][0] == limits[name][1]
    assert groups == []


@EVERYWHERE
def test_without_the_steps_inits_limits_and_groups_stay(
    grants: Grants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control experiment: there is something to lower and something to leave."""
    if os.geteuid() != 0 or bounds(os.getpid())["Max core file size"][1] == "0":
        pytest.skip("nothing to lower, or no way to join a group")
    for step in ("_limits", "_ids"):
        monkeypatch.setattr(Hardening, step, _no_step)

    limits, groups = _seen(linux_rig(), grants)

    assert limits["Max core file size"][1] != "0"
    assert groups == [str(SUPPLEMENTARY)]


# ---- what a service has for itself


def _drawn(grants: Grants) -> set[bytes]:
    async def root(boot: BootImage) -> Any:
        drawn = set()
        for name in ("one", "other"):
            spawned = await start(boot, name, program="draws", grants=grants)
            drawn.add((await take(boot.endpoint, link=spawned.link)).data)
            await Send(spawned.slot, b"end")
            await ended_well(spawned)
        return drawn

    drawn: set[bytes] = with_programs(linux_rig()).run(root)
    return drawn


@EVERYWHERE
def test_two_services_draw_different_random_numbers(grants: Grants) -> None:
    assert len(_drawn(grants)) == 2


# ---- the end of init


def _outlives(rig: Rig, grants: Grants, name: str = "spins", *, wait: int = GONE_MAX) -> bool:
    """Whether a service that asks Linux for nothing is there so long after the death of init."""

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, name, grants=grants)
        await take(boot.endpoint, link=spawned.link)
        os.write(told, json.dumps([os.getpid(), spawned.pid]).encode())
        signal.pause()

    ready, told = os.pipe()
    init = os.fork()
    if init == 0:
        try:
            if rig.user is not None:
                preload()  # the interpreter's own files may be root's alone
                rigs.drop_to(rig.user)
            with_programs(rig).run_here(root, {}, SystemLimits(), b"")
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert select.select([ready], [], [], SPINNING_MAX / 1000)[0], "no service spins"
        killed, spinning = json.loads(os.read(ready, 100))
        assert killed == init
        service = os.pidfd_open(spinning)
    finally:
        os.close(ready)
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
    try:
        look = select.poll()
        look.register(service, select.POLLIN)
        if look.poll(wait):
            return False
        signal.pidfd_send_signal(service, signal.SIGKILL)
        return True
    finally:
        os.close(service)


@EVERYWHERE
def test_a_spinning_service_dies_with_init(linux: Rig, grants: Grants) -> None:
    assert not _outlives(linux, grants)


def test_an_import_cannot_undo_that_a_service_dies_with_init(linux: Rig) -> None:
    assert not _outlives(linux, EXEC, "unhitched")


def test_without_the_step_a_spinning_service_outlives_init(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Hardening, "_die_with_parent", _no_step)

    assert _outlives(linux_rig(), FORK, wait=ALIVE)
