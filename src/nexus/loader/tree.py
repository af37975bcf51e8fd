"""The files of a slot's set on Linux, where Python can import them: unpacked, stamped, compiled.

    STATE/slots/b-0123456789ab/python/nexus/...      the set's package
                               python/nexus_set.py   the stamp: which set this is
                               system/...            system file and policy
                               tree.json             the SHA-256 of every file beside the set's

The set in the slot is what counts, the tree a copy of it: before each boot every file of the set is
compared with the manifest, and what was compiled with tree.json. What is not as it was made,
because of a power cut or of whoever wrote there, is removed and made anew. So a tree is used whole
or not at all, and nothing of it has to be synced: that took four fifths of its making (a thousand
files), and after a power cut that comes before the kernel wrote them they are made once more.
"""

import json
import os
import shutil
import sys
from contextlib import suppress
from hashlib import sha256
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from io import FileIO
from pathlib import Path
from typing import Final

import nexus
from nexus.bootctl import BootRecord, SlotName
from nexus.drivers.finished import finished
from nexus.kernel.linux.durable import make_directory
from nexus.sets import CHUNK_SIZE, File, Manifest, SetRefused, Source, unpack

FOLDER: Final = "slots"
PYTHON: Final = "python"  # of the tree what is importable
SUMS: Final = "tree.json"
STAMP: Final = "nexus_set.py"
STAMPED: Final = f"{PYTHON}/{STAMP}"
NEW: Final = ".new"
DIGEST_SHOWN: Final = 12  # characters of the digest in a tree's name
COMPILERS_MAX: Final = 4  # processes; more only fight for the disk
DIRECTORY_MODE: Final = 0o755  # the state directory above is its user's alone
PLAIN_MODE: Final = 0o644
PROGRAM_MODE: Final = 0o755
SUMS_SIZE_MAX: Final = 4 * 1024 * 1024  # bytes; 8192 files with the longest paths are less
MODULE_SIZE_MAX: Final = 16 * 1024 * 1024  # bytes of one compiled module
READ_SIZE: Final = 256 * 1024
UNCHECKED: Final = MAGIC_NUMBER + (1).to_bytes(4, "little")  # PEP 552: by hash, never compared
HASH: Final = slice(8, 16)  # where such a file says which source it is of


class NoTree(Exception):
    """The set could not be unpacked, and why."""


def tree_name(name: SlotName, digest: bytes) -> str:
    """The folder of a slot's tree."""
    return f"{name.value}-{digest.hex()[:DIGEST_SHOWN]}"


def tree_of(
    state: Path, record: BootRecord, name: SlotName, manifest: Manifest, source: Source
) -> Path:
    """The tree of this slot, made if it is not there as it should be.

    At most two are kept, one for each slot as the record has it. Raises NoTree.
    """
    folder = state / FOLDER
    kept = {tree_name(each, record.slot(each).digest) for each in SlotName}
    digest = record.slot(name).digest
    path = folder / tree_name(name, digest)
    try:
        make_directory(folder)
        folder.chmod(DIRECTORY_MODE)
        for other in folder.iterdir():
            if other.name not in kept:
                _remove(other)
        if not is_whole(path, manifest, digest):
            _remove(path)
            _make(path, manifest, digest, source)
    except SetRefused as refused:
        raise NoTree(f"the set cannot be unpacked: {refused}") from refused
    except OSError as error:
        raise NoTree(f"the set cannot be unpacked: {error}") from error
    return path


