"""The conformance scenario: four small programs whose every trap has one right answer.

Two kernels that keep the same promises give each task the same sequence of traps, statuses and
sizes. So nothing here depends on who is faster: a task waits for one named link at a time where
two could have something for it, and a death is looked at only after it is confirmed.
"""

import inspect
import json
import sys
from hashlib import sha256
from typing import Any, Final

from nexus.abi import (
    BOOT_MEMORY_SIZE_MAX,
    INIT_NAME,
    LINK_SIZE_MAX,
    MESSAGE_SIZE_MAX,
    NEVER,
    NO_WAIT,
    NOTIFY_SIZE_MAX,
    AbiError,
    BootImage,
    BootMemoryRead,
    BootMemoryReplace,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapQuery,
    ClockMap,
    ConsoleWrite,
    EndpointClose,
    EndpointCreate,
    Entropy,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    Notify,
    Now,
    PeerGone,
    Pid,
    PolicyRaise,
    PolicyRead,
    PolicyWord,
    PortClose,
    PortPeer,
    PortSend,
    Program,
    Programs,
    QosClass,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    SetTaskQos,
    SleepUntil,
    Slot,
    Spawn,
    Spawned,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskQos,
    TaskStats,
    TaskTable,
    Trap,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
    Wait,
)

STEP_WAIT: Final = Nanos(5_000_000_000)  # ns; for what comes at once, on a very busy host too
SHORT_WAIT: Final = Nanos(3_000_000)  # ns; a wait that is meant to run out
OWNER_SIZE: Final = 160 * 1024  # bytes of link shares of each task; five fit the total with root
ENDPOINTS: Final = 8
NOBODY: Final = Pid(1 << 30)  # beyond every number that Linux or the simulation gives
NO_LINK: Final = LinkId(1 << 30)
CALLS: Final = 20  # fused calls after the others, to see the fast path settle
PEER_TERMS: Final = LinkTerms(depth=4, size=LINK_SIZE_MAX, delegations=8)

ECHO, BIND, STOP, VIEW, SLEEP, BYE, KILL, WATCH = range(1, 9)  # first byte of a request


def programs() -> Programs:
    """The programs of the scenario; the root task is `root()`."""
    digest = sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()
    mains = {"server": _server, "client": _client, "doomed": _doomed, "failing": _failing}
    return {name: Program(name=name, main=main, digest=digest) for name, main in mains.items()}


def root() -> Program:
    """The root task of the scenario."""
    return Program(name=INIT_NAME, main=_root, digest="0" * 64)


async def _ahead(span: Nanos) -> Nanos:
    return Nanos(await Now() + span)


async def _refused(trap: Trap[Any], status: Status) -> None:
    """Await a trap that must be refused with this status."""
    try:
        _ = await trap
    except AbiError as error:
        assert error.status is status, f"{type(trap).__name__}: {error}, expected {status.name}"
    else:
        raise AssertionError(f"{type(trap).__name__} was not refused with {status.name}")


async def _gone(endpoint: Slot, link: LinkId) -> None:
    """Wait for the end of one link."""
    try:
        message = await Recv((endpoint,), await _ahead(STEP_WAIT), link=link)
    except PeerGone as gone:
        assert gone.link == link
    else:
        raise AssertionError(f"a message of {len(message.data)} bytes instead of the end")


async def _from(endpoint: Slot, link: LinkId) -> Message:
    return await Recv((endpoint,), await _ahead(STEP_WAIT), link=link)


async def _say(text: str, **evidence: object) -> None:
    await ConsoleWrite(f"scenario: {text}", json.dumps(evidence).encode() if evidence else b"")


async def _say_counters(text: str) -> None:
    """Print the kernel's own account of this task, which both kernels keep alike."""
    await _say(text, **(await TaskStats())._asdict())


# ---------------------------------------------------------------- root


