"""Tables, rights, shares and accounts: the pure parts under both kernels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import AbiError, CapKind, Rights, Slot, Status
from nexus.kernel.core import (
    Account,
    CapTable,
    Held,
    Pool,
    SystemLimits,
    SystemShares,
    derive,
    moved,
    page_round,
)

RIGHTS = st.integers(0, 15).map(Rights)


class Thing:
    """An object as any kernel might keep."""


def test_the_lowest_free_slot_is_filled_first() -> None:
    table: CapTable[Thing] = CapTable()
    slots = [table.set(Thing(), Rights.SEND) for _ in range(5)]

    _ = table.take(Slot(3))
    _ = table.take(Slot(1))

    assert slots == [0, 1, 2, 3, 4]
    assert table.set(Thing(), Rights.SEND) == 1
    assert table.set(Thing(), Rights.SEND) == 3
    assert table.set(Thing(), Rights.SEND) == 5


def test_a_full_table_refuses_and_changes_nothing() -> None:
    table: CapTable[Thing] = CapTable()
    for _ in range(96):
        _ = table.set(Thing(), Rights.SEND)

    with pytest.raises(AbiError) as refusal:
        _ = table.set(Thing(), Rights.SEND)

    assert refusal.value.status is Status.NO_SPACE
    assert table.full
    assert table.used == 96


@pytest.mark.parametrize("slot", [-1, 0, 95, 96, 1 << 70])
def test_a_slot_that_holds_nothing_is_invalid(slot: int) -> None:
    table: CapTable[Thing] = CapTable()

    for attempt in (table.get, table.take):
        with pytest.raises(AbiError) as refusal:
            _ = attempt(Slot(slot))
        assert refusal.value.status is Status.INVALID_ARGUMENT


def test_what_was_taken_is_restored_where_it_was() -> None:
    table: CapTable[Thing] = CapTable()
    thing = Thing()
    for _ in range(3):
        _ = table.set(thing, Rights.SEND)

    held = table.take(Slot(1))
    assert table.aliases(thing) == 2
    table.restore(Slot(1), held)

    assert table.get(Slot(1)) is held
    assert table.aliases(thing) == 3
    with pytest.raises(AssertionError):
        table.restore(Slot(1), held)


def test_a_right_is_required_exactly() -> None:
    table: CapTable[Thing] = CapTable()
    slot = table.set(Thing(), Rights.MAP | Rights.MANAGE)

    assert table.require(slot, Rights.MAP).rights == Rights.MAP | Rights.MANAGE
    with pytest.raises(AbiError) as refusal:
        _ = table.require(slot, Rights.SEND)
    assert refusal.value.status is Status.PERMISSION_DENIED


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 2))))
def test_a_table_equals_a_dumb_model(steps: list[tuple[bool, int, int]]) -> None:
    table: CapTable[Thing] = CapTable(8)
    things = [Thing() for _ in range(3)]
    model: dict[int, Thing] = {}
    for put, slot, which in steps:
        if put and len(model) < 8:
            free = min(set(range(8)) - set(model))
            assert table.set(things[which], Rights.SEND) == free
            model[free] = things[which]
        elif not put and slot in model:
            assert table.take(Slot(slot)).object is model.pop(slot)
        assert list(table.slots()) == sorted(model)
        assert table.full == (len(model) == 8)
        for thing in things:
            assert table.aliases(thing) == sum(held is thing for held in model.values())


@given(RIGHTS, RIGHTS)
def test_only_a_subset_of_rights_is_derived(held: Rights, wanted: Rights) -> None:
    if int(wanted) & ~int(held):
        with pytest.raises(AbiError) as refusal:
            _ = derive(held, wanted)
        assert refusal.value.status is Status.PERMISSION_DENIED
    else:
        assert derive(held, wanted) == wanted


@given(st.sampled_from(CapKind), RIGHTS)
def test_only_send_and_map_ever_move(kind: CapKind, held: Rights) -> None:
    try:
        right = moved(kind, held)
    except AbiError as refusal:
        assert refusal.status is Status.PERMISSION_DENIED
        assert kind not in (CapKind.LINK, CapKind.VMO) or not held & (
            Rights.SEND if kind is CapKind.LINK else Rights.MAP
        )
    else:
        assert (kind, right) in ((CapKind.LINK, Rights.SEND), (CapKind.VMO, Rights.MAP))
        assert held & right


@given(st.integers(0, 50), st.lists(st.integers(-20, 20)))
def test_a_pool_is_never_exceeded(total: int, steps: list[int]) -> None:
    pool = Pool("things", total)
    used = 0
    for step in steps:
        if step >= 0 and used + step > total:
            with pytest.raises(AbiError) as refusal:
                pool.take(step)
            assert refusal.value.status is Status.NO_SPACE
        elif step >= 0:
            pool.take(step)
            used += step
        elif -step <= used:
            pool.give(-step)
            used += step
        assert (pool.used, pool.free) == (used, total - used)


def test_giving_back_more_than_was_taken_is_a_bug() -> None:
    pool = Pool("things", 5)
    pool.take(2)

    with pytest.raises(AssertionError):
        pool.give(3)


def test_an_owner_is_reserved_wholly_or_not_at_all() -> None:
    limits = SystemLimits(total_size=10_000, endpoints=10, root_size=5_000, root_endpoints=5)
    shares = SystemShares(limits)
    first = shares.reserve(6_000, 6)

    with pytest.raises(AbiError):
        _ = shares.reserve(3_000, 5)
    assert (shares.size.used, shares.endpoints.used) == (6_000, 6)
    first.size.take(1_000)
    shares.release(first)

    assert (shares.size.used, shares.endpoints.used) == (0, 0)


@pytest.mark.parametrize(("size", "pages"), [(1, 4096), (4096, 4096), (4097, 8192), (5000, 8192)])
def test_lengths_are_rounded_up_to_pages(size: int, pages: int) -> None:
    assert page_round(size) == pages


def test_an_account_refuses_exactly_over_its_total_and_keeps_the_request() -> None:
    account = Account("heap", 100)
    account.charge(60)

    with pytest.raises(AbiError) as refusal:
        account.charge(41, 8, asked=37)
    account.charge(40)

    assert refusal.value.status is Status.NO_SPACE
    assert (account.used, account.free) == (100, 0)
    assert (account.refused_size, account.refused_align, account.refused_count) == (37, 8, 1)
    text = "heap: req_size=0x25 req_align=0x8 heap_budget_used=0x3c heap_budget_free=0x28 "
    assert str(refusal.value).endswith(text + "heap_budget_total=0x64")
    assert account.fields() == {
        "account": "heap",
        "heap_budget_used": 100,
        "heap_budget_free": 0,
        "heap_budget_total": 100,
        "size": 37,
        "align": 8,
    }


def test_an_account_gives_back_only_what_it_has() -> None:
    account = Account("heap", 100)
    account.charge(10)

    account.refund(10)

    with pytest.raises(AssertionError):
        account.refund(1)


def test_a_held_capability_has_its_rights_as_a_number_too() -> None:
    assert Held(Thing(), Rights.SEND | Rights.MANAGE).bits == 9
