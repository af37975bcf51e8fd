"""Policy files: which service holds which right, as TOML. ::

    [allow]
    "demo.testsvc" = ["storage.read", "statefs.write:/state/testsvc/"]

    [route]
    timed = "time.use"

The `capabilities` of the system file are the first layer, then each file of `system.policy` in
order: a later one replaces the whole list of a service. What no layer allows is denied. A right
may be bound to what it is for, behind a colon: to that alone, or if it ends in a slash to all that
begins with it. A service that is not in the system, a right twice or an unknown key is a
SystemFileError with the line of the policy file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nexus.init.declare import Key, ListOf, MapOf, Table, WrongValue, cut
from nexus.init.errors import SystemFileError
from nexus.init.files import WrongFile, read_whole
from nexus.init.lines import KeyLines, KeyPath
from nexus.init.system import BOUND_RIGHT, NAME, RIGHT, System, published, read_toml
from nexus.protocols.policy import (
    FILE_SIZE_MAX,
    POLICY_SIZE_MAX,
    RIGHTS_MAX,
    SUBJECTS_MAX,
    Policy,
    Right,
    parse_right,
)

POLICY_FILE_SIZE_MAX: Final = 64 * 1024  # bytes of TOML; what it may become as it travels

POLICY_FILE: Final = Table(
    doc="A policy file: which service holds which right. What is not listed is denied.",
    keys={
        "allow": Key(
            kind=MapOf(
                key=NAME,
                item=ListOf(item=BOUND_RIGHT, count_max=RIGHTS_MAX, unique="right"),
                count_max=SUBJECTS_MAX,
            ),
            doc="the rights of a service; replaces what an earlier layer says of it",
        ),
        "route": Key(
            kind=MapOf(key=NAME, item=RIGHT, count_max=SUBJECTS_MAX),
            doc="the further right that a route to a service needs",
        ),
    },
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What one file says: `allow` and `routes` as written, and how to find their lines.

    `shown` is the file as the policy repeats it; `roots` lead from a service to its list.
    """

    file: Path
    shown: str
    lines: KeyLines
    allow: Mapping[str, tuple[str, ...]]
    routes: Mapping[str, str]
    roots: Mapping[str, KeyPath]

    def line(self, service: str, index: int | None = None) -> int:
        """The line of a service's list, or of one right in it."""
        path = self.roots[service]
        return self.lines.line(path if index is None else (*path, index))

    def rights(self, service: str) -> list[Right]:
        """The rights that this layer gives a service."""
        return [
            parse_right(text, self.shown, self.line(service, index))
            for index, text in enumerate(self.allow.get(service, ()))
        ]


def layers_of(system: System) -> tuple[Layer, ...]:
    """The layers of a system's policy, the system file's own first. Raises SystemFileError."""
    return (_first_layer(system), *(_layer(system, index) for index in range(len(system.policy))))


def read_policy(system: System, names: Sequence[str]) -> Policy:
    """The policy of a system whose services are `names`. Raises SystemFileError."""
    return merge(layers_of(system), names)


def merge(layers: Sequence[Layer], names: Sequence[str]) -> Policy:
    """One policy out of layers, for services in the order of `names`. Raises SystemFileError."""
    allow: dict[str, list[Right]] = {}
    routes: dict[str, str] = {}
    for layer in layers:
        for service in layer.allow:
            _check_name(layer, layer.roots[service], service, names)
            allow[service] = layer.rights(service)
        for target, right in layer.routes.items():
            _check_name(layer, ("route", target), target, names)
            routes[target] = right
    policy = Policy(
        services=list(names),
        allow={name: allow[name] for name in names if allow.get(name)},
        routes={name: routes[name] for name in names if name in routes},
    )
    size = len(policy.encoded())
    if size > POLICY_SIZE_MAX:
        last = layers[-1]
        raise SystemFileError(
            last.file,
            1,
            f"a policy of all layers of at most {POLICY_SIZE_MAX} bytes as it travels",
            str(size),
        )
    return policy


def _first_layer(system: System) -> Layer:
    name = system.file.name.encode(errors="backslashreplace").decode()
    return Layer(
        file=system.file,
        shown=name[-FILE_SIZE_MAX:],
        lines=system.lines,
        allow={
            service.name: service.capabilities
            for service in system.services
            if service.capabilities
        },
        routes={},
        roots={service.name: (*service.path, "capabilities") for service in system.services},
    )


def _layer(system: System, index: int) -> Layer:
    """One policy file. That nothing can be read there is the system file's mistake."""
    shown = system.policy[index]
    file = system.file.parent / shown
    try:
        data = read_whole(file, POLICY_FILE_SIZE_MAX)
    except WrongFile as wrong:
        raise system.wrong(
            ("system", "policy", index),
            f"a policy file {wrong.rule}",
            f'"{cut(shown)}": {wrong.found}',
        ) from wrong
    return parse_layer(data, file, shown)


def parse_layer(data: bytes, file: Path, shown: str) -> Layer:
    """Read the bytes of a policy file. Raises SystemFileError, which names `file`."""
    document, lines = read_toml(data, file, POLICY_FILE_SIZE_MAX)
    try:
        read: dict[str, Any] = POLICY_FILE.read(document, ())
    except WrongValue as wrong:
        raise SystemFileError(file, lines.line(wrong.path), wrong.expected, wrong.found) from wrong
    allow = {name: tuple(rights) for name, rights in read.get("allow", {}).items()}
    return Layer(
        file=file,
        shown=shown,
        lines=lines,
        allow=allow,
        routes=read.get("route", {}),
        roots={name: ("allow", name) for name in allow},
    )


def _check_name(layer: Layer, path: KeyPath, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise SystemFileError(
            layer.file,
            layer.lines.line(path),
            f"a service of the system ({', '.join(names)})",
            f'"{name}"',
        )


def policy_schema_text() -> str:
    """The schema as it is published: docs/reference/policy-file.schema.json."""
    return published("Nexus policy file", POLICY_FILE)
