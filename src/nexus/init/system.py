"""The system file: every service of a system, its links, rights and budgets, as TOML.

`SYSTEM_FILE` declares what may stand in one; `load` reads it and refuses the rest with a
SystemFileError that names file and line. What the values mean together (sums, providers,
identities) is `nexus.init.plan`'s to say.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nexus.abi import (
    BUDGET_SIZE_DEFAULT,
    ENDPOINTS_PER_OWNER_MAX,
    INIT_NAME,
    LINK_DEPTH_DEFAULT,
    LINK_DEPTH_MAX,
    LINK_SIZE_MAX,
    OWNER_SIZE_DEFAULT,
    SERVICE_NAME_SIZE_MAX,
    TOTAL_SIZE_DEFAULT,
    Nanos,
    QosClass,
)
from nexus.init.declare import (
    Choice,
    Either,
    Integer,
    Key,
    ListOf,
    MapOf,
    Scalar,
    Table,
    Word,
    WrongValue,
    cut,
    duration,
    size,
)
from nexus.init.errors import SystemFileError
from nexus.init.lines import KeyLines, KeyPath
from nexus.kernel.core.budget import BOOT_BUDGET_SIZE
from nexus.kernel.core.spawn import BUDGET_SIZE_MAX
from nexus.protocols.init import DELEGATIONS_MAX, SERVICES_MAX

FILE_SIZE_MAX: Final = 256 * 1024  # bytes; a device of 44 services needs a tenth
ENDPOINTS_DEFAULT: Final = 8  # its own, its reply inbox, and a few it makes at run time
CPUS_MAX: Final = 4  # design.md section 3
OWNER_SIZE_MAX: Final = 16 * 1024**2  # bytes of link shares
TOTAL_SIZE_MAX: Final = 256 * 1024**2
SETTINGS_MAX: Final = 32  # entries
SETTING_SIZE_MAX: Final = 256  # characters
CAPABILITIES_MAX: Final = 32
BACKOFF_DEFAULT: Final = Nanos(50_000_000)  # ns; long enough not to spin, short for a person
BACKOFF_MAX: Final = Nanos(60_000_000_000)
HEALTH_DEADLINE_DEFAULT: Final = Nanos(2_000_000_000)  # the reference's route deadline
HEALTH_DEADLINE_MAX: Final = Nanos(60_000_000_000)

_NAME: Final = Word(
    pattern=r"[a-z][a-z0-9]*([.-][a-z0-9]+)*",
    what=f"a name of at most {SERVICE_NAME_SIZE_MAX} small letters, digits, dots and hyphens",
    size_max=SERVICE_NAME_SIZE_MAX,
)
_CAPABILITY: Final = Word(
    pattern=r"[a-z][a-z0-9]*(\.[a-z0-9]+)*", what="a capability such as proof.control", size_max=48
)
_SETTING: Final = Word(
    pattern=r"[a-z][a-z0-9_]*", what="a setting in small letters, digits and _", size_max=48
)
_DEPTH: Final = Integer(minimum=1, maximum=LINK_DEPTH_MAX)
_DELEGATIONS: Final = Integer(minimum=0, maximum=DELEGATIONS_MAX)
_LINK_SIZE: Final = size(1, LINK_SIZE_MAX, "16KiB")
_LINK_KEYS: Final = {
    "depth": Key(kind=_DEPTH, doc="messages that may wait in the link"),
    "size": Key(kind=_LINK_SIZE, doc="bytes that may wait; only less than its protocol needs"),
    "delegations": Key(kind=_DELEGATIONS, doc="links the client may hand on at run time"),
}
_QOS: Final = {
    "idle": QosClass.IDLE,
    "normal": QosClass.NORMAL,
    "interactive": QosClass.INTERACTIVE,
    "perf-burst": QosClass.PERF_BURST,
}

SERVICE: Final = Table(
    doc="One service: what it is, what it may reach and what it may cost.",
    keys={
        "program": Key(kind=_NAME, doc="the program it runs", required=True),
        "qos": Key(kind=Choice(words=tuple(_QOS)), doc="scheduling class; default normal"),
        "cpu": Key(kind=Integer(minimum=0, maximum=CPUS_MAX - 1), doc="the CPU it is placed on"),
        "budget": Key(
            kind=size(BOOT_BUDGET_SIZE, BUDGET_SIZE_MAX, "1792KiB"),
            doc="bytes of kernel objects it may hold",
        ),
        "owner_size": Key(
            kind=size(4096, OWNER_SIZE_MAX, "256KiB"),
            doc="bytes of link shares its endpoints may reserve; default the system's",
        ),
        "endpoints": Key(
            kind=Integer(minimum=2, maximum=ENDPOINTS_PER_OWNER_MAX),
            doc="endpoints it may have at a time: its own, its reply inbox, and what it makes",
        ),
        "capabilities": Key(
            kind=ListOf(item=_CAPABILITY, count_max=CAPABILITIES_MAX), doc="rights by name"
        ),
        "uses": Key(
            kind=Either(
                array=ListOf(
                    item=Table(
                        doc="One link to another service.",
                        keys={
                            "name": Key(kind=_NAME, doc="the service used", required=True),
                            **_LINK_KEYS,
                        },
                    ),
                    count_max=SERVICES_MAX,
                ),
                table=MapOf(
                    key=_NAME,
                    item=Table(doc="One link to another service.", keys=_LINK_KEYS),
                    count_max=SERVICES_MAX,
                ),
            ),
            doc="the services it may call, as an array or as a table by name",
        ),
        "restart": Key(
            kind=Table(
                doc="What happens when it ends.",
                keys={
                    "backoff": Key(
                        kind=duration(Nanos(1_000_000), BACKOFF_MAX, "50ms"),
                        doc="wait before the next start",
                    )
                },
            ),
            doc="restart after an exit",
        ),
        "health": Key(
            kind=Table(
                doc="How its readiness is probed.",
                keys={
                    "deadline": Key(
                        kind=duration(Nanos(1_000_000), HEALTH_DEADLINE_MAX, "2s"),
                        doc="time to answer the probe after its start, and to stop in",
                    )
                },
            ),
            doc="health probe",
        ),
        "settings": Key(
            kind=MapOf(
                key=_SETTING, item=Scalar(text_size_max=SETTING_SIZE_MAX), count_max=SETTINGS_MAX
            ),
            doc="values the program reads",
        ),
    },
)
SYSTEM_FILE: Final = Table(
    doc="A Nexus system: the file that names every service and what it may do.",
    keys={
        "system": Key(
            kind=Table(
                doc="What holds for the whole system.",
                keys={
                    "name": Key(kind=_NAME, doc="name of the system", required=True),
                    "smp": Key(
                        kind=Integer(minimum=1, maximum=CPUS_MAX),
                        doc="CPUs of the simulated machine; default 1",
                    ),
                    "total_size": Key(
                        kind=size(4096, TOTAL_SIZE_MAX, "1MiB"),
                        doc="bytes of link shares of all services and init together",
                    ),
                    "owner_size": Key(
                        kind=size(4096, OWNER_SIZE_MAX, "256KiB"),
                        doc="bytes of link shares of a service that does not say its own",
                    ),
                    "link": Key(
                        kind=Table(
                            doc="Defaults of every link.",
                            keys={name: _LINK_KEYS[name] for name in ("depth", "size")},
                        ),
                        doc="defaults of every link",
                    ),
                    "ends_with": Key(
                        kind=_NAME, doc="the service with whose end the system shuts down"
                    ),
                },
            ),
            doc="the system",
            required=True,
        ),
        "service": Key(
            kind=MapOf(key=_NAME, item=SERVICE, count_max=SERVICES_MAX),
            doc="the services by name, in the order of their start",
            required=True,
        ),
    },
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One link a service asks for; `size` None leaves it to the protocol. `path` is its key."""

    name: str
    depth: int
    size: int | None
    delegations: int
    path: KeyPath


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One service as the file declares it, defaults filled in."""

    name: str
    program: str
    qos: QosClass
    cpu: int | None
    budget: int
    owner_size: int
    endpoints: int
    capabilities: tuple[str, ...]
    uses: tuple[Use, ...]
    backoff: Nanos
    health_deadline: Nanos
    settings: tuple[tuple[str, str | int | bool], ...]
    path: KeyPath


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A system file, read. Its values are each within their bounds; their sums are unchecked."""

    file: Path
    lines: KeyLines
    name: str
    smp: int
    total_size: int
    owner_size: int
    ends_with: str | None
    services: tuple[Service, ...]

    def wrong(self, path: KeyPath, expected: str, found: str) -> SystemFileError:
        """The error about the value at `path`."""
        return SystemFileError(self.file, self.lines.line(path), expected, found)

    def with_services(self, services: tuple[Service, ...]) -> "System":
        """The same system of other services, for tests that leave some out."""
        return replace(self, services=services)


