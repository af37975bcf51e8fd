"""The vault between cuts: whatever is cut off, the next instance opens everything there was."""

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

import pytest

from nexus.abi import NEVER, Nanos
from nexus.ipc import Refused
from nexus.protocols.keystored import KeystoredStatus
from nexus.protocols.rngd import Entropy, GetEntropy
from nexus.protocols.statefsd import StatefsdStatus
from nexus.services.keystored import sealing
from nexus.services.keystored.ed25519 import public_of
from nexus.services.keystored.faults import Unusable, unavailable
from nexus.services.keystored.places import Asked, RngdRandom, StateRecords
from nexus.services.keystored.sealing import BOUND_SIZE, HEAD, NONCE_PREFIX_SIZE, number_of, unpack
from nexus.services.keystored.vault import DEVICE_PATH, RECORDS_MAX, ROOT, Vault
from nexus.wire import Request
from tests.fakes.keys import Cut, CutHere, Medium
from tests.fakes.source import good

ResultT = TypeVar("ResultT")
Step = Callable[[Vault], Awaitable[Any]]
ENTRIES: Final = {ROOT + b"%016x/%02x" % (each % 3, each): b"v%d" % each for each in range(70)}
LARGE: Final = 256 * b"x"


def run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    raise AssertionError("it waits")


def refusal(work: Coroutine[Any, Any, Any]) -> KeystoredStatus:
    with pytest.raises(Unusable) as caught:
        run(work)
    return caught.value.status


def value_of(vault: Vault, path: bytes) -> bytes | None:
    found = run(vault.get(path, NEVER))
    return None if found is None else bytes(found.data)


def public_in(vault: Vault) -> bytes:
    seed = run(vault.device(NEVER))
    assert seed is not None
    return public_of(seed)


def filled() -> tuple[Medium, bytes]:
    """A medium with a device key and entries, and the public key."""
    medium = Medium()
    vault = medium.vault()
    public = run(vault.generate(NEVER))
    for path, value in ENTRIES.items():
        run(vault.put(path, value, NEVER))
    medium.cut = Cut()
    return medium, public


def settled(medium: Medium) -> Vault:
    """The next instance, after what it does at its start."""
    medium.cut = Cut()
    vault = medium.vault()
    run(vault.settle(NEVER))
    run(vault.prepare(NEVER))
    return vault


# ------------------------------------------------------------------ the first start


def test_the_first_wrapping_key_is_entropy_and_is_kept_before_anything_is_sealed() -> None:
    medium = Medium()
    vault = medium.vault()

    assert run(vault.open(NEVER)) is None
    assert medium.secret == b"", "looking makes none"
    run(vault.put(ROOT + b"1/61", b"value", NEVER))

    wrapping = unpack(medium.secret)
    assert [bytes(key.secret.data) for key in wrapping.keys] == [medium.numbers.given[0]]
    assert vault.number == 1
    assert value_of(medium.vault(), ROOT + b"1/61") == b"value"


def test_nothing_in_clear_is_stored() -> None:
    medium, _ = filled()
    run(medium.vault().put(ROOT + b"1/61", LARGE, NEVER))

    stored = b"".join(medium.records.values())

    for value in (LARGE[:16], *[seed for seed in medium.numbers.given if len(seed) > 8]):
        assert value not in stored


@pytest.mark.parametrize("record", [DEVICE_PATH, ROOT + b"0000000000000001/61"])
def test_records_without_a_wrapping_key_are_corrupted_and_never_get_a_new_one(
    record: bytes,
) -> None:
    medium = Medium(records={record: b"sealed once"})
    vault = medium.vault()

    for act in (
        vault.open(NEVER),
        vault.prepare(NEVER),
        vault.put(ROOT + b"1/62", b"", NEVER),
        vault.get(record, NEVER),
        vault.generate(NEVER),
        vault.rotate(NEVER),
    ):
        assert refusal(act) is KeystoredStatus.CORRUPTED

    assert medium.secret == b""
    assert medium.records == {record: b"sealed once"}
    assert medium.numbers.given == [], "nothing was even drawn"
    assert vault.opened, "it is known how it stands"


def test_a_damaged_blob_is_corrupted_and_never_replaced() -> None:
    medium, _ = filled()
    medium.secret = damaged = medium.secret[:-1]
    vault = medium.vault()

    for act in (vault.put(ROOT + b"1/62", b"", NEVER), vault.generate(NEVER), vault.rotate(NEVER)):
        assert refusal(act) is KeystoredStatus.CORRUPTED

    assert medium.secret == damaged


def test_a_vault_whose_secret_comes_back_opens_without_a_restart() -> None:
    medium, public = filled()
    kept, medium.secret = medium.secret, b""
    vault = medium.vault()
    assert refusal(vault.device(NEVER)) is KeystoredStatus.CORRUPTED

    medium.secret = kept

    assert public_in(vault) == public


