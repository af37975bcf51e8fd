"""Each wall by itself: Landlock without the filter, and namespaces; next to runs without them."""

import errno
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, Send
from nexus.kernel.linux import landlock
from nexus.kernel.linux.harden import PRIVATE_NAMESPACES, Hardening, Namespaces
from nexus.testing.conformance.steps import ended_well, start, take
from nexus.testing.rig import Rig, linux_rig
from tests.attack.hostile import errno_of, report, reporting_back

pytestmark = pytest.mark.linux

READABLE: Final = "/etc/passwd"  # by everybody, so that only a wall refuses it


def _no_step(_hardening: Hardening) -> None:
    """A step of the hardening that does nothing."""


def _paths(_boot: BootImage, _told: Mapping[str, Any]) -> dict[str, int]:
    return {
        "read": errno_of(partial(os.open, READABLE, os.O_RDONLY)),
        "list": errno_of(partial(os.listdir, "/")),
    }


def _opened(rig: Rig) -> dict[str, int]:
    """The errnos of a service's attempts to open paths."""

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"{}")
        outcome = await report(boot, spawned.link)
        await ended_well(spawned)
        return outcome

    outcome: dict[str, int] = rig.run(root, programs={"hostile": reporting_back(_paths)})
    return outcome


@pytest.fixture
def unfiltered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services start without their system call filter; needs a Linux that has Landlock."""
    if landlock.version() == 0:
        pytest.skip("this Linux kernel has no Landlock")
    monkeypatch.setattr(Hardening, "_seccomp", _no_step)


@pytest.mark.usefixtures("unfiltered")
def test_landlock_alone_refuses_every_path(linux: Rig) -> None:
    refused = errno.EACCES

    assert _opened(linux) == {"read": refused, "list": refused}


@pytest.mark.usefixtures("unfiltered")
def test_without_landlock_and_filter_the_paths_open(
    linux: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardening, "_landlock", _no_step)

    assert _opened(linux) == {"read": 0, "list": 0}


def _namespaces() -> dict[str, bool]:
    """For each private namespace, whether a service is in another one than init."""

    async def waiting(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "waiting")
        apart = {
            name: Path(f"/proc/{spawned.pid}/ns/{name}").readlink()
            != Path(f"/proc/self/ns/{name}").readlink()
            for name in PRIVATE_NAMESPACES
        }
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return apart

    apart: dict[str, bool] = linux_rig().run(root, programs={"waiting": waiting})
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


@pytest.mark.usefixtures("as_root")
def test_a_service_is_in_other_namespaces_than_init() -> None:
    assert _namespaces() == {"net": True, "ipc": True, "uts": True}


@pytest.mark.usefixtures("as_root")
def test_without_the_step_a_service_shares_inits_namespaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Hardening, "_namespaces", _no_step)

    assert _namespaces() == {"net": False, "ipc": False, "uts": False}
