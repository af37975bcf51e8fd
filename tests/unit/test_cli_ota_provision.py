"""`nexus ota provision`: what a new device has on its disks, and what it does not become."""

import fcntl
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

from fuzz.sets import about, small
from fuzz.trust import Publisher
from nexus.bootctl import BootRecord, Cause, EnvironmentBoot, SlotName, SlotState, open_boot
from nexus.bootctl.block import BlockBoot
from nexus.bootctl.environment import ENVIRONMENT_SIZE, Copy, decode_environment, encode_environment
from nexus.cli.command import main
from nexus.cli.ota_provision import DEVELOPMENT_SETTING
from nexus.drivers import finished
from nexus.loader.devices import opened
from nexus.services.updated.config import Settings
from nexus.sets import Content, write
from nexus.trust import encode_update
from nexus.trust.update import root_name

SLOT_SIZE: Final = 1 << 20
DEVICES: Final = """
[device.boot]
kind = "block"
size = "64KiB"

[device.slot-a]
kind = "block"
size = "1MiB"

[device.slot-b]
kind = "block"
size = "1MiB"
"""
TAKES_DEVELOPMENT_KEYS: Final = """
[service.updated]
program = "updated"

[service.updated.settings]
development_keys = true
"""
SYSTEM: Final = '[system]\nname = "pump"\n\n[service.timed]\nprogram = "timed"\n'


