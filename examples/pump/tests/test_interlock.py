"""The whole station in the simulator: what the pump does when the sensor does not."""

from nexus.ipc import Refused
from nexus.testing.device import Device
from nexus.testing.plugin import Simulate
from pump_station.level_protocol import Fill
from pump_station.pump_protocol import GetState, PumpStatus, Start, Stop, StopReason

SYSTEM = "../system.toml"


async def started(device: Device) -> None:
    """A running pump; the tester was given the right to start it."""
    await device.sleep("300ms")
    assert (await device.call("pump", Start())).running


def test_it_starts_and_stops_when_asked(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        await started(device)
        state = await device.call("pump", Stop())
        assert (state.running, state.reason, state.starts) == (False, StopReason.ASKED, 1)

    simulate(SYSTEM, scenario, rights=("pump.operate",))


def test_who_lacks_the_right_is_denied(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        await device.sleep("300ms")
        outcome = await device.ask("pump", Start())
        assert isinstance(outcome, Refused)
        assert outcome.status.name == "DENIED"
        assert not (await device.call("pump", GetState())).running

    simulate(SYSTEM, scenario)


def test_who_lacks_the_right_may_not_stop_it_either(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        outcome = await device.ask("pump", Stop())
        assert isinstance(outcome, Refused)
        assert outcome.status.name == "DENIED"
        assert (await device.call("pump", GetState())).reason is StopReason.NOT_STARTED

    simulate(SYSTEM, scenario)


def test_while_it_runs_there_is_no_reason_to_stand(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        before = await device.call("pump", GetState())
        assert (before.running, before.reason) == (False, StopReason.NOT_STARTED)
        await started(device)
        for _ in range(2):
            state = await device.call("pump", GetState())
            assert (state.running, state.reason) == (True, StopReason.RUNNING)
            assert (await device.call("pump", Stop())).reason is StopReason.ASKED
            assert (await device.call("pump", Start())).reason is StopReason.RUNNING

    simulate(SYSTEM, scenario, rights=("pump.operate",))


def test_it_runs_on_when_the_sensor_dies_and_its_successor_answers_soon(
    simulate: Simulate,
) -> None:
    async def scenario(device: Device) -> None:
        await started(device)
        before = await device.state("level")
        await device.kill("level")
        await device.sleep("2s")  # longer than a reading counts
        assert (await device.state("level")).generation == before.generation + 1
        state = await device.call("pump", GetState())
        assert (state.running, state.reason, state.starts) == (True, StopReason.RUNNING, 1)

    simulate(SYSTEM, scenario, rights=("pump.operate",))


def test_it_does_not_start_on_an_empty_tank(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        await device.call("level", Fill(60))
        await device.sleep("300ms")
        assert await device.ask("pump", Start()) == Refused(PumpStatus.TANK_EMPTY)

    simulate(SYSTEM, scenario, rights=("pump.operate",))


def test_it_stops_when_the_tank_runs_dry(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        await started(device)
        await device.call("level", Fill(20))
        await device.sleep("300ms")
        state = await device.call("pump", GetState())
        assert (state.running, state.reason) == (False, StopReason.TANK_EMPTY)

    simulate(SYSTEM, scenario, rights=("pump.operate",))


def test_it_stops_when_the_sensor_hangs_and_may_start_when_it_is_back(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        await started(device)
        before = await device.state("level")
        device.freeze("level", "60s")
        await device.sleep("1s")
        state = await device.call("pump", GetState())
        assert (state.running, state.reason) == (False, StopReason.SENSOR_LOST)
        assert await device.ask("pump", Start()) == Refused(PumpStatus.NO_SENSOR)

        await device.sleep("4s")  # init's watchdog ends the hanging instance and starts another
        after = await device.state("level")
        assert (after.generation, after.reason) == (before.generation + 1, "hang")
        assert (await device.call("pump", Start())).running

    simulate(SYSTEM, scenario, rights=("pump.operate",))


def test_the_same_seed_gives_the_same_run(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        await started(device)
        await device.kill("level")
        await device.sleep("2s")

    first = simulate(SYSTEM, scenario, rights=("pump.operate",))
    assert simulate(SYSTEM, scenario, rights=("pump.operate",)).log == first.log
