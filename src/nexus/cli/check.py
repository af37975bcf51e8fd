"""`nexus check FILE`: is this system file right, and what follows from it?"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.init.declare import DURATION_UNITS, SIZE_UNITS, amount_text
from nexus.init.plan import Plan, load_plan
from nexus.init.system import schema_text

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_check(commands: "_SubParsersAction[Any]") -> None:
    """Declare the command."""
    command = commands.add_parser(
        "check",
        help="check a system file and show the plan that follows from it",
        description="Check a system file: units, providers, identities, shares and budgets.",
        epilog="Example: nexus check systems/selftest.toml --digest",
    )
    what = command.add_mutually_exclusive_group()
    _ = what.add_argument("--digest", action="store_true", help="print the plan's digest only")
    _ = what.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    _ = what.add_argument(
        "--schema", action="store_true", help="print the JSON schema of system files"
    )
    _ = command.add_argument("file", type=Path, nargs="?", help="the system file (TOML)")
    command.set_defaults(parser=command)


def check(options: argparse.Namespace) -> int:
    """Do it; the exit code. Raises SystemFileError."""
    if options.schema:
        print(schema_text(), end="")
        return 0
    if options.file is None:
        options.parser.error("name the system file to check")
    plan = load_plan(options.file)
    if options.digest:
        print(plan.digest)
    elif options.json:
        print(json.dumps({"digest": plan.digest, "plan": asdict(plan)}, indent=2))
    else:
        print("\n".join(describe(plan)))
    return 0


def describe(plan: Plan) -> list[str]:
    """The plan for a person, in lines."""
    owned = plan.root_size + sum(service.owner_size for service in plan.services)
    services = [
        (
            service.name,
            service.program,
            service.qos.name.lower().replace("_", "-"),
            "any" if service.cpu is None else str(service.cpu),
            f"{_size(service.reserved_size)} of {_size(service.owner_size)}",
            str(service.slots),
            str(service.endpoints),
            amount_text(service.backoff, DURATION_UNITS),
            amount_text(service.health_deadline, DURATION_UNITS),
            ", ".join(service.capabilities) or "-",
        )
        for service in plan.services
    ]
    links = [
        (
            link.client,
            link.server,
            str(link.depth),
            _size(link.size),
            str(link.delegations),
            f"{link.reply_depth} x {_size(link.reply_size)}",
        )
        for link in plan.links
    ]
    counts = f"{len(plan.services)} services, {len(plan.links)} links"
    return [
        f"{plan.name}: {counts}, {_size(owned)} of {_size(plan.total_size)}, smp {plan.smp}",
        "",
        *_table(
            (
                "SERVICE",
                "PROGRAM",
                "QOS",
                "CPU",
                "RESERVED",
                "SLOTS",
                "ENDPOINTS",
                "BACKOFF",
                "HEALTH",
                "CAPABILITIES",
            ),
            services,
        ),
        "",
        *_table(("CLIENT", "SERVER", "DEPTH", "SIZE", "DELEGATIONS", "REPLIES"), links),
        "",
        f"digest {plan.digest}",
    ]


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