def a_set(version: int = 7, devices: str = DEVICES) -> bytes:
    """A set named 1.2.0 with this system file."""
    system = Content(data=(SYSTEM + devices).encode())
    large = Content(
        data=b"".join(sha256(bytes([each % 256, each // 256])).digest() for each in range(3000))
    )
    return write(about(version), small() | {"system/system.toml": system, "x/large": large})


def an_update(
    publisher: Publisher, content: bytes, *, name: str = "1.2.0", version: int = 7, floor: int = 0
) -> bytes:
    """An update that names the set as it names itself."""
    files = publisher.release(version, content=content, floor=floor)

    def rename(signed: dict[str, dict[str, object]]) -> None:
        (only,) = signed["targets"].values()
        signed["targets"] = {f"{name}.nxs": only}

    return encode_update(publisher.changed(files, "targets.json", rename)) + content


class Place:
    """A folder with an update, a root, and the state directory of a device."""

    def __init__(self, folder: Path) -> None:
        self.update, self.root = folder / "x.nxu", folder / "root.json"
        self.state = folder / "state"
        self.publisher = Publisher()
        _ = self.root.write_bytes(self.publisher.anchor.root)

    def provision(self, update: bytes, *more: str) -> int:
        """Run the command."""
        _ = self.update.write_bytes(update)
        words = ["ota", "provision", str(self.update), "--root", str(self.root)]
        return main([*words, "--state", str(self.state), *more])

    def record(self) -> BootRecord:
        """What the boot device says."""
        with opened(self.state / "boot.img") as device:
            return finished(BlockBoot(device).load())

    def anchor(self) -> bytes:
        """Whom the boot device trusts."""
        with opened(self.state / "boot.img") as device:
            return finished(BlockBoot(device).read_anchor())

    def slot(self, name: SlotName) -> bytes:
        """All of a slot."""
        return (self.state / f"slot-{name.value}.img").read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place of its own."""
    return Place(tmp_path)


def test_a_new_device_boots_its_set_and_trusts_its_root(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    content = a_set()

    assert place.provision(an_update(place.publisher, content, floor=3), "--json") == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["system"], told["slot"], told["version"], told["floor"]) == ("pump", "a", 7, 3)
    record = place.record()
    info = record.slot(SlotName.A)
    assert record.active is SlotName.A
    assert record.trying is None
    assert record.floor == 3
    assert (info.state, info.version, info.name) == (SlotState.GOOD, 7, "1.2.0")
    assert (info.digest, info.size) == (sha256(content).digest(), len(content))
    assert [reason.cause for reason in record.reasons] == [Cause.PROVISIONED]
    assert place.slot(SlotName.A) == content + bytes(SLOT_SIZE - len(content))
    assert place.slot(SlotName.B) == bytes(SLOT_SIZE)
    assert place.anchor() == place.publisher.anchor.root


def test_a_device_is_given_the_latest_root_that_the_named_one_leads_to(place: Place) -> None:
    name = place.publisher.rotate("root")

    assert place.provision(an_update(place.publisher, a_set())) == 0

    assert name == root_name(2)
    assert place.anchor() == place.publisher.files[name]


def test_the_images_are_missed_if_they_go_away(place: Place) -> None:
    assert place.provision(an_update(place.publisher, a_set())) == 0

    assert sorted(path.name for path in place.state.iterdir()) == [
        "boot.img",
        "boot.made",
        "slot-a.img",
        "slot-a.made",
        "slot-b.img",
        "slot-b.made",
    ]


def test_a_device_is_provisioned_once_unless_it_is_asked_for(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.provision(an_update(place.publisher, a_set())) == 0
    before = place.record()
    other = a_set(8)
    update = an_update(place.publisher, other, version=8)

    assert place.provision(update) == 1
    assert "boots set 1.2.0 from slot a" in capsys.readouterr().err
    assert place.record() == before

    assert place.provision(update, "--again") == 0
    after = place.record()
    assert after.slot(SlotName.A).version == 8
    assert after.sequence > before.sequence
    assert place.slot(SlotName.A)[: len(other)] == other


@pytest.mark.parametrize("copy", [0, 1])
def test_a_u_boot_environment_keeps_its_variables_and_gets_the_record(
    copy: int, place: Place
) -> None:
    place.state.mkdir()
    image = bytearray(64 * 1024)
    own = encode_environment(7, {"bootcmd": "run boot_a", "bootdelay": "2"})
    image[copy * ENVIRONMENT_SIZE : (copy + 1) * ENVIRONMENT_SIZE] = own
    _ = (place.state / "boot.img").write_bytes(image)

    assert place.provision(an_update(place.publisher, a_set(), floor=3)) == 0

    with opened(place.state / "boot.img") as device:
        control, record = finished(open_boot(device))
    assert isinstance(control, EnvironmentBoot)
    assert (record.active, record.floor, record.slot(SlotName.A).version) == (SlotName.A, 3, 7)
    assert place.anchor() == place.publisher.anchor.root
    at = (1 - copy) * ENVIRONMENT_SIZE
    written = (place.state / "boot.img").read_bytes()[at : at + ENVIRONMENT_SIZE]
    found = decode_environment(written)
    assert isinstance(found, Copy)
    assert (found.variables["bootcmd"], found.variables["bootdelay"]) == ("run boot_a", "2")

    assert place.provision(an_update(place.publisher, a_set(8), version=8)) == 1, "once"


def untouched(place: Place) -> bool:
    """Whether nothing was made."""
    return not place.state.exists()


def test_an_update_that_is_not_trusted_makes_no_device(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.provision(an_update(Publisher("stranger"), a_set())) == 1

    assert "is not trusted: wrong key" in capsys.readouterr().err
    assert untouched(place)


def test_keys_for_development_make_no_device_that_would_refuse_them(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.publisher = Publisher(development=True)
    _ = place.root.write_bytes(place.publisher.anchor.root)

    refuses = a_set(7, DEVICES + TAKES_DEVELOPMENT_KEYS.replace("true", "false"))
    default = a_set(8, DEVICES + TAKES_DEVELOPMENT_KEYS.partition("[service.updated.set")[0])
    takes = a_set(9, DEVICES + TAKES_DEVELOPMENT_KEYS)

    for version, content in ((7, refuses), (8, default)):
        assert place.provision(an_update(place.publisher, content, version=version)) == 1
        assert "development key" in capsys.readouterr().err
        assert untouched(place)

    assert place.provision(an_update(place.publisher, takes, version=9)) == 0


def test_the_setting_is_the_one_that_updated_reads() -> None:
    assert Settings.__struct_fields__ == (DEVELOPMENT_SETTING,)
    assert Settings().development_keys is False


def test_a_set_that_was_changed_makes_no_device(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    update = an_update(place.publisher, a_set())

    assert place.provision(update[:-1]) == 1
    assert "is refused: truncated" in capsys.readouterr().err
    other = an_update(place.publisher, a_set(8), version=8)
    head = len(other) - len(a_set(8))
    assert place.provision(other[:head] + a_set(9)) == 1
    assert "is not the one that was signed" in capsys.readouterr().err
    assert untouched(place)


def test_a_set_whose_manifest_says_otherwise_makes_no_device(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.provision(an_update(place.publisher, a_set(8), version=9)) == 1
    assert "is not the one that was signed" in capsys.readouterr().err
    assert place.provision(an_update(place.publisher, a_set(10), version=10, name="2.0")) == 1
    assert "is not the one that was signed" in capsys.readouterr().err
    assert untouched(place)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("", "has no block device boot"),
        (DEVICES.partition("[device.slot-b]")[0], "has no block device slot-b"),
        (DEVICES.replace("1MiB", "64KiB"), "and a slot has 65536"),
        (
            DEVICES.replace(
                'slot-b]\nkind = "block"\nsize = "1MiB"', 'slot-b]\nkind = "block"\nsize = "2MiB"'
            ),
            "the two slots are of different size",
        ),
    ],
)
def test_a_system_without_two_fitting_slots_is_not_provisioned(
    devices: str, expected: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.provision(an_update(place.publisher, a_set(7, devices))) == 1

    assert expected in capsys.readouterr().err
    assert not (place.state / "boot.img").exists()


def test_a_device_that_is_smaller_than_the_system_file_says_is_left_as_it_is(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    update = an_update(place.publisher, a_set())
    assert place.provision(update) == 0
    before = place.record()
    os.truncate(place.state / "slot-b.img", SLOT_SIZE // 2)

    assert place.provision(update, "--again") == 1

    assert "the device slot-b is smaller than the system file says" in capsys.readouterr().err
    assert place.record() == before


def test_a_device_that_somebody_else_holds_is_left_alone(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus.loader.devices.LOCK_WAIT", 0)
    update = an_update(place.publisher, a_set())
    assert place.provision(update) == 0
    before = place.record()
    descriptor = os.open(place.state / "boot.img", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    assert place.provision(update, "--again") == 1

    os.close(descriptor)
    assert "another system uses" in capsys.readouterr().err
    assert place.record() == before


def test_a_root_that_is_none_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    update = an_update(place.publisher, a_set())
    _ = place.root.write_bytes(b"{}")

    assert place.provision(update) == 1
    assert "device: " in capsys.readouterr().err
    _ = place.root.write_bytes(bytes(20_000))
    assert place.provision(update) == 2
    assert "is no root" in capsys.readouterr().err
    assert untouched(place)


def test_without_a_state_directory_it_is_where_up_has_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STATE", "RUNTIME", "LOG"):
        monkeypatch.setenv(f"NEXUS_{name}_DIR", str(tmp_path / name.lower()))
    _ = place.update.write_bytes(an_update(place.publisher, a_set()))

    words = ["ota", "provision", str(place.update), "--root", str(place.root)]

    assert main([*words, "--instance", "b"]) == 0
    assert (tmp_path / "state" / "pump@b" / "boot.img").exists()