# ------------------------------------------------------------------ the device key


def test_a_device_key_is_made_once_in_the_life_of_the_device() -> None:
    medium, public = filled()

    for vault in (medium.vault(), settled(medium)):
        assert refusal(vault.generate(NEVER)) is KeystoredStatus.KEY_EXISTS
        assert vault.keygens == 0
        assert public_in(vault) == public


@pytest.mark.parametrize("left", [None, b"", b"short", bytes(77)])
def test_a_lost_or_damaged_device_key_is_never_made_anew(left: bytes | None) -> None:
    medium, _ = filled()
    if left is None:
        del medium.records[DEVICE_PATH]
    else:
        medium.records[DEVICE_PATH] = left
    drawn = len(medium.numbers.given)
    vault = medium.vault()

    for act in (vault.generate(NEVER), vault.device(NEVER), vault.rotate(NEVER)):
        assert refusal(act) is KeystoredStatus.CORRUPTED

    assert len(medium.numbers.given) == drawn
    assert vault.has_device_key, "there was one, and it is not forgotten"
    assert medium.records.get(DEVICE_PATH) == left
    assert value_of(vault, next(iter(ENTRIES))) == b"v0", "the entries are there all the same"


def test_a_device_key_record_of_another_key_is_damage() -> None:
    medium, _ = filled()
    vault = medium.vault()
    run(vault.put(DEVICE_PATH, bytes(32), NEVER))  # sealed well, and not the key that was made

    assert refusal(vault.device(NEVER)) is KeystoredStatus.CORRUPTED


def test_an_entry_put_in_the_place_of_the_device_key_does_not_open() -> None:
    medium, _ = filled()
    medium.records[DEVICE_PATH] = medium.records[next(iter(ENTRIES))]

    assert refusal(medium.vault().device(NEVER)) is KeystoredStatus.CORRUPTED


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_cut_at_any_change_of_the_generation_leaves_a_key_or_none(at: int, done: bool) -> None:
    # The changes: the wrapping key, the record, the mark.
    medium = Medium(cut=Cut(at, done))
    with pytest.raises(CutHere):
        run(medium.vault().generate(NEVER))
    has_record = DEVICE_PATH in medium.records

    vault = settled(medium)

    assert has_record is ((at, done) >= (2, True))
    assert vault.has_device_key is has_record, "the mark is set again"
    if has_record:
        assert refusal(vault.generate(NEVER)) is KeystoredStatus.KEY_EXISTS
    else:
        public = run(vault.generate(NEVER))
        assert public_in(medium.vault()) == public


# ------------------------------------------------------------------ rotation


def test_a_rotation_seals_everything_anew_and_keeps_every_value() -> None:
    medium, public = filled()
    before = dict(medium.records)
    vault = medium.vault()

    assert run(vault.rotate(NEVER)) == 2

    assert {number_of(record) for record in medium.records.values()} == {2}
    assert [key.number for key in unpack(medium.secret).keys] == [2]
    assert all(medium.records[path] != record for path, record in before.items())
    assert public_in(medium.vault()) == public
    assert {path: value_of(vault, path) for path in ENTRIES} == ENTRIES


def test_a_cut_at_any_change_of_a_rotation_loses_nothing_and_is_finished_by_the_next_start() -> (
    None
):
    medium, _ = filled()
    run(medium.vault().rotate(NEVER))
    changes = medium.cut.count
    assert changes >= 5, "the old one confirmed, old and new, two batches or more, new alone"

    for at in range(1, changes + 1):
        for done in (False, True):
            medium, public = filled()
            medium.cut = Cut(at, done)
            with pytest.raises(CutHere):
                run(medium.vault().rotate(NEVER))
            begun = (at, done) > (2, False)

            vault = settled(medium)

            assert vault.number == (2 if begun else 1), (at, done)
            assert not vault.rotating
            assert {number_of(each) for each in medium.records.values()} == {vault.number}
            assert len(unpack(medium.secret).keys) == 1, "the old key is gone"
            assert public_in(vault) == public
            assert {path: value_of(vault, path) for path in ENTRIES} == ENTRIES


def test_a_second_cut_during_the_recovery_loses_nothing_either() -> None:
    for second in range(1, 6):
        medium, public = filled()
        medium.cut = Cut(3, done=True)
        with pytest.raises(CutHere):
            run(medium.vault().rotate(NEVER))
        medium.cut = Cut(second, done=bool(second % 2))
        vault = medium.vault()
        try:
            run(vault.settle(NEVER))
        except CutHere:
            vault = settled(medium)

        assert vault.number == 2
        assert public_in(vault) == public
        assert {path: value_of(vault, path) for path in ENTRIES} == ENTRIES


