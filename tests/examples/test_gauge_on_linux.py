"""The gauge as a real process: asyncio, a pseudo-terminal for its serial port, the commands."""

import json
import os
import shutil
import subprocess
import sys
import threading
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "gauge"
NEXUS = (sys.executable, "-m", "nexus.cli")
COMMAND_TIME_MAX = 60  # seconds
LINES_EVERY = 0.05  # seconds between two lines of the gauge


class SerialGauge:
    """The device at the other end of the line: prints a pressure twenty times a second."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.path = os.ttyname(self._slave)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._thread.start()

    def _print(self) -> None:
        while not self._over.wait(LINES_EVERY):
            _ = os.write(self._master, b"P 1.013\r\n?noise\r\n")

    def close(self) -> None:
        """Fall silent for good."""
        self._over.set()
        self._thread.join()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def gauge() -> Iterator[SerialGauge]:
    device = SerialGauge()
    yield device
    device.close()


def use(system: Path, port: str) -> None:
    """Have the system of a test read `port`, and keep everything beside its own file."""
    here = system.parent
    directories = "".join(f'{name}_dir = "{here / name}"\n' for name in ("state", "run", "log"))
    text = system.read_text().replace("/dev/ttyUSB0", port)
    text = text.replace("[system]\n", f"[system]\n{directories.replace('run_dir', 'runtime_dir')}")
    _ = system.write_text(text)


def nexus(there: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command, with directories of its own."""
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(there / "state"),
        "XDG_RUNTIME_DIR": str(there / "run"),
        "NO_COLOR": "1",
    }
    return subprocess.run(
        [*NEXUS, *arguments],
        cwd=there,
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIME_MAX,
        check=False,
    )


@pytest.mark.linux
def test_an_asyncio_program_reads_its_granted_port_and_is_asked_like_any_service(
    tmp_path: Path, gauge: SerialGauge
) -> None:
    there = tmp_path / "gauge"
    _ = shutil.copytree(EXAMPLE, there)
    (there / "run").mkdir(mode=0o700)
    system = there / "system.toml"
    use(system, gauge.path)

    up = nexus(there, "up", "-d", "system.toml")
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        asked = nexus(there, "call", "gauge", "Read", "--json")
        status = nexus(there, "status", "--json")
    finally:
        down = nexus(there, "down")

    assert asked.returncode == 0, asked.stdout + asked.stderr
    answer = json.loads(asked.stdout)
    assert "101300" in asked.stdout, answer
    assert status.returncode == 0, status.stderr
    assert down.returncode == 0, down.stdout + down.stderr


@pytest.mark.linux
def test_a_port_that_is_not_there_is_said_by_name(tmp_path: Path) -> None:
    there = tmp_path / "gauge"
    _ = shutil.copytree(EXAMPLE, there)
    (there / "run").mkdir(mode=0o700)
    system = there / "system.toml"
    use(system, str(there / "no-such-port"))

    up = nexus(there, "up", "-d", "--wait", "5", "system.toml")
    down = nexus(there, "down")

    assert up.returncode == 1
    assert "gauge" in up.stdout + up.stderr
    assert "no-such-port" in up.stdout + up.stderr
    assert "Traceback" not in up.stdout + up.stderr
    assert down.returncode in (0, 1)
