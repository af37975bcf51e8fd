"""`nexus doctor`: which guarantee holds on this machine for this user, and how it degrades."""

from collections.abc import Mapping
from typing import Any

from nexus.cli.output import say, say_json, say_table
from nexus.kernel.linux.report import State, hardening_report, kernel_facts


def doctor(*, as_json: bool) -> None:
    """Try every guarantee and print how far it holds."""
    show(document(), as_json=as_json)


def show(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a machine says of itself."""
    if as_json:
        say_json(found)
        return
    rows = found["guarantees"]
    say_table(
        ("GUARANTEE", "STATE", "GIVES", "WHY"),
        [(row["name"], row["state"], row["gives"], row["why"] or "-") for row in rows],
    )
    counts = ", ".join(
        f"{sum(row['state'] == state for row in rows)} {state.value}" for state in State
    )
    facts = ", ".join(f"{name} {value}" for name, value in found["kernel"].items())
    say("")
    say(f"{counts}; {facts}")


def document() -> dict[str, Any]:
    """The report as JSON, for bug reports too."""
    return {
        "guarantees": [
            {"name": row.name, "state": row.state.value, "gives": row.gives, "why": row.why}
            for row in hardening_report()
        ],
        "kernel": kernel_facts(),
    }
