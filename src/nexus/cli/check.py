"""`nexus check FILE`: is this system file right, and what follows from it?"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from nexus.abi import Grants, HardwareKind
from nexus.cli.output import say
from nexus.cli.trial import tried_plan
from nexus.init.declare import DURATION_UNITS, SIZE_UNITS, amount_text
from nexus.init.plan import Plan, own_group, plan_data
from nexus.kernel.core.hardware import Hardware

STAGES: Final = ("policy", "core", "rest")  # by their number


def check(file: Path, *, digest: bool, as_json: bool) -> None:
    """Print what follows from a system file. Raises SystemFileError."""
    plan = tried_plan(file)
    if digest:
        say(plan.digest)
    elif as_json:
        say(json.dumps({"digest": plan.digest, "plan": plan_data(plan)}, indent=2))
    else:
        say("\n".join(describe(plan)))


def describe(plan: Plan) -> list[str]:
    """The plan for a person, in lines. A table that would be empty is left out."""
    owned = plan.root_size + sum(service.owner_size for service in plan.services)
    counts = f"{len(plan.services)} services, {len(plan.links)} links"
    tables = (
        _services(plan),
        _times(plan),
        _links(plan),
        _groups(plan),
        _devices(plan),
        _grants(plan),
        _rights(plan),
    )
    return [
        f"{plan.name}: {counts}, {_size(owned)} of {_size(plan.total_size)}, smp {plan.smp}",
        *(line for table in tables if table for line in ("", *table)),
        "",
        f"digest {plan.digest}",
    ]


def _services(plan: Plan) -> list[str]:
    """What each service is and costs, in the order of their start."""
    heads = (
        "SERVICE",
        "START",
        "PROGRAM",
        "QOS",
        "CPU",
        "SAFE",
        "RESERVED",
        "SLOTS",
        "ENDPOINTS",
        "MEMORY",
        "SHARE",
    )
    rows = [
        (
            service.name,
            f"by {service.by}" if service.by else STAGES[service.stage],
            service.program,
            service.qos.name.lower().replace("_", "-"),
            "any" if service.cpu is None else str(service.cpu),
            "yes" if service.safe else "no",
            f"{_size(service.reserved_size)} of {_size(service.owner_size)}",
            str(service.slots),
            str(service.endpoints),
            _size(service.memory),
            "any" if service.cpu_share is None else f"{service.cpu_share}%",
        )
        for service in plan.services
    ]
    return _table(heads, rows)


def _times(plan: Plan) -> list[str]:
    """How each service is watched, started again and stopped."""
    rows = [
        (
            service.name,
            _span(service.health_deadline),
            _span(service.probe_every) if service.probe_every else "first only",
            f"{_span(service.probe_answer)}, {service.probe_misses} missed"
            if service.probe_every
            else "-",
            str(service.late_max) if service.late_max else "-",
            f"{_span(service.backoff)} to {_span(service.backoff_max)}",
            _span(service.backoff_reset),
            _span(service.stop_max),
        )
        for service in plan.services
    ]
    heads = ("SERVICE", "READY", "PROBE", "ANSWER", "LATE MAX", "BACKOFF", "RESET", "STOP")
    return _table(heads, rows)


def _links(plan: Plan) -> list[str]:
    rows = [
        (
            link.client,
            link.server,
            "sync" if link.sync else "post",
            str(link.depth),
            _size(link.size),
            str(link.delegations),
            f"{link.reply_depth} x {_size(link.reply_size)}",
        )
        for link in plan.links
    ]
    heads = ("CLIENT", "SERVER", "KIND", "DEPTH", "SIZE", "DELEGATIONS", "REPLIES")
    return _table(heads, rows) if rows else []


def _groups(plan: Plan) -> list[str]:
    """The declared groups; those of services without one are all alike."""
    rows = [
        (
            group.name,
            group.strategy.value,
            f"{group.restarts} in {_span(group.within)}",
            group.exceeded.value,
            ", ".join(group.members),
        )
        for group in plan.groups
        if group != own_group(group.name)
    ]
    heads = ("GROUP", "STRATEGY", "RESTARTS", "EXCEEDED", "SERVICES")
    return _table(heads, rows) if rows else []


def _devices(plan: Plan) -> list[str]:
    """The bus map, and who has which device."""
    holders = {
        grant.name: service.name for service in plan.services for grant in service.grants.hardware
    }
    rows = [
        (
            device.name,
            device.kind.name.lower(),
            _size(device.size) if device.size else "-",
            _place(device),
            holders.get(device.name, "-"),
        )
        for device in plan.hardware
    ]
    heads = ("DEVICE", "KIND", "SIZE", "PLACE", "HOLDER")
    return _table(heads, rows) if rows else []


def _place(device: Hardware) -> str:
    """Where a device is on linux."""
    if device.legacy:
        return "old registers, refused"
    if device.kind is HardwareKind.BLOCK and not device.path:
        return f"{device.name}.img in the state directory"
    return device.path or "-"


def _grants(plan: Plan) -> list[str]:
    """What services may do beyond their links; those who may do nothing are left out."""
    rows = [
        (
            service.name,
            service.grants.isolation.name.lower(),
            str(service.grants.threads),
            "; ".join(_ways(service.grants)) or "-",
        )
        for service in plan.services
        if service.grants != Grants()
    ]
    heads = ("SERVICE", "ISOLATION", "THREADS", "GRANTS")
    return _table(heads, rows) if rows else []


def _ways(grants: Grants) -> list[str]:
    ways = [f"port {name}" for name in grants.ports]
    ways += [f"{each.kind.name.lower()} device {each.name}" for each in grants.hardware]
    ways += [f"secret in a {grants.secret.name.lower()}"] if grants.secret else []
    ways += [
        f"device {each.name} {each.path}{' writable' if each.writable else ''}"
        for each in grants.devices
    ]
    ways += [f"listens {each.name} {each.address} port {each.port}" for each in grants.listen]
    return ways + [f"connects to port {port}" for port in grants.connect]


def _rights(plan: Plan) -> list[str]:
    """The policy: who holds what, and where it says so."""
    given: dict[tuple[str, str], list[str]] = {}
    for name, rights in plan.policy.allow.items():
        for right in rights:
            given.setdefault((name, f"{right.file}:{right.line}"), []).append(right.text)
    rows = [(name, ", ".join(rights), where) for (name, where), rights in given.items()]
    rows += [(f"route to {name}", right, "-") for name, right in plan.policy.routes.items()]
    return _table(("SUBJECT", "RIGHTS", "GIVEN BY"), rows) if rows else []


def _span(amount: int) -> str:
    return amount_text(amount, DURATION_UNITS)


def _size(amount: int) -> str:
    return amount_text(amount, SIZE_UNITS)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, two spaces between them."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
