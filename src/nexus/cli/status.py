"""`nexus status`: a running system, a row per service."""

import os
from pathlib import Path
from typing import Any, Final

from nexus.abi import INIT_NAME
from nexus.cli.ask import Asked
from nexus.cli.client import OperatorClient
from nexus.cli.output import say, say_json, say_table
from nexus.cli.places import Running, all_running
from nexus.proof.lock import start_of
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import (
    GetService,
    GetSystem,
    GetTasks,
    Health,
    ServiceRecord,
    SystemInfo,
    TaskState,
)

ASK_TIME: Final = 5.0  # seconds for each question
HEADS: Final = ("SERVICE", "STATE", "PID", "GEN", "RESTARTS", "HEALTH", "SINCE", "LAST END")
DAY: Final = 86_400
HOUR: Final = 3_600
MINUTE: Final = 60


def status(asked: Asked, *, as_json: bool) -> None:
    """Print the state of the system. Raises CommandFailed."""
    with asked.client() as client:
        info = client.relay(INIT_NAME, INIT, GetSystem(), ASK_TIME)
        tasks = client.relay(INIT_NAME, INIT, GetTasks(), ASK_TIME)
        names = [row.name for row in tasks.rows if row.name != INIT_NAME]
        records = {name: _record(client, name) for name in names}
    running = asked.running
    if as_json:
        say_json(
            {
                "system": running.title,
                "file": running.file,
                "pid": running.pid,
                "state": info.state.name.lower(),
                "why": info.why,
                "digest": info.digest,
                "set": set_document(running),
                "boots": info.boots,
                "boot_id": info.boot_id.hex(),
                "policy": {
                    "generation": info.policy_generation,
                    "digest": info.policy_digest,
                    "available": info.policy_available,
                },
                "services": [document(name, record, info) for name, record in records.items()],
            }
        )
        return
    say(headline(running.title, running.pid, info) + from_slot(running))
    say_table(HEADS, [row(name, record, info) for name, record in records.items()])


def set_document(running: Running) -> dict[str, object] | None:
    """The system set that init imported its code from; None outside of a slot."""
    if not running.slot:
        return None
    return {
        "slot": running.slot,
        "name": running.set_name,
        "version": running.set_version,
        "digest": running.set_digest,
    }


def from_slot(running: Running) -> str:
    """The end of the headline of a system out of a slot."""
    return f", set {running.set_name} out of slot {running.slot}" if running.slot else ""


def systems(*, as_json: bool) -> None:
    """Print which systems of this user run."""
    found = all_running(os.environ, os.getuid())
    if as_json:
        say_json([{"system": each.title, "pid": each.pid, "file": each.file} for each in found])
    else:
        say_table(("SYSTEM", "PID", "FILE"), [(r.title, str(r.pid), r.file) for r in found])


def _record(client: OperatorClient, name: str) -> ServiceRecord:
    return client.relay(INIT_NAME, INIT, GetService(name), ASK_TIME)


def headline(title: str, pid: int, info: SystemInfo) -> str:
    """The system in one line."""
    up = f"up {span((info.now - info.started) / 1e9)}"
    policy = f"policy generation {info.policy_generation}"
    if not info.policy_available:
        policy += ", policyd does not answer"
    why = f" ({info.why})" if info.why else ""
    return (
        f"{title}: {info.state.name.lower()}{why}, process {pid}, {up}, boot {info.boots}, {policy}"
    )


def row(name: str, record: ServiceRecord, info: SystemInfo) -> tuple[str, ...]:
    """A service as cells."""
    since = age(record.pid)
    return (
        name,
        word(record.state),
        str(record.pid) if record.pid else "-",
        str(record.generation),
        str(record.restarts),
        word(record.health),
        "-" if since is None else span(since),
        last_end(record, info.now),
    )


def document(name: str, record: ServiceRecord, info: SystemInfo) -> dict[str, Any]:
    """A service as JSON; times are seconds."""
    return {
        "service": name,
        "state": word(record.state),
        "pid": record.pid or None,
        "generation": record.generation,
        "restarts": record.restarts,
        "health": word(record.health),
        "since_seconds": age(record.pid),
        "ended_seconds_ago": (info.now - record.died) / 1e9 if record.died else None,
        "exit_code": record.exit_code,
        "exit_signal": record.exit_signal,
        "reason": record.reason,
    }


def word(member: TaskState | Health) -> str:
    """An enum's member as people write it."""
    return member.name.lower().replace("_", " ")


def last_end(record: ServiceRecord, now: int) -> str:
    """How the instance before this one ended, and when."""
    if not record.died:
        return "-"
    how = f"signal {record.exit_signal}" if record.exit_signal else f"exit {record.exit_code}"
    return f"{how}, {record.reason}, {span((now - record.died) / 1e9)} ago"


def age(pid: int) -> float | None:
    """Seconds since the process was started, by Linux's own account; None if there is none."""
    ticks = start_of(pid) if pid else 0
    if not ticks:
        return None
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return max(0.0, round(uptime - ticks / os.sysconf("SC_CLK_TCK"), 2))


def span(seconds: float) -> str:
    """A span of time in its two largest units."""
    whole = int(seconds)
    if whole >= DAY:
        return f"{whole // DAY}d {whole % DAY // HOUR}h"
    if whole >= HOUR:
        return f"{whole // HOUR}h {whole % HOUR // MINUTE}m"
    if whole >= MINUTE:
        return f"{whole // MINUTE}m {whole % MINUTE}s"
    return f"{seconds:.1f}s"
