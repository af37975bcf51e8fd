"""The ladder's security rungs next to what `nexus doctor` says of the same machine: both have to
say the same, in both directions.

    doctor: held    --  init's own record of a start misses it, or Linux shows it missing --> red
    doctor: absent  --  init's record claims it, or a rung that rests on it is claimed    --> red

On linux the doctor is asked here, for the runner's machine is the one that was booted. What it says
in a machine of our own stands in GUEST_NOT_HELD, and tests/vm asks it there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Final

from nexus.protocols.ladder import Ground

HELD: Final = "held"
ABSENT: Final = "absent"

GUEST_NOT_HELD: Final = {"entropy": "degraded"}
"""In a machine of ours: the generator is rngd's, and no driver's of Linux."""

STEPS: Final = (
    "limits",
    "memory",
    "namespaces",
    "ids",
    "capabilities",
    "not_dumpable",
    "landlock",
    "landlock_scope",
    "seccomp",
)
"""Rows that are steps of each start: init records by name those that could not be taken."""

OF_ITS_OWN: Final = "exec_isolation"
IMPORT_READING: Final = "import_reading"  # in a start's record: what lacked there

SEEN: Final[Mapping[str, Callable[[Mapping[str, Any]], bool | None]]] = {
    "seccomp": lambda seen: (seen["no_new_privs"], seen["seccomp"]) == (1, 2),
    "capabilities": lambda seen: (seen["cap_eff"], seen["cap_prm"]) == (0, 0),
    "not_dumpable": lambda seen: None if seen["dumpable"] is None else not seen["dumpable"],
    "cgroup_memory": lambda seen: bool(seen["grouped"]),
    "cgroup_tasks": lambda seen: bool(seen["grouped"]),
    "cgroup_cpu": lambda seen: bool(seen["grouped"]),
}
"""Rows of which Linux shows something from outside of a process; None where it does not. Landlock
is not among them: nothing shows it, and it stands behind the filter. tests/attack takes the filter
away to meet it."""

RESTS_ON: Final[Mapping[int, tuple[str, ...]]] = {
    63: ("credentials", "identity_table", "pidfd"),
    95: ("seccomp", "capabilities", "identity_table", "environment"),
}
"""Rungs whose claim is none without these rows."""


def rows_of(ground: Ground) -> dict[str, str]:
    """The state of each row on a ground; of those that are not named in GUEST_NOT_HELD, held."""
    if ground is Ground.VM:
        names = {*STEPS, *SEEN, *(name for names in RESTS_ON.values() for name in names)}
        return dict.fromkeys((*names, OF_ITS_OWN), HELD) | GUEST_NOT_HELD
    return _rows_here()


@cache
def _rows_here() -> dict[str, str]:
    from nexus.kernel.linux.report import hardening_report

    rows = {row.name: row.state.value for row in hardening_report()}
    # Of the interpreter that the doctor runs in; the tree of a slot lies in the state directory.
    del rows[OF_ITS_OWN]
    return rows


def unfounded(number: int, rows: Mapping[str, str]) -> list[str]:
    """Why this rung cannot be claimed on a machine of which the doctor says this."""
    return [
        f"#{number} is claimed, and the doctor says {name}: absent"
        for name in RESTS_ON.get(number, ())
        if rows[name] == ABSENT
    ]


def disagreements(rows: Mapping[str, str], starts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where the kernel's records of starts and the doctor say different things of a machine."""
    found: list[str] = []
    uids: dict[int, str] = {}
    for start in starts:
        name = str(start["name"])
        said = [*_steps(rows, start["degraded"]), *_seen(rows, start["outside"] or {})]
        uid = (start["outside"] or {}).get("uid")
        if uid is not None and rows["ids"] == HELD:
            other = uids.setdefault(uid, name)
            if uid == 0 or other != name:
                said.append(f"ids: the doctor says held, and uid {uid} is {other}'s too")
        found += [f"{name}: {each}" for each in said]
    return found


def _steps(rows: Mapping[str, str], degraded: Iterable[str]) -> Iterator[str]:
    missed = set(degraded)
    if rows.get(OF_ITS_OWN) == HELD and IMPORT_READING in missed:
        yield f"{OF_ITS_OWN}: the doctor says held, and an import read as root would"
    for step in STEPS:
        if rows[step] == HELD and step in missed:
            yield f"{step}: the doctor says held, and init could not take it"
        if rows[step] == ABSENT and step not in missed:
            yield f"{step}: the doctor says absent, and init says it was taken"


def _seen(rows: Mapping[str, str], outside: Mapping[str, Any]) -> Iterator[str]:
    for name, look in SEEN.items() if outside else ():
        shown = look(outside)
        if rows[name] == HELD and shown is False:
            yield f"{name}: the doctor says held, and Linux shows it missing"
        if rows[name] == ABSENT and shown:
            yield f"{name}: the doctor says absent, and Linux shows it"
