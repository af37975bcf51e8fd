"""Metadata that is not to be trusted, brought to updated's engine: each kind has its own status,
nothing moves, nothing is written, and the running set is not touched."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import pytest

from fuzz.trust import DAY, T0, Publisher
from nexus.bootctl import BlockBoot, SlotName
from nexus.drivers import finished
from nexus.protocols.updated import EventKind, Phase, UpdatedStatus
from nexus.services.updated.faults import OF_TRUST, Declined
from nexus.services.updated.kept import TRUST
from nexus.trust import TrustStatus, decode_state, encode_metadata
from nexus.trust.limits import ROOTS_MAX, TIMESTAMP_SIZE_MAX
from nexus.trust.update import TARGETS, TIMESTAMP, root_name
from tests.fakes.diskdevice import DiskDevice
from tests.fakes.updates import ASKER, Device

SEEN: Final = 5  # version of the release that the device has seen
Make = Callable[[Publisher], bytes]


@pytest.fixture
def publisher() -> Publisher:
    """Whom the device believes: two of two keys sign targets."""
    return Publisher(targets=(2, 2))


@pytest.fixture
def device(publisher: Publisher) -> Device:
    """A device of the publisher's that has seen its release SEEN, and was told of it alone."""
    found = Device()
    finished(BlockBoot(DiskDevice(found.boot_disk)).write_anchor(publisher.anchor.root))
    _ = found.boot()
    _ = publisher.release(SEEN - 1)
    _ = finished(found.engine.begin(encode_metadata(publisher.release(SEEN)), ASKER))
    return found


def later(publisher: Publisher) -> dict[str, bytes]:
    """The next release."""
    return publisher.release(SEEN + 1)


def edited(name: str, change: Callable[[bytes], bytes]) -> Make:
    """The next release, with a file that somebody without a key has changed."""

    def make(publisher: Publisher) -> bytes:
        files = later(publisher)
        return encode_metadata({**files, name: change(files[name])})

    return make


def changed(name: str, change: Callable[[Any], object]) -> Make:
    """The next release, with a file that was signed so."""
    return lambda publisher: encode_metadata(publisher.changed(later(publisher), name, change))


def twice(publisher: Publisher) -> bytes:
    files = later(publisher)
    document = json.loads(files[TIMESTAMP])
    document["signatures"] *= 2
    return encode_metadata({**files, TIMESTAMP: json.dumps(document).encode()})


def too_few(publisher: Publisher) -> bytes:
    files = later(publisher)
    publisher.signers["targets"] = publisher.signers["targets"][:1]
    return encode_metadata(publisher.changed(files, TARGETS, lambda _: None))


def mixed(publisher: Publisher) -> bytes:
    old = dict(publisher.files)
    return encode_metadata({**later(publisher), TARGETS: old[TARGETS]})


def replayed(publisher: Publisher) -> bytes:
    other = Publisher(targets=(2, 2))
    return encode_metadata(other.release(SEEN - 1))


def rolled_back(publisher: Publisher) -> bytes:
    """An older snapshot and targets under a newer timestamp."""
    newest = publisher.files[TIMESTAMP]
    other = Publisher(targets=(2, 2))
    other.files = {**other.files, TIMESTAMP: newest}
    return encode_metadata(other.release(SEEN + 1))


def expired(publisher: Publisher) -> bytes:
    """It ended before the moment at which the root that comes with it was signed."""
    short = publisher.release(SEEN + 1, expires=T0 + (SEEN + 2) * DAY)
    publisher.release(SEEN + 3)
    name = publisher.rotate("root")
    return encode_metadata({**short, name: publisher.files[name]})


