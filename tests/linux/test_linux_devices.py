"""Devices of the bus map on Linux: what init opens, and what becomes of it when Linux refuses.

Real here are full file systems (tmpfs with a size), read-only ones (a remount), a disk that fails
(a loop device over a file on a full file system: Linux answers EIO), an unreadable file
(/proc/self/mem at address 0) and an image that shrinks. What no machine does on demand, short
transfers and a kernel without RWF_DSYNC, is injected at the calls of `os`.
"""

import errno
import fcntl
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    BLOCK_SIZE,
    MEMORY_SIZE_DEFAULT,
    PAGE_SIZE,
    AbiError,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootImage,
    BusScan,
    DeviceQuery,
    DmaArea,
    EntropyDraw,
    EventKind,
    Exit,
    Grants,
    HardwareGrant,
    HardwareKind,
    Nanos,
    Send,
    SpawnReason,
    Status,
)
from nexus.kernel.core import Hardware, SpawnRefused
from nexus.kernel.linux import hardware
from nexus.kernel.linux.devices import (
    Block,
    Granted,
    Registers,
    Source,
    Window,
    adopt_device,
)
from nexus.kernel.linux.driver import DESCRIPTORS_MAX
from nexus.kernel.linux.hardware import Bus
from nexus.kernel.linux.native import map_shared
from nexus.kernel.linux.sight import bounds
from nexus.testing.conformance.steps import ended, ended_well, refused, soon, start, take
from tests.linux.ground import Ground, ground, mine

__all__ = ["ground", "mine"]

pytestmark = pytest.mark.linux

BLOCKS: Final = 256
SIZE: Final = BLOCKS * BLOCK_SIZE
DISK: Final = Hardware("disk", HardwareKind.BLOCK, size=SIZE)
RNG: Final = Hardware("rng", HardwareKind.ENTROPY)
WITH_DISK: Final = Grants(hardware=(HardwareGrant("disk", HardwareKind.BLOCK),))
FAILING_SIZE: Final = 1 << 20  # so much that Linux does not write it in one piece
GRANTED: Final = Granted("disk", HardwareKind.BLOCK, "file", BLOCKS, writable=True)
LATER: Final = Nanos(1 << 62)
ONES: Final = b"\x11" * BLOCK_SIZE
IS_ROOT: Final = os.geteuid() == 0


def opened(device: Hardware, state_dir: Path | None) -> tuple[Granted, int, ExitStack]:
    """As a boot does it: what is to be made, and then the opening."""
    undo = ExitStack()
    bus = Bus((device,), state_dir)
    bus.make_images()
    granted, descriptor = bus.open(device, undo)
    return granted, descriptor, undo


def why_refused(device: Hardware, state_dir: Path | None) -> str:
    bus = Bus((device,), state_dir)
    bus.make_images()
    with ExitStack() as undo, pytest.raises(SpawnRefused) as refusal:
        _ = bus.open(device, undo)
    assert refusal.value.reason is SpawnReason.MAP_FAILED
    return str(refusal.value)


def status_of(act: Callable[[], object]) -> Status:
    with pytest.raises(AbiError) as refusal:
        act()
    return refusal.value.status


# ---- images


def test_an_image_is_made_of_its_size_closed_and_with_its_blocks_taken(tmp_path: Path) -> None:
    granted, descriptor, undo = opened(DISK, tmp_path / "state")

    with undo:
        status = os.fstat(descriptor)
        assert granted == GRANTED
        assert (status.st_size, stat.S_IMODE(status.st_mode)) == (SIZE, 0o600)
        assert status.st_blocks * 512 >= SIZE, "a hole would be filled at the first write"
        assert os.pread(descriptor, SIZE, 0) == bytes(SIZE)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["disk.img", "disk.made"]


def test_an_image_that_was_there_is_never_replaced(tmp_path: Path) -> None:
    opened(DISK, tmp_path)[2].close()
    (tmp_path / "disk.img").unlink()

    for _ in range(2):
        why = why_refused(DISK, tmp_path)
        assert "it was there and is missing: bring it back" in why
        assert f"or remove {tmp_path}/disk.made to begin with an empty one" in why
    assert [path.name for path in tmp_path.iterdir()] == ["disk.made"]

    (tmp_path / "disk.made").unlink()
    opened(DISK, tmp_path)[2].close()
    assert (tmp_path / "disk.img").exists(), "as the operator wanted it"


