"""What the values of a system file mean together: order, names, waiting, watching, grants.

Each `check_` refuses with a SystemFileError what no single value shows; what concerns budgets
and links is in `nexus.init.plan`.
"""

from collections.abc import Mapping
from typing import Final

from nexus.abi import (
    INIT_NAME,
    KERNEL_NAME,
    HardwareKind,
    Isolation,
    Nanos,
    StreamRole,
    service_id,
)
from nexus.init.declare import DURATION_UNITS, amount_text, cut
from nexus.init.errors import SystemFileError
from nexus.init.lines import KeyPath
from nexus.init.programs import ProgramSource, disk_fault
from nexus.init.system import (
    POLICY_PROBE_ANSWER,
    POLICY_PROBE_EVERY,
    PROBE_EVERY_DEFAULT,
    Service,
    System,
    Use,
)
from nexus.kernel.core.paths import SOCKET_PATH_SIZE_MAX
from nexus.protocols.policy import EXEC_RIGHT, Policy

POLICY_STAGE: Final = 0
CORE_STAGE: Final = 1
REST_STAGE: Final = 2
RESERVED_NAMES: Final = (KERNEL_NAME, INIT_NAME)  # they send messages too
POLICYD_PROGRAM: Final = "policyd"  # the service that runs it is the policy service
EXECD_PROGRAM: Final = "execd"  # the service that runs it starts others


def stage_of(service: Service) -> int:
    """When a service starts: the policy service before everybody."""
    if service.program == POLICYD_PROGRAM:
        return POLICY_STAGE
    return CORE_STAGE if service.core else REST_STAGE


def in_order(system: System) -> list[Service]:
    """The services in the order of their start: by stage, and in a stage as in the file."""
    return sorted(system.services, key=stage_of)


def policyd_of(system: System) -> str | None:
    """The name of the policy service. Raises SystemFileError for a second one."""
    found = [service for service in system.services if service.program == POLICYD_PROGRAM]
    if len(found) > 1:
        raise system.wrong(
            (*found[1].path, "program"),
            "at most one policy service",
            f'"{found[1].name}" beside "{found[0].name}"',
        )
    return found[0].name if found else None


def probe_every(service: Service) -> Nanos:
    """Time from an answer to the next probe; the policy service is watched more closely."""
    if service.probe_every is not None:
        return service.probe_every
    return POLICY_PROBE_EVERY if stage_of(service) == POLICY_STAGE else PROBE_EVERY_DEFAULT


def probe_answer(service: Service) -> Nanos:
    """Time to answer a probe after the first."""
    if service.probe_answer is not None:
        return service.probe_answer
    policy = stage_of(service) == POLICY_STAGE
    return POLICY_PROBE_ANSWER if policy else service.health_deadline


def is_safe(service: Service) -> bool:
    """Whether it runs in safe mode; the policy service does, or nothing would be allowed."""
    return service.safe or stage_of(service) == POLICY_STAGE


def check_identities(system: System) -> None:
    """Refuse two names with one id, init's and the kernel's included: it is all a receiver sees."""
    owners = {service_id(name): name for name in RESERVED_NAMES}
    for service in system.services:
        if service.name in RESERVED_NAMES:
            raise system.wrong(
                service.path,
                f"a name that is not reserved ({', '.join(RESERVED_NAMES)})",
                f'"{service.name}"',
            )
        identity = service_id(service.name)
        other = owners.setdefault(identity, service.name)
        if other != service.name:
            raise system.wrong(
                service.path,
                f'a name whose identity is its own, not that of "{other}"',
                f'"{service.name}" with 0x{identity:016x}',
            )


def check_path(system: System) -> None:
    """The folders of `path` are there."""
    for index, folder in enumerate(system.path):
        if not (system.file.parent / folder).is_dir():
            raise system.wrong(
                ("system", "path", index), "a folder, seen from the system file", f'"{cut(folder)}"'
            )


def check_programs(system: System) -> None:
    """Services that run one class of their own agree on what it speaks and how it runs."""
    first: dict[str, Service] = {}
    for service in system.services:
        if not service.entry:
            continue
        other = first.setdefault(service.entry, service)
        for key in ("protocol", "double", "ordinary"):
            if getattr(service, key) != getattr(other, key):
                raise system.wrong(
                    (*service.path, key),
                    f'the same {key} as "{other.name}", which runs "{cut(service.entry)}" too',
                    f'"{cut(str(getattr(service, key)))}"',
                )


