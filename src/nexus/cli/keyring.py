"""The folder of who signs updates: keys that are secret, metadata that is not.

    keys/root-1.pem ...      a key of a role each, mode 0600, encrypted unless for development
    metadata/1.root.json ... the repository: every root, the latest timestamp, snapshot, targets
    pending/2.root.json      a root that still lacks signatures

The files of keys are found by what they are, so those of root may be kept somewhere else and
copied here when a root is signed.
"""

import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.files import open_input, read_input
from nexus.trust import Untrusted
from nexus.trust.limits import ROOT_SIZE_MAX
from nexus.trust.sign import SEED_SIZE, NotSigned, Signer, Term, open_key, seal_key
from nexus.trust.update import check_file

EPOCH_VARIABLE: Final = "SOURCE_DATE_EPOCH"  # reproducible-builds.org/specs/source-date-epoch
KEY_SIZE_MAX: Final = 4096  # bytes of a key file; an encrypted one takes 300
PASSPHRASE_SIZE_MAX: Final = 1024  # bytes
FILES_MAX: Final = 1024  # that a folder of keys or of metadata is looked through
KEY_SUFFIX: Final = ".pem"
DAY: Final = 86_400  # seconds


class Keyring:
    """The folder, and what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = folder / "keys"
        self.metadata = folder / "metadata"
        self.pending = folder / "pending"

    def make(self) -> None:
        """The empty folders. Raises CommandFailed; nothing that is there is used again."""
        with telling(f"cannot make {self.folder}"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for each in (self.keys, self.metadata, self.pending):
                each.mkdir(mode=0o700 if each is self.keys else 0o755)

    def files(self) -> dict[str, bytes]:
        """The repository. Raises UsageError if this is no such folder."""
        found = {
            path.name: _bounded(path) for path in _listed(self.metadata) if path.suffix == ".json"
        }
        if not found:
            raise UsageError(f"{self.folder} has no metadata: `nexus bundle keys new` makes it")
        return found

    def write(self, files: Mapping[str, bytes]) -> None:
        """Put files of metadata in force, each whole or not at all, roots first."""
        for name, data in sorted(files.items()):
            replace_file(self.metadata / name, data)

    def new_key(self, role: str, passphrase: bytes | None) -> Signer:
        """Make a key of a role and its file, which is durable when this returns."""
        seed = secrets.token_bytes(SEED_SIZE)
        taken = {path.name for path in _listed(self.keys)}
        number = next(n for n in range(1, FILES_MAX + 1) if f"{role}-{n}{KEY_SUFFIX}" not in taken)
        path = self.keys / f"{role}-{number}{KEY_SUFFIX}"
        _write_new(path, seal_key(seed, passphrase))
        return open_key(path.read_bytes(), passphrase)

    def signers(self, passphrase: bytes | None, roles: Sequence[str]) -> list[Signer]:
        """The keys of these roles that are here, by the names of their files."""
        return [
            read_key(path, passphrase)
            for path in _listed(self.keys)
            if path.suffix == KEY_SUFFIX and path.name.rpartition("-")[0] in roles
        ]


def read_key(path: Path, passphrase: bytes | None) -> Signer:
    """The signer in a key file that nobody else may read. Raises UsageError."""
    with telling(f"cannot read {path}"):
        mode = path.stat().st_mode
    if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"others may read the key {path}: `chmod 600 {path}`")
    data = read_input(path, KEY_SIZE_MAX)
    try:
        return open_key(data, passphrase)
    except NotSigned as error:
        raise UsageError(f"{path}: {error}") from error


def read_passphrase(file: Path | None) -> bytes | None:
    """The first line of a file. Raises UsageError."""
    if file is None:
        return None
    line = read_input(file, PASSPHRASE_SIZE_MAX).partition(b"\n")[0]
    if not 0 < len(line) <= PASSPHRASE_SIZE_MAX:
        raise UsageError(f"{file} does not begin with a passphrase of 1 to {PASSPHRASE_SIZE_MAX} B")
    return line


def term(days: int) -> Term:
    """From now, or from SOURCE_DATE_EPOCH, for so many days."""
    text = os.environ.get(EPOCH_VARIABLE)
    if text is None:
        issued = int(datetime.now(tz=UTC).timestamp())
    elif text.isascii() and text.isdigit() and len(text) <= 11:  # seconds until the year 5138
        issued = int(text)
    else:
        raise UsageError(f"{EPOCH_VARIABLE} is {text!r}, and no number of seconds since 1970")
    return Term(issued, issued + days * DAY)


@contextmanager
def signing() -> Iterator[None]:
    """What cannot be signed is said in a sentence."""
    try:
        yield
    except NotSigned as error:
        raise CommandFailed(str(error)) from error
    except Untrusted as error:
        raise CommandFailed(f"no device would take this: {error}") from error


@contextmanager
def telling(what: str) -> Iterator[None]:
    """An OSError as CommandFailed, with what was tried."""
    try:
        yield
    except OSError as error:
        raise CommandFailed(f"{what}: {error.strerror or error}") from error


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` what is in a file, whole or not at all, also across a power cut."""
    fresh = path.with_name(f".{path.name}.new")
    with telling(f"cannot write {path}"):
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as opened:
            _ = opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        _ = fresh.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: Path, data: bytes) -> None:
    with telling(f"cannot write {path}"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "wb") as opened:
            _ = opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        sync_folder(path.parent)


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, in the order of its names; nothing if there is none."""
    try:
        found = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}") from error
    if len(found) > FILES_MAX:
        raise UsageError(f"{folder} has more than {FILES_MAX} files")
    return [path for path in found if not path.name.startswith(".")]


def _bounded(path: Path) -> bytes:
    """A file of metadata, not longer than one may be."""
    os.close(open_input(path))  # a file, and no pipe that somebody put there
    data = read_input(path, ROOT_SIZE_MAX)
    with signing():
        check_file(path.name, data)
    return data