ATTACKS: Final[Mapping[str, tuple[UpdatedStatus, Make]]] = {
    "no map": (UpdatedStatus.MALFORMED_METADATA, lambda _: b"\x90"),
    "no version": (
        UpdatedStatus.MALFORMED_METADATA,
        changed(TARGETS, lambda signed: signed.pop("version")),
    ),
    "an end that is missing": (
        UpdatedStatus.METADATA_TRUNCATED,
        edited(TIMESTAMP, lambda data: data[:-20]),
    ),
    "a file too large": (
        UpdatedStatus.METADATA_TOO_LARGE,
        edited(TIMESTAMP, lambda data: data.ljust(TIMESTAMP_SIZE_MAX + 1)),
    ),
    "too many roots": (
        UpdatedStatus.METADATA_TOO_MANY,
        lambda publisher: encode_metadata(
            {
                **later(publisher),
                **{root_name(number): b"{}" for number in range(2, ROOTS_MAX + 3)},
            }
        ),
    ),
    "one signature twice": (UpdatedStatus.METADATA_DUPLICATE, twice),
    "another publisher": (
        UpdatedStatus.WRONG_KEY,
        lambda _: encode_metadata(Publisher("stranger").release(SEEN + 1)),
    ),
    "changed targets": (
        UpdatedStatus.BAD_SIGNATURE,
        edited(TARGETS, lambda data: data.replace(b'"length":5', b'"length":6')),
    ),
    "too few signatures": (UpdatedStatus.THRESHOLD, too_few),
    "old targets": (UpdatedStatus.MIXED, mixed),
    "an older release": (UpdatedStatus.REPLAYED, replayed),
    "an older release inside": (UpdatedStatus.ROLLED_BACK, rolled_back),
    "an ended release": (UpdatedStatus.EXPIRED_METADATA, expired),
    "no set": (UpdatedStatus.NO_SET, changed(TARGETS, lambda signed: signed["targets"].clear())),
}


def declined(device: Device, section: bytes) -> UpdatedStatus:
    with pytest.raises(Declined) as caught:
        _ = finished(device.engine.begin(section, ASKER))
    assert caught.value.detail.isprintable()
    return caught.value.status


@pytest.mark.covers(
    "updated.MALFORMED_METADATA",
    "updated.METADATA_TRUNCATED",
    "updated.METADATA_TOO_LARGE",
    "updated.METADATA_TOO_MANY",
    "updated.METADATA_DUPLICATE",
    "updated.WRONG_KEY",
    "updated.BAD_SIGNATURE",
    "updated.THRESHOLD",
    "updated.MIXED",
    "updated.REPLAYED",
    "updated.ROLLED_BACK",
    "updated.EXPIRED_METADATA",
    "updated.NO_SET",
)
@pytest.mark.parametrize(("status", "make"), ATTACKS.values(), ids=ATTACKS)
def test_each_attack_has_its_status_and_moves_nothing(
    device: Device, publisher: Publisher, status: UpdatedStatus, make: Make
) -> None:
    kept = device.memory.values[TRUST]
    record = device.engine.record
    slots = [device.slot_bytes(name) for name in SlotName]

    assert declined(device, make(publisher)) is status

    assert device.memory.values[TRUST] == kept
    assert finished(BlockBoot(DiskDevice(device.boot_disk)).load()) == record
    assert [device.slot_bytes(name) for name in SlotName] == slots
    assert device.engine.transfer().phase is Phase.RECEIVING, "the one under way goes on"
    event = device.engine.history.page(0, 1)[0][0]
    assert (event.kind, event.status) == (EventKind.REFUSED, status)
    assert event.subject == ASKER.subject


def test_after_every_attack_the_true_release_is_still_taken(
    device: Device, publisher: Publisher
) -> None:
    for _, make in ATTACKS.values():
        other = Publisher(targets=(2, 2))
        _ = other.release(SEEN - 1)
        _ = other.release(SEEN)
        _ = declined(device, make(other))

    begun = finished(device.engine.begin(encode_metadata(later(publisher)), ASKER))

    assert begun.version == SEEN + 1


def test_a_set_below_the_version_floor_is_refused(device: Device, publisher: Publisher) -> None:
    kept = decode_state(device.memory.values[TRUST])
    device.memory.values[TRUST] = replace(kept, version_floor=SEEN + 2).encode()
    _ = device.start()

    assert declined(device, encode_metadata(later(publisher))) is UpdatedStatus.BELOW_FLOOR


def test_numbers_beyond_what_a_boot_record_counts_are_refused(
    device: Device, publisher: Publisher
) -> None:
    huge = encode_metadata(publisher.release(1 << 63, issued=T0 + 9 * DAY))

    assert declined(device, huge) is UpdatedStatus.MALFORMED_METADATA


def test_every_kind_of_distrust_has_a_status_of_its_own() -> None:
    assert len(set(OF_TRUST.values())) == len(TrustStatus)