def test_while_a_rotation_is_not_finished_both_keys_open_and_the_new_one_seals() -> None:
    medium, public = filled()
    medium.cut = Cut(3, done=True)
    with pytest.raises(CutHere):
        run(medium.vault().rotate(NEVER))
    medium.cut = Cut()
    vault = medium.vault()

    run(vault.put(ROOT + b"1/new", b"new", NEVER))

    assert vault.rotating
    assert number_of(medium.records[ROOT + b"1/new"]) == 2
    assert public_in(vault) == public
    assert {path: value_of(vault, path) for path in ENTRIES} == ENTRIES


def test_a_rotation_asked_for_again_is_finished_and_not_begun_anew() -> None:
    medium, _ = filled()
    medium.cut = Cut(3, done=True)
    with pytest.raises(CutHere):
        run(medium.vault().rotate(NEVER))
    medium.cut = Cut()

    assert run(medium.vault().rotate(NEVER)) == 2
    assert run(medium.vault().rotate(NEVER)) == 3


def test_a_failed_replacement_is_followed_by_a_look_at_what_is_kept() -> None:
    class Failing(Medium):
        fails = False

        async def replace(self, data: bytes) -> None:
            if self.fails:
                raise unavailable("secret: DEVICE_FAILED")
            await super().replace(data)

    medium = Failing()
    vault = medium.vault()
    public = run(vault.generate(NEVER))
    medium.fails = True

    assert refusal(vault.rotate(NEVER)) is KeystoredStatus.UNAVAILABLE

    assert vault.number == 0, "what is not known is not claimed"
    assert public_in(vault) == public
    assert vault.number == 1


class Unsynced(Medium):
    """A replacement may be seen and not be safe from a power cut; it says then that it failed."""

    safe = b""
    fails = False

    async def replace(self, data: bytes) -> None:
        await super().replace(data)
        if self.fails:
            raise unavailable("secret: DEVICE_FAILED")
        self.safe = data


@pytest.mark.parametrize("restarted", [False, True])
def test_nothing_is_sealed_with_a_key_that_a_power_cut_may_take_back(restarted: bool) -> None:
    medium = Unsynced()
    vault = medium.vault()
    public = run(vault.generate(NEVER))
    medium.fails = True
    assert refusal(vault.rotate(NEVER)) is KeystoredStatus.UNAVAILABLE
    if restarted:
        vault = medium.vault()

    assert refusal(vault.put(ROOT + b"1/61", b"v", NEVER)) is KeystoredStatus.UNAVAILABLE
    assert public_in(vault) == public, "what is there can be read"
    medium.fails = False
    run(vault.put(ROOT + b"1/61", b"v", NEVER))
    medium.secret = medium.safe

    assert value_of(medium.vault(), ROOT + b"1/61") == b"v"
    assert public_in(medium.vault()) == public


def test_a_damaged_entry_does_not_stop_a_rotation_and_is_counted() -> None:
    medium, public = filled()
    damaged = next(iter(ENTRIES))
    medium.records[damaged] = record = medium.records[damaged][:-1] + b"\0"
    vault = medium.vault()

    assert run(vault.rotate(NEVER)) == 2

    assert vault.damaged == 1
    assert medium.records[damaged] == record, "it is left as it is"
    assert refusal(vault.get(damaged, NEVER)) is KeystoredStatus.CORRUPTED
    assert public_in(vault) == public


def test_a_device_key_that_is_damaged_during_a_rotation_keeps_both_wrapping_keys() -> None:
    medium, _ = filled()
    medium.cut = Cut(2, done=True)
    with pytest.raises(CutHere):
        run(medium.vault().rotate(NEVER))
    medium.cut = Cut()
    medium.records[DEVICE_PATH] = medium.records[DEVICE_PATH][:-1] + b"\0"

    assert refusal(medium.vault().settle(NEVER)) is KeystoredStatus.CORRUPTED
    assert len(unpack(medium.secret).keys) == 2


class Slow(Medium):
    """A medium that gives no more than so many records in an attempt."""

    left = 0

    async def get(self, path: bytes, until: Nanos) -> bytes | None:
        if path != DEVICE_PATH:
            if not self.left:
                raise unavailable("the time of this attempt is over")
            self.left -= 1
        return await super().get(path, until)


def test_a_rotation_goes_on_where_the_last_attempt_ended() -> None:
    medium, public = filled()
    slow = Slow(medium.records, medium.secret, medium.numbers)
    vault = slow.vault()
    assert refusal(vault.rotate(NEVER)) is KeystoredStatus.UNAVAILABLE

    sealed = [vault.sealed]
    while vault.rotating and len(sealed) < len(ENTRIES):
        slow.left = 10
        with suppress(Unusable):
            run(vault.settle(NEVER))
        sealed.append(vault.sealed)

    assert vault.rotations == 1
    assert len(sealed) <= 10
    assert sealed[:3] == [0, 9, 18]
    assert [key.number for key in unpack(slow.secret).keys] == [2]
    assert all(number_of(record) == 2 for record in slow.records.values())
    again = slow.vault()
    slow.left = len(ENTRIES)
    assert [value_of(again, path) for path in ENTRIES] == list(ENTRIES.values())
    assert public_in(again) == public


