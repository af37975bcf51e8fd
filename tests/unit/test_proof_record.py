"""Events as JSON lines, the bounded record, and the lock."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from nexus.abi import Event, EventKind, Nanos, Pid
from nexus.proof import record
from nexus.proof.lock import LockRefused, run_lock, runtime_dir
from nexus.proof.record import (
    MalformedEvent,
    RecordLost,
    RecordWriter,
    decode_event,
    default_path,
    encode_event,
)
from nexus.proof.sink import EventSink


def _event(line: str = "SELFTEST: qos ok") -> Event:
    fields = {"name": "timed", "generation": 1, "line": line, "evidence": {"held": 1}}
    return Event(Nanos(12), EventKind.CONSOLE, Pid(3), fields)


def test_an_event_comes_back_as_it_went() -> None:
    assert decode_event(encode_event(_event())) == _event()


def test_a_value_json_does_not_know_becomes_its_text() -> None:
    event = Event(Nanos(0), EventKind.SPAWN, Pid(1), {"argument": b"\x01\xff", "path": Path("/a")})

    assert decode_event(encode_event(event)).fields == {"argument": "01ff", "path": "/a"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"not json",
        b'{"t":1,"k":"no such kind","p":1,"f":{}}',
        b'{"t":"1","k":"exit","p":1,"f":{}}',
        b'{"t":1,"k":"exit","p":1,"f":[]}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises(MalformedEvent):
        decode_event(line)


def test_a_record_is_json_lines_and_stays_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RECORD_SIZE_MAX", 1000)
    path = tmp_path / "run.jsonl"

    with RecordWriter(path) as writer:
        for _ in range(20):
            writer.event(0, encode_event(_event()))
        writer.entry("verdict", {"exit_code": 0})

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.stat().st_size <= 1000
    assert writer.left_out == 21 - len(lines)
    assert lines[0]["event"]["f"]["line"] == "SELFTEST: qos ok"


def test_old_records_make_room_for_new_ones(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / "records").mkdir(exist_ok=True)
        (tmp_path / "records" / f"{number}.jsonl").touch()

    default_path(tmp_path, "sim").touch()

    assert len(list((tmp_path / "records").iterdir())) == record.RECORDS_KEPT


def test_the_sink_hands_over_every_event_and_says_how_many_were_lost() -> None:
    reader, writer = os.pipe()
    sink = EventSink(writer)

    for _ in range(3):
        sink.record(_event())
    sink.close()

    *events, end, rest = os.read(reader, 1 << 16).split(b"\n")
    os.close(reader)
    assert [decode_event(line) for line in events] == [_event()] * 3
    assert (end, rest) == (b'{"dropped":0}', b"")


def test_the_sink_never_blocks_and_counts_what_it_cannot_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nexus.proof.sink.WAITING_SIZE_MAX", 4096)
    monkeypatch.setattr("nexus.proof.sink.PIPE_SIZE", 4096)
    reader, writer = os.pipe()
    sink = EventSink(writer)

    for _ in range(200):
        sink.record(_event("x" * 400))

    assert sink.dropped > 0
    os.close(reader)
    sink.close()


def test_a_second_run_is_refused_while_the_first_holds_the_lock(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(LockRefused, match=f"process {os.getpid()}"):
            with run_lock(tmp_path, wait=0):
                raise AssertionError("two runs at a time")


def test_the_lock_is_free_again_after_a_run(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        pass
    with run_lock(tmp_path, wait=0):
        pass


def test_what_a_killed_run_has_left_is_removed_by_the_next_one_and_nothing_else(
    tmp_path: Path,
) -> None:
    left, system = tmp_path / ".state-x1", tmp_path / "state-keeper"
    (tmp_path / ".state-x3").symlink_to(system)
    for each in (left, system):
        each.mkdir()
        _ = (each / "disk.img").write_bytes(b"x")
    with run_lock(tmp_path):
        during = sorted(each.name for each in tmp_path.iterdir())
        own = tmp_path / ".state-x2"
        own.mkdir()
        with pytest.raises(LockRefused), run_lock(tmp_path, wait=0):
            pass
        assert own.exists()

    assert during == ["prove.lock", "state-keeper"]
    assert (system / "disk.img").exists()


def test_a_left_state_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / ".state-x1").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refused)

    with pytest.raises(LockRefused, match=r"\.state-x1, .* \(Device or resource busy\): remove it"):
        with run_lock(tmp_path):
            pass


def test_a_runtime_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)

    with pytest.raises(LockRefused):
        _ = runtime_dir({"NEXUS_RUNTIME_DIR": str(shared)})


def test_a_lock_file_removed_during_a_run_makes_the_run_not_count(tmp_path: Path) -> None:
    with pytest.raises(LockRefused, match="does not count"), run_lock(tmp_path):
        (tmp_path / "prove.lock").unlink()


def test_a_lock_that_is_a_link_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "prove.lock").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(LockRefused, match="cannot be opened"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("path", ["", "relative", "/dev/null/below", "/proc/no-such"])
def test_a_runtime_directory_that_cannot_be_had_is_refused_in_a_sentence(path: str) -> None:
    with pytest.raises(LockRefused, match="runtime directory"):
        _ = runtime_dir({"NEXUS_RUNTIME_DIR": path})


def test_a_record_on_a_full_disk_is_lost_and_says_so() -> None:
    with pytest.raises(RecordLost, match="is lost"), RecordWriter(Path("/dev/full")) as kept:
        kept.entry("run", {"ground": "sim"})


def test_a_record_that_cannot_be_made_is_lost(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(RecordLost, match="cannot be made"):
        _ = RecordWriter(tmp_path / "file" / "record.jsonl")


def test_an_event_nested_too_deep_is_no_event() -> None:
    with pytest.raises(MalformedEvent):
        _ = decode_event(b"[" * 100_000 + b"]" * 100_000)