def test_an_image_that_somebody_else_put_there_is_missed_too(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    opened(DISK, tmp_path)[2].close()
    (tmp_path / "disk.img").unlink()

    assert "it was there and is missing" in why_refused(DISK, tmp_path)


def test_what_has_a_path_is_never_made(tmp_path: Path) -> None:
    """It may be missing because what it is on is not mounted."""
    path = tmp_path / "unmounted" / "disk.img"

    why = why_refused(DISK._replace(path=str(path)), tmp_path / "state")

    assert f"it is not there: mount what it is on, or `truncate -s {SIZE} {path}` makes" in why
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_goes_while_the_system_runs_is_not_made_by_a_restart(mine: Ground) -> None:
    image = mine.directory / "state" / "disk.img"

    async def holds(boot: BootImage) -> None:
        await DeviceQuery(boot.hardware[0])

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "holds", grants=WITH_DISK))
        image.unlink()
        with pytest.raises(AbiError, match="it was there and is missing"):
            await start(boot, "holds", grants=WITH_DISK)

    run = mine.observe(root, {"holds": holds}, hardware=(DISK,), state_dir=image.parent)

    (made,) = (each for each in run.fields(EventKind.DEVICE) if each["what"] == "made")
    assert (made["name"], made["path"], made["size"]) == ("disk", str(image), SIZE)
    assert not image.exists()


def test_an_image_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(ONES * (BLOCKS + 1))

    granted, descriptor, undo = opened(DISK, tmp_path)

    with undo:
        assert granted.block_count == BLOCKS, "as many as the bus map says"
        assert os.pread(descriptor, BLOCK_SIZE, 0) == ONES


def test_a_boot_that_ended_half_way_leaves_no_half_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.img.new").write_bytes(b"half")

    def fails(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fails)
        assert "Input/output error" in why_refused(DISK, tmp_path)
    assert list(tmp_path.iterdir()) == []

    _, descriptor, undo = opened(DISK, tmp_path)
    with undo:
        assert os.fstat(descriptor).st_size == SIZE


def test_what_is_no_image_is_refused_and_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(SIZE))
    state = tmp_path / "state"

    def wrong(make: Callable[[Path], object], device: Hardware = DISK) -> str:
        for path in state.iterdir() if state.exists() else ():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        state.mkdir(exist_ok=True)
        _ = make(state / "disk.img")
        return why_refused(device, state).removeprefix("MAP_FAILED: ")

    assert "it is a directory" in wrong(lambda path: path.mkdir())
    assert "it is a symbolic link" in wrong(lambda path: path.symlink_to(outside))
    assert "it is a symbolic link" in wrong(lambda path: path.symlink_to(tmp_path / "nowhere"))
    assert "neither a file nor a block device" in wrong(lambda path: os.mkfifo(path))
    small = wrong(lambda path: path.write_bytes(bytes(SIZE - 1)))
    assert f"it has {SIZE - 1} bytes, the bus map says {SIZE}" in small
    for path in ("../outside", "sub/disk.img", ".."):
        climbing = DISK._replace(path=path)
        assert "not in the state directory itself" in wrong(lambda _path: None, climbing)
    huge = DISK._replace(size=hardware.IMAGE_SIZE_MAX + BLOCK_SIZE)
    too_large = why_refused(huge, tmp_path / "other")
    assert (
        f"init makes up to {hardware.IMAGE_SIZE_MAX} bytes: `truncate -s {huge.size} " in too_large
    )
    assert "no state directory" in why_refused(DISK, None)
    missing = DISK._replace(path="/dev/nexus-has-none")
    assert "no such device" in why_refused(missing, state)
    assert outside.read_bytes() == bytes(SIZE)


def test_two_systems_do_not_share_an_image(tmp_path: Path) -> None:
    _, first, undo = opened(DISK, tmp_path)
    kept = os.dup(first)  # the holder's, when init has closed its own

    with undo:
        assert "another system uses it" in why_refused(DISK, tmp_path)
    assert "another system uses it" in why_refused(DISK, tmp_path)
    os.close(kept)
    opened(DISK, tmp_path)[2].close()


