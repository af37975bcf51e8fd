import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import SlotName
from nexus.drivers import DeviceFault, Fault, finished
from nexus.kernel.linux.hardware import IMAGE_SUFFIX
from nexus.loader import devices
from nexus.loader.devices import boot_path, opened, slot_path

BLOCKS = 4


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "boot.img"
    _ = path.write_bytes(bytes(range(256)) * (BLOCKS * BLOCK_SIZE // 256) + b"not a block")
    return path


@contextmanager
def faults(fault: Fault) -> Iterator[None]:
    with pytest.raises(DeviceFault) as caught:
        yield
    assert caught.value.fault is fault


def look(path: Path, *, writable: bool = False) -> None:
    with opened(path, writable=writable) as device:
        assert device.block_count


def test_blocks_are_read_as_they_stand_in_the_file(image: Path) -> None:
    with opened(image) as device:
        assert device.block_count == BLOCKS, "what is no whole block is none"
        assert finished(device.read(1, 2)) == image.read_bytes()[BLOCK_SIZE : 3 * BLOCK_SIZE]


def test_what_was_written_is_read(image: Path) -> None:
    with opened(image, writable=True) as device:
        finished(device.write(2, b"\1" * BLOCK_SIZE, durable=True))
        finished(device.flush())

    with opened(image) as device:
        assert finished(device.read(2, 1)) == b"\1" * BLOCK_SIZE
        assert finished(device.read(1, 1)) == bytes(range(256)) * 2


def test_a_durable_write_is_with_the_disk_when_it_is_answered(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(
        "nexus.loader.devices.os.fdatasync", lambda _: seen.append(image.read_bytes()[:1])
    )

    with opened(image, writable=True) as device:
        finished(device.write(0, b"\1" * BLOCK_SIZE))
        assert seen == []
        finished(device.write(0, b"\2" * BLOCK_SIZE, durable=True))
        assert seen == [b"\2"], "it was written, and then flushed"


def test_nothing_is_read_or_written_beyond_the_end(image: Path) -> None:
    with opened(image, writable=True) as device:
        with faults(Fault.OUT_OF_RANGE):
            _ = finished(device.read(BLOCKS - 1, 2))
        with faults(Fault.OUT_OF_RANGE):
            finished(device.write(BLOCKS, bytes(BLOCK_SIZE)))


def test_a_file_that_is_cut_meanwhile_is_an_error_and_no_short_answer(image: Path) -> None:
    with opened(image) as device:
        os.truncate(image, BLOCK_SIZE)
        with faults(Fault.IO):
            _ = finished(device.read(0, 2))


def test_a_look_writes_nothing(image: Path) -> None:
    with opened(image) as device:
        assert not device.writable
        with faults(Fault.READ_ONLY):
            finished(device.write(0, bytes(BLOCK_SIZE)))


def test_a_look_is_had_while_another_holds_the_device(image: Path) -> None:
    with opened(image, writable=True), opened(image) as device:
        assert finished(device.read(0, 1))


def test_a_device_that_another_holds_is_not_written(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LOCK_WAIT", 0)
    with image.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with faults(Fault.REFUSED):
            look(image, writable=True)

    with opened(image, writable=True) as device:
        assert device.writable


@pytest.mark.parametrize("what", ["directory", "pipe"])
def test_what_is_no_device_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "boot.img"
    if what == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with faults(Fault.REFUSED):
        look(path)


def test_a_link_is_not_followed_and_what_is_missing_is_named(tmp_path: Path, image: Path) -> None:
    link = tmp_path / "link.img"
    link.symlink_to(image)
    with faults(Fault.IO):
        look(link)
    with pytest.raises(DeviceFault, match=r"gone\.img: No such file"):
        look(tmp_path / "gone.img")


def test_the_devices_lie_where_the_kernel_has_their_images(tmp_path: Path) -> None:
    assert devices.IMAGE_SUFFIX == IMAGE_SUFFIX
    assert boot_path(tmp_path) == tmp_path / "boot.img"
    assert [slot_path(tmp_path, name).name for name in SlotName] == ["slot-a.img", "slot-b.img"]
