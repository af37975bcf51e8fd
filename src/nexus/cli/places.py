"""Where a system keeps things, and which systems run here.

root has /var/lib, /run and /var/log; anybody else has the XDG directories. In each a folder
"nexus", in it one folder per instance: NAME, or NAME@INSTANCE for further ones side by side.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from nexus.cli.errors import CommandFailed, UsageError
from nexus.kernel.core.paths import SOCKET_PATH_SIZE_MAX
from nexus.loader.main import LOCK_NAME as LOADER_LOCK
from nexus.proof.lock import (
    RUNTIME_VARIABLE,
    NotPrivate,
    check_private,
    holder_of,
    is_directory_held,
    make_private,
    start_of,
    user_runtime,
)

STATE_VARIABLE: Final = "NEXUS_STATE_DIR"
LOG_VARIABLE: Final = "NEXUS_LOG_DIR"
LOCK_NAME: Final = "up.lock"
RECORD_NAME: Final = "system.json"
CONSOLE_NAME: Final = "console.log"
INSTANCE_SIZE_MAX: Final = 32  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The directories of one instance. `home` holds its lock and its record, `runtime` its
    sockets; they are the same unless the system file says otherwise. `bases` are the folders of
    all instances."""

    title: str
    home: Path
    state: Path
    runtime: Path
    log: Path
    bases: tuple[Path, ...]

    @property
    def lock(self) -> Path:
        """The file that is locked while the instance runs."""
        return self.home / LOCK_NAME

    @property
    def record(self) -> Path:
        """What `up` wrote about the instance."""
        return self.home / RECORD_NAME

    @property
    def console(self) -> Path:
        """The console lines, and starts and ends of services."""
        return self.log / CONSOLE_NAME


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What `up` writes down about an instance, for the other commands."""

    title: str
    file: str
    digest: str
    pid: int
    started: int = 0
    """When the process was started, as nexus.proof.lock.start_of says it."""
    state: str
    runtime: str
    log: str
    stop_ns: int = 0
    """How long its services may take to stop."""
    loader: int = 0
    """The process of the loader that boots it out of its slots, 0 without one."""
    loader_started: int = 0
    slot: str = ""
    set_version: int = 0
    """Of the system set that init itself imported its code from, as its digest is."""
    set_name: str = ""
    set_digest: str = ""


def base_dirs(environ: Mapping[str, str], uid: int) -> tuple[Path, Path, Path]:
    """The folders of all instances: state, runtime, log."""
    if uid == 0:
        state, runtime, log = Path("/var/lib/nexus"), Path("/run/nexus"), Path("/var/log/nexus")
    else:
        home = Path(environ.get("HOME") or "/")
        state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "nexus"
        runtime = user_runtime(environ, uid)
        log = state / "log"
    return (
        Path(environ.get(STATE_VARIABLE) or state),
        Path(environ.get(RUNTIME_VARIABLE) or runtime),
        Path(environ.get(LOG_VARIABLE) or log),
    )


def title_of(name: str, instance: str | None) -> str:
    """NAME, or NAME@INSTANCE."""
    if instance is None:
        return name
    plain = instance.isascii() and instance.replace("-", "").replace("_", "").isalnum()
    if not plain or len(instance) > INSTANCE_SIZE_MAX:
        raise UsageError(
            f"--instance {instance!r} is no name: use letters, digits, - and _, "
            f"at most {INSTANCE_SIZE_MAX} of them"
        )
    return f"{name}@{instance}"


def places_of(
    name: str,
    instance: str | None,
    file: Path,
    declared: tuple[str | None, str | None, str | None],
    environ: Mapping[str, str],
    uid: int,
) -> Places:
    """The directories of an instance; `declared` are state, runtime and log of the system file."""
    title = title_of(name, instance)
    state, runtime, log = base_dirs(environ, uid)
    own_state, own_runtime, own_log = (
        None if each is None else _beside(file, each, instance) for each in declared
    )
    return Places(
        title=title,
        home=runtime / title,
        state=own_state or state / title,
        runtime=own_runtime or runtime / title,
        log=own_log or log / title,
        bases=(state, runtime, log),
    )


def _beside(file: Path, declared: str, instance: str | None) -> Path:
    """A declared directory, relative to the system file; a further instance has its own in it."""
    path = file.absolute().parent / declared
    return path if instance is None else path.with_name(f"{path.name}@{instance}")


def make_dirs(places: Places, uid: int, ports: Iterable[str]) -> None:
    """Make the directories, and see that nobody else can write there, and that a socket for each
    of `ports` fits. Raises CommandFailed."""
    for path in dict.fromkeys((places.home, places.runtime, places.state, places.log)):
        base = next((base for base in places.bases if path.is_relative_to(base)), None)
        try:
            make_private(path, uid, base)
        except NotPrivate as error:
            raise CommandFailed(str(error)) from error
        except OSError as error:
            raise CommandFailed(
                f"the directory {path} cannot be made: {error.strerror}; "
                f"set {STATE_VARIABLE}, {RUNTIME_VARIABLE} and {LOG_VARIABLE} to places that can"
            ) from error
    for port in ports:
        if len(os.fsencode(places.runtime / f"{port}.sock")) > SOCKET_PATH_SIZE_MAX:
            raise CommandFailed(
                f"the directory {places.runtime} has too long a name for a socket in it: "
                f"set {RUNTIME_VARIABLE} to a shorter one"
            )


def read_running(home: Path) -> Running | None:
    """What `up` wrote about the instance of `home`, a directory that is ours, if it runs now."""
    try:
        found = msgspec.json.decode((home / RECORD_NAME).read_bytes(), type=Running)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if is_alive(found, home) else None


def is_alive(running: Running, home: Path) -> bool:
    """Whether the process of `running` is the init of `home` now, and no other of its number.

    It holds two locks, up.lock and its state directory: one that was removed hides nothing.
    """
    if running.started == 0 or start_of(running.pid) != running.started:
        return False
    return holder_of(home / LOCK_NAME) == running.pid or is_directory_held(Path(running.state))


def all_running(environ: Mapping[str, str], uid: int) -> list[Running]:
    """Every instance of this user that runs now, by title.

    Nothing is read in a directory that another user may write in: what a file there says would
    be that user's word, and `down` would act on it. Raises CommandFailed.
    """
    _, runtime, _ = base_dirs(environ, uid)
    found = []
    try:
        check_private(runtime, uid, or_root=True)
        for home in sorted(path for path in runtime.iterdir() if path.is_dir()):
            check_private(home, uid, or_root=True)
            found.append(read_running(home))
    except NotPrivate as error:
        raise CommandFailed(str(error)) from error
    except OSError:  # it is not there, or is root's alone
        return []
    return [running for running in found if running is not None]


def the_running(title: str | None, environ: Mapping[str, str], uid: int) -> Running:
    """The instance a command means: the one named, or the only one. Raises CommandFailed."""
    found = all_running(environ, uid)
    titles = ", ".join(running.title for running in found)
    if title is not None:
        for running in found:
            if running.title == title:
                return running
        _check_booting([title], environ, uid)
        rest = f"running are: {titles}" if found else "none runs"
        raise CommandFailed(f"no system {title} runs here ({rest}): start it with `nexus up`")
    if not found:
        _, runtime, _ = base_dirs(environ, uid)
        _check_booting(
            sorted(path.parent.name for path in runtime.glob(f"*/{LOADER_LOCK}")), environ, uid
        )
        raise CommandFailed(
            f"no system runs here (looked in {runtime}): start one with `nexus up FILE`"
        )
    if len(found) > 1:
        raise UsageError(f"several systems run here, name one with --name: {titles}")
    return found[0]


def _check_booting(titles: Iterable[str], environ: Mapping[str, str], uid: int) -> None:
    """Raises CommandFailed if a loader is about to boot one of these: it is between two inits."""
    _, runtime, _ = base_dirs(environ, uid)
    for title in titles:
        if holder_of(runtime / title / LOADER_LOCK) is not None:
            raise CommandFailed(f"{title} is being booted out of its slots: try again in a moment")