def test_the_lock_is_the_holders_and_ends_with_it(ground: Ground) -> None:
    state = ground.directory / "state"

    async def holds(boot: BootImage) -> None:
        (disk,) = boot.hardware
        await BlockWrite(disk, 0, ONES, await soon(), durable=True)
        await take(boot.endpoint)

    async def root(boot: BootImage) -> bool:
        spawned = await start(boot, "holds", grants=WITH_DISK)
        with (state / "disk.img").open("rb") as image:
            try:
                fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise AssertionError("it is locked while it has a holder")
            except BlockingIOError:
                pass
            await Send(spawned.slot, b"end")
            await ended_well(spawned)
            fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return image.read(BLOCK_SIZE) == ONES

    assert ground.run(root, {"holds": holds}, hardware=(DISK,), state_dir=state)


def test_what_init_opened_is_in_the_record(ground: Ground) -> None:
    async def holds(boot: BootImage) -> None:
        await EntropyDraw(boot.hardware[1], 1)

    async def root(boot: BootImage) -> None:
        both = (*WITH_DISK.hardware, HardwareGrant("rng", HardwareKind.ENTROPY))
        await ended_well(await start(boot, "holds", grants=Grants(hardware=both)))

    run = ground.observe(
        root, {"holds": holds}, hardware=(DISK, RNG), state_dir=ground.directory / "state"
    )

    made, disk, rng = run.fields(EventKind.DEVICE)
    assert (made["name"], made["what"], made["size"]) == ("disk", "made", SIZE)
    assert (disk["name"], disk["what"], disk["holder"]) == ("disk", "granted", "holds")
    assert (disk["backing"], disk["block_count"], disk["writable"]) == ("file", BLOCKS, True)
    assert (rng["name"], rng["backing"]) == (
        "rng",
        "hwrng" if has_generator(ground) else "getrandom",
    )


def has_generator(ground: Ground) -> bool:
    if ground.uid:
        return False  # the node is root's
    try:
        with open("/dev/hwrng", "rb", buffering=0) as node:  # noqa: PTH123 (unbuffered)
            return bool(node.read(1))
    except OSError:
        return False


def test_a_holder_may_write_to_the_end_of_its_image_and_no_longer_file(mine: Ground) -> None:
    """RLIMIT_FSIZE is about both: an image of more than a memory object's size needs more."""
    large = DISK._replace(size=4 << 20)

    async def holds(boot: BootImage) -> None:
        (disk,) = boot.hardware
        last = (await DeviceQuery(disk)).block_count - 1
        await BlockWrite(disk, last, ONES, await soon(), durable=True)
        assert await BlockRead(disk, last, 1, await soon()) == ONES
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        spawned = await start(boot, "holds", grants=WITH_DISK)
        limits = bounds(spawned.pid)
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return limits["Max file size"], limits["Max open files"]

    files, descriptors = mine.run(
        root, {"holds": holds}, hardware=(large,), state_dir=mine.directory / "state"
    )

    assert files == (str(large.size), str(large.size))
    assert descriptors[1] == str(DESCRIPTORS_MAX + 1)


def test_a_holder_may_take_the_memory_that_its_plan_gives_it(mine: Ground) -> None:
    """Above the default by what is asked for and, for it is a limit, not by twice that."""
    more = 48 << 20
    taken: Final = MEMORY_SIZE_DEFAULT + more // 2

    async def takes(boot: BootImage) -> None:
        await take(boot.endpoint)
        try:
            _ = bytes(taken)
        except MemoryError:
            await Exit(1)

    async def root(boot: BootImage) -> list[Any]:
        found = []
        for memory in (MEMORY_SIZE_DEFAULT, MEMORY_SIZE_DEFAULT + more):
            spawned = await start(boot, "takes", memory=memory)
            limits = bounds(spawned.pid)
            await Send(spawned.slot, b"go")
            found.append((int(limits["Max data size"][1]), (await ended(spawned)).code))
        return found

    (least, least_code), (most, most_code) = mine.run(root, {"takes": takes})

    assert (least_code, most_code) == (1, 0)
    assert more - (2 << 20) <= most - least <= more + (2 << 20)


# ---- read only


def test_an_image_that_may_not_be_written_is_read_only(tmp_path: Path) -> None:
    granted, descriptor, undo = opened(DISK._replace(read_only=True), tmp_path)
    with undo:
        block = Block(granted, descriptor)
        assert not granted.writable
        assert status_of(lambda: block.write(0, ONES, LATER, durable=True)) is (
            Status.PERMISSION_DENIED
        )
        assert block.read(0, 1, LATER) == bytes(BLOCK_SIZE)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, ONES, 0)  # not by the filter of us alone


