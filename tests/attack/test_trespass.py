"""Devices and secrets, attacked by services that have none and by a holder that goes beyond its
own: each attempt is refused by the wall meant to refuse it, and without that by the next one."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    BLOCK_SIZE,
    BootImage,
    EventKind,
    Grants,
    HardwareGrant,
    HardwareKind,
    Isolation,
    PeerGone,
    Programs,
    Recorder,
    SecretBackend,
    Send,
)
from nexus.kernel.core import Hardware, SystemLimits
from nexus.kernel.linux import LinuxKernel, landlock, trespass
from nexus.kernel.linux.escapes import DONE, collect
from nexus.kernel.linux.harden import Hardening
from nexus.kernel.linux.secrets import DIRECTORY, NAME, find_key, key_name
from nexus.kernel.linux.trespass import BY, Prey, Trespass
from nexus.testing.conformance.steps import ended_well, start, take
from nexus.testing.rig import Kernel, Rig, linux_rig, program
from tests.attack.grounds import in_new_interpreters

pytestmark = pytest.mark.linux

DISK: Final = Hardware("disk", HardwareKind.BLOCK, size=64 * BLOCK_SIZE)
HOLDER: Final = Grants(hardware=(HardwareGrant("disk", HardwareKind.BLOCK),))
KEEPER: Final = dataclasses.replace(
    program("keeper", trespass.main), entry="nexus.kernel.linux.trespass:main"
)
GRANTS: Final = {
    SecretBackend.NONE: Grants(),
    SecretBackend.FILE: Grants(isolation=Isolation.EXEC, secret=SecretBackend.FILE),
    SecretBackend.KEYRING: Grants(isolation=Isolation.EXEC, secret=SecretBackend.KEYRING),
}
NAMES: Final = {
    SecretBackend.FILE: "file.keeper",
    SecretBackend.KEYRING: "key.keeper",
    SecretBackend.NONE: "stranger",
}


async def holds(boot: BootImage) -> None:
    """Has the disk, as long as the others attack it."""
    _ = await take(boot.endpoint)


def in_session(prey: Prey) -> str:
    """What comes of it when init, in the session it was started in, reads the key."""
    (attempt,) = (each for each in trespass.STRANGER if each.name == "read another's key")
    return trespass.outcome(attempt, prey, 0)


class System:
    """A system that keeps two secrets and has a disk, attacked from inside."""

    def __init__(self, rig: Rig, directory: Path) -> None:
        self.state_dir = directory / "state"
        self.user = rig.user
        self.neighbour = self.state_dir / "neighbour"
        self.neighbour.touch(mode=0o600)
        if rig.user is not None:
            os.chown(self.neighbour, rig.user, rig.user)
        harden = "soft" not in rig.name

        def make(programs: Programs, *, recorder: Recorder, limits: SystemLimits) -> Kernel:
            return LinuxKernel(
                {**programs, KEEPER.name: KEEPER},
                recorder=recorder,
                limits=limits,
                harden=harden,
                state_dir=self.state_dir,
                hardware=(DISK,),
            )

        self.rig = dataclasses.replace(rig, make_kernel=make)

    def attacked(self) -> dict[SecretBackend, dict[str, Any]]:
        """What came of it, by who attacked; the stranger is last, when there is all to find."""
        key = key_name(self.state_dir, NAMES[SecretBackend.KEYRING])

        async def root(boot: BootImage) -> dict[int, Any]:
            holder = await start(boot, "holds", grants=HOLDER)
            found = {}
            for backend, name in NAMES.items():
                prey = Prey(
                    image=str(self.state_dir / "disk.img"),
                    secret=str(self.state_dir / DIRECTORY / NAMES[SecretBackend.FILE] / NAME),
                    neighbour=f"../../{self.neighbour.name}",
                    key=find_key(key),
                )
                spawned = await start(
                    boot,
                    name,
                    program="keeper",
                    grants=GRANTS[backend],
                    argument=json.dumps(prey).encode(),
                )
                report = await collect(boot.endpoint, spawned.link, spawned.service)
                found[int(backend)] = {**report, "session": in_session(prey)}
                await ended_well(spawned)
            await Send(holder.slot, b"end")
            await ended_well(holder)
            return found

        found: dict[int, dict[str, Any]] = self.rig.run(root, programs={"holds": holds})
        return {SecretBackend(number): report for number, report in found.items()}


@pytest.fixture
def system(linux: Rig) -> Iterator[System]:
    """On every Linux rig."""
    yield from _made(linux)


@pytest.fixture
def mine() -> Iterator[System]:
    """As whoever runs the tests."""
    yield from _made(linux_rig())


def _made(rig: Rig) -> Iterator[System]:
    if not Path("/proc/key-users").exists():
        pytest.skip("this Linux kernel has no keyrings")
    if landlock.version() == 0:
        pytest.skip("this Linux kernel has no Landlock")
    with rig.place() as place:
        yield System(rig, place.directory)


def named(field: str) -> dict[SecretBackend, dict[str, str]]:
    return {
        backend: {each.name: getattr(each, field) for each in attempts}
        for backend, attempts in BY.items()
    }


def outcomes(found: dict[SecretBackend, dict[str, Any]]) -> dict[SecretBackend, dict[str, str]]:
    return {backend: report["outcomes"] for backend, report in found.items()}


def as_root(system: System) -> bool:
    return system.user is None and os.getuid() == 0


def test_every_attempt_is_refused_by_the_wall_meant_to(system: System) -> None:
    found = system.attacked()

    assert outcomes(found) == named("refusal")
    assert [found[each]["kept"] for each in NAMES] == [DONE, DONE, ""]


def test_without_the_filter_the_next_wall_refuses(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardening, "_seccomp", lambda _hardening: None)
    monkeypatch.setattr(Hardening, "_import_seccomp", lambda _hardening, _stage: None)
    in_new_interpreters(monkeypatch, "unwalled.without('_seccomp', '_import_seccomp')")

    expected = named("beyond")
    if not as_root(system):
        # The same id owns the key: only the filter keeps it from taking that for itself.
        expected[SecretBackend.NONE]["possess another's key"] = DONE
        expected[SecretBackend.KEYRING]["link the key"] = DONE
    found = outcomes(system.attacked())
    for backend, attempts in expected.items():
        assert found[backend] == attempts


def test_a_service_in_inits_session_would_possess_the_keys_of_its_user(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control experiment for the session keyring of its own, behind the filter."""
    if as_root(system):
        pytest.skip("root's services have ids of their own, and so other keyrings to begin with")
    for step in ("_seccomp", "_keyrings"):
        monkeypatch.setattr(Hardening, step, lambda *_: None)

    found = system.attacked()[SecretBackend.NONE]

    if found["session"] != DONE:
        pytest.skip("the session of these tests does not possess the keys of this user")
    assert found["outcomes"]["read another's key"] == DONE


