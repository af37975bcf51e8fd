"""init is held up for longer than its services may take to answer: nobody else is to blame."""

from pathlib import Path
from typing import Final

from nexus.testing.device import Device, simulate

DEVICE: Final = Path(__file__).parents[2] / "systems" / "device.toml"
WATCHED: Final = ("policyd", "logd", "metricsd", "statefsd", "execd", "rngd", "keystored")
TURNS: Final = 5


async def instances(device: Device) -> dict[str, int]:
    return {name: (await device.state(name)).generation for name in WATCHED}


def test_who_answered_in_time_is_not_killed_for_what_held_init_up() -> None:
    """The answers to all probes that were out wait in its queue, past the deadline of each."""

    async def scenario(device: Device) -> None:
        before = await instances(device)
        for _ in range(TURNS):
            for name in WATCHED:  # so that a probe is out to each of them
                device.freeze(name, "400ms")
            await device.sleep("350ms")
            device.freeze("init-lite", "8s")
            await device.sleep("9s")

        assert await instances(device) == before

    _ = simulate(DEVICE, scenario, seed=3)


def test_who_is_silent_is_killed_after_init_was_held_up_too() -> None:
    async def scenario(device: Device) -> None:
        before = await instances(device)
        device.freeze("policyd", "2s")
        await device.sleep("350ms")
        device.freeze("init-lite", "700ms")
        await device.sleep("2s")
        after = await instances(device)

        assert after.pop("policyd") == before.pop("policyd") + 1
        assert after == before

    _ = simulate(DEVICE, scenario, seed=3)
