"""What a service tries at devices and secrets that are not its own, and what the holder of a
secret tries beyond it; with the wall that refuses. `nexus doctor` and the attack suite share it.

As in `escapes` each attempt is a plain function, harms nobody where it succeeds, and `beyond` is
what meets it in a process without the system call filter.
"""

import ctypes
import errno
import gc
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from nexus.abi import (
    AbiError,
    BootImage,
    SecretBackend,
    SecretQuery,
    SecretRead,
    SecretReplace,
)
from nexus.kernel.linux import escapes
from nexus.kernel.linux.durable import READ_FLAGS, WRITE_FLAGS
from nexus.kernel.linux.escapes import DONE, READABLE, Wall
from nexus.kernel.linux.native import syscall
from nexus.kernel.linux.secrets import (
    KEY_TYPE,
    KEYCTL_LINK,
    KEYCTL_READ,
    KEYCTL_SEARCH,
    KEYCTL_SETPERM,
    NR_ADD_KEY,
    NR_KEYCTL,
    SESSION_KEYRING,
    USER_KEYRING,
    SecretFile,
    SecretKey,
)

OWN: Final = "escape"  # a file that the holder makes beside its secret
SECOND: Final = ".second"
OWN_SECOND: Final = OWN + SECOND
KEY_SIZE: Final = 64  # bytes of the attacker's buffer
ALL_PERMISSIONS: Final = 0x3F3F_3F3F
SECRET_TRIED: Final = b"kept"


class Prey(NamedTuple):
    """What there is to attack: paths by what they are, and the serial number of a key."""

    image: str
    secret: str  # the file in its directory
    neighbour: str  # a file in the state directory, relative to the directory of a secret
    key: int


class Trespass(NamedTuple):
    """One attempt; `run` raises OSError where it is refused."""

    name: str
    run: Callable[[Prey, int], None]  # the number: descriptor of the own directory, or own key
    wall: Wall
    refusal: str  # name of the errno
    behind: Wall  # without the filter
    beyond: str


# ---------------------------------------------------------------------- by somebody else


def _open_image(prey: Prey, _own: int) -> None:
    os.close(os.open(prey.image, os.O_RDONLY))


def _write_image(prey: Prey, _own: int) -> None:
    os.close(os.open(prey.image, os.O_WRONLY))


def _open_secret(prey: Prey, _own: int) -> None:
    os.close(os.open(prey.secret, os.O_RDONLY))


def _list_secrets(prey: Prey, _own: int) -> None:
    _ = os.listdir(os.path.dirname(prey.secret))  # noqa: PTH120, PTH208 (the plain calls)


def _open_generator(_prey: Prey, _own: int) -> None:
    os.close(os.open("/dev/hwrng", os.O_RDONLY | os.O_NONBLOCK))


def _read_key(prey: Prey, _own: int) -> None:
    _ = _keyctl(KEYCTL_READ, prey.key, ctypes.create_string_buffer(KEY_SIZE), KEY_SIZE)


def _possess_key(prey: Prey, _own: int) -> None:
    _ = _keyctl(KEYCTL_LINK, prey.key, SESSION_KEYRING)
    _read_key(prey, 0)


def _make_key(_prey: Prey, _own: int) -> None:
    size = ctypes.c_size_t(1)
    _ = syscall(NR_ADD_KEY, KEY_TYPE, b"nexus-escape", b"x", size, ctypes.c_int(SESSION_KEYRING))


# ---------------------------------------------------------------------- by the holder of a file


def _absolute(_prey: Prey, own: int) -> None:
    os.close(os.open(READABLE, READ_FLAGS, dir_fd=own))


def _climb(prey: Prey, own: int) -> None:
    os.close(os.open(prey.neighbour, READ_FLAGS, dir_fd=own))


def _other_directory(_prey: Prey, _own: int) -> None:
    os.close(os.open(OWN, READ_FLAGS, dir_fd=0))


