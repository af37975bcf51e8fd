"""The Linux kernel as whoever runs the tests, and as an ordinary user too if that is root."""

import os
import platform

import pytest

from nexus.testing import rig as rigs
from nexus.testing.rig import linux_rigs
from tests.attack import interpreter


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand the fixture `linux` each Linux rig."""
    if "linux" in metafunc.fixturenames:
        metafunc.parametrize("linux", linux_rigs(), ids=lambda rig: rig.name)


@pytest.fixture(autouse=True)
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an ordinary user's init execute the interpreter of the tests."""
    if os.getuid() or interpreter.closed_above() is None:
        return
    former = rigs.drop_to

    def drop_to(user: int) -> None:
        interpreter.open_to_everybody()
        former(user)

    monkeypatch.setattr(rigs, "drop_to", drop_to)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The attempts name system calls by number, which other machines number otherwise."""
    if platform.machine() != "x86_64":
        for item in items:
            if item.path.parent.name == "attack":
                item.add_marker(pytest.mark.skip(reason="system call numbers are x86_64's"))
