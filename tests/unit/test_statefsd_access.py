"""Which keys statefsd takes, which area they are in, and how much an area may hold."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import ServiceId
from nexus.protocols.statefsd import (
    AREA_SIZE_MAX,
    BOOT_RIGHT,
    KEY_SIZE_MAX,
    KEYSTORE_RIGHT,
    PROTOCOL,
    READ_RIGHT,
    WRITE_RIGHT,
    Get,
    StatefsdStatus,
)
from nexus.services.statefsd.access import (
    area_fault,
    is_special,
    key_fault,
    prefix_fault,
    right_for,
)
from nexus.services.statefsd.clients import CALLS_KEPT, CLIENTS_MAX, Clients
from nexus.services.statefsd.config import Settings, disk_fault
from nexus.services.statefsd.engine.limits import Quota, area_of
from nexus.testing.golden import frame

WELL = [
    b"/state/x",
    b"/state/boot",  # a name right below the root, and nothing of the area
    b"/state/area/a.b",
    b"/state/area/..a",
    b"/state/area/a..",
    b"/state/area/.../x",
    b"/state/area/a b",
    "/state/häuser/küche".encode(),
    b"/state/" + b"a" * AREA_SIZE_MAX,
    b"/state/a/" + b"k" * (KEY_SIZE_MAX - 9),
]
TRICKS = [
    b"",
    b"/",
    b"/state",
    b"/state/",
    b"state/x",
    b"/State/x",
    b"//state/x",
    b"/states/x",
    b"/state//x",
    b"/state/x/",
    b"/state/x//y",
    b"/state/./x",
    b"/state/../x",
    b"/state/x/..",
    b"/state/x/.",
    b"/state/x/../keystore/y",
    b"/state/x/./y",
    b"/state/x\x00",
    b"/state/x\ny",
    b"/state/x\x7fy",
    "/state/x\x85y".encode(),
    b"/state/x\xff",
    b"/state/\xc0\xaf/x",  # an overlong slash
    b"/state/\xed\xa0\x80",  # half of a surrogate pair
    b"/state/" + b"a" * (AREA_SIZE_MAX + 1),
    b"/state/" + b"a" * (AREA_SIZE_MAX + 1) + b"/x",
]


@pytest.mark.parametrize("key", WELL)
def test_what_is_a_path_of_plain_segments_is_a_key(key: bytes) -> None:
    assert key_fault(key) is None


@pytest.mark.parametrize("key", TRICKS)
def test_a_trick_is_no_key(key: bytes) -> None:
    assert key_fault(key) is StatefsdStatus.INVALID_KEY


def test_a_key_that_is_too_long_has_a_status_of_its_own_whatever_is_in_it() -> None:
    assert key_fault(b"/state/a/" + b"k" * (KEY_SIZE_MAX - 8)) is StatefsdStatus.KEY_TOO_LONG
    assert key_fault(b"\x00" * (KEY_SIZE_MAX + 1)) is StatefsdStatus.KEY_TOO_LONG


@given(st.lists(st.binary(max_size=12), max_size=5))
def test_a_key_is_in_one_area_and_never_leads_out_of_it(segments: list[bytes]) -> None:
    key = b"/state/" + b"/".join(segments)
    if key_fault(key) is None:
        area = area_of(key)
        assert key.startswith(area)
        assert area_fault(area) is None
        assert area.count(b"/") == (2 if b"/" not in key[7:] else 3)
        assert b"/../" not in key


def test_a_prefix_is_the_root_or_whole_segments() -> None:
    assert prefix_fault(b"/state/") is None
    assert prefix_fault(b"/state/a/b/") is None
    for wrong in (b"", b"/state", b"/state/a", b"/state//", b"/state/../", b"/", b"/state/a//"):
        assert prefix_fault(wrong) is StatefsdStatus.INVALID_KEY, wrong
    assert prefix_fault(b"/state/" + b"a/" * 200) is StatefsdStatus.KEY_TOO_LONG


def test_an_area_is_the_root_or_one_segment() -> None:
    assert area_fault(b"/state/") is None
    assert area_fault(b"/state/a/") is None
    assert area_fault(b"/state/a/b/") is StatefsdStatus.INVALID_KEY
    assert area_fault(b"/state/a") is StatefsdStatus.INVALID_KEY


@pytest.mark.parametrize(
    ("key", "area", "writes", "looks"),
    [
        (b"/state/x", b"/state/", WRITE_RIGHT, READ_RIGHT),
        (b"/state/keystore", b"/state/", WRITE_RIGHT, READ_RIGHT),
        (b"/state/keystore/x", b"/state/keystore/", KEYSTORE_RIGHT, KEYSTORE_RIGHT),
        (b"/state/boot/x/y", b"/state/boot/", BOOT_RIGHT, BOOT_RIGHT),
        (b"/state/bootx/y", b"/state/bootx/", WRITE_RIGHT, READ_RIGHT),
        (b"/state/Keystore/y", b"/state/Keystore/", WRITE_RIGHT, READ_RIGHT),
    ],
)
def test_the_right_depends_on_the_area(key: bytes, area: bytes, writes: str, looks: str) -> None:
    assert area_of(key) == area
    assert right_for(area, writes=True) == writes
    assert right_for(area, writes=False) == looks


def test_an_area_of_a_foreign_disk_has_a_right_like_any_other() -> None:
    assert right_for(b"/state/\xff\xfe/", writes=False) == READ_RIGHT
    assert not is_special(b"/state/\xff\xfe/")


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "size", "fault"),
    [
        ({}, 32 << 10, "no disk for a store"),
        ({}, 256 << 10, "keeps 0 bytes of records"),
        ({}, 1 << 20, "it takes a larger disk, or lower reserves"),
        ({"quota": "1"}, 16 << 20, "say bytes and keys"),
        ({"other": "1"}, 16 << 20, "unknown field"),
    ],
)
def test_a_disk_that_cannot_be_used_is_told_before_it_is(
    settings: dict[str, object], size: int, fault: str
) -> None:
    assert fault in (disk_fault(settings, size) or "")


def test_quotas_are_said_by_area_and_the_others_share_one() -> None:
    settings = Settings(quota="1MiB 100", quotas="logs 8MiB 4096, / 64KiB 8", reserves="boot 4KiB")

    assert settings.default_quota == Quota(size=1 << 20, keys=100)
    assert settings.area_quotas == {
        b"/state/logs/": Quota(size=8 << 20, keys=4096),
        b"/state/": Quota(size=64 << 10, keys=8),
    }
    assert settings.area_reserves == {b"/state/boot/": 4096}
    assert settings.limits.quotas == settings.area_quotas
    assert settings.limits.quota == settings.default_quota
    assert Settings(quotas="", reserves=" ").area_quotas == {}


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"quota": "4MiB"}, 'quota is "4MiB": say bytes and keys'),
        ({"quota": "4MB 5"}, '"4MB" is no size'),
        ({"quota": "0 5"}, "0 is no size"),
        ({"quota": "4MiB 0"}, '"0" is no number of keys'),
        ({"quotas": "logs 1KiB"}, 'quotas has "logs 1KiB": say area, bytes and keys'),
        ({"quotas": "a/b 1KiB 1"}, 'quotas names "a/b", which is no area'),
        ({"quotas": "a 1KiB 1, a 2KiB 1"}, 'quotas names "a" twice'),
        ({"quotas": ",".join(f"a{n} 1 1" for n in range(33))}, "quotas names 33 areas"),
        ({"reserves": "boot"}, 'reserves has "boot": say area and bytes'),
        ({"speed": 1}, "Object contains unknown field `speed`"),
    ],
)
def test_a_wrong_setting_is_told_in_a_sentence(table: dict[str, object], sentence: str) -> None:
    with pytest.raises(msgspec.ValidationError) as error:
        _ = msgspec.convert(table, type=Settings)
    assert str(error.value).startswith(sentence)


# ------------------------------------------------------------------ clients


def test_the_accounts_of_clients_are_bounded_and_the_one_heard_longest_ago_gives_way() -> None:
    clients = Clients()
    call = frame(PROTOCOL.codecs[Get], "least", reply=False)
    for number in range(CLIENTS_MAX + 1):
        _ = clients.heard(ServiceId(number + 1), call)
    for _ in range(CALLS_KEPT + 5):
        _ = clients.heard(ServiceId(9), call)

    assert len(clients) == CLIENTS_MAX
    assert clients.find(ServiceId(1)).total == 0
    assert clients.find(ServiceId(9)).total == CALLS_KEPT + 6
    seen = clients.latest(ServiceId(9), 3)
    last = CLIENTS_MAX + 1 + CALLS_KEPT + 5
    assert [each.number for each in seen] == [last - 2, last - 1, last]
    assert (seen[0].sender, seen[0].op, seen[0].deadline) == (9, 3, 0x0FED_CBA9_8765_4321)
    assert seen[0].trace == bytes(range(0x10, 0x20))
    assert seen[0].parent == bytes(range(0x20, 0x28))
    assert len(clients.latest(ServiceId(9), 99)) == CALLS_KEPT
