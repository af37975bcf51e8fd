"""Where the secret of one service is: a directory of its own, or a key of Linux's key retention.

FILE: `secrets/NAME` in the state directory, closed to everybody but the service's id of this
start (to which the child gives it before it takes that id) and root. Init opens it and passes the
descriptor on; it reads nothing in it. The service has no other descriptor of a directory, its
filter takes none but this one, and Landlock refuses every path that leaves it.

KEYRING: a key of type "user", anchored in the user keyring of whoever runs the system. It
survives the service, init and every other process, and ends with the machine's power or reboot.
Only who possesses it can read it: the child links it into a session keyring of its own before it
takes its id. Its owner, the user who runs the system, may link it too, and so come to possess it;
nobody else may even see it. Possession is not divided among services of one id, where an ordinary
user runs the system: there only the filter keeps the others from asking.
"""

import ctypes
import errno
import hashlib
import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import SECRET_SIZE_MAX, AbiError, SecretBackend, SpawnReason, Status
from nexus.kernel.core import SpawnRefused
from nexus.kernel.linux.devices import FULL_ERRORS
from nexus.kernel.linux.durable import (
    DIRECTORY_FLAGS,
    NEW_SUFFIX,
    make_directory,
    read_file,
    replace_file,
    sync_directory,
)
from nexus.kernel.linux.native import MACHINE, syscall

DIRECTORY: Final = "secrets"
NAME: Final = "secret"
CLOSED: Final = 0o700
OTHERS: Final = 0o077  # what nobody else may have on the directories

# System call numbers on x86_64 and in the generic table.
NR_ADD_KEY: Final = {"x86_64": 248}.get(MACHINE, 217)
NR_KEYCTL: Final = {"x86_64": 250}.get(MACHINE, 219)

# include/uapi/linux/keyctl.h
KEYCTL_JOIN_SESSION_KEYRING: Final = 1
KEYCTL_UPDATE: Final = 2
KEYCTL_SETPERM: Final = 5
KEYCTL_LINK: Final = 8
KEYCTL_UNLINK: Final = 9
KEYCTL_SEARCH: Final = 10
KEYCTL_READ: Final = 11
SESSION_KEYRING: Final = -3
USER_KEYRING: Final = -4
KEY_TYPE: Final = b"user"
# View, read, write and search for who possesses it; view, search and link for its owner.
KEY_PERMISSIONS: Final = 0x0F19_0000
# A key has a payload of one byte at least. The first says whether anything was stored.
NOTHING: Final = b"\0"
STORED: Final = b"\1"
UPDATE_MAX: Final = 4096  # bytes; keyctl(2) updates a key by no more than a page

assert len(STORED) + SECRET_SIZE_MAX <= UPDATE_MAX

_OPEN: Final = DIRECTORY_FLAGS | os.O_NOFOLLOW


class Secret(NamedTuple):
    """What a process has of its secret, by number: so a filter can know it."""

    directory: int = -1  # descriptor
    key: int = 0  # serial number


NO_SECRET: Final = Secret()
DAMAGED: Final = b"\0"  # what stands for a file that was emptied: it was not always so

# ---------------------------------------------------------------------- init's side


def open_directory(state_dir: Path | None, service: str, undo: ExitStack) -> int:
    """The directory of a service's secret, made where it is not there; `undo` closes it.

    Refuses: SpawnRefused (map-failed).
    """
    if state_dir is None:
        why = f"secret of {service}: this run has no state directory"
        raise SpawnRefused(SpawnReason.MAP_FAILED, why)
    try:
        above = _directory(state_dir, undo)
        with suppress(FileExistsError):
            os.mkdir(service, CLOSED, dir_fd=above)
        os.fsync(above)
        found = os.open(service, _OPEN, dir_fd=above)
        _ = undo.callback(os.close, found)
        _check_closed(found, service)
    except OSError as error:
        text = error.strerror or str(error)
        raise SpawnRefused(SpawnReason.MAP_FAILED, f"secret of {service}: {text}") from None
    return found


def _directory(state_dir: Path, undo: ExitStack) -> int:
    make_directory(state_dir)
    path = state_dir / DIRECTORY
    with suppress(FileExistsError):
        path.mkdir(mode=CLOSED)
    sync_directory(state_dir)
    above = os.open(path, _OPEN)
    _ = undo.callback(os.close, above)
    _check_closed(above, DIRECTORY)
    if os.fstat(above).st_uid != os.geteuid():
        raise OSError(f"{DIRECTORY} belongs to another user")
    return above


def _check_closed(directory: int, name: str) -> None:
    mode = stat.S_IMODE(os.fstat(directory).st_mode)
    if mode & OTHERS:
        raise OSError(f"the directory {name} is open to others (mode {mode:04o})")


def key_name(state_dir: Path | None, service: str) -> str:
    """What the key is called: two systems of one user have different state directories."""
    system = hashlib.sha256(os.fsencode(state_dir.resolve() if state_dir else "")).hexdigest()
    return f"nexus:{system[:16]}:{service}"


# ---------------------------------------------------------------------- the child's, not confined


def give_directory(directory: int, uid: int) -> None:
    """Give a secret's directory to the id that the service is about to take. Raises OSError."""
    if os.fstat(directory).st_uid == uid:
        return
    for name in (NAME, NAME + NEW_SUFFIX):
        with suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            # Else root would give away what the last holder has made a name for.
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise OSError(f"{name} is no file of its own")
            os.chown(name, uid, uid, dir_fd=directory, follow_symlinks=False)
    os.fchown(directory, uid, uid)


