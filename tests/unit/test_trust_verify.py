"""The offline client of TUF: what it takes, and what it refuses by which status."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from typing import Any, Final

import pytest

from fuzz.trust import DAY, T0, UNTIL, Publisher, envelope
from nexus.trust import Anchor, Target, TrustState, TrustStatus, Untrusted
from nexus.trust.limits import (
    KEYS_MAX,
    ROOT_SIZE_MAX,
    ROOTS_MAX,
    SIGNATURES_MAX,
    SNAPSHOT_SIZE_MAX,
    TARGETS_SIZE_MAX,
    TIMESTAMP_SIZE_MAX,
)
from nexus.trust.metadata import DEVELOPMENT, ISSUED, SET_FLOOR, SET_VERSION
from nexus.trust.update import FILES_MAX, SNAPSHOT, TARGETS, TIMESTAMP, root_name
from nexus.trust.verify import resume, verify_metadata

ROLE_FILES: Final = (TIMESTAMP, SNAPSHOT, TARGETS)
CONTENT: Final = b"a set"
MEMORY_MAX: Final = 4 * 1024 * 1024  # bytes for any metadata


def moved(state: TrustState, files: Mapping[str, bytes], *, release: bool = True) -> TrustState:
    """What is known after metadata that are taken."""
    return verify_metadata(state, files, release=release)[0]


def refused(state: TrustState, files: Mapping[str, bytes], *, release: bool = True) -> TrustStatus:
    """Why metadata are refused."""
    with pytest.raises(Untrusted) as caught:
        _ = verify_metadata(state, files, release=release)
    assert str(caught.value).isprintable()
    return caught.value.status


def edited(data: bytes, change: Callable[[Any], object]) -> bytes:
    """A file with something changed by somebody who has no key."""
    document = json.loads(data)
    _ = change(document)
    return json.dumps(document).encode()


# ---------------------------------------------------------------- what is taken


def test_a_release_names_its_set_and_moves_what_was_seen() -> None:
    publisher = Publisher()
    state = publisher.new_state()

    seen, target = verify_metadata(
        state, publisher.release(7, content=CONTENT, floor=5), release=True
    )

    assert target == Target(
        name="1.7", length=len(CONTENT), sha256=sha256(CONTENT).digest(), version=7, floor=5
    )
    assert (seen.timestamp, seen.snapshot, seen.targets) == (1, 1, 1)
    assert seen.time_floor == T0 + 7 * DAY
    assert (seen.root, seen.anchor) == (state.root, state.anchor)
    assert seen.version_floor == 0, "a floor is raised when a set is committed, not when it comes"


def test_an_update_that_was_cut_off_is_taken_again_and_moves_nothing() -> None:
    publisher = Publisher()
    files = publisher.release(7)
    seen = moved(publisher.new_state(), files)

    assert moved(seen, files) == seen


def test_a_device_that_slept_through_releases_and_rotations_takes_the_latest() -> None:
    publisher = Publisher(roots=(2, 3))
    seen = moved(publisher.new_state(), publisher.release(1))
    _ = publisher.rotate("root", 2, 3)
    _ = publisher.rotate("targets", 2, 2)
    _ = publisher.release(2)
    _ = publisher.rotate("root", 1, 1)
    _ = publisher.rotate("timestamp")
    files = publisher.release(3)

    after = moved(seen, files)

    assert after.root == files[root_name(5)]
    assert (after.timestamp, after.snapshot, after.targets) == (3, 3, 3)


def test_what_was_seen_only_grows() -> None:
    publisher = Publisher()
    seen = [publisher.new_state()]
    for version in range(1, 6):
        files = publisher.release(version, issued=T0 + (10 + version % 2) * version)
        seen.append(moved(seen[-1], files))

    for before, after in pairwise(seen):
        assert after.timestamp > before.timestamp
        assert after.snapshot > before.snapshot
        assert after.targets > before.targets
        assert after.time_floor >= before.time_floor


def test_an_older_set_in_a_newer_release_is_taken_down_to_the_floor() -> None:
    publisher = Publisher()
    seen = moved(publisher.new_state(), publisher.release(9))

    files = publisher.release(4, issued=T0 + 10 * DAY)

    assert moved(seen.raised(4), files).targets == 2
    assert refused(seen.raised(5), files) is TrustStatus.BELOW_FLOOR


def test_development_keys_are_taken_where_they_are_meant_for() -> None:
    publisher = Publisher(development=True)

    assert moved(publisher.new_state(), publisher.release(1), release=False).targets == 1


# ---------------------------------------------------------------- who signed


def test_metadata_of_another_publisher_are_refused() -> None:
    stranger = Publisher("stranger")

    assert refused(Publisher().new_state(), stranger.release(1)) is TrustStatus.WRONG_KEY


@pytest.mark.parametrize("name", ROLE_FILES)
def test_a_key_signs_for_its_own_role_only(name: str) -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)
    other = publisher.signers["root"]
    for role in ("timestamp", "snapshot", "targets"):
        publisher.signers[role] = other if f"{role}.json" == name else publisher.signers[role]

    forged = publisher.changed(files, name, lambda _: None)

    assert refused(state, forged) is TrustStatus.WRONG_KEY


@pytest.mark.parametrize("name", ROLE_FILES)
def test_a_changed_byte_of_what_was_signed_is_refused(name: str) -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)

    def change(document: Any) -> None:
        document["signed"][ISSUED] -= 1

    assert refused(state, {**files, name: edited(files[name], change)}) is TrustStatus.BAD_SIGNATURE


def test_every_flipped_bit_of_metadata_is_refused() -> None:
    publisher = Publisher()
    seen = moved(publisher.new_state(), publisher.release(1))
    _ = publisher.rotate("root")
    files = publisher.release(2)
    assert moved(seen, files).timestamp == 2
    flips = 0
    for name in (root_name(2), *ROLE_FILES):
        for at in range(len(files[name])):
            data = bytearray(files[name])
            data[at] ^= 1 << (at % 8)

            _ = refused(seen, {**files, name: bytes(data)})

            flips += 1
    assert flips == sum(len(files[name]) for name in (root_name(2), *ROLE_FILES))


def test_too_few_signatures_are_refused() -> None:
    publisher = Publisher(targets=(2, 3))
    state = publisher.new_state()
    files = publisher.release(1)
    assert moved(state, files).targets == 1
    publisher.signers["targets"] = publisher.signers["targets"][:1]

    fewer = publisher.changed(files, TARGETS, lambda _: None)

    assert refused(state, fewer) is TrustStatus.THRESHOLD


def test_one_signature_given_twice_counts_once() -> None:
    publisher = Publisher(targets=(2, 2))
    state, files = publisher.new_state(), publisher.release(1)
    (first, _) = publisher.signers["targets"]
    publisher.signers["targets"] = [first, first]

    doubled = publisher.changed(files, TARGETS, lambda _: None)

    assert refused(state, doubled) is TrustStatus.DUPLICATE


def test_one_signature_under_two_names_counts_once() -> None:
    publisher = Publisher(targets=(2, 2))
    state, files = publisher.new_state(), publisher.release(1)
    (first, second) = publisher.signers["targets"]
    publisher.signers["targets"] = [first]
    forged = publisher.changed(files, TARGETS, lambda _: None)

    def rename(document: Any) -> None:
        copy = {**document["signatures"][0], "keyid": second.public_key.keyid}
        document["signatures"].append(copy)

    renamed = publisher.changed(
        {**forged, TARGETS: edited(forged[TARGETS], rename)},
        SNAPSHOT,
        _as_it_is(edited(forged[TARGETS], rename)),
    )

    assert refused(state, renamed) is TrustStatus.THRESHOLD


def _as_it_is(targets: bytes) -> Callable[[Any], object]:
    """Have snapshot.json name these bytes of targets.json."""

    def change(signed: Any) -> None:
        meta = signed["meta"][TARGETS]
        meta["length"] = len(targets)
        meta["hashes"] = {"sha256": sha256(targets).hexdigest()}

    return change


def test_a_key_for_development_is_refused_by_a_release_build() -> None:
    publisher = Publisher(development=True)
    state, files = publisher.new_state(), publisher.release(1)

    assert refused(state, files, release=True) is TrustStatus.DEVELOPMENT_KEY


def test_a_root_that_becomes_one_for_development_is_refused_by_a_release_build() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    name = publisher.rotate("timestamp")
    files = publisher.release(1)

    marked = publisher.changed(files, name, lambda signed: signed.update({DEVELOPMENT: True}))

    assert refused(state, marked) is TrustStatus.DEVELOPMENT_KEY
    assert moved(state, marked, release=False).timestamp == 1


# ---------------------------------------------------------------- new keys


def test_a_successor_needs_the_keys_of_the_root_before_it() -> None:
    publisher, stranger = Publisher(roots=(2, 3)), Publisher("stranger", roots=(2, 3))
    state = publisher.new_state()
    name = publisher.rotate("timestamp")
    files = publisher.release(1)
    signed = json.loads(files[name])["signed"]
    before = publisher.signers["root"]

    by_one = {**files, name: envelope(signed, before[:1])}
    by_strangers = {**files, name: envelope(signed, stranger.signers["root"])}

    assert refused(state, by_one) is TrustStatus.THRESHOLD
    assert refused(state, by_strangers) is TrustStatus.WRONG_KEY


def test_a_successor_that_names_other_people_needs_the_keys_of_the_root_before_it() -> None:
    publisher = Publisher(roots=(2, 2))
    state = publisher.new_state()
    before = publisher.signers["root"]
    name = publisher.rotate("root", 1, 1)
    files = publisher.release(1)
    signed = json.loads(files[name])["signed"]
    own = publisher.signers["root"]

    by_itself = {**files, name: envelope(signed, own)}
    by_one_of_two = {**files, name: envelope(signed, [*own, before[0]])}

    assert refused(state, by_itself) is TrustStatus.WRONG_KEY
    assert refused(state, by_one_of_two) is TrustStatus.THRESHOLD
    assert moved(state, {**files, name: envelope(signed, [*own, *before])}).timestamp == 1


def test_a_successor_needs_its_own_keys_too() -> None:
    publisher = Publisher(roots=(2, 2))
    state = publisher.new_state()
    before = publisher.signers["root"]
    name = publisher.rotate("root", 2, 2)
    files = publisher.release(1)
    signed = json.loads(files[name])["signed"]

    assert refused(state, {**files, name: envelope(signed, before)}) is TrustStatus.WRONG_KEY
    half = [*before, publisher.signers["root"][0]]
    assert refused(state, {**files, name: envelope(signed, half)}) is TrustStatus.THRESHOLD


def test_keys_that_were_taken_away_sign_nothing_any_more() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    old = publisher.signers["targets"]
    _ = publisher.rotate("targets")
    files = publisher.release(1)
    publisher.signers["targets"] = old

    assert refused(state, publisher.changed(files, TARGETS, lambda _: None)) is (
        TrustStatus.WRONG_KEY
    )


def test_a_missing_link_in_the_chain_of_roots_is_refused() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    hole = publisher.rotate("timestamp")
    _ = publisher.rotate("timestamp")
    files = publisher.release(1)

    without = {name: data for name, data in files.items() if name != hole}

    assert refused(state, {**without, TIMESTAMP: files[TIMESTAMP]}) is TrustStatus.MIXED


def test_a_root_under_another_number_is_refused() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    files = publisher.release(1)

    assert refused(state, {**files, root_name(2): files[root_name(1)]}) is TrustStatus.ROLLED_BACK


def test_roots_that_the_device_has_already_are_not_looked_at() -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)

    assert moved(state, {**files, root_name(1): b"anything"}).timestamp == 1


def test_a_version_that_a_stolen_key_counted_up_is_forgotten_with_the_key() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    stolen = publisher.release(1)
    for name in (SNAPSHOT, TIMESTAMP):
        stolen = publisher.changed(stolen, name, lambda signed: signed.update(version=1 << 60))
    seen = moved(state, stolen)
    assert (seen.timestamp, seen.snapshot) == (1 << 60, 1 << 60)
    again = publisher.release(2)
    assert refused(seen, again) is TrustStatus.REPLAYED

    _ = publisher.rotate("snapshot")
    files = publisher.release(3)

    after = moved(seen, files)
    assert (after.timestamp, after.snapshot, after.targets) == (3, 3, 3)


def test_sets_that_a_stolen_key_counted_up_are_forgotten_with_the_key() -> None:
    publisher = Publisher()
    stolen = publisher.changed(
        publisher.release(1), TARGETS, lambda signed: signed.update(version=1 << 60)
    )
    stolen = publisher.changed(
        stolen, SNAPSHOT, lambda signed: signed["meta"][TARGETS].update(version=1 << 60)
    )
    seen = moved(publisher.new_state(), stolen)
    assert seen.targets == 1 << 60
    assert refused(seen, publisher.release(2)) is TrustStatus.ROLLED_BACK

    _ = publisher.rotate("targets")

    assert moved(seen, publisher.release(3)).targets == 3


def test_a_key_that_is_added_makes_the_device_forget_nothing() -> None:
    publisher = Publisher()
    old = publisher.release(1)
    seen = moved(publisher.new_state(), publisher.release(2))
    keep = publisher.signers["timestamp"][0]
    name = publisher.rotate("timestamp")
    both = [keep, *publisher.signers["timestamp"]]

    def add(signed: Any) -> None:
        for each in both:
            signed["keys"][each.public_key.keyid] = each.public_key.to_dict()
        signed["roles"]["timestamp"]["keyids"] = [each.public_key.keyid for each in both]

    files = publisher.changed({**old, name: publisher.files[name]}, name, add)

    assert refused(seen, files) is TrustStatus.REPLAYED


# ---------------------------------------------------------------- old and mixed


def test_an_older_release_is_refused_as_a_whole() -> None:
    publisher = Publisher()
    old = publisher.release(1)
    seen = moved(publisher.new_state(), publisher.release(2))

    assert refused(seen, old) is TrustStatus.REPLAYED


@pytest.mark.parametrize("name", [SNAPSHOT, TARGETS])
def test_files_of_two_releases_are_refused(name: str) -> None:
    publisher = Publisher()
    state = publisher.new_state()
    old = publisher.release(1)
    new = publisher.release(2)

    assert refused(state, {**new, name: old[name]}) is TrustStatus.MIXED
    assert refused(state, {**old, name: new[name]}) is TrustStatus.MIXED


@pytest.mark.parametrize("name", [SNAPSHOT, TARGETS])
def test_another_file_of_the_same_version_and_size_is_refused(name: str) -> None:
    named, other = (
        Publisher().release(1, content=b"a set"),
        Publisher().release(1, content=b"b set"),
    )
    assert len(named[name]) == len(other[name])

    assert refused(Publisher().new_state(), {**named, name: other[name]}) is TrustStatus.MIXED


def test_an_old_timestamp_with_a_new_release_is_refused() -> None:
    publisher = Publisher()
    old = publisher.release(1)
    new = publisher.release(2)

    assert refused(publisher.new_state(), {**new, TIMESTAMP: old[TIMESTAMP]}) is TrustStatus.MIXED


def test_a_second_release_of_one_number_is_refused() -> None:
    publisher = Publisher()
    files = publisher.release(1)
    seen = moved(publisher.new_state(), files)

    def later(signed: Any) -> None:
        signed[ISSUED] += 1

    assert refused(seen, publisher.changed(files, TIMESTAMP, later)) is TrustStatus.MIXED


@pytest.mark.parametrize("name", [SNAPSHOT, TARGETS])
def test_a_newer_outside_with_an_older_inside_is_refused(name: str) -> None:
    publisher = Publisher()
    _ = publisher.release(1)
    seen = moved(publisher.new_state(), publisher.release(2))
    files = publisher.release(3)

    def back(signed: Any) -> None:
        signed["version"] = 1

    files = publisher.changed(files, name, back)

    assert refused(seen, files) is TrustStatus.ROLLED_BACK


# ---------------------------------------------------------------- what has ended


def _with(fields: Mapping[str, Any]) -> Callable[[Any], object]:
    return lambda signed: signed.update(fields)


def _earlier(publisher: Publisher, files: Mapping[str, bytes], **more: str) -> dict[str, bytes]:
    """The same files, signed on the fifth day; `more` changes one of them, by its role."""
    found = dict(files)
    for name in (root_name(2), TARGETS, SNAPSHOT, TIMESTAMP):
        role = name.removesuffix(".json").rpartition(".")[2]
        fields: dict[str, Any] = {ISSUED: T0 + 5 * DAY}
        if role in more:
            fields["expires"] = more[role]
        found = publisher.changed(found, name, _with(fields))
    return found


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_what_ended_before_the_time_floor_is_refused(role: str) -> None:
    publisher = Publisher()
    seen = moved(publisher.new_state(), publisher.release(10))
    _ = publisher.rotate("root")
    files = publisher.release(11)
    day_7 = "2020-09-20T00:00:00Z"  # after the fifth day, before the tenth

    assert moved(seen, _earlier(publisher, files)).time_floor == T0 + 10 * DAY
    assert refused(seen, _earlier(publisher, files, **{role: day_7})) is TrustStatus.EXPIRED
    new = publisher.new_state()
    assert moved(new, _earlier(publisher, files, **{role: day_7})).time_floor == T0 + 5 * DAY


@pytest.mark.parametrize("name", [root_name(2), *ROLE_FILES])
def test_every_signed_file_moves_the_time_floor(name: str) -> None:
    publisher = Publisher()
    _ = publisher.rotate("root")
    _ = publisher.rotate("root")
    files = publisher.release(1)

    def later(signed: Any) -> None:
        signed[ISSUED] = T0 + 40 * DAY

    moment = moved(publisher.new_state(), publisher.changed(files, name, later)).time_floor

    assert moment == T0 + 40 * DAY


def test_what_ended_before_the_release_itself_was_signed_is_refused() -> None:
    publisher = Publisher(expires=T0 + 5 * DAY)

    files = publisher.release(10)

    assert refused(publisher.new_state(), files) is TrustStatus.EXPIRED, "of the root"


def test_what_ends_at_the_time_floor_has_ended() -> None:
    publisher = Publisher()
    seen = moved(publisher.new_state(), publisher.release(10))
    files = publisher.release(11, issued=T0 + 10 * DAY)

    def ending(second: int) -> dict[str, bytes]:
        moment = datetime.fromtimestamp(T0 + 10 * DAY + second, UTC)
        fields = {ISSUED: T0 + 9 * DAY, "expires": f"{moment:%Y-%m-%dT%H:%M:%SZ}"}
        return publisher.changed(files, TIMESTAMP, _with(fields))

    assert seen.time_floor == T0 + 10 * DAY
    assert refused(seen, ending(0)) is TrustStatus.EXPIRED
    assert moved(seen, ending(1)).timestamp == 2


def test_without_a_later_signature_nothing_has_ended() -> None:
    """The limit of a device without a clock: docs/reference/trust.md."""
    publisher = Publisher()

    files = publisher.release(1, issued=T0 + DAY, expires=T0 + 2 * DAY)

    assert moved(publisher.new_state(), files).time_floor == T0 + DAY


def test_a_root_in_between_may_have_ended() -> None:
    publisher = Publisher(expires=T0 + DAY)
    state = publisher.new_state()
    _ = publisher.rotate("root")

    assert moved(state, publisher.release(10)).time_floor == T0 + 10 * DAY


def test_the_timestamp_key_alone_moves_time_no_further_than_the_other_files_last() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    files = publisher.release(1, expires=T0 + 30 * DAY)

    def far(signed: Any) -> None:
        signed[ISSUED] = T0 + 40 * DAY
        signed["expires"] = "2090-01-01T00:00:00Z"

    stolen = publisher.changed(files, TIMESTAMP, far)

    assert refused(state, stolen) is TrustStatus.EXPIRED


# ---------------------------------------------------------------- the version floor


def test_a_set_below_the_floor_is_refused_and_one_at_it_is_not() -> None:
    publisher = Publisher()
    files = publisher.release(4)

    assert refused(publisher.new_state(5), files) is TrustStatus.BELOW_FLOOR
    assert moved(publisher.new_state(4), files).version_floor == 4


def test_a_floor_above_the_set_itself_is_refused() -> None:
    publisher = Publisher()

    assert refused(publisher.new_state(), publisher.release(4, floor=5)) is TrustStatus.MALFORMED


# ---------------------------------------------------------------- bounds, before parsing


@pytest.mark.parametrize(
    ("name", "size_max"),
    [
        (root_name(2), ROOT_SIZE_MAX),
        (TIMESTAMP, TIMESTAMP_SIZE_MAX),
        (SNAPSHOT, SNAPSHOT_SIZE_MAX),
        (TARGETS, TARGETS_SIZE_MAX),
    ],
)
def test_a_file_is_bounded_before_it_is_parsed(
    name: str, size_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)
    at_limit = {**files, name: b" " * size_max}
    assert refused(state, at_limit) is TrustStatus.TRUNCATED, "it is read, and nothing is there"

    def parsed(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr("nexus.trust.metadata.json.loads", parsed)

    assert refused(state, {**files, name: b" " * (size_max + 1)}) is TrustStatus.TOO_LARGE


def test_signatures_are_counted_before_one_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)
    one = json.loads(files[TIMESTAMP])["signatures"][0]

    def many(count: int) -> Callable[[Any], object]:
        def change(document: Any) -> None:
            document["signatures"] += [
                {**one, "keyid": f"{number:064x}"} for number in range(count - 1)
            ]

        return change

    at_limit = {**files, TIMESTAMP: edited(files[TIMESTAMP], many(SIGNATURES_MAX))}
    assert moved(state, at_limit).timestamp == 1
    monkeypatch.setattr("nexus.trust.verify._check_keys_of", lambda *_: None)

    beyond = {**files, TIMESTAMP: edited(files[TIMESTAMP], many(SIGNATURES_MAX + 1))}

    assert refused(state, beyond) is TrustStatus.TOO_MANY


def test_keys_are_counted() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    name = publisher.rotate("timestamp")
    files = publisher.release(1)

    def more(count: int) -> Callable[[Any], object]:
        def change(signed: Any) -> None:
            while len(signed["keys"]) < count:
                key = publisher.new_signer().public_key
                signed["keys"][key.keyid] = key.to_dict()

        return change

    assert moved(state, publisher.changed(files, name, more(KEYS_MAX))).timestamp == 1
    beyond = publisher.changed(files, name, more(KEYS_MAX + 1))
    assert refused(state, beyond) is TrustStatus.TOO_MANY


def test_roots_and_files_are_counted() -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)
    roots = {root_name(number): b"" for number in range(2, ROOTS_MAX + 2)}

    assert refused(state, {**files, **roots}) is TrustStatus.TOO_MANY
    assert len({**files, **roots}) == FILES_MAX + 1
    with_others = {root_name(number): b"" for number in range(2, ROOTS_MAX + 3)}
    assert refused(state, {**files, **with_others}) is TrustStatus.TOO_MANY


def test_a_chain_of_as_many_roots_as_may_be_is_followed() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    for _ in range(ROOTS_MAX):
        _ = publisher.rotate("root")

    files = publisher.release(1)

    assert root_name(1) not in files, "an update carries the last ones"
    assert moved(state, files).root == files[root_name(ROOTS_MAX + 1)]


def test_an_update_carries_the_last_roots_as_many_as_a_device_takes() -> None:
    publisher = Publisher()
    for _ in range(ROOTS_MAX + 1):
        _ = publisher.rotate("timestamp")

    files = publisher.release(1)

    last = ROOTS_MAX + 2
    roots = {root_name(version) for version in range(last - ROOTS_MAX + 1, last + 1)}
    assert files.keys() == {*roots, *ROLE_FILES}


@pytest.mark.parametrize("filler", ['"x":[1', '"x":[{}', '"x":[[]', '"x":["y"'])
def test_the_largest_metadata_take_little_memory(filler: str) -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)
    item = filler.partition("[")[2]
    names = [root_name(number) for number in range(2, ROOTS_MAX + 1)]
    count = (ROOT_SIZE_MAX - 100) // (len(item) + 1)
    data = f'{{"signatures":[],"signed":{{{filler}{f",{item}" * (count - 1)}]}}}}'.encode()
    assert ROOT_SIZE_MAX - 200 < len(data) <= ROOT_SIZE_MAX
    largest = {**files, **dict.fromkeys(names, data)}
    _ = refused(state, largest)  # whatever is made once
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    assert refused(state, largest) is TrustStatus.MALFORMED

    assert tracemalloc.get_traced_memory()[1] - before < MEMORY_MAX
    tracemalloc.stop()


def test_two_sets_in_one_release_are_refused_and_none_too() -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)

    def two(signed: Any) -> None:
        (only,) = signed["targets"].values()
        signed["targets"]["other.nxs"] = only

    assert refused(state, publisher.changed(files, TARGETS, two)) is TrustStatus.TOO_MANY
    none = publisher.changed(files, TARGETS, lambda signed: signed["targets"].clear())
    assert refused(state, none) is TrustStatus.NO_SET


# ---------------------------------------------------------------- what is no metadata


MALFORMED: Final[dict[str, bytes]] = {
    "a list": b"[]",
    "a number": b"7",
    "no JSON": b"{signed}",
    "nothing signed": b'{"signatures": []}',
    "a field outside": b'{"signatures": [], "signed": {}, "x": 1}',
    "another role": b'{"signatures": [], "signed": {"_type": "root"}}',
    "a fraction": b'{"signatures": [], "signed": {"_type": "timestamp", "version": 1.0}}',
    "not a number": b'{"signatures": [], "signed": {"_type": "timestamp", "version": NaN}}',
    "a huge number": b'{"signatures": [], "signed": {"version": ' + b"9" * 5000 + b"}}",
    "nothing": b'{"signatures": [], "signed": {"_type": "timestamp", "version": null}}',
    "a control character": b'{"signatures": [], "signed": {"_type": "timestamp\\u0007"}}',
    "half a character": b'{"signatures": [], "signed": {"_type": "\\ud800"}}',
    "no UTF-8": b'{"signatures": [], "signed": {"_type": "\xff"}}',
    "depth": b'{"signed": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "some depth": b'{"signatures": [], "signed": {"x": ' + b"[" * 9 + b"]" * 9 + b"}}",
    "a signature that is none": b'{"signatures": [{"keyid": "x", "sig": "y"}], "signed": {}}',
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_metadata_is_malformed(data: bytes) -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)

    assert refused(state, {**files, TIMESTAMP: data}) is TrustStatus.MALFORMED


def test_a_field_that_is_there_twice_is_refused() -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)
    twice = files[TIMESTAMP].replace(b'"version":1', b'"version":1,"version":1', 1)
    assert twice != files[TIMESTAMP]

    assert refused(state, {**files, TIMESTAMP: twice}) is TrustStatus.DUPLICATE


@pytest.mark.parametrize("name", ROLE_FILES)
def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(name: str) -> None:
    publisher = Publisher()
    state, files = publisher.new_state(), publisher.release(1)

    for size in range(len(files[name])):
        cut = {**files, name: files[name][:size]}

        assert refused(state, cut) in (TrustStatus.TRUNCATED, TrustStatus.MALFORMED)
        if not cut[name].endswith(b"}"):
            assert refused(state, cut) is TrustStatus.TRUNCATED


SIGNED_WRONG: Final[dict[str, tuple[str, Callable[[Any], object]]]] = {
    "no moment": (TIMESTAMP, lambda signed: signed.pop(ISSUED)),
    "a moment that is true": (TIMESTAMP, lambda signed: signed.update({ISSUED: True})),
    "signed after its end": (TIMESTAMP, lambda signed: signed.update({ISSUED: UNTIL})),
    "another specification": (TIMESTAMP, lambda signed: signed.update(spec_version="2.0.0")),
    "depth": (TIMESTAMP, lambda signed: signed.update(x=json.loads("[" * 7 + "]" * 7))),
    "no version": (TIMESTAMP, lambda signed: signed.update(version=0)),
    "a version that is true": (TIMESTAMP, lambda signed: signed.update(version=True)),
    "a date with a blank": (
        TIMESTAMP,
        lambda signed: signed.update(expires="2096-10- 2T07:06:40Z"),
    ),
    "nothing said of the set": (TARGETS, lambda signed: _only(signed).pop("custom")),
    "a word said of the set": (TARGETS, lambda signed: _only(signed).update(custom="x")),
    "no end": (TIMESTAMP, lambda signed: signed.update(expires="never")),
    "no snapshot": (TIMESTAMP, lambda signed: signed["meta"].clear()),
    "no digest": (TIMESTAMP, lambda signed: signed["meta"][SNAPSHOT].pop("hashes")),
    "no length": (TIMESTAMP, lambda signed: signed["meta"][SNAPSHOT].pop("length")),
    "more files": (
        SNAPSHOT,
        lambda signed: signed["meta"].update({"role.json": {"version": 1}}),
    ),
    "a delegation": (TARGETS, lambda signed: signed.update(delegations={"keys": {}, "roles": []})),
    "a set of no version": (TARGETS, lambda signed: _custom(signed).pop(SET_VERSION)),
    "a set of no floor": (TARGETS, lambda signed: _custom(signed).pop(SET_FLOOR)),
    "a version in words": (TARGETS, lambda signed: _custom(signed).update({SET_VERSION: "7"})),
    "an empty set": (TARGETS, lambda signed: _only(signed).update(length=0)),
    "another digest": (TARGETS, lambda signed: _only(signed).update(hashes={"md5": "0" * 32})),
    "half a digest": (TARGETS, lambda signed: _only(signed).update(hashes={"sha256": "00"})),
    "a path": (
        TARGETS,
        lambda signed: signed.update(targets={"../x.nxs": _only(signed)}),
    ),
    "another file": (
        TARGETS,
        lambda signed: signed.update(targets={"x.tar": _only(signed)}),
    ),
    "a key of another kind": (
        root_name(2),
        lambda signed: _key(signed).update(keytype="rsa", scheme="rsassa-pss-sha256"),
    ),
    "a key that is none": (root_name(2), lambda signed: _key(signed)["keyval"].update(public="0")),
    "a key that is not there": (
        root_name(2),
        lambda signed: signed["roles"]["targets"]["keyids"].append("0" * 64),
    ),
    "a threshold nobody meets": (
        root_name(2),
        lambda signed: signed["roles"]["targets"].update(threshold=2),
    ),
    "no threshold": (
        root_name(2),
        lambda signed: signed["roles"]["targets"].update(threshold=0),
    ),
    "a role too many": (root_name(2), lambda signed: signed["roles"].update(mirrors={})),
    "a mark in words": (root_name(2), lambda signed: signed.update({DEVELOPMENT: "no"})),
}


def _only(signed: Any) -> Any:
    return next(iter(signed["targets"].values()))


def _custom(signed: Any) -> Any:
    return _only(signed)["custom"]


def _key(signed: Any) -> Any:
    return next(iter(signed["keys"].values()))


@pytest.mark.parametrize(("name", "change"), SIGNED_WRONG.values(), ids=SIGNED_WRONG)
def test_what_is_signed_and_makes_no_sense_is_malformed(
    name: str, change: Callable[[Any], object]
) -> None:
    publisher = Publisher()
    state = publisher.new_state()
    _ = publisher.rotate("root")
    files = publisher.release(1)

    assert refused(state, publisher.changed(files, name, change)) is TrustStatus.MALFORMED


def test_a_root_with_one_key_under_two_names_is_refused() -> None:
    publisher = Publisher()
    state = publisher.new_state()
    name = publisher.rotate("timestamp")
    files = publisher.release(1)

    def alias(signed: Any) -> None:
        (keyid,) = signed["roles"]["targets"]["keyids"]
        signed["keys"]["0" * 64] = signed["keys"][keyid]
        signed["roles"]["targets"] = {"keyids": [keyid, "0" * 64], "threshold": 2}

    def in_capitals(signed: Any) -> None:
        alias(signed)
        (keyid, _) = signed["roles"]["targets"]["keyids"]
        public = signed["keys"][keyid]["keyval"]["public"]
        assert public != public.upper()
        again = {**signed["keys"][keyid], "keyval": {"public": public.upper()}}
        signed["keys"]["0" * 64] = again

    assert refused(state, publisher.changed(files, name, alias)) is TrustStatus.DUPLICATE
    assert refused(state, publisher.changed(files, name, in_capitals)) is TrustStatus.MALFORMED


# ---------------------------------------------------------------- what the device keeps


def test_a_device_begins_with_its_anchor_and_goes_on_with_what_it_kept() -> None:
    publisher = Publisher()
    _ = publisher.rotate("root")
    seen = moved(publisher.new_state(), publisher.release(3))

    assert resume(publisher.anchor, seen.encode(), version_floor=2) == seen.raised(2)
    assert resume(publisher.anchor, seen.raised(9).encode(), version_floor=2).version_floor == 9
    assert publisher.new_state().time_floor == T0


def test_a_device_that_is_provisioned_anew_forgets_what_it_saw_under_other_keys() -> None:
    old, new = Publisher("old"), Publisher("new")
    kept = moved(old.new_state(), old.release(3)).encode()

    assert resume(new.anchor, kept, version_floor=1) == new.new_state(1)


def test_what_a_device_kept_and_is_damaged_is_refused_and_not_forgotten() -> None:
    publisher = Publisher()
    kept = moved(publisher.new_state(), publisher.release(3)).encode()

    for damaged in (b"", kept[:-1], kept + b"\0", b"\xff" * 20, bytes(100_000)):
        with pytest.raises(Untrusted) as caught:
            _ = resume(publisher.anchor, damaged, version_floor=0)
        assert caught.value.status is TrustStatus.DEVICE


def test_an_anchor_that_is_none_is_refused() -> None:
    publisher = Publisher()
    data = publisher.anchor.root

    for wrong in (b"", b"{}", data[:-1], data.replace(b'"threshold":1', b'"threshold":2')):
        with pytest.raises(Untrusted) as caught:
            _ = resume(Anchor(wrong), None, version_floor=0)
        assert caught.value.status is TrustStatus.DEVICE
    state = replace(publisher.new_state(), root=b" " * (ROOT_SIZE_MAX + 1))
    assert refused(state, publisher.release(1)) is TrustStatus.DEVICE


# ---------------------------------------------------------------- in a confined process


CONFINED: Final = """
import sys
from fuzz.trust import Publisher
from nexus.trust import encode_metadata, decode_metadata, Untrusted
publisher = Publisher()
files = publisher.release(1)
anchor, section = publisher.anchor, encode_metadata(files)
from nexus.trust.verify import resume, verify_metadata
def hook(event, arguments):
    if event in ("open", "import", "socket.__new__", "subprocess.Popen", "ctypes.dlopen"):
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(hook)
state = resume(anchor, None, version_floor=0)
state, target = verify_metadata(state, decode_metadata(section), release=True)
try:
    verify_metadata(state, {**files, "targets.json": b"{}"}, release=True)
except Untrusted as error:
    print(target.name, error.status.name)
"""


def test_verification_opens_no_file_and_imports_nothing_more() -> None:
    """updated is confined before it sees metadata: what an import would open is not there."""
    done = subprocess.run(
        [sys.executable, "-c", CONFINED], capture_output=True, text=True, check=False, timeout=60
    )

    assert (done.stdout, done.stderr, done.returncode) == ("1.1 MALFORMED\n", "", 0)


def test_naming_a_status_imports_no_cryptography() -> None:
    script = (
        "import sys, nexus.trust; "
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('tuf', 'securesystemslib', 'cryptography')])"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout == "[]\n"