def is_whole(path: Path, manifest: Manifest, digest: bytes) -> bool:
    """Whether a tree is what was made of this set, by this Python, to the byte."""
    try:
        sums = json.loads(_read(path / SUMS, SUMS_SIZE_MAX))
        if sums["set"] != digest.hex() or sums["python"] != sys.version:
            return False
        own = {file.path for file in manifest.files}
        names = [name for name in _names(path) if name != SUMS]
        if not _possible(own).issuperset(names):  # whatever tree.json says of it
            return False
        made = {name: _sum(f"{path}/{name}") for name in names if name not in own}
        stamp = sha256(_stamp(manifest, digest)).hexdigest()
        whole = own.issubset(names) and made == sums["files"] and made[STAMPED] == stamp
        return whole and all(_is_as_set(path, file, manifest) for file in manifest.files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _possible(own: set[str]) -> set[str]:
    """Every name that a tree of these files may have: theirs, the stamp, and what is compiled."""
    named = {*own, STAMPED}
    return named | {_compiled(name) for name in named if name.endswith(".py")}


def _is_as_set(path: Path, file: File, manifest: Manifest) -> bool:
    """Whether a file has the chunks that the manifest names, and ends there."""
    with FileIO(_opened(f"{path}/{file.path}")) as opened:
        for index in file.chunks:
            piece = opened.read(CHUNK_SIZE)  # of a regular file, short only at its end
            if sha256(piece).digest() != manifest.chunks[index].sha256:
                return False
        return not opened.read(1)


def _make(path: Path, manifest: Manifest, digest: bytes, source: Source) -> None:
    """Raises SetRefused and OSError."""
    new = path.with_name(path.name + NEW)
    _remove(new)
    new.mkdir(mode=DIRECTORY_MODE)
    folder = _Folder(new)
    try:
        verified = finished(unpack(source, folder))
    finally:
        folder.close()
    if verified.sha256 != digest:
        raise OSError("the slot changed while it was read")
    (new / PYTHON).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    _write(new / STAMPED, _stamp(manifest, digest))
    _take_over(new, path)
    _take_from_base(new)
    _compile(new, path)
    names = sorted(_names(new))
    own = {file.path for file in manifest.files}
    sums = {name: _sum(f"{new}/{name}") for name in names if name not in own}
    text = json.dumps({"set": digest.hex(), "python": sys.version, "files": sums})
    _write(new / SUMS, text.encode())
    _ = new.rename(path)


class _Folder:
    """sets.Sink: a file below a folder for each of the set."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folders: set[str] = set()  # that are there
        self._open: FileIO | None = None

    async def begin(self, file: File) -> None:
        """The next file, which is not there."""
        self._make_folder(file.path.rpartition("/")[0])
        mode = PROGRAM_MODE if file.executable else PLAIN_MODE
        self._open = FileIO(_new(f"{self._path}/{file.path}", mode), "wb")

    async def write(self, data: bytes) -> None:
        """The next bytes of it."""
        assert self._open is not None, "a file begins first"
        _write_all(self._open.fileno(), data)

    async def end(self, file: File) -> None:
        """It is whole."""
        del file
        assert self._open is not None, "a file begins first"
        self.close()

    def _make_folder(self, name: str) -> None:
        if name not in self._folders:
            (self._path / name).mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            self._folders.add(name)

    def close(self) -> None:
        """The file that was being written, if there is one, is given up."""
        if self._open is not None:
            self._open.close()
        self._open = None


def _stamp(manifest: Manifest, digest: bytes) -> bytes:
    """What nexus.runtime.stamp reads."""
    return (
        f'"""Which system set this is; written by the loader."""\n\n'
        f"VERSION = {manifest.version}\nNAME = {manifest.name!r}\nDIGEST = {digest.hex()!r}\n"
    ).encode()


def _take_over(new: Path, path: Path) -> None:
    """Copy from the other slot's tree what was compiled of the same source: an update changes few
    modules, and compiling them all takes longer than the rest of a boot."""
    for other in sorted(path.parent.iterdir()):
        if other in (new, path):
            continue
        try:
            sums = json.loads(_read(other / SUMS, SUMS_SIZE_MAX))
            made = sums["files"] if sums["python"] == sys.version else {}
            for name in _names(new):
                compiled = _compiled(name)
                if name.endswith(".py") and compiled in made:
                    _copy(other, new, name, made[compiled])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # what is missing is compiled


def _copy(other: Path, new: Path, name: str, digest: str) -> None:
    """Take over one module's compiled file, if it is what it was and of this very source."""
    target = new / _compiled(name)
    data = _read(other / _compiled(name), MODULE_SIZE_MAX)
    if sha256(data).hexdigest() == digest and _sum(other / name) == _sum(new / name):
        target.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        _write(target, data)


def _take_from_base(new: Path) -> None:
    """Copy what the base system has compiled of the same source, where it came compiled and never
    compares the two: on an emulated machine a second set of its modules takes minutes.

    A compiled file says which source it is of (PEP 552); whose word is taken for it is the base's.
    """
    base, top = str(Path(nexus.__file__).parent), str(new)
    inside = f"{PYTHON}/{Path(base).name}/"
    there = set(_names(new))
    made: set[str] = set()  # folders
    for name in sorted(there):  # by strings: paths took three times as long
        if not name.startswith(inside) or not name.endswith(".py"):
            continue
        compiled = _compiled(name)
        if compiled in there:
            continue
        try:
            data = _read(_compiled(f"{base}/{name.removeprefix(inside)}"), MODULE_SIZE_MAX)
        except OSError:
            continue
        source = _read(f"{top}/{name}", MODULE_SIZE_MAX)
        if data.startswith(UNCHECKED) and data[HASH] == source_hash(source):
            folder = compiled.rpartition("/")[0]
            if folder not in made:
                Path(top, folder).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
                made.add(folder)
            _write(f"{top}/{compiled}", data)


def _compiled(name: str) -> str:
    """Where Python looks for a module's compiled file."""
    return cache_from_source(name)


def _compile(new: Path, path: Path) -> None:
    """Compile every module, as if it lay in `path`: nobody writes in a tree while it runs.

    By source hash and never checked again: is_whole compares both. A module that is no Python is
    left as it is, for whoever imports it to meet.
    """
    there = set(_names(new))
    modules = sorted(
        name for name in there if name.endswith(".py") and _compiled(name) not in there
    )
    count = min(COMPILERS_MAX, len(os.sched_getaffinity(0)))
    children = []
    for index in range(count):
        child = os.fork()
        if child == 0:
            _compile_and_end(new, path, modules[index::count])
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise OSError(f"a compiler ended with {max(codes, key=abs)}")


def _compile_and_end(new: Path, path: Path, modules: list[str]) -> None:
    """A compiler's life; its exit code says whether it could write."""
    import py_compile  # which most boots do without

    code = 1
    try:
        for name in modules:
            compiled = new / _compiled(name)
            with suppress(py_compile.PyCompileError):
                _ = py_compile.compile(
                    str(new / name),
                    cfile=str(compiled),
                    dfile=str(path / name),
                    doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
        code = 0
    finally:
        os._exit(code)


def _names(path: Path) -> list[str]:
    """Every file below a folder, by its path in it. Raises OSError for what is no file."""
    names, top = [], str(path)
    for folder, folders, files in os.walk(top, onerror=_refuse):
        for name in (*folders, *files):
            if os.path.islink(f"{folder}/{name}"):  # noqa: PTH114 (a fifth of pathlib's time)
                raise OSError(f"{name} is a link")
        below = f"{folder[len(top) + 1 :]}/" if folder != top else ""
        names += [f"{below}{file}" for file in files]
    return names


def _refuse(error: OSError) -> None:
    raise error


def _sum(path: Path | str) -> str:
    digest = sha256()
    with FileIO(_opened(path)) as file:
        while part := file.read(READ_SIZE):
            digest.update(part)
    return digest.hexdigest()


def _read(path: Path | str, size_max: int) -> bytes:
    with FileIO(_opened(path)) as file:
        return file.read(size_max)


def _opened(path: Path | str) -> int:
    # A pipe that somebody put there would be waited for.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _new(path: Path | str, mode: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, mode)
    os.fchmod(descriptor, mode)  # whatever the umask is
    return descriptor


def _write(path: Path | str, data: bytes) -> None:
    with FileIO(_new(path, PLAIN_MODE), "wb") as file:
        _write_all(file.fileno(), data)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _remove(path: Path) -> None:
    """Whatever it is. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
