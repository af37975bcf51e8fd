"""The programs of `executed` on a Linux rig, and what lets a test take a wall of a new interpreter
away.

A step that a test replaces in init is replaced in a fork of it only: what a new interpreter does
by itself is replaced there, before it does it.
"""

import dataclasses
from typing import Any, Final

import pytest

from nexus.abi import Grants, Isolation, Program, Programs, Recorder
from nexus.kernel.core.limits import SystemLimits
from nexus.kernel.linux import stage2
from nexus.testing.rig import Kernel, Rig, program
from tests.attack import executed

FORK: Final = Grants()
EXEC: Final = Grants(isolation=Isolation.EXEC)
EVERYWHERE: Final = pytest.mark.parametrize("grants", [FORK, EXEC], ids=["fork", "exec"])


def entry(name: str, main: Any, words: str = "") -> Program:
    """A program of `executed`, forked or executed as its grants say."""
    return dataclasses.replace(program(name, main), entry=f"{executed.__name__}:{name}{words}")


PROGRAMS: Final = (
    entry("opens_paths", executed.opens_paths),
    entry("hoards", executed.hoards),
    entry("spins", executed.spins),
    entry("draws", executed.draws),
    entry("unhitched", executed.spins, " -"),
)


def with_programs(rig: Rig, *added: Program) -> Rig:
    """The rig with programs that name an entry, beside those of a test."""

    def make(programs: Programs, *, recorder: Recorder, limits: SystemLimits) -> Kernel:
        table = {**programs, **{one.name: one for one in (*PROGRAMS, *added)}}
        return rig.make_kernel(table, recorder=recorder, limits=limits)

    return dataclasses.replace(rig, make_kernel=make)


def in_new_interpreters(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Have every new interpreter run a line that knows `unwalled`, before its steps."""
    begin = "    from nexus.kernel.linux.stage2 import main\n"
    assert stage2.BOOTSTRAP.count(begin) == 1, "the bootstrap has changed"
    added = f"    from tests.attack import unwalled\n    {line}\n"
    monkeypatch.setattr(stage2, "BOOTSTRAP", stage2.BOOTSTRAP.replace(begin, added + begin))
