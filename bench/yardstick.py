"""The C ping-pong: compiled at run time into a temporary folder, run once per pair."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Self

import msgspec

from bench.measure import PAYLOAD_SIZE, Placement, Sample, UnavailableError

SOURCE: Final = Path(__file__).with_name("pingpong.c")
RUN_SECONDS_MAX: Final = 30.0  # more than any asked-for run; a stuck yardstick must not hang


class Yardstick:
    """A compiled ping-pong program. Use as a context manager: the binary goes with it."""

    def __init__(self) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise UnavailableError("no C compiler: apt-get install gcc libc6-dev")
        self._folder = tempfile.TemporaryDirectory(prefix="nexus-bench-")
        self._program = Path(self._folder.name, "pingpong")
        built = subprocess.run(
            (compiler, "-O2", "-o", str(self._program), str(SOURCE)),
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode != 0:
            self._folder.cleanup()
            raise UnavailableError(f"{SOURCE.name} does not compile: {built.stderr.strip()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self, placement: Placement, seconds: float, *, credentials: bool = False) -> Sample:
        """One ping-pong of 64 bytes; with `credentials` both ends ask for SCM_CREDENTIALS."""
        command = [
            str(self._program),
            str(PAYLOAD_SIZE),
            str(seconds),
            str(placement.client),
            str(placement.server),
        ]
        if credentials:
            command.append("cred")
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=seconds + RUN_SECONDS_MAX
        )
        return msgspec.json.decode(done.stdout, type=Sample)
