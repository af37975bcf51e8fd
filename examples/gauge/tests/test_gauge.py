"""The gauge: its lines, and its double in a simulated system."""

import pytest

from nexus.testing.device import Device
from nexus.testing.plugin import Simulate
from serial_gauge.lines import pascal_of
from serial_gauge.protocol import Read


@pytest.mark.parametrize(
    ("line", "pascal"),
    [(b"P 1.013\r\n", 101_300), (b"P 0.000\n", 0), (b"P 9999.999", 999_999_900)],
)
def test_a_line_is_a_pressure(line: bytes, pascal: int) -> None:
    assert pascal_of(line) == pascal


@pytest.mark.parametrize("line", [b"", b"P 1.01", b"P -1.013", b"Q 1.013", b"P 1.013 bar", b"\xff"])
def test_noise_is_none(line: bytes) -> None:
    assert pascal_of(line) is None


def test_the_double_swings_in_the_simulator(simulate: Simulate) -> None:
    async def scenario(device: Device) -> None:
        first = await device.call("gauge", Read())
        await device.sleep("2s")
        second = await device.call("gauge", Read())
        assert 100_000 <= first.pascal < second.pascal <= 105_000

    _ = simulate("../system.toml", scenario)
