"""Tests that ask nothing of the machine run beside those that do: `pytest -n 2`, as `make test`.

Tests of real processes wait more than they compute, and some measure time. They are one scope, so
one worker has all of them, one after the other. All others take what is left of the processors: a
test from here on runs only when no process wants to that is not one of them.
"""

import os
from pathlib import PurePosixPath
from typing import Final

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

ON_THE_MACHINE: Final = frozenset(
    f"tests/{name}" for name in ("attack", "conformance", "examples", "guide", "linux", "stateful")
)
ONE_BY_ONE: Final = "test_prove_saboteurs.py"  # the longest of the others, and last


def scope_of(nodeid: str) -> str:
    """Tests with the same scope run on one worker, in their order."""
    path = PurePosixPath(nodeid.partition("::")[0])
    if str(path.parent) in ON_THE_MACHINE:
        return "machine"
    return nodeid if is_last(nodeid) else str(path)


def is_last(nodeid: str) -> bool:
    """Whether the test is one of many small scopes that fill what time is left at the end."""
    return PurePosixPath(nodeid.partition("::")[0]).name == ONE_BY_ONE


class Beside(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """The machine's tests to the first worker, file by file the rest to whoever is free."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def make_way(item: pytest.Item) -> None:
    """In a worker: from the first test on that is not the machine's, run behind all that is."""
    if "PYTEST_XDIST_WORKER" in os.environ and scope_of(item.nodeid) != "machine":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