async def _root(boot: BootImage) -> int:
    assert await PolicyRead() == PolicyWord(0, available=False)
    assert await PolicyRaise(True) == PolicyWord(1, available=True)
    await _refused(BootMemoryReplace(bytes(BOOT_MEMORY_SIZE_MAX + 1)), Status.INVALID_ARGUMENT)
    await _refused(Notify("x" * (NOTIFY_SIZE_MAX + 1)), Status.INVALID_ARGUMENT)
    server, doomed, client = [await _start(boot, name) for name in ("server", "doomed", "client")]
    for peer in (server, doomed):
        link = await LinkCreate(peer.slot, PEER_TERMS)
        await Send(client.slot, bytes((ECHO,)), move=link.slot)
    await _try_spawns(boot)

    asked = await _from(boot.endpoint, client.link)
    assert asked.data == bytes((KILL,))
    assert asked.sender.pid == client.pid
    await Kill(doomed.pid)
    ended = await Wait(doomed.pid, await _ahead(STEP_WAIT))
    assert ended.signal == 9
    await _gone(boot.endpoint, doomed.link)
    await SetTaskQos(server.pid, QosClass.IDLE)
    await Send(client.slot, bytes((KILL,)))

    again = await _start(boot, "doomed")
    assert (again.generation, again.service) == (2, doomed.service)
    await Kill(again.pid)
    _ = await Wait(again.pid, await _ahead(STEP_WAIT))
    await _gone(boot.endpoint, again.link)

    code = (await Wait(client.pid, await _ahead(STEP_WAIT))).code
    await _gone(boot.endpoint, client.link)
    await Send(server.slot, bytes((STOP,)))
    _ = await Wait(server.pid, await _ahead(STEP_WAIT))
    await _gone(boot.endpoint, server.link)
    for spawned in (server, doomed, client, again):
        await CapClose(spawned.slot)
    await _say("root ends", tasks=len(await TaskTable()))
    await _say_counters("counters of root")
    return code


async def _start(boot: BootImage, name: str) -> Spawned:
    spec = SpawnSpec(
        name=name,
        program=name,
        control=boot.endpoint,
        owner_size=OWNER_SIZE,
        endpoints=ENDPOINTS,
        delegations=8,
    )
    return await Spawn(spec)


async def _try_spawns(boot: BootImage) -> None:
    """A program that fails, and spawns that are refused with their reason, told once."""
    failing = await _start(boot, "failing")
    ended = await Wait(failing.pid, await _ahead(STEP_WAIT))
    assert (ended.code, ended.signal) == (7, 0)
    await _gone(boot.endpoint, failing.link)
    await CapClose(failing.slot)
    for name, program in (("nobody", "no-such-program"), ("client", "client")):
        spec = SpawnSpec(name=name, program=program, control=boot.endpoint)
        await _refused(Spawn(spec), Status.INVALID_ARGUMENT)
        assert await SpawnLastError() is SpawnReason.INVALID_PAYLOAD
        assert await SpawnLastError() is SpawnReason.NONE
    await _refused(Wait(failing.pid, NO_WAIT), Status.INVALID_ARGUMENT)
    assert len(await Entropy(16)) == 16


# ---------------------------------------------------------------- peers


async def _failing(_boot: BootImage) -> int:
    return 7


async def _doomed(boot: BootImage) -> int:
    """Answers one bind and waits to be killed."""
    message = await Recv((boot.endpoint,), NEVER)
    assert message.cap is not None
    await Send(message.cap, bytes((BIND,)))
    _ = await Recv((boot.endpoint,), NEVER)
    return 1


async def _server(boot: BootImage) -> int:
    kept: Slot | None = None
    watched = memoryview(b"")
    receive = ReplyRecv((boot.endpoint,), NEVER)
    while True:
        message = await receive
        receive.slot = None
        match message.data[0]:
            case 1:  # ECHO
                receive.slot, receive.data = await _echo(message, kept)
            case 2:  # BIND
                kept = message.cap
                receive.slot, receive.data = kept, bytes((BIND,))
            case 4:  # VIEW
                receive.slot, receive.data = kept, await _view(message)
            case 5:  # SLEEP
                _ = await SleepUntil(Nanos(message.now + SHORT_WAIT))
                receive.slot, receive.data = kept, bytes((SLEEP,))
            case 8:  # WATCH
                if message.cap is not None:
                    watched = await VmoWatch(message.cap)
                    await CapClose(message.cap)
                receive.slot, receive.data = kept, bytes((WATCH,)) + bytes(watched[:4])
            case 6:  # BYE
                assert kept is not None
                await Send(kept, bytes((BYE,)))
                await _gone(boot.endpoint, message.link)
                await CapClose(kept)
                kept = None
            case _:  # STOP
                await _say_counters("counters of server")
                return 0


