"""The bus map on Linux: what is behind each device, and init's opening of it for its holder.

A block device is a file or a device node; an entropy source is a hardware generator's node, or
getrandom(2). A machine of our own has pages of registers too: a device without a path that one of
them is for is a window, which its holder drives, and only there is an empty transport. A legacy
transport is a thing of the simulated bus and not here.

A device without a path is an image in the state directory, made before the first boot of that
directory and never again: a marker beside it says that it has been there, and an image that is
missing since is refused, for a new one would be taken for what was lost. What has a path is the
operator's to make: it may be missing because a file system is not mounted. A boot makes no image.

An image is written full of zeros when it is made: over blocks that are only reserved, each first
write also changes the file system's own records, and a durable write of 4 KiB takes twice the
time (measured on ext4: 0.11 ms against 0.26 ms; bench/state).
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from nexus.abi import BLOCK_SIZE, BusEntry, HardwareKind, SpawnReason
from nexus.kernel.core import WINDOW_SIZE, Hardware, SpawnRefused
from nexus.kernel.linux.devices import FILE, GETRANDOM, HWRNG, NODE, WINDOW, Granted
from nexus.kernel.linux.durable import DIRECTORY_FLAGS, make_directory, replace_file
from nexus.kernel.linux.mmio import MEMORY, Mmio, MmioPage

HWRNG_PATH: Final = "/dev/hwrng"
HWRNG_NUMBER: Final = os.makedev(10, 183)  # Documentation/admin-guide/devices.txt
HWRNG_PROBE_SIZE: Final = 16  # bytes read once to see whether a generator is behind the node
HWRNG_PROBES_MAX: Final = 20  # looks, HWRNG_PAUSE apart, while the generator has none at hand
HWRNG_PAUSE: Final = 0.005  # seconds
IMAGE_SIZE_MAX: Final = 256 << 20  # bytes of an image made here; a first boot waits for it
IMAGE_SUFFIX: Final = ".img"
MARKER_SUFFIX: Final = ".made"  # of the file that says that an image has been there
CHUNK: Final = 1 << 20  # bytes written at once

# Where a descriptor for writing is refused, one for reading may be had.
READ_ONLY_ERRORS: Final = frozenset((errno.EROFS, errno.EACCES, errno.EPERM))

_BLOCK: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_NEW: Final = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL


class Made(NamedTuple):
    """An image that was made before a boot."""

    name: str
    path: Path
    size: int


class Bus:
    """The devices of this machine, and their opening."""

    __slots__ = ("_state_dir", "_unmade", "present", "windows")

    def __init__(
        self,
        hardware: Sequence[Hardware],
        state_dir: Path | None,
        pages: Sequence[MmioPage] = (),
    ) -> None:
        self._state_dir = state_dir
        self._unmade: dict[str, str] = {}  # why an image could not be made, by the device's name
        modern = [each for each in sorted(hardware, key=_by_name) if not each.legacy]
        self.windows = _windows(modern, pages)
        self.present = tuple(
            each
            for each in modern
            if each.kind is not HardwareKind.EMPTY or each.name in self.windows
        )

    def close(self) -> None:
        """No device has a holder any more."""
        for window in self.windows.values():
            window.close()

    def make_images(self) -> tuple[Made, ...]:
        """Before a boot: make the images that this state directory has never had. One that cannot
        be made is refused when it is granted."""
        if self._state_dir is None:
            return ()
        made = []
        for device in self.present:
            if device.kind is HardwareKind.BLOCK and not self._is_elsewhere(device):
                try:
                    if self._make(device):
                        made.append(Made(device.name, self._path_of(device), device.size))
                except OSError as error:
                    self._unmade[device.name] = f"it could not be made: {_why(error)}"
        return tuple(made)

    def _make(self, device: Hardware) -> bool:
        """Make an image that was never there, and mark it; False if there is nothing to make.
        Raises OSError."""
        path = self._path_of(device)
        marker = path.with_suffix(MARKER_SUFFIX)
        if os.path.lexists(path):
            # Of whoever put it there: from now on it is missed too. Where nothing can be
            # written, nothing can be made either.
            with suppress(OSError):
                _mark(marker)
            return False
        if os.path.lexists(marker) or device.size > IMAGE_SIZE_MAX:
            return False
        _make_image(path, device.size)
        _mark(marker)
        return True

    def scan(self) -> tuple[BusEntry, ...]:
        """The answer to BusScan."""
        return tuple(self._entry(each) for each in self.present)

    def _entry(self, device: Hardware) -> BusEntry:
        window = self.windows.get(device.name)
        if window is None:
            return BusEntry(device.name, device.kind, self._backing(device), 0, 0, 0, 0, 0)
        found = window.look()
        return BusEntry(device.name, device.kind, WINDOW, window.page.address, WINDOW_SIZE, *found)

    def _is_elsewhere(self, device: Hardware) -> bool:
        """Whether there is more to a disk than an image in the state directory."""
        return bool(device.path) or device.name in self.windows

    def source(self) -> Granted:
        """What an entropy device without a path is on this machine."""
        with ExitStack() as undo:
            return _open_source(Hardware("entropy", HardwareKind.ENTROPY), undo)[0]

    def open(self, device: Hardware, undo: ExitStack) -> tuple[Granted, int]:
        """Open a device for its one holder: what it is, and a descriptor that `undo` closes, -1
        for getrandom and for a window, whose mappings `undo` takes from init when they were
        inherited. Refuses: SpawnRefused (map-failed)."""
        window = self.windows.get(device.name)
        if window is not None:
            return _open_window(device, window, undo)
        if device.kind is HardwareKind.ENTROPY:
            return _open_source(device, undo)
        return self._open_block(device, undo)

    def _backing(self, device: Hardware) -> str:
        if device.kind is HardwareKind.ENTROPY:
            with ExitStack() as undo, suppress(SpawnRefused):
                return _open_source(device, undo)[0].backing
            return NODE  # that cannot be opened
        try:
            node = stat.S_ISBLK(self._path_of(device).stat().st_mode)
        except (OSError, SpawnRefused):
            return FILE  # that is not there yet
        return NODE if node else FILE

    # ------------------------------------------------------------------ block devices

    def _open_block(self, device: Hardware, undo: ExitStack) -> tuple[Granted, int]:
        path = self._path_of(device)
        try:
            descriptor, writable = _open_file(path, device, undo)
        except FileNotFoundError:
            raise _refused(device, path, self._why_missing(path, device)) from None
        except OSError as error:
            raise _refused(device, path, _why(error)) from None
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise _refused(device, path, "it is a directory")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise _refused(device, path, "it is neither a file nor a block device")
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size < device.size:
            raise _refused(device, path, f"it has {size} bytes, the bus map says {device.size}")
        try:
            # Held by the open file itself, so by its holder when init has closed its copy.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refused(device, path, "another system uses it") from None
        except OSError as error:
            raise _refused(device, path, f"it cannot be locked: {error.strerror}") from None
        backing = NODE if stat.S_ISBLK(mode) else FILE
        granted = Granted(device.name, device.kind, backing, device.size // BLOCK_SIZE, writable)
        return granted, descriptor

    def _why_missing(self, path: Path, device: Hardware) -> str:
        """What is not there and why not, and what to do about it."""
        if path.is_relative_to("/dev"):
            return "it is not there: no such device"
        make = f"`truncate -s {device.size} {path}` makes an empty one"
        marker = path.with_suffix(MARKER_SUFFIX)
        if device.path:
            return f"it is not there: mount what it is on, or {make}"
        if device.name in self._unmade:
            return self._unmade[device.name]
        if os.path.lexists(marker):
            return (
                "it was there and is missing: bring it back, "
                f"or remove {marker} to begin with an empty one"
            )
        return f"it is not there, and init makes up to {IMAGE_SIZE_MAX} bytes: {make}"

    def _path_of(self, device: Hardware) -> Path:
        """Where a block device is; what leaves the state directory must say so by being
        absolute."""
        given = PurePosixPath(device.path or f"{device.name}{IMAGE_SUFFIX}")
        if given.is_absolute():
            return Path(given)
        if self._state_dir is None:
            raise _refused(device, Path(given), "this run has no state directory")
        if len(given.parts) != 1 or ".." in given.parts:
            raise _refused(device, Path(given), "it is not in the state directory itself")
        return self._state_dir / given


def _windows(hardware: Sequence[Hardware], pages: Sequence[MmioPage]) -> dict[str, Mmio]:
    """Which page is which device's, by the name of the device: one that is for it by name, else
    the first one for any of its kind."""
    left = list(pages)
    windows = {}
    for device in hardware:
        fitting = [each for each in left if each.kind is device.kind and not device.path]
        fitting = [each for each in fitting if each.name in ("", device.name)]
        page = max(fitting, key=lambda each: each.name, default=None)
        if page is not None:
            left.remove(page)
            windows[device.name] = Mmio(page)
    return windows


def _by_name(device: Hardware) -> str:
    return device.name


def _open_window(device: Hardware, window: Mmio, undo: ExitStack) -> tuple[Granted, int]:
    try:
        mapped = window.open(undo)
    except OSError as error:
        where = f"the page {window.page.address:#x} of {MEMORY}"
        raise SpawnRefused(
            SpawnReason.MAP_FAILED, f"device {device.name}: {where}: {_why(error)}"
        ) from None
    return Granted(device.name, device.kind, WINDOW, 0, writable=True, mapped=mapped), -1


def _open_file(path: Path, device: Hardware, undo: ExitStack) -> tuple[int, bool]:
    """A descriptor of an image or a node, and whether it may be written. Raises OSError."""
    flags = _BLOCK
    with suppress(OSError):
        # A node is often known by a link in /dev, and that directory is root's. A link to a file
        # is not followed: whoever may make one there would choose what is written.
        if stat.S_ISBLK(path.stat().st_mode):
            flags = flags & ~os.O_NOFOLLOW | os.O_EXCL  # not while it is mounted
    mode = os.O_RDONLY if device.read_only else os.O_RDWR
    try:
        return _opened(path, flags | mode, undo), not device.read_only
    except OSError as error:
        if device.read_only or error.errno not in READ_ONLY_ERRORS:
            raise
        return _opened(path, flags | os.O_RDONLY, undo), False


def _opened(path: Path, flags: int, undo: ExitStack) -> int:
    descriptor = os.open(path, flags)
    _ = undo.callback(os.close, descriptor)
    return descriptor


def _mark(marker: Path) -> None:
    """Have it known to every later boot that the image has been there. Raises OSError."""
    if os.path.lexists(marker):
        return
    directory = os.open(marker.parent, DIRECTORY_FLAGS)
    try:
        replace_file(directory, marker.name, b"")
    finally:
        os.close(directory)


def _make_image(path: Path, size: int) -> None:
    """Make an image of zeros: whole and durable, or not at all. Raises OSError."""
    make_directory(path.parent)
    directory = os.open(path.parent, DIRECTORY_FLAGS)
    new = f"{path.name}.new"
    try:
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=directory)  # of a boot that ended half way
        try:
            _write_zeros(os.open(new, _NEW, 0o600, dir_fd=directory), size)
            os.rename(new, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(new, dir_fd=directory)
            raise
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_zeros(descriptor: int, size: int) -> None:
    try:
        zeros, done = bytes(CHUNK), 0
        while done < size:
            done += os.write(descriptor, zeros[: min(CHUNK, size - done)])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a symbolic link"
    if error.errno == errno.EBUSY:
        return "it is in use, mounted perhaps"
    if error.errno == errno.EISDIR:
        return "it is a directory"
    return error.strerror or str(error)


def _refused(device: Hardware, path: Path, why: str) -> SpawnRefused:
    return SpawnRefused(SpawnReason.MAP_FAILED, f"device {device.name}: {path}: {why}")


# ---------------------------------------------------------------------- entropy sources


def _open_source(device: Hardware, undo: ExitStack) -> tuple[Granted, int]:
    """Never waits for bytes: whoever draws would wait without a deadline."""
    path = device.path or HWRNG_PATH
    try:
        descriptor = _opened(
            Path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, undo
        )
        status = os.fstat(descriptor)
        if not stat.S_ISCHR(status.st_mode):
            raise _refused(device, Path(path), "it is no character device")
        backing = HWRNG if status.st_rdev == HWRNG_NUMBER else NODE
        if delivers(lambda: os.read(descriptor, HWRNG_PROBE_SIZE)):
            return Granted(device.name, device.kind, backing, 0, writable=False), descriptor
        why = "it delivers nothing"
    except OSError as error:
        why = error.strerror or str(error)
    if device.path:
        raise _refused(device, Path(path), why)
    return Granted(device.name, device.kind, GETRANDOM, 0, writable=False), -1


def delivers(read: Callable[[], bytes]) -> bool:
    """Whether a source has bytes within a bounded number of looks. Raises OSError."""
    for _ in range(HWRNG_PROBES_MAX):
        try:
            return bool(read())
        except BlockingIOError:
            time.sleep(HWRNG_PAUSE)  # noqa: TID251 (a kernel's wait, bounded)
    return False
