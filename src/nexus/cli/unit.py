"""`nexus unit`: a systemd unit that runs a system.

What it hardens is what init itself does not need. Its services are confined by init, more
tightly than a unit could: so nothing here may take away what init needs for that (user ids,
namespaces, seccomp, scheduling classes).
"""

import sys
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from nexus.cli.output import say, say_json
from nexus.cli.places import Places, base_dirs, places_of, title_of
from nexus.cli.trial import tried_plan
from nexus.init.plan import Plan
from nexus.loader.devices import boot_path
from nexus.loader.main import END_MAX, EXIT_ENDED, EXIT_STOPPED

WATCHDOG: Final = 10  # seconds; init pings twice as often, and stalls for none of its services
NANOS: Final = 1_000_000_000
STOP_SPARE: Final = 5  # seconds beyond what the services may take to stop
START_MAX: Final = 60  # seconds until READY=1
INTENSITY: Final = "StartLimitIntervalSec=300\nStartLimitBurst=5"
SLOTS_INTENSITY: Final = "StartLimitIntervalSec=300\nStartLimitBurst=20"
"""Each reboot is a start: a rolled back update takes as many as it has tries, and two more."""
SLOTS_START_MAX: Final = 180  # seconds until READY=1, of which a new set's unpacking may take some
SLOTS_STOP: Final = int(END_MAX) + STOP_SPARE  # init kills what lives after 20

Declared: TypeAlias = tuple[str | None, str | None, str | None]  # state, runtime, log

# What init does itself, as root: gives each service an id of its own, a network, mount and IPC
# namespace, a scheduling class, rlimits; ends them; looks at them. CAP_DAC_READ_SEARCH is for
# services of isolation "exec" when only root may read the interpreter: without it in the bounding
# set they could not keep it while they import (nexus.kernel.linux.native).
CAPABILITIES: Final = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_NICE",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RESOURCE",
)
SHARED_DIRS: Final = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 (what PrivateTmp= replaces)


def unit(file: Path, instance: str | None, *, user: bool, as_json: bool) -> None:
    """Print the unit. Raises SystemFileError and UsageError."""
    plan = tried_plan(file)
    text = _text(plan, file, instance, user=user)
    if as_json:
        title = title_of(plan.name, instance)
        say_json({"system": title, "file": str(file.absolute()), "user": user, "unit": text})
    else:
        say(text.removesuffix("\n"))


def unit_text(file: Path, instance: str | None, *, user: bool) -> str:
    """The unit for a system file, checked first. Raises SystemFileError and UsageError."""
    return _text(tried_plan(file), file, instance, user=user)


def slots_unit(name: str, instance: str | None, *, user: bool, as_json: bool) -> None:
    """Print the unit of a system out of its slots. Raises UsageError."""
    text = slots_unit_text(name, instance, user=user)
    if as_json:
        say_json({"system": title_of(name, instance), "user": user, "unit": text})
    else:
        say(text.removesuffix("\n"))


def slots_unit_text(name: str, instance: str | None, *, user: bool) -> str:
    """The unit for a provisioned system, whose system file is in its slots. Raises UsageError.

    Each start chooses a slot and becomes its init; a reboot and a failed trial are exit codes after
    which the manager starts it again, and its watchdog ends a trial that hangs.
    """
    nowhere = (None, None, None)
    places = places_of(name, instance, Path(), nowhere, {}, 0)
    command = [sys.executable, "-P", "-m", "nexus.cli", "up", "--exec", "--slots", name]
    subject = _Subject(
        title=places.title,
        command=[*command, *([] if instance is None else ["--instance", instance])],
        condition=None if user else boot_path(places.state),
        intensity=SLOTS_INTENSITY,
        start=SLOTS_START_MAX,
        stop=SLOTS_STOP,
        endings=[
            "Restart=always",  # also after 0: a set that ends by itself is on trial, or broken
            f"RestartPreventExitStatus={EXIT_ENDED} {EXIT_STOPPED}",
            f"SuccessExitStatus={EXIT_STOPPED}",
        ],
        directories=_directories(nowhere, []),
        is_private=True,
    )
    return _unit(subject, user=user)


class _Subject(NamedTuple):
    """What differs from one unit to another. Times are in seconds."""

    title: str
    command: list[str]
    condition: Path | None  # what has to be there; of a user's unit nobody knows where it is
    intensity: str
    start: int
    stop: int
    endings: list[str]
    directories: list[str]
    is_private: bool  # nothing of it is where PrivateTmp= would hide it