def _open_directory(_prey: Prey, own: int) -> None:
    os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=own))


def _path_only(_prey: Prey, own: int) -> None:
    os.close(os.open(OWN, os.O_PATH, dir_fd=own))


def _symbolic_link(_prey: Prey, own: int) -> None:
    os.symlink(READABLE, OWN_SECOND, dir_fd=own)
    os.unlink(OWN_SECOND, dir_fd=own)


def _hard_link(_prey: Prey, own: int) -> None:
    os.link(OWN, OWN_SECOND, src_dir_fd=own, dst_dir_fd=own)
    os.unlink(OWN_SECOND, dir_fd=own)


def _link_out(prey: Prey, own: int) -> None:
    os.link(OWN, prey.neighbour + SECOND, src_dir_fd=own, dst_dir_fd=own)
    os.unlink(prey.neighbour + SECOND, dir_fd=own)


def _rename_out(prey: Prey, own: int) -> None:
    os.rename(OWN, prey.neighbour + SECOND, src_dir_fd=own, dst_dir_fd=own)
    os.rename(prey.neighbour + SECOND, OWN, src_dir_fd=own, dst_dir_fd=own)


def _rename_in(prey: Prey, own: int) -> None:
    os.rename(prey.neighbour, OWN_SECOND, src_dir_fd=own, dst_dir_fd=own)
    os.rename(OWN_SECOND, prey.neighbour, src_dir_fd=own, dst_dir_fd=own)


def _rename_away(_prey: Prey, own: int) -> None:
    os.rename(OWN, OWN, src_dir_fd=own, dst_dir_fd=0)


def _unlink_out(prey: Prey, own: int) -> None:
    os.unlink(prey.neighbour, dir_fd=own)
    os.close(os.open(prey.neighbour, WRITE_FLAGS, 0o600, dir_fd=own))


def _make_directory(_prey: Prey, own: int) -> None:
    os.mkdir(OWN_SECOND, dir_fd=own)
    os.rmdir(OWN_SECOND, dir_fd=own)


def _let_others_in(_prey: Prey, own: int) -> None:
    os.fchmod(own, 0o711)
    os.fchmod(own, 0o700)


# ---------------------------------------------------------------------- by the holder of a key


def _other_key(_prey: Prey, own: int) -> None:
    _ = _keyctl(KEYCTL_READ, own + 1, ctypes.create_string_buffer(KEY_SIZE), KEY_SIZE)


def _search_keys(_prey: Prey, _own: int) -> None:
    number = ctypes.c_int(USER_KEYRING)
    _ = _keyctl(KEYCTL_SEARCH, number, KEY_TYPE, b"nexus-escape", 0)


def _give_key_away(_prey: Prey, own: int) -> None:
    _ = _keyctl(KEYCTL_SETPERM, own, ctypes.c_uint32(ALL_PERMISSIONS))


def _link_key(_prey: Prey, own: int) -> None:
    _ = _keyctl(KEYCTL_LINK, own, ctypes.c_int(USER_KEYRING))


def _keyctl(operation: int, *words: object) -> int:
    return syscall(NR_KEYCTL, ctypes.c_int(operation), *words)


EPERM, EACCES = "EPERM", "EACCES"
FILTER, LANDLOCK, IDS, NONE = Wall.FILTER, Wall.LANDLOCK, Wall.IDS, Wall.NONE

