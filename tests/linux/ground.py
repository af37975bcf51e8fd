"""The Linux kernel in a process of its own, as whoever runs the test and as an ordinary user."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nexus.abi import Nanos, Programs, Recorder
from nexus.kernel.core import SystemLimits
from nexus.kernel.linux import LinuxKernel
from nexus.testing.outside import Place
from nexus.testing.rig import USER_NOBODY, Main, Rig, Run

LATENESS_MAX = Nanos(20_000_000)  # not what these tests measure

USERS = (None,) if os.getuid() else (None, USER_NOBODY)


class Ground:
    """A user to run kernels as, and a directory of that user's."""

    def __init__(self, user: int | None) -> None:
        self.user = user
        self.uid = os.getuid() if user is None else user
        self.kernels: list[LinuxKernel] = []  # made in the process of the run, by it alone
        # Not tmp_path: an ordinary user cannot enter it, and a socket's path is short.
        self.directory = Path(tempfile.mkdtemp(prefix="nx"))
        if user is not None:
            os.chown(self.directory, user, user)

    @property
    def kernel(self) -> LinuxKernel:
        """The kernel of the run that the caller is part of."""
        return self.kernels[-1]

    def observe(self, root: Main, mains: Mapping[str, Main] | None = None, **options: Any) -> Run:
        """Run a root task to its end; a failed assertion in any task fails the test."""

        def make(
            programs: Programs,
            *,
            recorder: Recorder,
            limits: SystemLimits,
            place: Place | None = None,
        ) -> LinuxKernel:
            assert place is None, "the options say where"
            kernel = LinuxKernel(programs, recorder=recorder, limits=limits, **options)
            self.kernels.append(kernel)
            return kernel

        rig = Rig(
            name="linux" if self.user is None else "linux-user",
            make_kernel=make,
            lateness_max=LATENESS_MAX,
            forked=True,
            user=self.user,
        )
        return rig.observe(root, programs=mains)

    def run(self, root: Main, mains: Mapping[str, Main] | None = None, **options: Any) -> Any:
        """The same, for what the root task returned."""
        return self.observe(root, mains, **options).result


@pytest.fixture(params=USERS, ids=lambda user: "me" if user is None else "user")
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    """Every user this test can run kernels as."""
    yield from _made(request.param)


@pytest.fixture
def mine() -> Iterator[Ground]:
    """Whoever runs the test."""
    yield from _made(None)


def _made(user: int | None) -> Iterator[Ground]:
    made = Ground(user)
    yield made
    shutil.rmtree(made.directory)