async def _echo(message: Message, kept: Slot | None) -> tuple[Slot | None, bytes]:
    """Answer over the capability that came along, once, or over the bound link."""
    if message.cap is None:
        return kept, message.data
    await Send(message.cap, message.data)
    await CapClose(message.cap)
    return None, b""


async def _view(message: Message) -> bytes:
    assert message.cap is not None
    info = await CapQuery(message.cap)
    view = await VmoMap(message.cap)
    total = sum(view) & 0xFFFF
    view.release()
    await CapClose(message.cap)
    return bytes((VIEW,)) + total.to_bytes(2, "little") + info.length.to_bytes(4, "little")


# ---------------------------------------------------------------- client


async def _client(boot: BootImage) -> int:
    server, doomed = [await _given(boot) for _ in range(2)]
    inbox = await EndpointCreate()
    reply = await LinkCreate(inbox, LinkTerms())
    assert reply.link is not None
    await Send(server, bytes((BIND,)), move=reply.slot)
    bound = await _from(inbox, reply.link)
    assert bound.data == bytes((BIND,))

    await _calls(server, inbox, reply.link)
    await _one_shot(server, inbox)
    await _deadlines(inbox)
    await _full_queues()
    await _bulk(server, inbox, reply.link)
    await _shared(server, inbox, reply.link)
    await _refusals(boot, server)
    await _classes(bound.sender.pid)
    await _death(boot, doomed, inbox)
    await _say_counters("counters of client")

    await Send(server, bytes((BYE,)))
    assert (await _from(inbox, reply.link)).data == bytes((BYE,))
    return 0


async def _given(boot: BootImage) -> Slot:
    message = await Recv((boot.endpoint,), await _ahead(STEP_WAIT))
    assert message.cap is not None
    return message.cap


async def _calls(server: Slot, inbox: Slot, link: LinkId) -> None:
    for size in (1, 2, 100, 4096, MESSAGE_SIZE_MAX):
        sent = bytes((ECHO,)) + bytes(size - 1)
        answer = await Call(server, sent, inbox, link, await _ahead(STEP_WAIT))
        assert answer.data == sent
    call = Call(server, bytes((ECHO,)) + b"again", inbox, link, await _ahead(STEP_WAIT))
    for _ in range(CALLS):
        assert (await call).data == call.data
    slept = await Call(server, bytes((SLEEP,)), inbox, link, await _ahead(STEP_WAIT))
    assert slept.data == bytes((SLEEP,))
    await _say("calls ok", calls=CALLS)


async def _one_shot(server: Slot, inbox: Slot) -> None:
    """A reply link of its own moves with the request; its end is seen after the reply."""
    for size in (1, 500):
        link = await LinkCreate(inbox, LinkTerms(depth=1))
        assert link.link is not None
        sent = bytes((ECHO,)) + bytes(size)
        await Send(server, sent, move=link.slot)
        assert (await _from(inbox, link.link)).data == sent
        await _gone(inbox, link.link)
        await _refused(CapClose(link.slot), Status.INVALID_ARGUMENT)
    await _say("one-shot replies ok")


async def _deadlines(inbox: Slot) -> None:
    await _refused(Recv((inbox,), NO_WAIT), Status.QUEUE_EMPTY)
    await _refused(Recv((inbox,), Nanos(1)), Status.TIMED_OUT)
    deadline = await _ahead(SHORT_WAIT)
    await _refused(Recv((inbox,), deadline), Status.TIMED_OUT)
    assert await Now() >= deadline
    deadline = await _ahead(SHORT_WAIT)
    assert await SleepUntil(deadline) >= deadline
    assert (await ClockMap()).monotonic() >= deadline
    await _say("deadlines ok")