def test_a_file_without_the_right_to_write_is_granted_read_only(ground: Ground) -> None:
    """As an ordinary user by its mode; to root a mode says nothing."""
    if not ground.uid:
        pytest.skip("root may write any file")
    state = ground.directory / "state"
    state.mkdir()
    (state / "disk.img").write_bytes(bytes(SIZE))
    (state / "disk.img").chmod(0o400)
    for path in (state, state / "disk.img"):
        os.chown(path, ground.uid, ground.uid)

    async def reads(boot: BootImage) -> None:
        (disk,) = boot.hardware
        assert not (await DeviceQuery(disk)).writable
        await refused(BlockWrite(disk, 0, ONES, await soon()), Status.PERMISSION_DENIED)
        assert await BlockRead(disk, 0, 1, await soon()) == bytes(BLOCK_SIZE)

    async def root(boot: BootImage) -> None:
        await ended_well(await start(boot, "reads", grants=WITH_DISK))

    ground.run(root, {"reads": reads}, hardware=(DISK,), state_dir=state)


@contextmanager
def mounted(path: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes; only root can have one."""
    if not IS_ROOT:
        pytest.skip("only root mounts file systems")
    path.mkdir(parents=True)
    done = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)],
        check=False,
        capture_output=True,
    )
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode()}")
    try:
        yield path
    finally:
        # Lazily: Linux lets go of a loop device, and of its file, when its last user has.
        _ = subprocess.run(["/bin/umount", "--lazy", str(path)], check=True)


def test_an_image_on_a_file_system_mounted_read_only_is_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", 4 * SIZE) as place:
        opened(DISK, place)[2].close()
        _ = subprocess.run(["/bin/mount", "-o", "remount,ro", str(place)], check=True)

        granted, descriptor, undo = opened(DISK, place)

        with undo:
            assert not granted.writable
            assert Block(granted, descriptor).read(0, 1, LATER) == bytes(BLOCK_SIZE)
        assert "Read-only file system" in why_refused(DISK._replace(name="other"), place)


# ---- full


def test_an_image_that_does_not_fit_is_not_made(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", SIZE // 2) as place:
        assert "No space left on device" in why_refused(DISK, place)
        assert list(place.iterdir()) == []


def test_a_full_file_system_refuses_a_write_and_the_device_lives_on(tmp_path: Path) -> None:
    """Only where an image has holes: one that init made has its room."""
    with mounted(tmp_path / "small", 64 << 10) as place:
        with (place / "disk.img").open("wb") as image:
            image.truncate(SIZE)
        granted, descriptor, undo = opened(DISK, place)
        with undo:
            block = Block(granted, descriptor)
            for durable in (True, False):
                assert status_of(partial(fill, block, durable=durable)) is Status.NO_SPACE
            block.flush(LATER)
            block.write(0, ONES, LATER, durable=True)
            assert block.read(0, 1, LATER) == ONES


# ---- failing


@contextmanager
def failing_node(directory: Path) -> Iterator[Path]:
    """A block device whose writes fail when they are to reach the medium."""
    with mounted(directory, 64 << 10) as place:
        backing = place / "backing"
        with backing.open("wb") as file:
            file.truncate(FAILING_SIZE)
        made = subprocess.run(
            ["/sbin/losetup", "--show", "-f", str(backing)],
            check=False,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            pytest.skip(f"no loop device: {made.stderr}")
        node = Path(made.stdout.strip())
        try:
            yield node
        finally:
            _ = subprocess.run(["/sbin/losetup", "-d", str(node)], check=True)


def at_node(node: Path) -> Hardware:
    return DISK._replace(path=str(node), size=FAILING_SIZE)


def fill(block: Block, *, durable: bool) -> None:
    """Write everywhere."""
    step = 8
    for at in range(0, block.granted.block_count, step):
        block.write(at, ONES * step, LATER, durable=durable)


def test_after_a_failed_flush_a_device_has_failed_for_good(tmp_path: Path) -> None:
    with failing_node(tmp_path / "small") as node:
        device = at_node(node)
        granted, descriptor, undo = opened(device, None)
        with undo:
            assert granted.backing == "node"
            told: list[str] = []
            block = Block(granted, descriptor)
            block.on_failure = told.append
            fill(block, durable=False)

            assert status_of(lambda: block.flush(LATER)) is Status.DEVICE_FAILED
            assert told == ["EIO"]

            # The control experiment, and why: Linux itself tells it once.
            os.fdatasync(descriptor)
            for act in (
                lambda: block.flush(LATER),
                lambda: block.read(0, 1, LATER),
                lambda: block.write(0, ONES, LATER, durable=False),
                lambda: block.write(0, ONES, LATER, durable=True),
            ):
                assert status_of(act) is Status.DEVICE_FAILED
            assert told == ["EIO"]


def test_after_a_failed_durable_write_a_device_has_failed_for_good(tmp_path: Path) -> None:
    with failing_node(tmp_path / "small") as node:
        granted, descriptor, undo = opened(at_node(node), None)
        with undo:
            block = Block(granted, descriptor)
            assert status_of(lambda: fill(block, durable=True)) is Status.DEVICE_FAILED
            assert status_of(lambda: block.read(0, 1, LATER)) is Status.DEVICE_FAILED


def test_whoever_holds_a_device_next_finds_it_as_it_is(tmp_path: Path) -> None:
    with failing_node(tmp_path / "small") as node:
        device = at_node(node)
        for _ in range(2):
            granted, descriptor, undo = opened(device, None)
            with undo:
                block = Block(granted, descriptor)
                assert len(block.read(0, 1, LATER)) == BLOCK_SIZE


def test_a_node_in_use_is_refused(tmp_path: Path) -> None:
    with failing_node(tmp_path / "small") as node:
        mine = os.open(node, os.O_RDONLY | os.O_EXCL)
        try:
            assert "in use" in why_refused(at_node(node), None)
        finally:
            os.close(mine)
        link = tmp_path / "by-name"
        link.symlink_to(node)
        granted, _, undo = opened(at_node(link), None)
        undo.close()
        assert granted.backing == "node", "a node may be known by a link"


def test_the_failure_of_a_service_device_is_in_the_record(tmp_path: Path) -> None:
    with failing_node(tmp_path / "small") as node:
        device = at_node(node)

        async def fails(boot: BootImage) -> None:
            (disk,) = boot.hardware
            for at in range(0, FAILING_SIZE // BLOCK_SIZE, BLOCKS):
                await BlockWrite(disk, at, ONES * BLOCKS, await soon())
            await refused(BlockFlush(disk, await soon()), Status.DEVICE_FAILED)
            await refused(BlockRead(disk, 0, 1, await soon()), Status.DEVICE_FAILED)

        async def root(boot: BootImage) -> None:
            (entry,) = await BusScan()
            assert entry.backing == "node"
            await ended_well(await start(boot, "fails", grants=WITH_DISK))

        ground = Ground(None)
        run = ground.observe(root, {"fails": fails}, hardware=(device,))
        ground.directory.rmdir()

        failed = [each for each in run.fields(EventKind.DEVICE) if each["what"] == "failed"]
        assert failed == [{"name": "disk", "what": "failed", "error": "EIO", "holder": "fails"}]


def test_what_cannot_be_read_is_a_failure_of_one_read(tmp_path: Path) -> None:
    descriptor = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        block = Block(GRANTED, descriptor)
        assert status_of(lambda: block.read(0, 1, LATER)) is Status.DEVICE_FAILED
        assert block.failed == "", "another block may be read"
    finally:
        os.close(descriptor)
    _, descriptor, undo = opened(DISK, tmp_path)
    with undo:
        block = Block(GRANTED, descriptor)
        os.truncate(tmp_path / "disk.img", BLOCK_SIZE)
        assert block.read(0, 1, LATER) == bytes(BLOCK_SIZE)
        assert status_of(lambda: block.read(0, 2, LATER)) is Status.DEVICE_FAILED


# ---- injected: what no machine does on demand


@pytest.fixture
def block(tmp_path: Path) -> Iterator[Block]:
    granted, descriptor, undo = opened(DISK, tmp_path)
    with undo:
        yield Block(granted, descriptor)


def test_short_transfers_are_continued(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    real = {name: getattr(os, name) for name in ("pread", "pwrite", "pwritev")}
    monkeypatch.setattr(os, "pread", lambda fd, size, at: real["pread"](fd, min(size, 100), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real["pwrite"](fd, data[:100], at))
    monkeypatch.setattr(
        os, "pwritev", lambda fd, parts, at, flags: real["pwritev"](fd, [parts[0][:7]], at, flags)
    )
    data = os.urandom(3 * BLOCK_SIZE)

    block.write(1, data, LATER, durable=False)
    block.write(10, data, LATER, durable=True)

    assert block.read(0, 5, LATER) == bytes(BLOCK_SIZE) + data + bytes(BLOCK_SIZE)
    assert block.read(10, 3, LATER) == data


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_rwf_dsync_a_durable_write_is_a_write_and_a_sync(
    number: int, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    sync = os.fdatasync

    def no_flag(*_: object) -> int:
        asked.append("pwritev")
        raise OSError(number, os.strerror(number))

    def synced(descriptor: int) -> None:
        asked.append("fdatasync")
        sync(descriptor)

    monkeypatch.setattr(os, "pwritev", no_flag)
    monkeypatch.setattr(os, "fdatasync", synced)

    for at in (0, 1):
        block.write(at, ONES, LATER, durable=True)

    assert asked == ["pwritev", "fdatasync", "fdatasync"], "Linux is asked once"
    assert block.read(0, 2, LATER) == ONES * 2


def failing(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EIO, Status.DEVICE_FAILED),
        (errno.ENOSPC, Status.NO_SPACE),
        (errno.EDQUOT, Status.NO_SPACE),
        (errno.EFBIG, Status.NO_SPACE),
        (errno.EROFS, Status.PERMISSION_DENIED),
        (errno.EBADF, Status.PERMISSION_DENIED),
        (errno.ENXIO, Status.DEVICE_FAILED),
    ],
)
def test_each_error_of_a_write_has_its_status(
    number: int, status: Status, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", failing(number))
    assert status_of(lambda: block.write(0, ONES, LATER, durable=False)) is status
    assert block.failed == "", "nothing was written"
    monkeypatch.setattr(os, "pwritev", failing(number))
    assert status_of(lambda: block.write(0, ONES, LATER, durable=True)) is status
    assert bool(block.failed) is (status is Status.DEVICE_FAILED)


def test_no_room_at_the_sync_of_a_durable_write_is_a_failure(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one call says ENOSPC for both: the write alone succeeds, so it was the sync, and what
    was written before may be lost."""
    monkeypatch.setattr(os, "pwritev", failing(errno.ENOSPC))

    assert status_of(lambda: block.write(0, ONES, LATER, durable=True)) is Status.DEVICE_FAILED
    assert status_of(lambda: block.flush(LATER)) is Status.DEVICE_FAILED


def test_a_late_request_does_not_reach_the_device(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pread", "pwrite", "pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, failing(errno.EIO))
    past = Nanos(time.monotonic_ns() - 1)

    for act in (
        lambda: block.read(0, 1, past),
        lambda: block.write(0, ONES, past, durable=True),
        lambda: block.flush(past),
    ):
        assert status_of(act) is Status.TIMED_OUT


# ---- entropy


def test_a_source_without_hardware_is_getrandom_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "HWRNG_PATH", "/dev/nexus-has-none")

    granted, descriptor, undo = opened(RNG, None)

    with undo:
        assert (granted.backing, descriptor, granted.described) == ("getrandom", -1, False)
        source = adopt_device(granted, descriptor)
        assert isinstance(source, Source)
        assert len(source.draw(256)) == 256
        assert [entry.backing for entry in Bus((RNG,), None).scan()] == ["getrandom"]