def check_grants(system: System) -> None:
    """No two services share a port of the system or a listening address."""
    ports: dict[str, str] = {}
    sockets: dict[tuple[str, int], str] = {}
    for service in system.services:
        doors: list[tuple[str, KeyPath]]
        doors = [(port, ("ports", index)) for index, port in enumerate(service.grants.ports)]
        doors += [
            (each.name, ("streams", each.name))
            for each in service.grants.stream_ports
            if each.role is StreamRole.UNIX
        ]
        for port, key in doors:
            other = ports.setdefault(port, service.name)
            if other != service.name:
                raise system.wrong(
                    (*service.path, *key),
                    "a port that no other service has",
                    f'"{port}", which "{other}" has',
                )
            size = len(f"{system.runtime_dir or ''}/{port}.sock".encode())
            if size > SOCKET_PATH_SIZE_MAX:
                raise system.wrong(
                    (*service.path, *key),
                    f"a socket in runtime_dir with a path of at most {SOCKET_PATH_SIZE_MAX} bytes",
                    str(size),
                )
        listens = [("listen", each.name, each.address, each.port) for each in service.grants.listen]
        listens += [
            ("streams", each.name, each.address, each.port)
            for each in service.grants.stream_ports
            if each.role is StreamRole.TCP
        ]
        for where, name, address, number in listens:
            mine = f"{service.name}.{where}.{name}"
            if sockets.setdefault((address, number), mine) != mine:
                raise system.wrong(
                    (*service.path, where, name),
                    "an address and port that nobody else listens on",
                    f"{address} port {number} again",
                )


def check_hardware(system: System, sources: Mapping[str, ProgramSource]) -> None:
    """A device has one holder and one place, and a program has the device it drives."""
    devices = {device.name: device for device in system.hardware}
    places: dict[str, str] = {}
    for device in system.hardware:
        other = places.setdefault(device.path, device.name) if device.path else device.name
        if other != device.name:
            raise system.wrong(
                ("device", device.name, "path"),
                f'another path than that of the device "{other}"',
                f'"{cut(device.path)}"',
            )
    holders: dict[str, str] = {}
    for service in system.services:
        for index, grant in enumerate(service.grants.hardware):
            path = (*service.path, "hardware", index)
            holder = holders.setdefault(grant.name, service.name)
            if holder != service.name:
                raise system.wrong(
                    path,
                    "a device that no other service has",
                    f'"{grant.name}", which "{holder}" has',
                )
            if devices[grant.name].legacy:
                raise system.wrong(
                    path, "a device that is not legacy: those are refused", f'"{grant.name}"'
                )
        _check_needs(system, service, sources[service.name])


def _check_needs(system: System, service: Service, source: ProgramSource) -> None:
    """What a program of Nexus cannot be without."""
    kinds = [grant.kind for grant in service.grants.hardware]
    if source.drives is not None and source.drives not in kinds:
        kind = source.drives.name.lower()
        raise system.wrong(
            (*service.path, "hardware"),
            f'a device of kind "{kind}" in hardware, which "{source.name}" drives',
            ", ".join(f'"{each.name.lower()}"' for each in kinds) or "none",
        )
    _check_disk(system, service, source)
    if source.apart and service.grants.isolation is not Isolation.EXEC:
        raise system.wrong(
            service.path,
            f'isolation = "exec", for the libraries of "{source.name}"',
            "a process forked from init",
        )
    if source.keeps_secret and not service.grants.secret:
        raise system.wrong(
            (*service.path, "secret"),
            f'isolation = "exec" and a secret, which "{source.name}" needs',
            "none",
        )


def _check_disk(system: System, service: Service, source: ProgramSource) -> None:
    """Its settings leave the first disk it has something to keep."""
    disks = [each.name for each in service.grants.hardware if each.kind is HardwareKind.BLOCK]
    if not disks:
        return
    size = next(each.size for each in system.hardware if each.name == disks[0])
    fault = disk_fault(source, dict(service.settings), size)
    if fault is not None:
        expected = f'a disk and settings that "{source.name}" can use'
        raise system.wrong((*service.path, "hardware"), expected, fault)


def check_starters(system: System) -> None:
    """What starts on demand has somebody who starts it, and is not what others begin with."""
    services = {service.name: service for service in system.services}
    for service in system.services:
        if not service.by:
            continue
        starter = services.get(service.by)
        if starter is None or starter.program != EXECD_PROGRAM or starter.by:
            listed = ", ".join(each.name for each in system.services if _starts_others(each))
            raise system.wrong(
                (*service.path, "by"),
                f'a service that runs "{EXECD_PROGRAM}" ({listed or "none"})',
                f'"{service.by}"',
            )
        if is_safe(service) and not is_safe(starter):
            raise system.wrong(
                (*service.path, "by"),
                f'"{service.by}" to be safe as "{service.name}" is, which it starts',
                "that it is not",
            )
        if service.program == POLICYD_PROGRAM:
            raise system.wrong(
                (*service.path, "start"),
                "the policy service to start before all others",
                '"demand"',
            )
        if system.ends_with == service.name:
            raise system.wrong(
                ("system", "ends_with"),
                "the name of a service that starts with the system",
                f'"{service.name}", which "{service.by}" starts',
            )