WITHOUT_LANDLOCK: Final = {
    "an absolute path": DONE,
    "a path that climbs": DONE,
    "rename to outside": DONE,
    "rename from outside": DONE,
    "remove what is outside": DONE,
}


def test_without_landlock_the_filter_alone_does_not_bound_a_path(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a secret in a file needs Landlock: a filter sees the directory and not the path. As
    root the directory above is closed to the service's id, and only an absolute path leaves."""
    for step in ("_landlock", "_import_landlock"):
        monkeypatch.setattr(Hardening, step, lambda *_: None)
    in_new_interpreters(monkeypatch, "unwalled.without('_landlock')")

    found = outcomes(system.attacked())[SecretBackend.FILE]

    free = WITHOUT_LANDLOCK if not as_root(system) else {"an absolute path": DONE}
    assert {name: found[name] for name in free} == free
    assert found["a symbolic link"] == found["another directory"] == "EPERM"
    if as_root(system):
        assert found["a path that climbs"] == found["rename to outside"] == "EACCES"


def test_without_any_wall_the_attempts_succeed() -> None:
    """The control experiment: each attempt is one on something that is there."""
    if os.getuid():
        pytest.skip("an ordinary user is refused some of them anyway")
    for system in _made(linux_rig(harden=False)):
        found = outcomes(system.attacked())
        expected = {
            SecretBackend.NONE: {
                "read another's key": "EACCES",  # its owner must possess it first, which is next
            },
            SecretBackend.FILE: {
                "another directory": "ENOTDIR",
                "rename by another directory": "ENOENT",
            },
            SecretBackend.KEYRING: {"another key": "ENOKEY", "search for keys": "ENOKEY"},
        }
        for backend, attempts in found.items():
            others = {name: outcome for name, outcome in attempts.items() if outcome != DONE}
            assert set(others) <= set(expected[backend]) | {"give the key away"}, backend


@pytest.mark.parametrize("step", ["landlock", "seccomp"])
def test_a_secret_in_a_file_needs_what_bounds_its_directory(
    step: str, mine: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_new_interpreters(monkeypatch, f"unwalled.refused({f'_{step}'!r})")

    async def root(boot: BootImage) -> None:
        spawned = await start(
            boot, "file.keeper", program="keeper", grants=GRANTS[SecretBackend.FILE]
        )
        with pytest.raises(PeerGone):
            await take(boot.endpoint, link=spawned.link)

    (event,) = mine.rig.observe(root).fields(EventKind.SPAWN_FAILED)

    assert f"no bound on the secret's directory, {step}: not on this machine" in str(
        event["detail"]
    )


def test_each_attempt_has_a_name_of_its_own() -> None:
    for attempts in BY.values():
        assert all(isinstance(each, Trespass) for each in attempts)
        assert len({each.name for each in attempts}) == len(attempts)
