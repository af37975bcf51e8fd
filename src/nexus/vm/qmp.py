"""Questions to a running QEMU over its control socket.

One at a time, from the thread that reads the machine's evidence: each has a deadline, and a machine
that does not answer is not asked again.
"""

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event as Pause
from types import TracebackType
from typing import Any, Final, Self

ANSWER_MAX: Final = 5.0  # seconds for one answer, on a busy machine
ANSWER_SIZE_MAX: Final = 1024 * 1024  # bytes
READ_SIZE: Final = 64 * 1024
LISTEN_POLL: Final = 0.02  # seconds


class QmpFailed(Exception):
    """QEMU refused, or did not answer; the text says what."""


class Qmp:
    """A connection to the socket that QEMU listens on."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_MAX)
        self._rest = b""
        try:
            self._socket.connect(str(path))
            greeting = self._next()
        except OSError as error:
            self._socket.close()
            raise QmpFailed(f"{path.name}: {error}") from error
        if "QMP" not in greeting:
            self._socket.close()
            raise QmpFailed(f"{path.name} greets with {greeting}")
        _ = self.ask("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def ask(self, command: str, **arguments: object) -> Any:
        """What QEMU answers. Raises QmpFailed."""
        question = {"execute": command, "arguments": arguments}
        try:
            self._socket.sendall(json.dumps(question).encode() + b"\n")
            while True:
                answer = self._next()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise QmpFailed(f"{command}: {answer['error'].get('desc')}")
        except OSError as error:
            raise QmpFailed(f"{command}: {error}") from error

    def told(self) -> list[Mapping[str, Any]]:
        """What QEMU has told unasked since the last question, up to its end."""
        found: list[Mapping[str, Any]] = []
        with suppress(QmpFailed, OSError):
            while True:
                found.append(self._next())
        return [each for each in found if "event" in each]

    def _next(self) -> Mapping[str, Any]:
        while b"\n" not in self._rest:
            part = self._socket.recv(READ_SIZE)
            if not part or len(self._rest) > ANSWER_SIZE_MAX:
                raise QmpFailed("QEMU has closed its control socket, or said too much")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer: Mapping[str, Any] = json.loads(line)
        except ValueError as error:
            raise QmpFailed(f"QEMU's control socket says {line[:80]!r}") from error
        return answer


def awaited(path: Path, until: int) -> Qmp:
    """A connection to a QEMU that has just been started: until `until`, in nanoseconds of the
    monotonic clock, it may not listen yet. Raises QmpFailed."""
    pause = Pause()
    while True:
        try:
            return Qmp(path)
        except QmpFailed:
            if time.monotonic_ns() > until:
                raise
        _ = pause.wait(LISTEN_POLL)


def devices(qmp: Qmp) -> list[Mapping[str, Any]]:
    """What QEMU itself says of each virtio device: what its driver has agreed to, and how many
    requests it has answered on its first queue."""
    found: list[Mapping[str, Any]] = []
    for each in qmp.ask("x-query-virtio"):
        status = qmp.ask("x-query-virtio-status", path=each["path"])
        features = status["guest-features"]
        entry = {
            "name": each["name"],
            "path": each["path"],
            "device_id": status["device-id"],
            "features": [_first_word(word) for word in features.get("transports", ())],
            "status": [_first_word(word) for word in status["status"].get("statuses", ())],
        }
        if status["num-vqs"]:
            queue = qmp.ask("x-query-virtio-queue-status", path=each["path"], queue=0)
            entry["used"] = queue.get("used-idx")
        found.append(entry)
    return found


def cpu_count(qmp: Qmp) -> int:
    """How many CPUs the machine has."""
    return len(qmp.ask("query-cpus-fast"))


def _first_word(text: object) -> str:
    return str(text).partition(":")[0]
