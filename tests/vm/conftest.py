"""The images; where a machine is required, a test that finds none is red and not skipped."""

import os
from collections.abc import Generator
from typing import Final

import pytest

from nexus.vm import qemu
from nexus.vm.disks import check_tools
from nexus.vm.image import Image, build
from nexus.vm.machines import DEFAULT
from nexus.vm.packages import NotHad, cache_folder
from tests.linux.slotted import Set
from tests.vm import board

REQUIRED: Final = "NEXUS_VM_REQUIRED"  # in the environment: 1 where a machine has to be had


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of every test in this folder, whichever fixture it was that skipped."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(REQUIRED) == "1":
        report.outcome = "failed"
        report.longrepr = f"{report.longreprtext}\n{REQUIRED}=1: a machine has to be had here"
    return report


@pytest.fixture(scope="session")
def built_image() -> Image:
    """The image, to be looked at."""
    try:
        return build(DEFAULT, cache_folder())
    except NotHad as missing:
        pytest.skip(f"not run: {missing}")


@pytest.fixture(scope="session")
def image(built_image: Image) -> Image:
    """The same, with all that a boot and a look at its disks need."""
    try:
        _ = qemu.check(DEFAULT)
        check_tools()
    except NotHad as missing:
        pytest.skip(f"not run: {missing}")
    return built_image


@pytest.fixture(scope="session")
def board_image() -> Image:
    """The same, with all that a board with a boot loader needs."""
    try:
        return board.built()
    except NotHad as missing:
        pytest.skip(f"not run: {missing}")


@pytest.fixture(scope="session")
def first() -> Set:
    """The set that a board is provisioned with."""
    return board.first_set()
