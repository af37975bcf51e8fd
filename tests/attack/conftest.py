"""The Linux kernel as whoever runs the tests, and as an ordinary user too if that is root."""

import platform

import pytest

from nexus.testing.rig import linux_rigs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand the fixture `linux` each Linux rig."""
    if "linux" in metafunc.fixturenames:
        metafunc.parametrize("linux", linux_rigs(), ids=lambda rig: rig.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The attempts name system calls by number, which other machines number otherwise."""
    if platform.machine() != "x86_64":
        for item in items:
            if item.path.parent.name == "attack":
                item.add_marker(pytest.mark.skip(reason="system call numbers are x86_64's"))
