"""Which ways a service holds: one to policyd, and those it asks by, soon after its start."""

from pathlib import Path
from typing import Final

import pytest

from nexus.protocols.init import GetLinks, LinkRow
from nexus.testing.device import Device, simulate

pytestmark = pytest.mark.sim

DEVICE: Final = Path(__file__).parents[2] / "systems" / "device.toml"
TWICE: Final = {("execd", "logd"), ("execd", "metricsd"), ("exportd", "metricsd")}
"""By the service itself, and by its log or its metrics."""


async def taken(device: Device, client: str) -> dict[str, int]:
    """How often the client's present instance took its way to each server."""
    rows: list[LinkRow] = []
    total = 1
    while len(rows) < total:
        page = await device.init(GetLinks(len(rows)))
        assert page.rows, "a page of the table is never empty"
        rows += page.rows
        total = page.total
    return {row.server: row.taken for row in rows if row.client == client}


def expected(client: str, servers: set[str]) -> dict[str, int]:
    return {server: 1 + ((client, server) in TWICE) for server in servers}


def test_a_service_asks_policyd_by_one_way() -> None:
    async def scenario(device: Device) -> None:
        assert await taken(device, "execd") == expected(
            "execd", {"policyd", "statefsd", "logd", "metricsd"}
        )

    _ = simulate(DEVICE, scenario, seed=3)


@pytest.mark.parametrize(
    ("name", "servers"),
    [("execd", {"policyd", "statefsd", "logd", "metricsd"}), ("exportd", {"metricsd", "logd"})],
)
def test_a_way_that_is_late_at_the_start_is_there_before_anybody_needs_it(
    name: str, servers: set[str]
) -> None:
    """Whom it asks says nothing while it starts: of two that look for one server, its log and the
    service, one has the late link then, and the other none."""

    async def scenario(device: Device) -> None:
        before = await taken(device, name)
        for server in sorted(servers - {"statefsd"}):
            device.freeze(server, "800ms")
        _ = await device.kill(name)
        await device.sleep("500ms")
        late = await taken(device, name)
        await device.sleep("6s")

        assert late != before
        assert await taken(device, name) == before == expected(name, servers)

    _ = simulate(DEVICE, scenario, seed=3)