STRANGER: Final = (
    Trespass("read another's device", _open_image, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("write another's device", _write_image, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("open another's secret", _open_secret, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("list another's secrets", _list_secrets, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("open the generator", _open_generator, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("read another's key", _read_key, FILTER, EPERM, IDS, EACCES),
    Trespass("possess another's key", _possess_key, FILTER, EPERM, IDS, EACCES),
    Trespass("make a key", _make_key, FILTER, EPERM, NONE, DONE),
)
FILE_HOLDER: Final = (
    Trespass("an absolute path", _absolute, LANDLOCK, EACCES, LANDLOCK, EACCES),
    Trespass("a path that climbs", _climb, LANDLOCK, EACCES, LANDLOCK, EACCES),
    Trespass("another directory", _other_directory, FILTER, EPERM, NONE, "ENOTDIR"),
    Trespass("the directory again", _open_directory, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("a path without a file", _path_only, FILTER, EPERM, NONE, DONE),
    Trespass("a symbolic link", _symbolic_link, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("a hard link", _hard_link, FILTER, EPERM, NONE, DONE),
    Trespass("a hard link outside", _link_out, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("rename to outside", _rename_out, LANDLOCK, EACCES, LANDLOCK, EACCES),
    Trespass("rename from outside", _rename_in, LANDLOCK, EACCES, LANDLOCK, EACCES),
    Trespass("rename by another directory", _rename_away, FILTER, EPERM, NONE, "ENOTDIR"),
    Trespass("remove what is outside", _unlink_out, LANDLOCK, EACCES, LANDLOCK, EACCES),
    Trespass("make a directory", _make_directory, FILTER, EPERM, LANDLOCK, EACCES),
    Trespass("let others in", _let_others_in, FILTER, EPERM, NONE, DONE),
    Trespass("make a key", _make_key, FILTER, EPERM, NONE, DONE),
)
KEY_HOLDER: Final = (
    Trespass("another key", _other_key, FILTER, EPERM, NONE, "ENOKEY"),
    Trespass("search for keys", _search_keys, FILTER, EPERM, NONE, "ENOKEY"),
    Trespass("give the key away", _give_key_away, FILTER, EPERM, IDS, EACCES),
    Trespass("link the key", _link_key, FILTER, EPERM, IDS, EACCES),
    Trespass("make a key", _make_key, FILTER, EPERM, NONE, DONE),
    Trespass("open the generator", _open_generator, FILTER, EPERM, LANDLOCK, EACCES),
)
BY: Final = {
    SecretBackend.NONE: STRANGER,
    SecretBackend.FILE: FILE_HOLDER,
    SecretBackend.KEYRING: KEY_HOLDER,
}


def outcomes(backend: SecretBackend, prey: Prey) -> dict[str, str]:
    """Try everything that the holder of such a secret can try, in its process."""
    own = _own(backend)
    if backend is SecretBackend.FILE:
        with suppress(FileExistsError):
            os.close(os.open(OWN, WRITE_FLAGS, 0o600, dir_fd=own))
    found = {attempt.name: outcome(attempt, prey, own) for attempt in BY[backend]}
    if backend is SecretBackend.FILE:
        os.unlink(OWN, dir_fd=own)
    return found


def _own(backend: SecretBackend) -> int:
    """The number of the own directory or key: the driver is a library in this process."""
    for each in gc.get_objects():
        if isinstance(each, SecretFile) and backend is SecretBackend.FILE:
            return each.directory
        if isinstance(each, SecretKey) and backend is SecretBackend.KEYRING:
            return each.key
    return -1


def outcome(attempt: Trespass, prey: Prey, own: int) -> str:
    """DONE, or the name of the errno that refused it."""
    try:
        attempt.run(prey, own)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return DONE


async def main(boot: BootImage) -> None:
    """A program that keeps a secret, if it was granted one, and then tries it all: its argument
    is its prey as JSON. The report has `kept`, what came of the secret."""
    prey = Prey(*json.loads(boot.argument))
    backend = await SecretQuery()
    kept = ""
    if backend:
        try:
            await SecretReplace(SECRET_TRIED)
            kept = DONE if await SecretRead() == SECRET_TRIED else "another secret was read"
        except AbiError as refusal:
            kept = str(refusal)
    await escapes.tell_report(boot, {"outcomes": outcomes(backend, prey), "kept": kept})