def load(file: Path) -> System:
    """Read a system file. Raises SystemFileError."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise SystemFileError(
            file, 1, "a file that can be read", str(error.strerror or error)
        ) from error
    return parse(data, file)


def parse(data: bytes, file: Path) -> System:
    """Read the bytes of a system file. Raises SystemFileError; `file` is what it names."""
    if len(data) > FILE_SIZE_MAX:
        raise SystemFileError(file, 1, f"at most {FILE_SIZE_MAX} bytes", str(len(data)))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SystemFileError(file, line, "UTF-8", f"byte 0x{data[error.start]:02x}") from error
    try:
        document = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one; a number too long for int() another
        raise SystemFileError(file, _toml_line(error, text), "TOML", cut(str(error))) from error
    except RecursionError as error:
        raise SystemFileError(file, 1, "TOML", "tables nested too deeply") from error
    lines = KeyLines(text)
    try:
        return _system(SYSTEM_FILE.read(document, ()), file, lines)
    except WrongValue as wrong:
        raise SystemFileError(file, lines.line(wrong.path), wrong.expected, wrong.found) from wrong


def _toml_line(error: ValueError, text: str) -> int:
    """Where tomllib says the error is: a line, the end, or nowhere, and then it is line 1."""
    found = re.search(r"\(at line (\d+), column \d+\)$", str(error))
    if found:
        return int(found[1])
    return text.count("\n") + 1 if isinstance(error, tomllib.TOMLDecodeError) else 1


def _system(document: Mapping[str, Any], file: Path, lines: KeyLines) -> System:
    head = document["system"]
    owner_size = head.get("owner_size", OWNER_SIZE_DEFAULT)
    link = head.get("link", {})
    services = tuple(
        _service(name, entry, owner_size, link) for name, entry in document["service"].items()
    )
    if not services:
        raise WrongValue(("service",), "at least one service", "none")
    return System(
        file=file,
        lines=lines,
        name=head["name"],
        smp=head.get("smp", 1),
        total_size=head.get("total_size", TOTAL_SIZE_DEFAULT),
        owner_size=owner_size,
        ends_with=head.get("ends_with"),
        services=services,
    )


def _service(
    name: str, entry: Mapping[str, Any], owner_size: int, link: Mapping[str, Any]
) -> Service:
    path: KeyPath = ("service", name)
    if name == INIT_NAME:
        raise WrongValue(path, "another name than init's own", f'"{name}"')
    capabilities = tuple(entry.get("capabilities", ()))
    for index, capability in enumerate(capabilities):
        if capability in capabilities[:index]:
            raise WrongValue(
                (*path, "capabilities", index), "each capability once", f'"{capability}" again'
            )
    return Service(
        name=name,
        program=entry["program"],
        qos=_QOS[entry.get("qos", "normal")],
        cpu=entry.get("cpu"),
        budget=entry.get("budget", BUDGET_SIZE_DEFAULT),
        owner_size=entry.get("owner_size", owner_size),
        endpoints=entry.get("endpoints", ENDPOINTS_DEFAULT),
        capabilities=capabilities,
        uses=_uses(entry.get("uses", ()), (*path, "uses"), link),
        backoff=Nanos(entry.get("restart", {}).get("backoff", BACKOFF_DEFAULT)),
        health_deadline=Nanos(entry.get("health", {}).get("deadline", HEALTH_DEADLINE_DEFAULT)),
        settings=tuple(sorted(entry.get("settings", {}).items())),
        path=path,
    )


def _uses(declared: Any, path: KeyPath, link: Mapping[str, Any]) -> tuple[Use, ...]:
    """Both forms of `uses`, as one."""
    if isinstance(declared, Mapping):
        items: list[tuple[KeyPath, str, Mapping[str, Any]]] = [
            ((*path, name), name, use) for name, use in declared.items()
        ]
    else:
        items = [((*path, index), use["name"], use) for index, use in enumerate(declared)]
    return tuple(
        Use(
            name=name,
            depth=use.get("depth", link.get("depth", LINK_DEPTH_DEFAULT)),
            size=use.get("size", link.get("size")),
            delegations=use.get("delegations", 0),
            path=use_path,
        )
        for use_path, name, use in items
    )


def schema() -> dict[str, Any]:
    """The JSON schema of a system file (JSON Schema 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Nexus system file",
        **SYSTEM_FILE.schema(),
    }


def schema_text() -> str:
    """The schema as it is published: docs/reference/system-file.schema.json."""
    return json.dumps(schema(), indent=2) + "\n"