def take_key(name: str) -> int:
    """The serial number of the key of that name, made where it is not there, in a session keyring
    that holds it alone. Raises OSError where this kernel has no keyrings."""
    description = name.encode()
    session, user = ctypes.c_int(SESSION_KEYRING), ctypes.c_int(USER_KEYRING)
    _ = _keyctl(KEYCTL_JOIN_SESSION_KEYRING, None)
    key = find_key(name)
    if not key:
        # First where it is possessed: without that nobody may set its permissions.
        size = ctypes.c_size_t(len(NOTHING))
        key = syscall(NR_ADD_KEY, KEY_TYPE, description, NOTHING, size, session)
        _ = _keyctl(KEYCTL_SETPERM, ctypes.c_int(key), ctypes.c_uint32(KEY_PERMISSIONS))
        _ = _keyctl(KEYCTL_LINK, ctypes.c_int(key), user)
    else:
        _ = _keyctl(KEYCTL_LINK, ctypes.c_int(key), session)
    return key


def leave_keys() -> None:
    """Reach no key of whoever started the system: a session keyring of its own, which is empty.
    Raises OSError."""
    try:
        _ = _keyctl(KEYCTL_JOIN_SESSION_KEYRING, None)
    except OSError as error:
        # No keyrings here, or none for us and so none for our children.
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise


def find_key(name: str) -> int:
    """The serial number of the key of that name in the caller's user keyring; 0 if there is none.
    Raises OSError."""
    try:
        return _keyctl(KEYCTL_SEARCH, ctypes.c_int(USER_KEYRING), KEY_TYPE, name.encode(), 0)
    except OSError as error:
        if error.errno != errno.ENOKEY:
            raise
        return 0


def forget_keys(state_dir: Path) -> int:
    """Unlink every key of a system from the caller's user keyring; how many there were. Raises
    OSError."""
    prefix = key_name(state_dir, "")
    listed = Path("/proc/keys")
    lines = listed.read_text().splitlines() if listed.exists() else []
    keys = [int(line.split()[0], 16) for line in lines if prefix in line]
    for key in keys:
        _ = _keyctl(KEYCTL_UNLINK, ctypes.c_int(key), ctypes.c_int(USER_KEYRING))
    return len(keys)


def _keyctl(operation: int, *words: object) -> int:
    return syscall(NR_KEYCTL, ctypes.c_int(operation), *words)


# ---------------------------------------------------------------------- the holder's side


class SecretFile:
    """The secret in a directory of its own."""

    __slots__ = ("directory",)

    backend: Final = SecretBackend.FILE

    def __init__(self, directory: int) -> None:
        self.directory = directory

    def read(self) -> bytes:
        """Refuses as SecretRead. A file of a wrong size is damage like any other, which its holder
        can tell from what it stored; so something of it is given, and never nothing."""
        try:
            data = read_file(self.directory, NAME, SECRET_SIZE_MAX)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise AbiError(Status.DEVICE_FAILED, f"the secret: {error.strerror}") from None
        return data or DAMAGED

    def replace(self, data: bytes) -> None:
        """Refuses as SecretReplace; after a directory that cannot be synced, DeviceFailed, a
        later boot may find either secret."""
        try:
            replace_file(self.directory, NAME, data)
        except OSError as error:
            raise _refusal(error) from None


class SecretKey:
    """The secret in a key. Its update is whole or does not happen: Linux swaps the payload."""

    __slots__ = ("key",)

    backend: Final = SecretBackend.KEYRING

    def __init__(self, key: int) -> None:
        self.key = key  # 0: this kernel has none for us

    def read(self) -> bytes:
        """Refuses as SecretRead."""
        size = len(STORED) + SECRET_SIZE_MAX
        buffer = ctypes.create_string_buffer(size)
        try:
            found = self._ask(KEYCTL_READ, buffer, ctypes.c_size_t(size))
            payload = buffer.raw[: min(found, size)]
        except OSError as error:
            raise AbiError(Status.DEVICE_FAILED, f"the key: {error.strerror}") from None
        finally:
            _ = ctypes.memset(buffer, 0, size)
        if payload == NOTHING:
            return b""
        if payload[:1] != STORED or not len(STORED) < found <= size:
            raise AbiError(Status.DEVICE_FAILED, "the key holds no secret")
        return payload[len(STORED) :]

    def replace(self, data: bytes) -> None:
        """Refuses as SecretReplace."""
        size = len(STORED) + len(data)
        buffer = ctypes.create_string_buffer(STORED + data, size)
        try:
            _ = self._ask(KEYCTL_UPDATE, buffer, ctypes.c_size_t(size))
        except OSError as error:
            raise _refusal(error) from None
        finally:
            _ = ctypes.memset(buffer, 0, size)

    def _ask(self, operation: int, buffer: object, size: object) -> int:
        if not self.key:
            raise OSError(errno.ENOKEY, "this kernel keeps no keys")
        return _keyctl(operation, ctypes.c_int(self.key), buffer, size)


Holding = SecretFile | SecretKey


def hold(backend: SecretBackend, secret: Secret) -> Holding | None:
    """The holder's way to its secret; None without the grant."""
    if backend is SecretBackend.FILE:
        return SecretFile(secret.directory)
    return SecretKey(secret.key) if backend is SecretBackend.KEYRING else None


def _refusal(error: OSError) -> AbiError:
    if error.errno in FULL_ERRORS:
        return AbiError(Status.NO_SPACE, error.strerror or str(error))
    return AbiError(Status.DEVICE_FAILED, error.strerror or str(error))
