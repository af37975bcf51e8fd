"""Every decision that a saboteur of the ipc rungs breaks can be replaced from outside."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    NEVER,
    NO_WAIT,
    AbiError,
    BootImage,
    CapClone,
    CapQuery,
    EndpointCreate,
    Kill,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    Pid,
    Program,
    QosClass,
    Recv,
    Send,
    Sender,
    ServiceId,
    SetTaskQos,
    SleepUntil,
    Slot,
    Spawn,
    SpawnSpec,
    Status,
    Trap,
    VmoCreate,
    Wait,
)
from nexus.kernel.core import qos
from nexus.kernel.sim import Faults, Forge, Plan, SimKernel
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.heap import Heap
from nexus.kernel.sim.ipc import Ipc
from nexus.kernel.sim.objects import Entry, Link, Task

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000


async def status_of(trap: Trap[Any]) -> Status | None:
    try:
        await trap
    except AbiError as refusal:
        return refusal.status
    return None


# Scenes: what the rung's evidence would look at. Each is true on the kernel as it is.


async def payload(boot: BootImage) -> bool:
    link = await LinkCreate(boot.endpoint)
    data = bytes(range(64)) * 128
    await Send(link.slot, data)
    return (await Recv((boot.endpoint,), NO_WAIT)).data == data


async def past_deadline(boot: BootImage) -> bool:
    return await status_of(Recv((boot.endpoint,), Nanos(1))) is Status.TIMED_OUT


async def deadline_fires(boot: BootImage) -> bool:
    deadline = Nanos(await Now() + 50 * MS)
    status = await status_of(Recv((boot.endpoint,), deadline))
    return status is Status.TIMED_OUT and await Now() < deadline + MS


async def forged(boot: BootImage) -> bool:
    link = await LinkCreate(boot.endpoint)
    await Send(link.slot, b"true")
    assert (await Recv((boot.endpoint,), NO_WAIT)).data == b"true"
    return await status_of(Recv((boot.endpoint,), NO_WAIT)) is Status.QUEUE_EMPTY


async def moved_sender(boot: BootImage) -> bool:
    child = await Spawn(SpawnSpec("child", "child", boot.endpoint))
    endpoint = await EndpointCreate()
    link = await LinkCreate(endpoint)
    await Send(child.slot, b"yours", move=link.slot)
    message = await Recv((endpoint,), Nanos(await Now() + 10 * MS))
    return message.sender.pid == child.pid


async def rollback(boot: BootImage) -> bool:
    link = await LinkCreate(boot.endpoint, LinkTerms(depth=1))
    other = await LinkCreate(boot.endpoint)
    await Send(link.slot, b"full")
    assert await status_of(Send(link.slot, b"x", move=other.slot)) is Status.QUEUE_FULL
    return await status_of(Send(other.slot, b"still mine")) is None


async def full_table(boot: BootImage) -> bool:
    link = await LinkCreate(boot.endpoint)
    other = await LinkCreate(boot.endpoint)
    await Send(link.slot, b"with", move=other.slot)
    while await status_of(CapClone(link.slot)) is None:
        pass
    assert await status_of(Recv((boot.endpoint,), NO_WAIT)) is Status.NO_SPACE
    return await status_of(Recv((boot.endpoint,), NO_WAIT)) is Status.NO_SPACE


async def both_wake(boot: BootImage) -> bool:
    owner = await Spawn(SpawnSpec("owner", "hold", boot.endpoint, delegations=9))
    waiters = []
    for name in ("one", "two"):
        link = await LinkCreate(owner.slot, LinkTerms(1, 64, 0))
        waiter = await Spawn(SpawnSpec(name, "fill", boot.endpoint))
        await Send(waiter.slot, b"link", move=link.slot)
        waiters.append(waiter)
    await SleepUntil(Nanos(await Now() + MS))
    await Kill(owner.pid)
    soon = Nanos(await Now() + 100 * MS)
    return [await status_of(Wait(waiter.pid, soon)) for waiter in waiters] == [None, None]


async def own_queue(boot: BootImage) -> bool:
    first = await LinkCreate(boot.endpoint, LinkTerms(depth=2))
    second = await LinkCreate(boot.endpoint, LinkTerms(depth=2))
    for _ in range(2):
        await Send(first.slot, b"flood")
    return await status_of(Send(second.slot, b"other")) is None


async def generation(boot: BootImage) -> bool:
    seen = []
    for _ in range(2):
        child = await Spawn(SpawnSpec("child", "child", boot.endpoint))
        seen.append(child.generation)
        await Kill(child.pid)
        await Wait(child.pid, NO_WAIT)
    return seen == [1, 2]


async def escalation(boot: BootImage) -> bool:
    child = await Spawn(SpawnSpec("child", "raise", boot.endpoint))
    return (await Wait(child.pid, NEVER)).code == Status.PERMISSION_DENIED


async def vmo_length(boot: BootImage) -> bool:
    return (await CapQuery(await VmoCreate(5000))).length == 8192


async def published(boot: BootImage) -> bool:
    child = await Spawn(SpawnSpec("child", "speak", boot.endpoint))
    await Wait(child.pid, NEVER)
    return await status_of(Recv((boot.endpoint,), NO_WAIT, link=child.link)) is None


async def child(boot: BootImage) -> None:
    cap = (await Recv((boot.endpoint,), NEVER)).cap
    assert cap is not None
    await Send(cap, b"hello")


async def hold(boot: BootImage) -> None:
    await SleepUntil(NEVER)


async def fill(boot: BootImage) -> None:
    cap = (await Recv((boot.endpoint,), NEVER)).cap
    assert cap is not None
    await Send(cap, b"x")
    await status_of(Send(cap, b"y", deadline=Nanos(await Now() + 5000 * MS)))


async def lift(boot: BootImage) -> int:
    return int(await status_of(SetTaskQos(None, 2)) or 0)


async def speak(boot: BootImage) -> None:
    assert boot.control is not None
    await Send(boot.control, b"hello")


# Saboteurs.


def last_byte_lost(_: Ipc, data: bytes | bytearray) -> bytes:
    return bytes(data[:-1]) if len(data) == 8192 else bytes(data)


def unknown_is_zero(self: Ipc) -> Callable[[Pid], Sender | None]:
    nobody = Sender(ServiceId(0), Pid(0), 0, QosClass.NORMAL)
    return lambda pid: self.identities.get(pid, nobody)


def emptied_early(
    self: Ipc, task: Task, slot: Slot, data: bytes | bytearray, move: Slot | None = None
) -> None:
    try:
        SEND(self, task, slot, data, move)
    except AbiError:
        if move is not None:
            self.close_slot(task, move)
        raise


def taken_first(self: Ipc, task: Task, entry: Entry) -> None:
    try:
        CHECK_TAKE(self, task, entry)
    except AbiError:
        for link in task.links.values():
            if link.queue and link.queue[0] is entry:
                _ = link.queue.popleft()
        raise


def shared_queue(self: Ipc, link: Link, size: int) -> Status | None:
    queued = sum(len(other.queue) for other in link.endpoint.links.values())
    return Status.QUEUE_FULL if queued >= link.depth else None


SEND, CHECK_TAKE, WAKE_ALL = Ipc.send, Ipc.check_take, Ipc.wake_all

SABOTEURS: list[tuple[int, Main, Any, str, Any]] = [
    (7, published, SimKernel, "publish", lambda self, task: None),
    (57, payload, Ipc, "copy_in", last_byte_lost),
    (59, past_deadline, Ipc, "empty_status", lambda self, deadline: Status.QUEUE_EMPTY),
    (60, deadline_fires, Clock, "expire", lambda self, task: None),
    (63, forged, Ipc, "make_lookup", unknown_is_zero),
    (64, moved_sender, Ipc, "stamp", lambda self, task, link: link.maker_pid),
    (66, rollback, Ipc, "send", emptied_early),
    (67, full_table, Ipc, "check_take", taken_first),
    (68, both_wake, Ipc, "wake_all", lambda self, tasks: WAKE_ALL(self, tasks[:1])),
    (71, generation, SimKernel, "next_generation", lambda self, name: 1),
    (72, own_queue, Ipc, "room", shared_queue),
    (75, escalation, qos, "may_not_raise", lambda current, wanted: False),
    (142, vmo_length, Heap, "vmo_length", lambda self, size: size),
]


def plays(scene: Main) -> bool:
    """Whether a scene holds; it does not either if it never ends or ends in a crash."""
    holds: list[bool] = []

    async def main(boot: BootImage) -> None:
        holds.append(bool(await scene(boot)))

    table = {
        task.__name__: Program(name=task.__name__, main=task, digest="")
        for task in (child, hold, fill, speak)
    }
    table["raise"] = Program(name="raise", main=lift, digest="")
    plan = Plan(forge=(Forge(task="init-lite", nth=1, pid=Pid(77)),) if scene is forged else ())
    kernel = SimKernel(table, seed=1, recorder=lambda _: None, faults=Faults(plan))
    root = Program(name="root", main=main, digest="")
    try:
        kernel.run(root, b"", until=Nanos(kernel.now + 20_000 * MS))
    except Exception:  # noqa: BLE001 (whatever a saboteur leads to, the scene does not hold)
        return False
    return holds == [True]


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda saboteur: str(saboteur[0]))
def test_a_scene_holds_and_its_saboteur_breaks_it(
    monkeypatch: pytest.MonkeyPatch, saboteur: tuple[int, Main, Any, str, Any]
) -> None:
    _, scene, owner, attribute, faulty = saboteur
    assert plays(scene)

    monkeypatch.setattr(owner, attribute, faulty)

    assert not plays(scene)