def test_a_source_by_its_path_is_that_or_none(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(b"always the same")
    assert "no character device" in why_refused(RNG._replace(path=str(file)), None)
    assert "No such file" in why_refused(RNG._replace(path=str(tmp_path / "none")), None)
    assert "delivers nothing" in why_refused(RNG._replace(path="/dev/null"), None)
    granted, descriptor, undo = opened(RNG._replace(path="/dev/urandom"), None)
    with undo:
        assert granted.backing == "node"
        assert len(Source(granted, descriptor).draw(32)) == 32


def test_a_source_that_has_nothing_delivers_nothing_and_one_that_fails_has_failed() -> None:
    granted = Granted("rng", HardwareKind.ENTROPY, "hwrng", 0, writable=False)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    try:
        assert Source(granted, reader).draw(8) == b""
        os.write(writer, b"abc")
        assert Source(granted, reader).draw(8) == b"abc"
    finally:
        os.close(reader)
        os.close(writer)
    descriptor = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        assert status_of(lambda: Source(granted, descriptor).draw(8)) is Status.DEVICE_FAILED
    finally:
        os.close(descriptor)


def test_a_source_is_given_a_bounded_time_to_have_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "HWRNG_PAUSE", 0.0)
    asked = []

    def busy() -> bytes:
        asked.append(1)
        raise BlockingIOError

    assert not hardware.delivers(busy)
    assert len(asked) == hardware.HWRNG_PROBES_MAX
    assert hardware.delivers(lambda: b"x")
    assert not hardware.delivers(lambda: b"")


