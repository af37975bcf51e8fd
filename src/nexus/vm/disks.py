"""The disks of a guest on the host: files, and what is in the one for what lasts.

That one is a small ext4, made and read by the tools of e2fsprogs, which need no root. Before the
first boot it is given what the run's state directory holds; after each boot the directory is given
what the disk holds, so that a runner finds there what it finds beside a system of processes.

The guest is not trusted: it has the whole disk and may write any bytes there. Nothing of it is
written on the host before the file system is checked and all that is in the folder is counted, and
nothing on the host is removed before all of it is there.
"""

import json
import os
import re
import resource
import shutil
import stat
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import HardwareKind
from nexus.init.plan import Plan
from nexus.kernel.core import Hardware
from nexus.proof.remains import disk_of
from nexus.vm.contract import DISK_SUFFIX, PERSIST, PERSIST_STATE, SERIAL_SIZE_MAX
from nexus.vm.packages import NotHad
from nexus.vm.qemu import Disk

PERSIST_SIZE: Final = 128 * 1024 * 1024  # bytes; holes until they are written
TOOL_MAX: Final = 60.0  # seconds for one tool
TOOLS: Final = "e2fsprogs"  # the package
NEEDED: Final = ("mkfs.ext4", "e2fsck", "debugfs")
TOOL_FOLDERS: Final = ("/usr/sbin", "/sbin")  # of root's path alone
CARRIED_MAX: Final = 256  # files that the host has put there since
HOME_COUNT_MAX: Final = 32768  # names; mkfs.ext4 gives a disk of this size as many inodes
HOME_DEPTH_MAX: Final = 32  # folders in one another; each costs one debugfs
PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # one word of debugfs, and no option
LISTED: Final = re.compile(r"/([0-9]+)/([0-7]{6})/[0-9]+/[0-9]+/([^/]+)/([0-9]*)/")  # of `ls -p`
ECHO: Final = "debugfs: "  # before each command, on stdout
BANNER: Final = re.compile(r"debugfs [0-9.]+ \([^)]*\)")  # on stderr, and no problem
# Who is not root has what comes home as his own.
NOT_ROOT: Final = re.compile(
    r"(rdump|dump_file): Operation not permitted while changing ownership of .*"
)
FIXED: Final = {0, 1}  # what e2fsck exits with for a file system that is in order now


def check_tools() -> None:
    """Raises NotHad when a tool is missing."""
    for name in NEEDED:
        _ = _tool(name)


def disks_of(plan: Plan, state: Path) -> tuple[Disk, ...]:
    """The disks of a plan and the one for what lasts, made where they are not there. Raises
    NotHad."""
    persist = _persist_file(state)
    if persist.exists():
        _repair(persist)
        _carry(state, persist)
    else:
        _make(state, persist)
    disks = tuple(_disks(plan, state))
    for disk, size in disks:
        if not disk.file.exists():
            with disk.file.open("xb") as new:
                _ = new.truncate(size)
    return tuple(disk for disk, _ in disks)


def disks_later(plan: Plan, state: Path) -> tuple[Disk, ...]:
    """The same disks for a machine that they are put in later: another one has them now."""
    return tuple(replace(disk, size=size) for disk, size in _disks(plan, state))


def _disks(plan: Plan, state: Path) -> Iterator[tuple[Disk, int]]:
    """Each disk, and its size in bytes."""
    yield Disk(name=PERSIST, file=_persist_file(state)), PERSIST_SIZE
    serials = {PERSIST}
    for device in filter(_is_disk, plan.hardware):
        name = device.name[:SERIAL_SIZE_MAX]
        assert name not in serials, f"two disks have the serial {name!r}"
        serials.add(name)
        disk = Disk(
            name=name,
            file=Path(device.path) if device.path else state / f"{device.name}{DISK_SUFFIX}",
            read_only=device.read_only,
            is_alone=device == disk_of(plan),
        )
        yield disk, device.size


def _is_disk(device: Hardware) -> bool:
    """A transport of the old layout is on no machine of ours."""
    return device.kind is HardwareKind.BLOCK and not device.legacy


def _persist_file(state: Path) -> Path:
    """The disk for what lasts."""
    return state / f"{PERSIST}{DISK_SUFFIX}"