async def _full_queues() -> None:
    """Exact bounds, a moving send that fails, and the messages that were there before it."""
    endpoint = await EndpointCreate()
    link = await LinkCreate(endpoint, LinkTerms(depth=2, size=100))
    other = await LinkCreate(endpoint, LinkTerms())
    await Send(link.slot, bytes((ECHO,)) * 60)
    await _refused(Send(link.slot, bytes((ECHO,)) * 41), Status.NO_SPACE)
    await Send(link.slot, bytes((ECHO,)) * 40)
    await _refused(Send(link.slot, bytes((ECHO,))), Status.QUEUE_FULL)
    await _refused(Send(link.slot, bytes((ECHO,)), move=other.slot), Status.QUEUE_FULL)
    ahead = await _ahead(SHORT_WAIT)
    await _refused(
        Send(link.slot, bytes((ECHO,)), move=other.slot, deadline=ahead), Status.TIMED_OUT
    )
    await Send(other.slot, bytes((ECHO,)) * 3)
    await _refused(Recv((endpoint,), NO_WAIT, size_max=2), Status.INVALID_ARGUMENT)
    assert link.link is not None
    assert other.link is not None
    for expected, source in ((60, link.link), (40, link.link), (3, other.link)):
        message = await Recv((endpoint,), NO_WAIT, link=source)
        assert len(message.data) == expected
    alias = await CapClone(link.slot)
    await CapClose(link.slot)
    await Send(alias, bytes((ECHO,)))
    await CapClose(alias)
    assert len((await _from(endpoint, link.link)).data) == 1
    await _gone(endpoint, link.link)
    await EndpointClose(endpoint)
    await _refused(Send(other.slot, bytes((ECHO,))), Status.NO_SUCH_ENDPOINT)
    await CapClose(other.slot)
    await _say("queues ok")


async def _bulk(server: Slot, inbox: Slot, link: LinkId) -> None:
    vmo = await VmoCreate(5000)
    await VmoWrite(vmo, 4990, b"0123456789")
    await _refused(VmoWrite(vmo, 8190, b"0123456789"), Status.INVALID_ARGUMENT)
    await _refused(VmoMap(vmo), Status.PERMISSION_DENIED)
    await VmoSeal(vmo)
    await _refused(VmoWrite(vmo, 0, b"late"), Status.PERMISSION_DENIED)
    kept = await CapClone(vmo)
    await Send(server, bytes((VIEW,)), move=vmo)
    answer = (await _from(inbox, link)).data
    assert int.from_bytes(answer[1:3], "little") == sum(b"0123456789")
    assert int.from_bytes(answer[3:], "little") == 8192
    await CapClose(kept)
    await _say("bulk ok")


async def _shared(server: Slot, inbox: Slot, link: LinkId) -> None:
    """Memory that the server goes on watching: it sees each change before the next request."""
    vmo = await VmoCreate(5000)
    view = await VmoShare(vmo)
    for trap in (VmoShare(vmo), VmoWrite(vmo, 0, b"x"), VmoSeal(vmo), VmoMap(vmo)):
        await _refused(trap, Status.PERMISSION_DENIED)
    for words in (b"fine", b"well"):
        view[:4] = words
        move = await CapClone(vmo) if words == b"fine" else None
        await Send(server, bytes((WATCH,)), move=move)
        assert (await _from(inbox, link)).data == bytes((WATCH,)) + words
    unsealed = await VmoCreate(1)
    await _refused(VmoWatch(unsealed), Status.PERMISSION_DENIED)
    await CapClose(unsealed)
    await CapClose(vmo)
    assert bytes(view[:4]) == b"well"
    view.release()
    await _say("shared ok")