def test_what_is_only_on_the_simulated_bus_is_not_here() -> None:
    bus = (
        RNG,
        Hardware("empty", HardwareKind.EMPTY),
        Hardware("old", HardwareKind.ENTROPY, legacy=True),
    )

    assert [entry.name for entry in Bus(bus, None).scan()] == ["rng"]


# ---- register windows, over memory


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("registers")
    os.ftruncate(descriptor, 3 * PAGE_SIZE)
    yield descriptor
    os.close(descriptor)


def area_over(memory: int) -> DmaArea:
    view = memoryview(map_shared(memory, 2 * PAGE_SIZE, 0)).cast("B")
    return DmaArea(view, (0x9000, 0x4000))


def test_registers_are_little_endian_words_of_the_mapping(memory: int) -> None:
    os.pwrite(memory, b"\x76\x69\x72\x74", PAGE_SIZE)
    registers = Registers(map_shared(memory, 3 * PAGE_SIZE, 0), PAGE_SIZE)

    assert registers.length == 2 * PAGE_SIZE
    assert registers.read(0) == 0x7472_6976
    registers.write(2 * PAGE_SIZE - 4, 0xFFFF_FFFE)
    assert os.pread(memory, 4, 3 * PAGE_SIZE - 4) == b"\xfe\xff\xff\xff"


