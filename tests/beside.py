"""Tests that measure no time run beside those that do: `pytest --beside`.

Tests of real processes wait more than they compute. Those that measure time stay in this process,
which has one thread, as our Linux kernel demands of who forks. More pytests run meanwhile: one has
the patient tests, which start whole systems and only ask how they end, and gives way when a process
wakes up that is measured (the longest of these are run here once nothing is); two have all tests
that ask nothing of the machine, and run when no process wants to that is not one of them. What they
report is reported here when it is their turn, as if they had run here.

They stay in this session: Linux weighs sessions against each other first (autogroups), and what is
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
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pytest

from nexus.proof.runner import die_with_parent


class Part(Enum):
    """Which pytest runs a test, and how Linux schedules it; they are reported in this order."""

    MEASURED = ("measured", os.SCHED_OTHER)  # this one
    PATIENT = ("patient", os.SCHED_BATCH)  # whoever wakes up goes before
    SIMULATED = ("simulated", os.SCHED_IDLE)
    PURE = ("pure", os.SCHED_IDLE)

    def __init__(self, label: str, policy: int) -> None:
        self.label = label
        self.policy = policy


ON_THE_MACHINE: Final = frozenset(
    f"tests/{name}" for name in ("attack", "conformance", "examples", "guide", "linux", "stateful")
)
PATIENT: Final = frozenset(
    (
        "tests/examples",
        "tests/guide",
        "tests/linux/test_bad_sets_on_linux.py",
        "tests/linux/test_cli_system.py",
        "tests/linux/test_export_on_linux.py",
        "tests/linux/test_slot_kills.py",
        "tests/linux/test_slots_on_linux.py",
        "tests/linux/test_updated_on_linux.py",
        "tests/linux/test_why.py",
        "tests/stateful",
        "tests/vm",
        "tests/unit/test_beside.py",  # only root is not idle for ever
    )
)
"""Whole systems from the outside: each wait of these has a limit that is no claim."""

ROOT: Final = Path(__file__).parents[1]
LADDERS: Final = "tests/vm/test_prove_in_a_machine.py"
"""The longest file, and as patient: it is run here after all that is measured, when this process
would have nothing to do but to report."""

OPTION: Final = "--beside"
REPORTS: Final = "NEXUS_TESTS_REPORTS"  # in the environment of another pytest: where it reports
PART: Final = "NEXUS_TESTS_PART"  # and which tests are its own
LOOK_PAUSE: Final = 0.02  # seconds between two looks for a report; each test has a limit of its own
END_WAIT: Final = 120.0  # seconds from its last report to its end; the sweep of saboteurs is closed
TERM_WAIT: Final = 10.0  # seconds to end when it is told to; then it is killed
KILL_WAIT: Final = 60.0  # seconds; only what the kernel itself holds up takes longer
OUTPUT_SHOWN: Final = 4_000  # characters of what a pytest said that ended too early
SIZE: Final = struct.Struct("<I")  # bytes of a report


def part_of(item: pytest.Item) -> Part:
    """Which pytest runs it, if there are several."""
    file = PurePosixPath(item.nodeid.partition("::")[0])
    if str(file) == LADDERS:
        return Part.MEASURED
    if not PATIENT.isdisjoint((str(file), str(file.parent))):
        return Part.PATIENT
    if str(file.parent) in ON_THE_MACHINE:
        return Part.MEASURED
    return Part.SIMULATED if file.parent.name == "sim" else Part.PURE


def runs_here(item: pytest.Item) -> bool:
    """Whether this process runs it."""
    reporter = item.config.pluginmanager.get_plugin("reporter")
    if isinstance(reporter, Reporter):
        return part_of(item) is reporter.part
    return part_of(item) is Part.MEASURED or not item.config.getoption(OPTION)


class Reporter:
    """In another pytest: writes every report to a file, which is open only then: some tests write
    to whatever descriptor they find."""

    def __init__(self, config: pytest.Config, path: Path, part: Part) -> None:
        self.part = part
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


class Other:
    """Another pytest, as the first one sees it."""

    def __init__(self, config: pytest.Config, part: Part) -> None:
        self._part = part
        self._reports = tempfile.NamedTemporaryFile(prefix="reports")  # noqa: SIM115
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._read = bytearray()
        arguments = [each for each in config.invocation_params.args if each != OPTION]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *map(str, arguments)],
            cwd=config.invocation_params.dir,
            env={**os.environ, REPORTS: self._reports.name, PART: part.name},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        self.failed = 0  # whether a test did

    def next(self) -> Any:
        """Its next report, or the name of the test that has no more of them."""
        data = self._taken(SIZE.unpack(self._taken(SIZE.size))[0])
        return pickle.loads(data)

    def see_its_end(self) -> None:
        """Its last test is reported: what goes wrong from here on would be seen by nobody else."""
        try:
            code = self._process.wait(END_WAIT)
        except subprocess.TimeoutExpired:
            pytest.exit(f"{self} does not end: {self._said()}", returncode=1)
        if code != self.failed:  # 1 if a test failed, as was reported; or by an exception of any
            pytest.exit(f"{self} ended with {code}: {self._said()}", returncode=1)

    def close(self) -> None:
        """Leave nothing running when the first one has enough."""
        self._process.terminate()
        try:
            _ = self._process.wait(TERM_WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _ = self._process.wait(KILL_WAIT)
        os.close(self._pidfd)
        self._reports.close()
        self._output.close()

    def __str__(self) -> str:
        return f"the pytest of {self._part.label} tests"

    def _said(self) -> str:
        _ = self._output.seek(0)
        return self._output.read().decode(errors="replace")[-OUTPUT_SHOWN:]

    def _taken(self, size: int) -> bytes:
        while len(self._read) < size:
            ended = self._process.poll() is not None
            more = os.read(self._reports.fileno(), 1 << 20)
            self._read += more
            if not more and ended:
                pytest.exit(f"{self} has ended too early: {self._said()}", returncode=1)
            if not more:
                _ = select.select((self._pidfd,), (), (), LOOK_PAUSE)
        data = bytes(self._read[:size])
        del self._read[:size]
        return data


class Beside:
    """In the first pytest: has the others run, and reports what they report."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._others: dict[Part, Other] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Begin, and see that they end as they should; the loop itself is pytest's."""
        if not self._config.option.collectonly:
            for part in {part_of(item): None for item in session.items if not runs_here(item)}:
                self._others[part] = Other(self._config, part)
        result = yield
        for other in self._others.values():
            other.see_its_end()
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """The reports of a test that runs elsewhere."""
        if runs_here(item):
            return None
        other, hook = self._others[part_of(item)], item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        while (found := other.next()) != item.nodeid:
            assert isinstance(found, dict), f"{found} out of turn, before {item.nodeid}"
            from_plain = self._config.hook.pytest_report_from_serializable
            report = from_plain(config=self._config, data=found)
            assert report.nodeid == item.nodeid, f"{report.nodeid} out of turn"
            other.failed |= report.failed
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        """Nothing goes on."""
        for other in self._others.values():
            other.close()


def configure(config: pytest.Config) -> None:
    """Take part in a session of several processes, as whichever this is."""
    path, name = os.environ.pop(REPORTS, None), os.environ.pop(PART, "")
    if path is not None:
        die_with_parent(os.getppid())
        part = Part[name]
        os.sched_setscheduler(0, part.policy, os.sched_param(0))
        _ = config.pluginmanager.register(Reporter(config, Path(path), part), "reporter")
    elif config.getoption(OPTION):
        _ = config.pluginmanager.register(Beside(config), "beside")


def sort(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those first that are measured: they run while the others do. Another pytest has only its
    own."""
    if config.pluginmanager.has_plugin("reporter"):
        items[:] = [item for item in items if runs_here(item)]
    items.sort(key=lambda item: (ORDER.index(part_of(item)), item.path == ROOT / LADDERS))


ORDER: Final = tuple(Part)