def _make(state: Path, file: Path) -> None:
    """It, with what the host has to give to the first boot."""
    seen = _seen(state)
    with tempfile.TemporaryDirectory(dir=state, prefix=".new-") as name:
        new = Path(name, "disk")
        root = Path(name, "root")
        (root / PERSIST_STATE).mkdir(parents=True)
        (root / PERSIST_STATE).chmod(0o700)
        for entry in _lasting(state):
            target = root / PERSIST_STATE / entry.name
            if entry.is_dir():
                _ = shutil.copytree(entry, target, symlinks=True)
            else:
                _ = shutil.copy2(entry, target)
        with new.open("xb") as disk:
            _ = disk.truncate(PERSIST_SIZE)
        _ = _run("mkfs.ext4", "-q", "-F", "-m", "0", "-d", str(root), str(new))
        _ = new.rename(file)
    _stamp(state, seen)


def _stamp_file(state: Path) -> Path:
    return state / ".persist-equal"


def _stamp(state: Path, seen: dict[str, list[int]]) -> None:
    """Remember the files of the directory that are so on the disk too."""
    _ = _stamp_file(state).write_text(json.dumps(seen))


def _stamped(state: Path) -> dict[str, list[int]]:
    """Those files; none, if what is there is of another version: then all are new."""
    try:
        found = json.loads(_stamp_file(state).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seen(state: Path) -> dict[str, list[int]]:
    """By what a file is known again: its size in bytes and when it was changed. A guest sets both,
    so that they are compared with what they were and never with a clock."""
    found = {entry.name: entry.stat() for entry in _lasting(state) if entry.is_file()}
    return {name: [file.st_size, file.st_mtime_ns] for name, file in found.items()}


def _lasting(state: Path) -> list[Path]:
    """What of the directory belongs on the disk: files and folders of a system's own. Raises
    NotHad for a name that is not plain, be it the host's or the guest's: left out, it would be on
    the one side only and nobody would know."""
    found: list[Path] = []
    for entry in sorted(state.iterdir()):
        mode = entry.lstat().st_mode
        is_plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        is_ours = entry.name.startswith((".", "console-", "guest-"))
        if is_plain and not is_ours and entry.suffix != DISK_SUFFIX:
            _check_plain(entry.name)
            found.append(entry)
    return found


def _check_plain(name: str) -> None:
    if PLAIN.fullmatch(name) is None:
        raise NotHad(f"{name!r} is no plain name for what lasts; try `mv`, in the guest if it is")


def _carry(state: Path, disk: Path) -> None:
    """Put files on the disk that the host has written since the last boot."""
    seen, stamped = _seen(state), _stamped(state)
    changed = [name for name in seen if seen[name] != stamped.get(name)]
    assert len(changed) <= CARRIED_MAX, f"{len(changed)} files"
    if changed:
        there = {entry.name for entry in _listed(disk, [f"/{PERSIST_STATE}"])}
        words = [f"cd /{PERSIST_STATE}"]
        for name in changed:
            words += [f"rm {name}"] if name in there else []
            words += [f"write {name} {name}"]
        _ = _debugfs(disk, words, cwd=state, writable=True)
    _stamp(state, seen)


def bring_home(state: Path) -> None:
    """Make the directory what the disk says, after a boot. Raises NotHad."""
    disk = _persist_file(state)
    if not disk.exists():
        return
    _repair(disk)
    with tempfile.TemporaryDirectory(dir=state, prefix=".home-") as name:
        _check_content(disk)
        _ = _debugfs(disk, [f"rdump /{PERSIST_STATE} ."], cwd=Path(name))
        there = Path(name, PERSIST_STATE)
        if not there.is_dir():
            raise NotHad(f"nothing came home from {disk.name}; try `df -h`")
        new, old = _lasting(there), _lasting(state)
        for entry in old:
            if not (there / entry.name).exists():
                _remove(entry)
        for entry in new:
            _remove(state / entry.name)
            _ = entry.rename(state / entry.name)
    _stamp(state, _seen(state))


def _check_content(disk: Path) -> None:
    """Count what would come home, before any of it is written: a file may be nearly all holes, and
    may have many names. Raises NotHad."""
    count = size = 0
    folders = [f"/{PERSIST_STATE}"]
    for _ in range(HOME_DEPTH_MAX):
        listed = _listed(disk, folders)
        count += len(listed)
        size += sum(entry.size for entry in listed)
        # Of two entries with one name the first may be a link, through which the second is written.
        again = Counter((entry.folder, entry.name) for entry in listed).most_common(1)
        if again and again[0][1] > 1:
            raise NotHad(f"{again[0][0][1]!r} is twice on {disk.name}; try `e2fsck -fD`")
        if count > HOME_COUNT_MAX or size > PERSIST_SIZE:
            raise NotHad(
                f"{disk.name} holds {count} names and {size} bytes, more than the host takes "
                f"({HOME_COUNT_MAX}, {PERSIST_SIZE}); try `rm`, in the guest"
            )
        folders = [f"<{entry.inode}>" for entry in listed if stat.S_ISDIR(entry.mode)]
        if not folders:
            return
    raise NotHad(f"folders on {disk.name} are in one another {HOME_DEPTH_MAX} deep; try `rm -r`")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _repair(disk: Path) -> None:
    """Replay the journal of a disk whose machine went off as it was. All of it is looked at, also
    where it says that it is clean: a guest wrote that, and `../x` is a name to debugfs."""
    _ = _run("e2fsck", "-f", "-p", str(disk), fine=FIXED)


class _Entry(NamedTuple):
    """A name in a folder of the disk."""

    folder: str  # as it was asked for
    inode: int
    mode: int
    name: str
    size: int  # bytes, holes among them; 0 for a folder


def _listed(disk: Path, folders: Iterable[str]) -> list[_Entry]:
    """What is in folders of the disk. Raises NotHad, for a name with a line break too."""
    ask = "ls -p "
    found: list[_Entry] = []
    folder = ""
    for line in _debugfs(disk, [f"{ask}{folder}" for folder in folders]).split("\n"):
        if line.startswith(ECHO):
            folder = line.removeprefix(f"{ECHO}{ask}")
        elif line:
            listed = LISTED.fullmatch(line)
            if listed is None:
                raise NotHad(f"{disk.name} has a name that is no line: {line!r}; try `mv` in it")
            inode, mode, name, size = listed.groups()
            if name not in {".", ".."}:
                found.append(_Entry(folder, int(inode), int(mode, 8), name, int(size or 0)))
    return found


def _debugfs(
    disk: Path, words: Iterable[str], *, cwd: Path | None = None, writable: bool = False
) -> str:
    """What debugfs printed. It exits with 0 whatever a command came to, so that any complaint of it
    is a failure. Paths in `words` are relative, since it has no way to quote a quote."""
    options = ["-w"] if writable else []
    text = "".join(f"{word}\n" for word in words)
    done = _run("debugfs", *options, "-f", "-", str(disk.absolute()), text=text, cwd=cwd)
    for line in done.stderr.split("\n"):
        if line and BANNER.fullmatch(line) is None and NOT_ROOT.fullmatch(line) is None:
            raise NotHad(f"debugfs says {line!r} of {disk.name}; try `df -h`")
    return done.stdout


class _Done(NamedTuple):
    """What a tool printed."""

    stdout: str
    stderr: str


def _run(
    name: str,
    *arguments: str,
    text: str = "",
    cwd: Path | None = None,
    fine: Iterable[int] = (0,),
) -> _Done:
    with subprocess.Popen(  # noqa: S603 (fixed arguments)
        [_tool(name), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},  # what it says is compared
        encoding="utf-8",
        errors="backslashreplace",  # a name on the disk is any bytes
    ) as tool:
        _limit(tool.pid)  # before debugfs has its first command
        try:
            done = _Done(*tool.communicate(text, timeout=TOOL_MAX))
        except subprocess.TimeoutExpired:
            tool.kill()
            raise NotHad(f"{name} was not over in {TOOL_MAX:.0f} s; try `df -h`") from None
    if tool.returncode not in fine:
        said = done.stderr.strip().rpartition("\n")[2]
        raise NotHad(f"{name} says {said!r} of {Path(arguments[-1]).name}; try `df -h`")
    return done


def _limit(tool: int) -> None:
    """Let a process write no file that is larger than the disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = PERSIST_SIZE if hard == resource.RLIM_INFINITY else min(PERSIST_SIZE, hard)
    _ = resource.prlimit(tool, resource.RLIMIT_FSIZE, (limit, limit))


def _tool(name: str) -> str:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *TOOL_FOLDERS))
    program = shutil.which(name, path=path)
    if program is None:
        raise NotHad(f"there is no {name}; try `apt-get install {TOOLS}`")
    return program