async def _refusals(boot: BootImage, server: Slot) -> None:
    """What an ordinary task may not do, and what nobody may."""
    spec = SpawnSpec(name="other", program="failing", control=boot.endpoint)
    await _refused(Spawn(spec), Status.PERMISSION_DENIED)
    await _refused(Kill(boot.pid), Status.PERMISSION_DENIED)
    await _refused(Wait(boot.pid, NO_WAIT), Status.PERMISSION_DENIED)
    await _refused(TaskTable(), Status.PERMISSION_DENIED)
    await _refused(Entropy(8), Status.PERMISSION_DENIED)
    await _refused(PolicyRaise(False), Status.PERMISSION_DENIED)
    assert await PolicyRead() == PolicyWord(1, available=True)
    await _refused(BootMemoryRead(), Status.PERMISSION_DENIED)
    await _refused(BootMemoryReplace(b""), Status.PERMISSION_DENIED)
    await _refused(Notify("READY=1"), Status.PERMISSION_DENIED)
    for trap in (
        PortSend(boot.endpoint, NO_LINK, b"\x01"),
        PortClose(boot.endpoint, NO_LINK),
        PortPeer(server, NO_LINK),
    ):
        await _refused(trap, Status.INVALID_ARGUMENT)
    await _refused(CapQuery(boot.endpoint), Status.PERMISSION_DENIED)
    await _refused(CapClone(boot.endpoint), Status.PERMISSION_DENIED)
    await _refused(CapDerive(server, Rights.SEND | Rights.MANAGE), Status.PERMISSION_DENIED)
    await _refused(Recv((server,), NO_WAIT), Status.PERMISSION_DENIED)
    await _refused(Send(Slot(95), b"\x01"), Status.INVALID_ARGUMENT)
    await _refused(Send(Slot(96), b"\x01"), Status.INVALID_ARGUMENT)
    await _refused(Send(server, b""), Status.INVALID_ARGUMENT)
    await _refused(Send(server, b"\xf0"), Status.INVALID_ARGUMENT)
    await _refused(Send(server, bytes(MESSAGE_SIZE_MAX + 1)), Status.INVALID_ARGUMENT)
    await _refused(LinkCreate(boot.endpoint, LinkTerms(depth=0)), Status.INVALID_ARGUMENT)
    await _refused(VmoCreate(0), Status.INVALID_ARGUMENT)
    await _refused(ConsoleWrite("two\nlines"), Status.INVALID_ARGUMENT)
    await _refused(ConsoleWrite("x", b"[]"), Status.INVALID_ARGUMENT)
    await _say("refusals ok")


async def _classes(other: Pid) -> None:
    """Each request leaves a line in the audit of the kernel, those that are refused too."""
    assert await TaskQos() is QosClass.NORMAL
    await SetTaskQos(None, QosClass.NORMAL)
    await _refused(SetTaskQos(None, QosClass.INTERACTIVE), Status.PERMISSION_DENIED)
    await _refused(SetTaskQos(None, 255), Status.INVALID_ARGUMENT)
    await _refused(SetTaskQos(other, QosClass.IDLE), Status.PERMISSION_DENIED)
    await _refused(SetTaskQos(NOBODY, QosClass.IDLE), Status.INVALID_ARGUMENT)
    await SetTaskQos(None, QosClass.IDLE)
    assert await TaskQos() is QosClass.IDLE
    await _say("classes ok")


async def _death(boot: BootImage, doomed: Slot, inbox: Slot) -> None:
    """A peer dies while this task waits for it; what it had sent is received first."""
    reply = await LinkCreate(inbox, LinkTerms())
    assert reply.link is not None
    assert boot.control is not None
    await Send(doomed, bytes((BIND,)), move=reply.slot)
    assert (await _from(inbox, reply.link)).data == bytes((BIND,))
    await Send(boot.control, bytes((KILL,)))
    await _gone(inbox, reply.link)
    confirmed = await Recv((boot.endpoint,), await _ahead(STEP_WAIT))
    assert confirmed.data == bytes((KILL,))
    await _refused(Send(doomed, b"\x01"), Status.NO_SUCH_ENDPOINT)
    await CapClose(doomed)
    await _say("death ok")
