"""Tests that ask nothing of the machine run beside those that do: `pytest --beside`.

Tests of real processes wait more than they compute, and some measure time. They stay in this
process, which has one thread, as our Linux kernel demands of who forks. A second pytest runs all
others meanwhile, and only when no process wants to that is not one of them; what it reports is
reported here when it is their turn, as if they had run here.

It stays in this session: Linux weighs sessions against each other first (autogroups), and what is
idle in one would hold up what wakes in another until the next tick.
"""

import os
import pickle
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pytest

from nexus.proof.runner import die_with_parent

ON_THE_MACHINE: Final = frozenset(
    f"tests/{name}" for name in ("attack", "conformance", "examples", "guide", "linux", "stateful")
)
OPTION: Final = "--beside"
REPORTS: Final = "NEXUS_TESTS_REPORTS"  # in the environment of the second pytest: where it reports
LOOK_PAUSE: Final = 0.02  # seconds between two looks for a report; each test has a limit of its own
END_WAIT: Final = 120.0  # seconds from its last report to its end; the sweep of saboteurs is closed
TERM_WAIT: Final = 10.0  # seconds to end when it is told to; then it is killed
OUTPUT_SHOWN: Final = 4_000  # characters of what a second pytest said that ended too early
SIZE: Final = struct.Struct("<I")  # bytes of a report


def is_of_the_machine(item: pytest.Item) -> bool:
    """Whether it runs where real processes and real time are."""
    return str(PurePosixPath(item.nodeid.partition("::")[0]).parent) in ON_THE_MACHINE


def runs_here(item: pytest.Item) -> bool:
    """Whether this process runs it, if there are two."""
    config = item.config
    second = config.pluginmanager.has_plugin("reporter")
    return second or is_of_the_machine(item) or not config.getoption(OPTION)


class Reporter:
    """In the second pytest: writes every report to a file, which is open only then: some tests
    write to whatever descriptor they find."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One of the three of a test."""
        to_plain = self._config.hook.pytest_report_to_serializable
        self._write(to_plain(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """There are no more of this test."""
        self._write(nodeid)

    def _write(self, what: object) -> None:
        data = pickle.dumps(what)
        with self._path.open("ab") as file:
            _ = file.write(SIZE.pack(len(data)) + data)


class Beside:
    """In the first pytest: has the second one run, and reports what that reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._reports = tempfile.NamedTemporaryFile(prefix="reports")  # noqa: SIM115
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._read = bytearray()
        self._pidfd = -1
        self._failed = 0  # whether a test did

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Begin, and see that it ends as it should; the loop itself is pytest's."""
        self._begin(session)
        result = yield
        self._see_its_end()
        return result

    def _begin(self, session: pytest.Session) -> None:
        if all(runs_here(item) for item in session.items) or self._config.option.collectonly:
            return
        arguments = [each for each in self._config.invocation_params.args if each != OPTION]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *map(str, arguments)],
            cwd=self._config.invocation_params.dir,
            env={**os.environ, REPORTS: self._reports.name},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self._pidfd = os.pidfd_open(self._process.pid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """The reports of a test that runs elsewhere."""
        if runs_here(item):
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        while (found := self._next()) != item.nodeid:
            assert isinstance(found, dict), f"{found} out of turn, before {item.nodeid}"
            from_plain = self._config.hook.pytest_report_from_serializable
            report = from_plain(config=self._config, data=found)
            assert report.nodeid == item.nodeid, f"{report.nodeid} out of turn"
            self._failed |= report.failed
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        """Leave nothing running when the first one has enough."""
        if self._process is not None:
            self._process.terminate()
            try:
                _ = self._process.wait(TERM_WAIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                _ = self._process.wait()
            os.close(self._pidfd)
        self._reports.close()
        self._output.close()

    def _see_its_end(self) -> None:
        """Its last test is reported: what goes wrong from here on would be seen by nobody else."""
        if self._process is None:
            return
        try:
            code = self._process.wait(END_WAIT)
        except subprocess.TimeoutExpired:
            pytest.exit(f"the second pytest does not end: {self._said()}", returncode=1)
        if code != self._failed:  # 1 if a test failed, as was reported; or by an exception of any
            pytest.exit(f"the second pytest ended with {code}: {self._said()}", returncode=1)

    def _said(self) -> str:
        _ = self._output.seek(0)
        return self._output.read().decode(errors="replace")[-OUTPUT_SHOWN:]

    def _next(self) -> Any:
        """The next report, or the name of the test that has no more of them."""
        data = self._taken(SIZE.unpack(self._taken(SIZE.size))[0])
        return pickle.loads(data)

    def _taken(self, size: int) -> bytes:
        assert self._process is not None
        while len(self._read) < size:
            ended = self._process.poll() is not None
            more = os.read(self._reports.fileno(), 1 << 20)
            self._read += more
            if not more and ended:
                pytest.exit(f"the second pytest has ended too early: {self._said()}", returncode=1)
            if not more:
                _ = select.select((self._pidfd,), (), (), LOOK_PAUSE)
        data = bytes(self._read[:size])
        del self._read[:size]
        return data


def configure(config: pytest.Config) -> None:
    """Take part in a session of two processes, as whichever this is."""
    path = os.environ.pop(REPORTS, None)
    if path is not None:
        die_with_parent(os.getppid())
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        _ = config.pluginmanager.register(Reporter(config, Path(path)), "reporter")
    elif config.getoption(OPTION):
        _ = config.pluginmanager.register(Beside(config), "beside")


def sort(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The machine's tests first: they run while the others do. The second pytest has no others."""
    if config.pluginmanager.has_plugin("reporter"):
        items[:] = [item for item in items if not is_of_the_machine(item)]
    items.sort(key=is_of_the_machine, reverse=True)
