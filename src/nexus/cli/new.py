"""`nexus new`: files to begin with. What is made is checked before it is said to be made.

`new_system` makes a system; a service of one's own has its templates beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nexus.cli.errors import CommandFailed, UsageError

NAME_SIZE_MAX: Final = 32  # characters

SYSTEM: Final = """\
# A Nexus system. `nexus check {file}` says what follows from it.
# Every key is described in docs/reference; `nexus check --schema` prints the schema for an editor.

[system]
name = "{name}"
total_size = "2MiB"

[service.policyd] # decides who may do what, and writes it down in logd
program = "policyd"
capabilities = ["ipc.core", "policy.authority"]
uses = {{ logd = {{ depth = 64, sync = false }} }} # it never waits for the journal
health = {{ deadline = "2s", every = "250ms", answer = "500ms" }}

[service.logd] # the journal: `nexus logs`
program = "logd"
stage = "core"
safe = true
capabilities = ["ipc.core", "policy.delegate"]
uses = {{ policyd = {{}} }}

[service.logd.settings]
core = "policyd"

[service.operator] # the door for `nexus status`, `call`, `logs`, `down`
program = "operator"
stage = "core"
safe = true
ports = ["operator"]
capabilities = [
    "ipc.core",
    "log.read",
    "policy.reload",
    "port.operator",
    "system.control",
    "system.observe",
]

[service.operator.uses] # whom `nexus call` may ask; operator never waits for an answer
policyd = {{ sync = false }}
logd = {{ sync = false }}
timed = {{ sync = false }}

[service.timed] # timers
program = "timed"
stage = "core"
safe = true
capabilities = ["ipc.core"]
"""


def new_system(name: str, directory: Path) -> list[Path]:
    """Make `directory`/system.toml; the files made. Raises CommandFailed and UsageError."""
    plain = name.isascii() and name.replace("-", "").isalnum() and name[0].isalpha()
    if not plain or len(name) > NAME_SIZE_MAX:
        raise UsageError(
            f"{name!r} is no name for a system: begin with a letter, go on with letters, digits "
            f"and -, at most {NAME_SIZE_MAX}"
        )
    file = directory / "system.toml"
    return write_files({file: SYSTEM.format(name=name, file=file)})


def write_files(files: Mapping[Path, str]) -> list[Path]:
    """Write all of them or none; an existing file is never overwritten. Raises CommandFailed."""
    standing = [path for path in files if path.exists() or path.is_symlink()]
    if standing:
        raise CommandFailed(f"{standing[0]} is there already: remove it, or choose another name")
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                _ = file.write(text)
    except OSError as error:
        raise CommandFailed(f"{error.filename} cannot be written: {error.strerror}") from error
    return list(files)
