"""systems/device.toml against real processes: who has which device, and what a new boot tells."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fakes.machine import NOBODY, Machine, machine, python_of

pytestmark = pytest.mark.linux

DEVICE: Final = Path(__file__).parents[2] / "systems" / "device.toml"
WINDOW: Final = "device.mmio.blk:window disk"


@pytest.fixture(params=["root", "user"])
def host(request: pytest.FixtureRequest) -> Iterator[Machine]:
    uid = os.getuid() if request.param == "root" else NOBODY
    if request.param == "user" and os.getuid() != 0:
        pytest.skip("the tester is an ordinary user already, and was the first case")
    python = python_of(uid)
    if python is None:
        pytest.skip("no Python here that an ordinary user may run with our packages")
    with machine(uid, python) as made:
        yield made


def service(host: Machine, name: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = host.ok("status", "--json").json["services"]
    (found,) = [row for row in rows if row["service"] == name]
    return found


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds soon; each look is a command of its own, which is pause enough."""
    until = time.monotonic_ns() + 60 * 10**9
    while time.monotonic_ns() < until:
        if holds():
            return True
    return False


def is_up(host: Machine, name: str, generation: int) -> bool:
    row = service(host, name)
    return (row["state"], row["health"], row["generation"]) == ("up", "ok", generation)


def decided(host: Machine, right: str) -> list[tuple[str, str]]:
    """The decisions about a right in the journal: target and verdict."""
    lines = host.ok("logs", "-n", "1000", "--json").out.splitlines()
    records = [json.loads(line)["fields"] for line in lines]
    found = [fields for fields in records if fields.get("action") == right]
    assert all(fields["asked_by"] == "init-lite" for fields in found)
    return [(fields["target"], fields["decision"]) for fields in found]


def test_devices_are_granted_by_the_policy_and_come_back_after_each_death(host: Machine) -> None:
    file = host.home / "device.toml"
    _ = file.write_text(DEVICE.read_text())
    file.chmod(0o644)
    _ = host.ok("up", "-d", str(file))
    for generation in (2, 3):
        os.kill(service(host, "statefsd")["pid"], signal.SIGKILL)
        assert eventually(partial(is_up, host, "statefsd", generation))

    _ = file.write_text(DEVICE.read_text().replace(WINDOW, "device.mmio.blk:window dis"))
    init = host.ok("status", "--json").json["pid"]
    os.kill(init, signal.SIGHUP)
    assert eventually(lambda: service(host, "statefsd")["state"] == "failed")
    denied = service(host, "statefsd")
    _ = file.write_text(DEVICE.read_text())
    os.kill(init, signal.SIGHUP)

    assert (denied["reason"], denied["pid"]) == ("denied", None)
    assert eventually(lambda: is_up(host, "statefsd", 4))
    assert decided(host, "device.mmio.rng") == [("window rng", "allow")]
    assert decided(host, "secret.file") == [("secret of keystored", "allow")]
    expected = ["allow", "allow", "allow", "deny", "allow"]

    def disk() -> list[str]:  # a decision comes into the journal after what it allows has begun
        decisions = decided(host, "device.mmio.blk")
        return [verdict for target, verdict in decisions if target == "window disk"]

    assert eventually(lambda: disk() == expected), disk()
    _ = host.ok("down")


def test_every_boot_has_a_number_and_an_id_of_its_own(host: Machine) -> None:
    told = []
    for _ in range(2):
        _ = host.ok("up", "-d", str(DEVICE))
        told.append(host.ok("status", "--json").json)
        _ = host.ok("down")

    assert [each["boots"] for each in told] == [1, 2]
    assert len({each["boot_id"] for each in told}) == 2
    assert all(len(bytes.fromhex(each["boot_id"])) == 16 for each in told)
