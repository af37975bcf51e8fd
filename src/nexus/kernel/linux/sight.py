"""What init sees of a confined child from outside, before it lets it go: for the record.

Linux's own account of the process, which nothing in it can change; None where this user may not
look.
"""

import os
from typing import Final

STATUS_SIZE_MAX: Final = 8192  # bytes of /proc/PID/status; /proc/PID/limits has fewer
LIMIT_AT: Final = 26  # column of the values in /proc/PID/limits
# Of a forked child, made by its driver: the timer, the idle set, its endpoint's set. A port has a
# set too.
DRIVER_DESCRIPTORS: Final = 3
STANDARD_DESCRIPTORS: Final = 3


def seen(pid: int, granted: int, group: bytes = b"") -> dict[str, object]:
    """`granted` is how many descriptors it ought to have, the driver's own among them, `group` the
    last of the path of its control group, empty for none.

    Raises OSError when the process is gone.
    """
    text = _read(f"/proc/{pid}/status")
    uid = int(_field(text, b"Uid").split()[0])
    # Linux gives the files of a process that is not dumpable to root.
    owner = os.stat(f"/proc/{pid}/statm").st_uid  # noqa: PTH116 (a fifth of pathlib's time)
    try:
        descriptors: int | None = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (the same)
    except PermissionError:
        descriptors = None
    return {
        "uid": uid,
        "groups": _field(text, b"Groups").decode().split(),
        "no_new_privs": int(_field(text, b"NoNewPrivs")),
        "seccomp": int(_field(text, b"Seccomp")),
        "cap_eff": int(_field(text, b"CapEff"), 16),
        "cap_prm": int(_field(text, b"CapPrm"), 16),
        "cap_bnd": int(_field(text, b"CapBnd"), 16),
        "dumpable": owner == uid if uid else None,  # root owns its files either way
        "descriptors": descriptors,
        "granted": granted,
        "grouped": _read(f"/proc/{pid}/cgroup").endswith(group) if group else False,
    }


def bounds(pid: int) -> dict[str, tuple[str, str]]:
    """Each limit of a process by Linux's name for it, soft and hard, proc_pid_limits(5).

    Raises OSError when the process is gone.
    """
    _, *lines = _read(f"/proc/{pid}/limits").decode().splitlines()
    found = {}
    for line in lines:
        soft, hard = line[LIMIT_AT:].split()[:2]
        found[line[:LIMIT_AT].strip()] = (soft, hard)
    return found


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, STATUS_SIZE_MAX)
    finally:
        os.close(descriptor)


def _field(text: bytes, name: bytes) -> bytes:
    """A line of /proc/PID/status without its name, proc_pid_status(5)."""
    at = text.index(b"\n" + name + b":\t") + len(name) + 3
    return text[at : text.index(b"\n", at)]