@pytest.mark.parametrize(("attempts", "was_there"), [(1, False), (2, True)])
def test_what_is_gone_when_a_cut_off_deletion_is_repeated_was_deleted(
    attempts: int, was_there: bool
) -> None:
    class Cutting(Asked):
        def __init__(self) -> None:
            self.attempts = attempts

        async def ask(self, request: Request[object], until: Nanos) -> object:
            return Refused(StatefsdStatus.NOT_FOUND)

    records = StateRecords.__new__(StateRecords)
    records._statefsd = Cutting()

    assert run(records.delete(ROOT + b"1/61", NEVER)) is was_there


def test_more_records_than_there_can_be_do_not_keep_it_busy_for_ever() -> None:
    medium, _ = filled()
    medium.page_size = 1000
    medium.records |= {ROOT + b"z/%08d" % each: b"" for each in range(RECORDS_MAX)}

    assert refusal(medium.vault().rotate(NEVER)) is KeystoredStatus.UNAVAILABLE


def test_forgotten_keys_are_wiped_and_read_again() -> None:
    medium, public = filled()
    vault = medium.vault()
    wrapping = run(vault.open(NEVER))
    assert wrapping is not None

    vault.forget()

    assert bytes(wrapping.current.secret.data) == bytes(32)
    assert public_in(vault) == public


def test_the_old_wrapping_key_is_wiped_when_nothing_needs_it_any_more() -> None:
    medium, _ = filled()
    vault = medium.vault()
    old = run(vault.open(NEVER))
    assert old is not None

    run(vault.rotate(NEVER))

    assert bytes(old.current.secret.data) == bytes(32)


# ------------------------------------------------------------------ entropy


def prefix_of(record: bytes) -> bytes:
    """What its nonce begins with."""
    return record[BOUND_SIZE : BOUND_SIZE + NONCE_PREFIX_SIZE]


def test_two_instances_under_one_key_seal_with_prefixes_that_were_drawn_for_each() -> None:
    medium = Medium()
    found = []

    for each in range(2):
        vault = medium.vault()
        before = len(medium.numbers.given)
        paths = [ROOT + b"1/%d%d" % (each, number) for number in range(3)]
        for path in paths:
            run(vault.put(path, b"value", NEVER))
        (prefix,) = {prefix_of(medium.records[path]) for path in paths}
        assert prefix in medium.numbers.given[before:], "drawn, and for this instance"
        found.append(prefix)

    assert len({number_of(record) for record in medium.records.values()}) == 1, "one key"
    assert found[0] != found[1]
    nonces = {record[BOUND_SIZE : HEAD.size] for record in medium.records.values()}
    assert len(nonces) == len(medium.records) == 6


def test_a_prefix_whose_numbers_are_spent_gives_way_to_one_that_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealing, "NONCES_MAX", 2)
    medium = Medium()
    vault = medium.vault()

    for each in range(6):
        run(vault.put(ROOT + b"1/%d" % each, b"value", NEVER))

    prefixes = [prefix_of(record) for _, record in sorted(medium.records.items())]
    assert prefixes[::2] == prefixes[1::2] == medium.numbers.given[1:], "the first is the key"
    assert len(set(prefixes)) == 3


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_a_delivery_of_another_length_than_asked_for_is_none(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answered(self: Asked, request: Request[object], until: Nanos) -> object:
        assert request == GetEntropy(32)
        return Entropy(good(1, size))

    monkeypatch.setattr(Asked, "ask", answered)
    random = RngdRandom.__new__(RngdRandom)
    random._rngd = Asked.__new__(Asked)

    assert refusal(random.draw(32, NEVER)) is KeystoredStatus.UNAVAILABLE
    size = 32
    assert run(random.draw(32, NEVER)) == good(1, 32)


# ------------------------------------------------------------------ room


def test_a_known_name_always_has_room_and_a_new_one_up_to_the_limit() -> None:
    medium = Medium()
    vault = medium.vault()
    prefix = ROOT + b"1/"
    for each in range(8):
        run(vault.put(prefix + b"%d" % each, b"", NEVER))

    assert run(vault.has_room(prefix, prefix + b"7", 8, NEVER))
    assert not run(vault.has_room(prefix, prefix + b"new", 8, NEVER))
    assert run(vault.has_room(prefix, prefix + b"new", 9, NEVER))
    assert run(vault.has_room(ROOT + b"2/", ROOT + b"2/0", 8, NEVER)), "of another caller"