def _text(plan: Plan, file: Path, instance: str | None, *, user: bool) -> str:
    declared = (plan.state_dir, plan.runtime_dir, plan.log_dir)
    places = places_of(plan.name, instance, file, declared, {}, 0)
    own = _own_dirs(plan, places)
    command = [sys.executable, "-P", "-m", "nexus.cli", "up", "--exec", str(file.absolute())]
    subject = _Subject(
        title=places.title,
        command=[*command, *([] if instance is None else ["--instance", instance])],
        condition=file.absolute(),
        intensity=INTENSITY,
        start=START_MAX,
        stop=-(-sum(service.stop_max for service in plan.services) // NANOS) + STOP_SPARE,
        endings=["Restart=on-failure"],
        directories=_directories(declared, own),
        is_private=not _is_shared([file.absolute(), *own]),
    )
    return _unit(subject, user=user)


def _unit(subject: _Subject, *, user: bool) -> str:
    condition = subject.condition
    lines = [
        "[Unit]",
        f"Description=Nexus system {subject.title}",
        "" if condition is None else f"ConditionPathExists={_escaped(str(condition))}",
        "" if user else "After=local-fs.target",
        subject.intensity,
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(_quoted(word) for word in subject.command)}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "KillMode=mixed",
        f"TimeoutStartSec={subject.start}",
        f"TimeoutStopSec={subject.stop}",
        f"WatchdogSec={WATCHDOG}",
        *subject.endings,
        "RestartSec=1",
        *([] if user else subject.directories),
        "UMask=0077",
        "TasksMax=512",
        "NoNewPrivileges=yes",
        "LockPersonality=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=no",
        *([] if user else _root_hardening(private=subject.is_private)),
        "",
        "[Install]",
        f"WantedBy={'default.target' if user else 'multi-user.target'}",
    ]
    return "\n".join(line for index, line in enumerate(lines) if line or lines[index - 1]) + "\n"


def _own_dirs(plan: Plan, places: Places) -> list[Path]:
    """The directories that the system file names itself."""
    declared = (
        (plan.state_dir, places.state),
        (plan.runtime_dir, places.runtime),
        (plan.log_dir, places.log),
    )
    return [path for own, path in declared if own is not None]


def _directories(declared: Declared, own: list[Path]) -> list[str]:
    """Directories that systemd makes, and what the system file names beside them.

    The one at run time is always needed: an instance has its lock in it (nexus.cli.places).
    """
    state, runtime, log = base_dirs({}, 0)
    lines = [f"RuntimeDirectory={runtime.name}", "RuntimeDirectoryMode=0700"]
    lines.append("RuntimeDirectoryPreserve=yes")  # other instances have theirs in it
    state_dir, _, log_dir = declared
    if state_dir is None:
        lines += [f"StateDirectory={state.name}", "StateDirectoryMode=0700"]
    if log_dir is None:
        lines += [f"LogsDirectory={log.name}", "LogsDirectoryMode=0700"]
    for path in own:  # "+" is outside of ProtectSystem=, whose exceptions have to be there
        word = _quoted(str(path))
        lines.append(f"ExecStartPre=+/bin/mkdir -m 0700 -p -- {word}")
    if own:
        lines.append(f"ReadWritePaths={' '.join(_word(str(path)) for path in own)}")
    return lines


def _is_shared(paths: list[Path]) -> bool:
    """Whether one of them is in a directory that PrivateTmp= would hide."""
    return any(path.is_relative_to(shared) for path in paths for shared in SHARED_DIRS)


def _root_hardening(*, private: bool) -> list[str]:
    return [
        f"CapabilityBoundingSet={' '.join(CAPABILITIES)}",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        *(["PrivateTmp=yes"] if private else []),
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectHostname=yes",
        "SystemCallArchitectures=native",
    ]


def _quoted(word: str) -> str:
    """A word of ExecStart, as systemd.service(5) reads it: with variables."""
    return _word(word.replace("$", "$$"))


def _word(word: str) -> str:
    """A word of a list, as systemd.syntax(7) reads it."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if any(letter in escaped for letter in " \t'\"\\;") else escaped


def _escaped(word: str) -> str:
    """Percent signs are specifiers in a unit."""
    return word.replace("%", "%%")
