"""The files of a set, by their paths in it, read from folders that people keep.

    python/nexus/...   the package tree of Nexus
    system/...         the system file and what it names, laid out as beside it

What a folder holds beside Python and its data (compiled files, hidden files, tests' caches) is left
out. A link is refused and not followed: what it leads to may be another thing on the next machine.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from nexus.init.files import WrongFile, read_whole
from nexus.init.system import System
from nexus.sets import UNPACKED_SIZE_MAX, Content
from nexus.sets.manifest import PARTS_MAX

PYTHON: Final = "python"
SYSTEM: Final = "system"
LEFT_OUT: Final = ("__pycache__",)
LEFT_OUT_ENDS: Final = (".pyc", ".pyo", ".egg-info", ".dist-info")

Contents = dict[str, Content]


class WrongContent(Exception):
    """Something that cannot be in a set: where, and what is wrong with it."""

    def __init__(self, file: Path, rule: str) -> None:
        super().__init__(f"{file} {rule}")
        self.file = file
        self.rule = rule


def package_folder() -> Path:
    """The package tree that this process runs."""
    import nexus

    return Path(nexus.__file__).parent


def package_files(folder: Path) -> Contents:
    """The package tree of Nexus in `folder`, under its path in a set."""
    return dict(_tree(folder, PurePosixPath(PYTHON, "nexus")))


def system_files(system: System) -> Contents:
    """The system file, its policy files and the folders of its `path`, laid out as they are."""
    home = system.file.parent
    found = {placed(name): _content(home / name) for name in (system.file.name, *system.policy)}
    for folder in system.path:
        for part in _packages(home, folder):
            found |= _tree(part, PurePosixPath(placed(part.relative_to(home).as_posix())))
    return found


def _packages(home: Path, folder: str) -> list[Path]:
    """What can be imported from a folder of `path`: modules, and folders with Python in them."""
    if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
        raise WrongContent(Path(folder), "is not below the system file: a set holds no other path")
    found = []
    for entry in _entries(home / folder):
        file = Path(entry.path)
        is_module = entry.name.endswith(".py")
        if is_module or (entry.is_dir(follow_symlinks=False) and any(file.rglob("*.py"))):
            found.append(file)
        elif entry.is_symlink() and file.is_dir():
            raise WrongContent(file, "is a link")
    return found


def placed(name: str) -> str:
    """The path in a set of what is beside the system file."""
    return PurePosixPath(SYSTEM, name).as_posix()


def _tree(file: Path, path: PurePosixPath, depth: int = 0) -> Iterator[tuple[str, Content]]:
    """A file, or all files below a folder, by their paths in the set."""
    if depth > PARTS_MAX:
        raise WrongContent(file, f"is more than {PARTS_MAX} folders deep")
    if file.is_symlink() or not file.is_dir():
        yield path.as_posix(), _content(file)
        return
    for entry in _entries(file):
        yield from _tree(Path(entry.path), path / entry.name, depth + 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise WrongContent(folder, f"cannot be read: {error.strerror or error}") from error
    return [
        entry
        for entry in found
        if entry.name not in LEFT_OUT
        and not entry.name.startswith(".")
        and not entry.name.endswith(LEFT_OUT_ENDS)
    ]


def _content(file: Path) -> Content:
    try:
        mode = file.lstat().st_mode
    except OSError as error:
        raise WrongContent(file, f"cannot be read: {error.strerror or error}") from error
    if stat.S_ISLNK(mode):
        raise WrongContent(file, "is a link")
    try:
        data = read_whole(file, UNPACKED_SIZE_MAX)
    except WrongFile as wrong:
        raise WrongContent(file, f"is {wrong.found}, and no file {wrong.rule}") from wrong
    return Content(data=data, executable=bool(mode & stat.S_IXUSR))
