"""systems/device.toml in the simulator: what it promised is there after the power was cut."""

from pathlib import Path
from typing import Final

from nexus.abi import service_id
from nexus.ipc import Refused
from nexus.protocols.keystored import (
    KEYGEN_RIGHT,
    PUBKEY_RIGHT,
    DeviceKey,
    GenerateKey,
    GetPublicKey,
)
from nexus.protocols.logd import GetStats as LogStats
from nexus.protocols.metricsd import METRICS_READ, SERIES_ROWS_MAX, GetSeries
from nexus.protocols.metricsd import GetStats as MetricsStats
from nexus.protocols.statefsd import Durability, Get, Put
from nexus.testing.device import Device, simulate

DEVICE: Final = Path(__file__).parents[2] / "systems" / "device.toml"
STATEFSD: Final = service_id("statefsd")
KEY: Final = b"/state/plant/limit"
RIGHTS: Final = (
    KEYGEN_RIGHT,
    PUBKEY_RIGHT,
    "statefs.read:/state/plant/",
    "statefs.write:/state/plant/",
)


def put(value: bytes, durability: Durability = Durability.DURABLE, key: bytes = KEY) -> Put:
    return Put(key, value, durability, 0)


def test_after_a_power_cut_the_durable_value_and_the_key_are_there() -> None:
    keys: list[DeviceKey] = []

    async def first(device: Device) -> None:
        _ = await device.call("statefsd", put(b"80"))
        keys.append(await device.call("keystored", GenerateKey()))
        await device.cut_power()

    async def second(device: Device) -> None:
        assert (await device.call("statefsd", Get(KEY))).value == b"80"
        keys.append(await device.call("keystored", GetPublicKey()))

    cut = simulate(DEVICE, first, seed=1, rights=RIGHTS)
    again = simulate(DEVICE, second, seed=2, rights=RIGHTS, after=cut)

    assert cut.cut
    assert (again.cut, again.exit_code) == ("", 0)
    assert keys[0] == keys[1]


def test_a_right_to_one_area_is_none_to_another() -> None:
    async def scenario(device: Device) -> None:
        other = await device.ask("statefsd", put(b"x", key=b"/state/plants/limit"))
        assert isinstance(other, Refused)
        assert other.status.name == "DENIED"
        root = await device.ask("statefsd", put(b"x", key=b"/state/limit"))
        assert isinstance(root, Refused)
        assert root.status.name == "DENIED"
        _ = await device.call("statefsd", put(b"x", Durability.ACCEPTED))

    run = simulate(DEVICE, scenario, seed=3, rights=RIGHTS)

    assert run.exit_code == 0


def test_every_service_is_back_after_its_death_with_its_device() -> None:
    async def scenario(device: Device) -> None:
        _ = await device.call("statefsd", put(b"80"))
        for name in ("statefsd", "rngd", "keystored"):
            _ = await device.kill(name)
            await device.sleep("3s")
            record = await device.state(name)
            assert (record.state.name, record.health.name, record.generation) == ("UP", "OK", 2)
            assert record.spawn_refused == 0

    async def after(device: Device) -> None:
        assert (await device.call("statefsd", Get(KEY))).value == b"80"

    run = simulate(DEVICE, scenario, seed=4, rights=RIGHTS)
    _ = simulate(DEVICE, after, seed=5, rights=RIGHTS, after=run)

    assert run.exit_code == 0


def test_a_device_at_rest_counts_no_requests_and_writes_nothing() -> None:
    """systems/device.toml declares no metric: what is there are the requests of each service."""
    counted: list[dict[str, int]] = []
    written: list[tuple[int, int]] = []

    async def look(device: Device) -> None:
        page = await device.call("metricsd", GetSeries(1, SERIES_ROWS_MAX, STATEFSD, "nexus_"))
        counted.append({each.name: each.value for each in page.series})
        metrics = await device.call("metricsd", MetricsStats())
        log = await device.call("logd", LogStats())
        written.append((metrics.written_today, log.tail_written_today))

    async def scenario(device: Device) -> None:
        await device.sleep("30s")
        await look(device)
        await device.sleep("30s")
        for _ in range(2):
            await look(device)
            await device.sleep("90s")
        for _ in range(3):
            _ = await device.call("statefsd", put(b"80", Durability.ACCEPTED))
        _ = await device.ask("statefsd", put(b"x", key=b"/state/limit"))
        await device.sleep("2s")
        await look(device)

    _ = simulate(DEVICE, scenario, seed=5, rights=(*RIGHTS, METRICS_READ), within="10min")

    _, before, after, busy = counted
    assert after == before
    assert written[2] == written[1]
    more = {name: value - after.get(name, 0) for name, value in busy.items()}
    assert more == {"nexus_requests_total": 4, "nexus_request_errors_total": 1}
