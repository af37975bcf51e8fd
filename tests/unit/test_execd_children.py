"""The table of children: who may know, who waits, what is remembered."""

from dataclasses import dataclass

from nexus.abi import LinkId, Nanos, ServiceId
from nexus.protocols.execd import Ended
from nexus.services.execd.children import (
    CHILDREN_MAX,
    CHILDREN_OF_ONE_MAX,
    ENDS_MAX,
    WAITERS_MAX,
    WAITERS_OF_ONE_MAX,
    Children,
)

STARTER = ServiceId(7)


@dataclass
class Waiter:
    """Somebody who waits."""

    link: LinkId
    deadline: Nanos


def ended(pid: int, generation: int = 1) -> Ended:
    return Ended(pid, generation, 0, 0, 0)


def children_with(*pids: int) -> Children[Waiter]:
    children: Children[Waiter] = Children()
    for pid in pids:
        children.on_started(f"program.{pid}", STARTER, pid, 1)
    return children


def test_a_child_that_ends_is_remembered_under_its_pid_and_its_waiters_are_given() -> None:
    children = children_with(5)
    waiter = Waiter(LinkId(1), Nanos(100))
    child = children.living(5)
    assert child is not None
    child.waiters.append(waiter)

    given = children.on_ended("program.5", ended(5), again=False)

    assert given == [waiter]
    assert children.living(5) is None
    over = children.over(5)
    assert over is not None
    assert (over.starter, over.ended) == (STARTER, ended(5))


def test_a_child_that_is_started_again_stays_a_child_and_its_first_end_is_known() -> None:
    children = children_with(5)

    _ = children.on_ended("program.5", ended(5), again=True)
    _ = children.on_ended("program.5", ended(6, 2), again=False)

    assert children.named("program.5") is None
    assert [children.over(pid) is not None for pid in (5, 6)] == [True, True]


def test_the_end_of_what_is_no_child_is_nobodys_business() -> None:
    children = children_with()

    assert children.on_ended("timed", ended(3), again=True) == []
    assert children.over(3) is None


def test_only_so_many_ends_are_remembered_the_oldest_is_forgotten() -> None:
    children: Children[Waiter] = Children()
    for pid in range(1, ENDS_MAX + 2):
        children.on_started("program", STARTER, pid, pid)
        _ = children.on_ended("program", ended(pid, pid), again=False)

    assert children.over(1) is None
    assert children.over(2) is not None
    assert children.over(ENDS_MAX + 1) is not None


def test_a_pid_that_the_kernel_gives_again_is_the_new_childs() -> None:
    children = children_with(5)
    _ = children.on_ended("program.5", ended(5), again=False)

    children.on_started("other", ServiceId(8), 5, 1)

    assert children.over(5) is None
    assert children.living(5) is not None


def test_children_are_bounded_for_one_starter_and_for_all() -> None:
    children = children_with(*range(CHILDREN_OF_ONE_MAX))
    assert not children.has_room(STARTER)
    assert children.has_room(ServiceId(8))

    for pid in range(CHILDREN_OF_ONE_MAX, CHILDREN_MAX):
        children.on_started(f"program.{pid}", ServiceId(pid), pid, 1)

    assert len(children) == CHILDREN_MAX
    assert not children.has_room(ServiceId(9999))


def test_one_client_cannot_take_all_places_to_wait_and_who_is_late_makes_room() -> None:
    children = children_with(5)
    child = children.living(5)
    assert child is not None
    child.waiters += [Waiter(LinkId(1), Nanos(100))] * WAITERS_OF_ONE_MAX

    assert not children.may_wait(LinkId(1), Nanos(50))
    assert children.may_wait(LinkId(2), Nanos(50))
    assert children.may_wait(LinkId(1), Nanos(100)), "the time of the others is over"
    assert children.waiting == 0


def test_waiters_are_bounded_in_all_and_go_with_their_link() -> None:
    children = children_with(5)
    child = children.living(5)
    assert child is not None
    for index in range(WAITERS_MAX):
        child.waiters.append(Waiter(LinkId(index % 8), Nanos(100)))

    assert not children.may_wait(LinkId(99), Nanos(50))
    children.forget_link(LinkId(0))

    assert children.may_wait(LinkId(99), Nanos(50))
    assert all(waiter.link != 0 for waiter in child.waiters)
