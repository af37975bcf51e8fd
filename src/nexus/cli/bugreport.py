"""`nexus bugreport`: everything somebody needs who was not there, in one small file.

No secrets: no environment, no settings of services, no state, no memory; of the system file what
TOML makes of it, without its comments. Every part is bounded.
"""

import io
import json
import os
import platform
import re
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from nexus import __version__
from nexus.cli.ask import Asked
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.output import progress, say, say_json
from nexus.init.errors import SystemFileError

PART_SIZE_MAX: Final = 256 * 1024  # bytes of one part; its end is kept
LOG_RECORDS: Final = 1000  # records of the journal, the last ones
PACKAGES: Final = ("msgspec", "typer", "rich")
KERNEL_FILES: Final = (
    "/proc/version",
    "/proc/sys/kernel/pid_max",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/user/max_user_namespaces",
    "/sys/kernel/security/lsm",
    "/proc/self/cgroup",
)
HIDDEN: Final = "settings"  # of services: anybody may keep a password there
NEVER_SHOWN: Final = "not shown"
PLACE: Final = re.compile(r"at (line [0-9]+, column [0-9]+|end of document)")  # tomllib's words

CONSOLE_FILES: Final = ("console.log", "console.log.1", "init.err")

WHAT: Final = {
    "README.txt": "what is in here",
    "versions.json": "Nexus, Python, its packages, the machine",
    "kernel.json": "what Linux says about itself",
    "doctor.json": "which guarantees hold here",
    "system.json": "the system file as it is now, without settings of services and comments",
    "plan.json": "the plan that follows from it, without the services' settings",
    "status.json": "the running system",
    "logs.jsonl": f"the last {LOG_RECORDS} records of the journal",
    "console.log": "the console lines, starts and ends of services",
    "console.log.1": "those before",
    "init.err": "what init's interpreter said",
}


def bugreport(asked: Asked | None, file: Path | None, out: Path | None, *, as_json: bool) -> None:
    """Write the report; what cannot be had is said in it. Raises CommandFailed."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = out or Path(f"nexus-bugreport-{stamp}.tar.gz")
    if target.exists():
        raise CommandFailed(f"{target} is there already: name another file with --output")
    with progress("collecting"):
        parts = _parts(asked, file)
    listed = "".join(
        f"{name:<16} {WHAT[name]} ({len(data)} bytes)\n" for name, data in parts.items()
    )
    parts["README.txt"] = (
        f"A bug report of Nexus {__version__}. It holds no environment, no settings of services\n"
        f"and no state. Look through it before you send it.\n\n{listed}"
    ).encode()
    try:
        _write(target, parts)
    except OSError as error:
        raise CommandFailed(f"{target} cannot be written: {error.strerror}") from error
    if as_json:
        say_json({"file": str(target), "parts": {name: len(data) for name, data in parts.items()}})
        return
    say(f"{target}: {target.stat().st_size} bytes, look through it before you send it")
    say(listed.rstrip("\n"))


def _parts(asked: Asked | None, file: Path | None) -> dict[str, bytes]:
    from nexus.cli.doctor import document

    parts = {
        "versions.json": _json(versions()),
        "kernel.json": _json({name: _read(Path(name)) for name in KERNEL_FILES}),
        "doctor.json": _json(document()),
    }
    source = Path(asked.running.file) if asked is not None else file
    if source is not None:
        parts["system.json"] = _json(system_of(source))
        parts["plan.json"] = _json(plan_of(source))
    if asked is not None:
        parts |= _running_parts(asked)
    return {name: data[-PART_SIZE_MAX:] for name, data in parts.items() if data}


def _running_parts(asked: Asked) -> dict[str, bytes]:
    from nexus.cli.logs import Filter, logs
    from nexus.cli.status import status

    log = Path(asked.running.log)
    wanted = Filter()
    return {
        "status.json": _said(lambda: status(asked, as_json=True)),
        "logs.jsonl": _said(
            lambda: logs(asked, wanted, last=LOG_RECORDS, follow=False, as_json=True)
        ),
        **{name: _tail(log / name) for name in CONSOLE_FILES if (log / name).exists()},
    }


def versions() -> dict[str, Any]:
    """What is installed, and on what."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "nexus": __version__,
        "python": sys.version,
        "executable": sys.executable,
        "packages": packages,
        "machine": platform.machine(),
        "release": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "root": os.geteuid() == 0,
    }


def plan_of(file: Path) -> dict[str, Any]:
    """The plan without the services' settings, or why there is none."""
    from nexus.cli.trial import tried_plan
    from nexus.init.plan import plan_data

    try:
        plan = tried_plan(file)
    except SystemFileError as error:
        return {"error": _place_of(error)}
    data = plan_data(plan)
    for service in data["services"]:
        service[HIDDEN] = f"{len(service[HIDDEN])} not shown"
    return {"digest": plan.digest, "plan": data}


def system_of(file: Path) -> dict[str, Any]:
    """The system file without any settings, or why it is left out.

    It is parsed, because no pattern finds every spelling that TOML has for a table.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(PART_SIZE_MAX + 1)
        if len(data) > PART_SIZE_MAX:
            return {"left_out": f"it has more than {PART_SIZE_MAX} bytes"}
        whole = tomllib.loads(data.decode())
    except OSError as error:
        return {"left_out": f"it cannot be read: {error.strerror}"}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        place = PLACE.search(str(error))
        where = f", {place[1]}" if place else ""
        return {"left_out": f"it is no TOML{where}; what it says about settings cannot be told"}
    shown: dict[str, Any] = without_settings(whole)
    return shown


def without_settings(table: Any) -> Any:
    """A value of TOML with every key `settings` in it emptied."""
    match table:
        case dict():
            return {
                key: NEVER_SHOWN if key == HIDDEN else without_settings(value)
                for key, value in table.items()
            }
        case list():
            return [without_settings(value) for value in table]
        case _:
            return table


def _place_of(error: SystemFileError) -> str:
    """Where a system file is wrong, but not what is there: it may be a setting."""
    return f"{error.path}:{error.line} is wrong; `nexus check` says what, here it is {NEVER_SHOWN}"


def _said(act: Callable[[], None]) -> bytes:
    """What a command prints, or why it could not."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            act()
    except SystemFileError as error:
        _ = text.write(json.dumps({"error": _place_of(error)}) + "\n")
    except (CommandFailed, UsageError) as error:
        _ = text.write(json.dumps({"error": str(error)}) + "\n")
    return text.getvalue().encode()


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            _ = file.seek(max(0, size - PART_SIZE_MAX))
            return file.read(PART_SIZE_MAX)
    except OSError as error:
        return f"# {path.name} cannot be read: {error.strerror}\n".encode()


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=2, default=str).encode() + b"\n"  # TOML has dates


def _write(target: Path, parts: dict[str, bytes]) -> None:
    folder = target.name.removesuffix(".tar.gz")
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, data in parts.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(data)
            entry.mode = 0o600
            archive.addfile(entry, io.BytesIO(data))
