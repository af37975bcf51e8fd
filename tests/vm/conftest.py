"""Where a machine is required, a test that finds none is red and not skipped."""

import os
from collections.abc import Generator
from typing import Final

import pytest

REQUIRED: Final = "NEXUS_VM_REQUIRED"  # in the environment: 1 where a machine has to be had


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of every test in this folder, whichever fixture it was that skipped."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(REQUIRED) == "1":
        report.outcome = "failed"
        report.longrepr = f"{report.longreprtext}\n{REQUIRED}=1: a machine has to be had here"
    return report
