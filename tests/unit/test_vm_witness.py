"""What process 1 reads in memory maps, what QEMU is asked, and what a cut leaves of a disk."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import Event, EventKind, HardwareKind, Nanos, Pid
from nexus.kernel.linux.mmio import MmioPage
from nexus.vm.qmp import Qmp, QmpFailed, cpu_count, devices
from nexus.vm.witness import pages_note, seen_at, windows

MAPS: Final = """\
ffff8c000000-ffff8c021000 rw-p 00000000 00:00 0
ffff8e4d1000-ffff8e4d2000 rw-s 0a000000 00:06 4                          /dev/mem
ffff8e4d2000-ffff8e4d4000 rw-s 00000000 00:01 5                          /memfd:dma (deleted)
"""
CLAIM: Final = "rngd: mmio window mapped ok"


def printed(line: str, kind: EventKind = EventKind.CONSOLE) -> Event:
    return Event(Nanos(1), kind, Pid(7), {"name": "rngd", "line": line})


def machine(folder: Path) -> Path:
    """A /proc with two processes, of which one has registers."""
    for name, text in {"7": MAPS, "8": MAPS.splitlines()[0], "self": MAPS}.items():
        (folder / name).mkdir()
        (folder / name / "maps").write_text(text, "ascii")
    (folder / "9").mkdir()  # it has ended
    return folder


def test_whoever_has_a_page_of_the_machine_mapped_is_told(tmp_path: Path) -> None:
    assert windows(machine(tmp_path)) == [[7, 0x0A00_0000, 4096]]


def test_a_look_follows_a_claim_and_nothing_else(tmp_path: Path) -> None:
    proc = machine(tmp_path)

    seen = seen_at(printed(CLAIM), proc)

    assert seen is not None
    assert (seen["line"], seen["pid"], seen["holders"]) == (CLAIM, 7, [[7, 0x0A00_0000, 4096]])
    assert seen_at(printed("rngd: ready"), proc) is None
    assert seen_at(printed(CLAIM, EventKind.KERNEL), proc) is None


def test_pages_are_told_by_kind_address_and_name() -> None:
    page = MmioPage(HardwareKind.BLOCK, 0x0A00_3000, "disk")

    assert pages_note([page])["pages"] == [[2, 0x0A00_3000, "disk"]]


# ---------------------------------------------------------------- QEMU


@contextmanager
def qemu(path: Path, answer: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Somebody who speaks QMP at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                connection.sendall(b'{"QMP": {}}\n')
                for line in lines:
                    connection.sendall(b'{"event": "RESUME"}\n')
                    told = answer(json.loads(line))
                    if told is None:
                        return
                    connection.sendall(json.dumps(told).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join(10)


def test_a_question_gets_its_answer_past_events(tmp_path: Path) -> None:
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        return {"return": [{}, {}] if asked["execute"] == "query-cpus-fast" else {}}

    with qemu(tmp_path / "q", answer), Qmp(tmp_path / "q") as qmp:
        assert cpu_count(qmp) == 2


def test_what_a_driver_agreed_to_is_told_by_the_words_of_the_features(tmp_path: Path) -> None:
    status = {
        "device-id": 4,
        "num-vqs": 1,
        "guest-features": {"transports": ["VIRTIO_F_VERSION_1: Device compliant"]},
        "status": {"statuses": ["VIRTIO_CONFIG_S_DRIVER_OK: Driver setup"]},
    }
    told = {
        "qmp_capabilities": {},
        "x-query-virtio": [{"name": "virtio-rng", "path": "/machine/a"}],
        "x-query-virtio-status": status,
        "x-query-virtio-queue-status": {"used-idx": 3},
    }

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        return {"return": told[asked["execute"]]}

    with qemu(tmp_path / "q", answer), Qmp(tmp_path / "q") as qmp:
        (found,) = devices(qmp)

    assert found["device_id"] == 4
    assert found["features"] == ["VIRTIO_F_VERSION_1"]
    assert found["status"] == ["VIRTIO_CONFIG_S_DRIVER_OK"]
    assert found["used"] == 3


def test_a_refusal_a_silence_and_nobody_are_failures(tmp_path: Path) -> None:
    def refuse(asked: dict[str, Any]) -> dict[str, Any] | None:
        if asked["execute"] == "qmp_capabilities":
            return {"return": {}}
        return {"error": {"desc": "no such thing"}} if asked["execute"] == "x" else None

    with qemu(tmp_path / "q", refuse), Qmp(tmp_path / "q") as qmp:
        with pytest.raises(QmpFailed, match="x: no such thing"):
            _ = qmp.ask("x")
        with pytest.raises(QmpFailed, match="closed its control socket"):
            _ = qmp.ask("y")
    with pytest.raises(QmpFailed, match="nobody"):
        _ = Qmp(tmp_path / "nobody")