def test_an_access_outside_a_window_or_after_its_end_is_a_value_error(memory: int) -> None:
    registers = Registers(map_shared(memory, PAGE_SIZE, 0))

    for offset in (-4, 1, 2, 3, PAGE_SIZE, PAGE_SIZE - 2, 1 << 40):
        with pytest.raises(ValueError, match="no register at"):
            registers.read(offset)
        with pytest.raises(ValueError, match="no register at"):
            registers.write(offset, 0)
    for value in (-1, 1 << 32):
        with pytest.raises(ValueError, match="no 32-bit word"):
            registers.write(0, value)
    registers.end()
    with pytest.raises(ValueError, match="has ended"):
        registers.read(0)
    assert os.pread(memory, PAGE_SIZE, 0) == bytes(PAGE_SIZE)


def test_a_window_maps_whole_pages_and_never_executable(memory: int) -> None:
    granted = Granted("net", HardwareKind.EMPTY, "virtio-mmio", 0, writable=True)
    window = Window(granted, map_shared(memory, 2 * PAGE_SIZE, 0), area_over(memory))

    assert window.map(PAGE_SIZE, execute=False).length == PAGE_SIZE
    assert status_of(lambda: window.map(0, execute=True)) is Status.PERMISSION_DENIED
    assert status_of(lambda: window.map(2 * PAGE_SIZE, execute=False)) is Status.PERMISSION_DENIED
    assert status_of(lambda: window.map(-PAGE_SIZE, execute=False)) is Status.PERMISSION_DENIED
    assert status_of(lambda: window.map(4, execute=False)) is Status.INVALID_ARGUMENT


def test_dma_memory_is_the_same_each_time_and_shared_with_the_device(memory: int) -> None:
    granted = Granted("net", HardwareKind.EMPTY, "virtio-mmio", 0, writable=True)
    window = Window(granted, map_shared(memory, PAGE_SIZE, 0), area_over(memory))

    area = window.dma()
    area.view[PAGE_SIZE : PAGE_SIZE + 3] = b"abc"

    assert (len(area.view), area.addresses) == (2 * PAGE_SIZE, (0x9000, 0x4000))
    assert os.pread(memory, 3, PAGE_SIZE) == b"abc"
    os.pwrite(memory, b"def", 0)
    assert bytes(window.dma().view[:3]) == b"def"
