"""Which ways a service holds: one to policyd, and those it asks by, soon after its start."""

from pathlib import Path
from typing import Final

import pytest

from nexus.protocols.init import GetLinks, GetRouteCounts, LinkRow
from nexus.services.selftest.main import TAKEN_TWICE
from nexus.testing.device import Device, simulate

pytestmark = pytest.mark.sim

DEVICE: Final = Path(__file__).parents[2] / "systems" / "device.toml"


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
    return {server: 1 + ((client, server) in TAKEN_TWICE) for server in servers}


def test_a_service_asks_policyd_by_one_way() -> None:
    async def scenario(device: Device) -> None:
        assert await taken(device, "execd") == expected(
            "execd", {"policyd", "statefsd", "logd", "metricsd"}
        )

    _ = simulate(DEVICE, scenario, seed=3)


@pytest.mark.parametrize(
    ("name", "servers", "frozen", "look"),
    [
        ("execd", {"policyd", "statefsd", "logd", "metricsd"}, "2300ms", "2200ms"),
        ("exportd", {"metricsd", "logd"}, "1400ms", "1300ms"),
    ],
)
def test_a_way_that_is_late_at_the_start_is_there_before_anybody_needs_it(
    name: str, servers: set[str], frozen: str, look: str
) -> None:
    """metricsd says nothing as long as the service looks for it at its start: of the two that look,
    the service and its metrics, one has the late link then, and the other none."""

    async def scenario(device: Device) -> None:
        before = await taken(device, name)
        device.freeze("metricsd", frozen)
        _ = await device.kill(name)
        await device.sleep(look)
        late = await taken(device, name)
        await device.sleep("4s")

        assert late["metricsd"] < 2
        assert await taken(device, name) == before == expected(name, servers)

    _ = simulate(DEVICE, scenario, seed=3)


def test_nobody_looks_without_an_end_for_what_is_not_to_be_had() -> None:
    """metricsd has room for two links beyond the plan's; who comes third finds none."""

    async def scenario(device: Device) -> None:
        device.freeze("logd", "1400ms")
        _ = await device.kill("execd")
        await device.sleep("40s")
        before = await device.init(GetRouteCounts("execd"))
        await device.sleep("20s")
        after = await device.init(GetRouteCounts("execd"))

        assert (await taken(device, "execd"))["metricsd"] == 1
        assert after == before

    _ = simulate(DEVICE, scenario, seed=3)