def check_spawn_rights(system: System, policy: Policy) -> None:
    """Who starts others has the right to, for each of them."""
    services = {service.name: service for service in system.services}
    for service in system.services:
        if not service.by or policy.right(service.by, EXEC_RIGHT, service.name) is not None:
            continue
        own = (*services[service.by].path, "capabilities")
        raise system.wrong(
            own if system.lines.has(own) else services[service.by].path,
            f'the right {EXEC_RIGHT} of "{service.by}" for "{service.name}", which it starts',
            "none",
        )


def _starts_others(service: Service) -> bool:
    return service.program == EXECD_PROGRAM and not service.by


def check_waits(system: System) -> None:
    """A service waits for none that may not be there: of a later stage, or left out when safe."""
    services = {service.name: service for service in system.services}
    for client in system.services:
        for use in client.uses:
            server = services[use.name]
            if not use.sync:
                continue
            if stage_of(client) < stage_of(server):
                raise system.wrong(
                    use.path,
                    f'"{client.name}" to wait for no service that starts in a later stage;'
                    " sync = false posts",
                    f'"{use.name}"',
                )
            if is_safe(client) and not is_safe(server):
                raise system.wrong(
                    use.path,
                    f'a use of "{client.name}", which is safe, to be of a service that is safe'
                    " too, or sync = false",
                    f'"{use.name}"',
                )


def check_cycles(system: System) -> None:
    """No service waits for itself by way of others: each of them would wait for ever."""
    waits = {service.name: [use for use in service.uses if use.sync] for service in system.services}
    done: set[str] = set()
    for service in system.services:
        trail: list[Use] = []
        stack = [(service.name, iter(waits[service.name]))] if service.name not in done else []
        while stack:
            name, rest = stack[-1]
            use = next(rest, None)
            if use is None:
                done.add(name)
                _ = stack.pop()
                _ = trail.pop() if trail else None
                continue
            on_trail = [each for each, _ in stack]
            if use.name in on_trail:
                start = on_trail.index(use.name)
                raise _cycle(system, [*on_trail[start:], use.name], [*trail[start:], use])
            if use.name not in done:
                trail.append(use)
                stack.append((use.name, iter(waits[use.name])))


def _cycle(system: System, names: list[str], uses: list[Use]) -> SystemFileError:
    """The sentence about a cycle: everybody in it, and the line of each use."""
    lines = ", ".join(str(system.lines.line(use.path)) for use in uses)
    return system.wrong(
        uses[-1].path,
        "no cycle of services that wait for each other; sync = false breaks it where one posts",
        f"{' -> '.join(names)} (lines {lines})",
    )


def check_policyd(
    system: System, policyd: str | None, sources: Mapping[str, ProgramSource]
) -> None:
    """Who asks the policy service uses it, and a silent one is noticed in time."""
    for service in system.services:
        use = next((use for use in service.uses if use.name == policyd), None)
        if sources[service.name].asks_policy and (use is None or not use.sync):
            raise system.wrong(
                (*service.path, "uses") if use is None else use.path,
                f'a use of the policy service, which "{service.program}" asks: uses.policyd = {{}}',
                "none" if use is None else "one that posts",
            )
        if service.name == POLICYD_PROGRAM != service.program:
            raise system.wrong(
                (*service.path, "module" if service.entry else "program"),
                f'program = "{POLICYD_PROGRAM}" for the service that everybody asks by this name',
                f'"{cut(service.entry or service.program)}"',
            )
        if service.name != policyd:
            continue
        if service.name != POLICYD_PROGRAM:
            raise system.wrong(
                service.path,
                f'the policy service to be named "{POLICYD_PROGRAM}", as those say who ask it',
                f'"{service.name}"',
            )
        every, answer = probe_every(service), probe_answer(service)
        if not every:
            raise system.wrong(
                (*service.path, "health", "every"), "a policy service that is probed", '"0s"'
            )
        if every + answer > system.policy_stale_max:
            raise system.wrong(
                _policy_span(system, service),
                "health.every and health.answer of the policy service within"
                f" policy_stale_max, {amount_text(system.policy_stale_max, DURATION_UNITS)}",
                f"{amount_text(every, DURATION_UNITS)} and {amount_text(answer, DURATION_UNITS)}",
            )


def _policy_span(system: System, service: Service) -> KeyPath:
    """The key that sets how long a silent policy service goes unnoticed, as far as one stands."""
    keys: list[KeyPath] = [(*service.path, "health", key) for key in ("every", "answer")]
    keys.append(("system", "policy_stale_max"))
    return next((key for key in keys if system.lines.has(key)), service.path)
