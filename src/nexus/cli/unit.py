"""`nexus unit`: a systemd unit that runs a system.

What it hardens is what init itself does not need. Its services are confined by init, more
tightly than a unit could: so nothing here may take away what init needs for that (user ids,
namespaces, seccomp, scheduling classes).
"""

import os
import sys
from pathlib import Path
from typing import Final

from nexus.cli.places import base_dirs, title_of
from nexus.init.plan import Plan, load_plan

WATCHDOG: Final = 10  # seconds; init pings twice as often, and stalls for none of its services
NANOS: Final = 1_000_000_000
STOP_SPARE: Final = 5  # seconds beyond what the services may take to stop
START_MAX: Final = 60  # seconds until READY=1
INTENSITY: Final = "StartLimitIntervalSec=300\nStartLimitBurst=5"

# What init does itself, as root: gives each service an id of its own, a network, mount and IPC
# namespace, a scheduling class, rlimits; ends them; looks at them.
CAPABILITIES: Final = (
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SYS_ADMIN",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_KILL",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_SYS_PTRACE",
)


def unit_text(file: Path, instance: str | None, *, user: bool) -> str:
    """The unit for a system file, checked first. Raises SystemFileError and UsageError."""
    plan = load_plan(file)
    title = title_of(plan.name, instance)
    stop = -(-sum(service.stop_max for service in plan.services) // NANOS) + STOP_SPARE
    command = [sys.executable, "-P", "-m", "nexus.cli", "up", "--exec", str(file.absolute())]
    if instance is not None:
        command += ["--instance", instance]
    lines = [
        "[Unit]",
        f"Description=Nexus system {title}",
        f"ConditionPathExists={_escaped(str(file.absolute()))}",
        "" if user else "After=local-fs.target",
        INTENSITY,
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(_quoted(word) for word in command)}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "KillMode=mixed",
        f"TimeoutStartSec={START_MAX}",
        f"TimeoutStopSec={stop}",
        f"WatchdogSec={WATCHDOG}",
        "Restart=on-failure",
        "RestartSec=1",
        *_directories(plan, user=user),
        "UMask=0077",
        "TasksMax=512",
        "NoNewPrivileges=yes",
        "LockPersonality=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=no",
        *([] if user else _root_hardening()),
        "",
        "[Install]",
        f"WantedBy={'default.target' if user else 'multi-user.target'}",
    ]
    return "\n".join(line for index, line in enumerate(lines) if line or lines[index - 1]) + "\n"


def _directories(plan: Plan, *, user: bool) -> list[str]:
    """Directories that systemd makes and removes, where the system file names none of its own."""
    if user:
        return []
    state, runtime, log = base_dirs({}, 0)
    declared = (
        ("StateDirectory", plan.state_dir, state),
        ("RuntimeDirectory", plan.runtime_dir, runtime),
        ("LogsDirectory", plan.log_dir, log),
    )
    lines = []
    for name, own, path in declared:
        if own is None:
            lines += [f"{name}={path.name}", f"{name}Mode=0700"]
    if plan.runtime_dir is None:
        lines.append("RuntimeDirectoryPreserve=yes")  # other instances have theirs in it
    return lines


def _root_hardening() -> list[str]:
    return [
        f"CapabilityBoundingSet={' '.join(CAPABILITIES)}",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        "PrivateTmp=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectHostname=yes",
        "SystemCallArchitectures=native",
    ]


def _quoted(word: str) -> str:
    """A word of ExecStart, as systemd.service(5) reads it."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"' if any(letter in escaped for letter in " \t'\"\\;") else escaped


def _escaped(word: str) -> str:
    """Percent signs are specifiers in a unit."""
    return word.replace("%", "%%")


def default_unit_user() -> bool:
    """Whether the unit is for the user's own manager."""
    return os.getuid() != 0
