"""A program that does what it is told: operations by name, results as normalised text.

Three tasks run it: root, which takes operations from the test over a pipe and hands on those
for a child, and two children. What may differ between two kernels is not in a result: pids and
times are left out, link ids are numbered in the order in which the task met them, and messages of
links it has not met are sorted by what they say. Everything else has to be equal.

Capabilities move over the `ways` only: links to each task made before the first operation. So
the order in which unmet links are served never decides which slot a capability lands in.
"""

import os
import zlib
from collections.abc import Callable, Coroutine
from typing import Any, Final

from nexus.abi import (
    NO_WAIT,
    AbiError,
    BootImage,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapQuery,
    EndpointClose,
    EndpointCreate,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    Now,
    PeerGone,
    PolicyRaise,
    PolicyRead,
    Recv,
    ReplyRecv,
    Rights,
    Send,
    SetTaskQos,
    Slot,
    Spawned,
    TaskQos,
    TaskStats,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
    Wait,
)
from nexus.testing.conformance.steps import control, start

PAST: Final = Nanos(1)
PATIENCE: Final = Nanos(15_000_000_000)
WAY_TERMS: Final = LinkTerms(2, 300, 1)  # small, so that moves collide with the limits as well
COMMAND_SIZE_MAX: Final = 3500  # bytes of a result that fits the control link
DELEGATIONS: Final = 200  # respawns of the other child in one run
CHILDREN: Final = (1, 2)
PROGRAM: Final = "interpreter"

Operation = tuple[Any, ...]


class Actor:
    """One task's side of the interpreter."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.ways: dict[int, Slot] = {}  # to root (0) and to the children
        self.links: list[LinkId] = []  # met, in order
        self.hidden: set[Slot] = set()  # carry the commands: no operation may touch them
        self.count = 0  # messages sent, so that each is different

    # ---------------------------------------------------------------- normalising

    def number(self, link: LinkId | None) -> int | None:
        """The number of a link in the order of meeting."""
        if link is None:
            return None
        if link not in self.links:
            self.links.append(link)
        return self.links.index(link)

    def text(self, message: Message) -> str:
        """A message without what may differ."""
        sender = message.sender
        digest = zlib.crc32(message.data)
        return (
            f"{len(message.data)}:{digest:08x} from {sender.service:x}.{sender.generation}"
            f".{int(sender.qos)} cap={message.cap}"
        )

    def payload(self, size: int, first: int) -> bytes:
        """Bytes that no other message of this task has, as far as they fit."""
        self.count += 1
        words = b"%c%d %s" % (first, self.count, self.boot.name.encode())
        return (words + bytes(size))[:size]

    # ---------------------------------------------------------------- operations

    async def do(self, operation: Operation) -> str:
        """The result of one operation, or the name of its refusal."""
        name, *arguments = operation
        method: Callable[..., Coroutine[Any, Any, object]] = getattr(self, f"op_{name}")
        if any(slot in self.hidden for slot in self._slots(name, arguments)):
            return "hidden"
        try:
            return str(await method(*arguments))
        except PeerGone as error:
            return f"gone {self.number(error.link)}"
        except AbiError as error:
            return error.status.name

    def _slots(self, name: str, arguments: list[Any]) -> list[Any]:
        """The operands that are slots."""
        if name == "policy_raise":
            return []
        return arguments[: 2 if name == "call" else 1]

    async def op_endpoint_create(self) -> object:
        return await EndpointCreate()

    async def op_endpoint_close(self, slot: Slot) -> object:
        if self._needed(slot):
            return "needed"
        await EndpointClose(slot)
        return "closed"

    async def op_close(self, slot: Slot) -> object:
        if self._needed(slot):
            return "needed"
        await CapClose(slot)
        return "closed"

    async def op_clone(self, slot: Slot) -> object:
        return await CapClone(slot)

    async def op_derive(self, slot: Slot, rights: int) -> object:
        return await CapDerive(slot, Rights(rights))

    async def op_query(self, slot: Slot) -> object:
        return await CapQuery(slot)

    async def op_link(self, slot: Slot, depth: int, size: int, delegations: int) -> object:
        made = await LinkCreate(slot, LinkTerms(depth, size, delegations))
        return made.slot, self.number(made.link)

    async def op_send(self, slot: Slot, size: int, first: int, deadline: Nanos) -> object:
        await Send(slot, self.payload(size, first), deadline=deadline)
        return "sent"

    async def op_move(self, slot: Slot, way: int, size: int, deadline: Nanos) -> object:
        if self._needed(slot):
            return "needed"
        await Send(self.ways[way], self.payload(size, 65), move=slot, deadline=deadline)
        return "moved"

    async def op_take(self, slot: Slot, link: int, size_max: int, deadline: Nanos) -> object:
        met = self.links[link % len(self.links)] if self.links else LinkId(999_999)
        message = await Recv((slot,), deadline, link=met, size_max=size_max)
        return f"{self.text(message)} link={self.number(message.link)}"

    async def op_call(self, slot: Slot, inbox: Slot, link: int, size: int) -> object:
        met = self.links[link % len(self.links)] if self.links else LinkId(999_999)
        call = Call(slot, self.payload(size, 66), inbox, met, PAST)
        try:
            return f"{self.text(await call)} link={self.number(met)}"
        except PeerGone as error:
            return f"gone {self.number(error.link)} sent={call.sent}"
        except AbiError as error:
            return f"{error.status.name} sent={call.sent}"

    async def op_reply_recv(self, slot: Slot, size: int) -> object:
        # Received from an empty endpoint of its own, so that only the reply is compared.
        trap = ReplyRecv((await EndpointCreate(),), NO_WAIT)
        trap.slot, trap.data = slot, self.payload(size, 67)
        status = "received"
        try:
            await trap
        except AbiError as error:
            status = error.status.name
        await CapClose(trap.sources[0])
        return f"{status} reply={trap.reply_status}"

    async def op_drain(self, slot: Slot) -> object:
        """Everything an endpoint has to give, by link: the met ones first, in order."""
        if slot in self.ways.values():
            return "a way"
        seen = []
        for index, link in enumerate(list(self.links)):
            while True:
                try:
                    message = await Recv((slot,), NO_WAIT, link=link)
                except PeerGone:
                    seen.append(f"{index} gone")
                    break
                except AbiError as error:
                    seen.append(f"{index} {error.status.name}")
                    break
                seen.append(f"{index} {self.text(message)}")
        unmet: dict[LinkId, list[str]] = {}
        end = "?"
        while end == "?":
            try:
                message = await Recv((slot,), NO_WAIT)
                unmet.setdefault(message.link, []).append(self.text(message))
            except PeerGone as error:
                unmet.setdefault(error.link, []).append("gone")
            except AbiError as error:
                end = error.status.name
        groups = sorted(unmet.items(), key=lambda item: item[1])
        for link, texts in groups:
            seen += [f"{self.number(link)} new {text}" for text in texts]
        return "; ".join([*seen, end])

    async def op_vmo(self, size: int) -> object:
        return await VmoCreate(size)

    async def op_write(self, slot: Slot, offset: int, size: int) -> object:
        await VmoWrite(slot, offset, self.payload(size, 68))
        return "written"

    async def op_seal(self, slot: Slot) -> object:
        await VmoSeal(slot)
        return "sealed"

    async def op_map(self, slot: Slot) -> object:
        view = await VmoMap(slot)
        text = f"{len(view)}:{zlib.crc32(view):08x}"
        view.release()
        return text

    async def op_share(self, slot: Slot, size: int) -> object:
        view = await VmoShare(slot)
        data = self.payload(min(size, len(view)), 69)
        view[: len(data)] = data
        text = f"{len(view)}:{zlib.crc32(view):08x}"
        view.release()
        return text

    async def op_watch(self, slot: Slot) -> object:
        view = await VmoWatch(slot)
        text = f"{len(view)}:{zlib.crc32(view):08x}"
        view.release()
        return text

    async def op_qos(self, raw: int) -> object:
        await SetTaskQos(None, raw)
        return await TaskQos()

    async def op_policy_raise(self, available: int) -> object:
        return await PolicyRaise(bool(available))

    async def op_policy_read(self) -> object:
        return await PolicyRead()

    async def op_stats(self) -> object:
        stats = await TaskStats()
        return (
            stats.slots, stats.endpoints, stats.sent, stats.sent_size, stats.received,
            stats.received_size, stats.timeouts, stats.refused_identity, stats.refused_caps,
            stats.refused_oversize, stats.refused_links, stats.vmo_size, stats.refused_size,
            stats.refused_align,
        )  # fmt: skip

    def _needed(self, slot: Slot) -> bool:
        return slot == self.boot.endpoint or slot in self.ways.values()


async def child(boot: BootImage) -> int:
    """Do commands until told to exit; ways to the others come first, as they are made."""
    actor = Actor(boot)
    actor.hidden.add(control(boot))
    commands: LinkId | None = None
    while True:
        deadline = Nanos(await Now() + PATIENCE)
        command = await Recv((boot.endpoint,), deadline, link=commands)
        if commands is None:
            commands = command.link
        verb, _, rest = command.data.decode().partition(" ")
        if verb == "exit":
            return int(rest)
        if verb == "way":
            assert command.cap is not None
            if int(rest) in actor.ways:
                await CapClose(actor.ways[int(rest)])
            actor.ways[int(rest)] = command.cap
            answer = f"way {command.cap}"
        else:
            answer = await actor.do(decoded(rest))
        data = answer.encode()
        if len(data) > COMMAND_SIZE_MAX:
            data = b"%d:%08x" % (len(data), zlib.crc32(data))
        await Send(control(boot), data)


class Conductor:
    """Root's side: the children, their ways, and what is done by whom."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.actor = Actor(boot)
        self.children: dict[int, Spawned] = {}

    async def begin(self) -> str:
        """Make both children and every way."""
        own = await LinkCreate(self.boot.endpoint, WAY_TERMS)
        self.actor.ways[0] = own.slot
        self.actor.number(own.link)
        return " ".join([await self.spawn(1), await self.spawn(2)])

    async def spawn(self, number: int) -> str:
        """Start a child and make the ways to and from it."""
        boot, actor = self.boot, self.actor
        spawned = await start(
            boot, f"child{number}", program=PROGRAM, delegations=DELEGATIONS, owner_size=200_000
        )
        self.children[number] = spawned
        actor.hidden.add(spawned.slot)
        actor.number(spawned.link)
        texts = [str(spawned.slot)]
        back = await LinkCreate(boot.endpoint, WAY_TERMS)
        actor.number(back.link)
        texts.append(await self.command(number, "way 0", move=back.slot))
        own = await LinkCreate(spawned.slot, WAY_TERMS)
        texts.append(await self.command(number, f"way {number}", move=own.slot))
        if number in actor.ways:
            await CapClose(actor.ways[number])
        actor.ways[number] = (await LinkCreate(spawned.slot, WAY_TERMS)).slot
        texts.append(str(actor.ways[number]))
        for other, sibling in self.children.items():
            if other != number:
                there = await LinkCreate(spawned.slot, WAY_TERMS)
                texts.append(await self.command(other, f"way {number}", move=there.slot))
                here = await LinkCreate(sibling.slot, WAY_TERMS)
                texts.append(await self.command(number, f"way {other}", move=here.slot))
        return ",".join(texts)

    async def command(self, number: int, text: str, *, move: Slot | None = None) -> str:
        """Have a child do something and return its answer."""
        spawned = self.children[number]
        deadline = Nanos(await Now() + PATIENCE)
        await Send(spawned.slot, text.encode(), move=move)
        answer = await Recv((self.boot.endpoint,), deadline, link=spawned.link)
        return answer.data.decode()

    async def respawn(self, number: int, *, kill: bool) -> str:
        """End a child and start it again."""
        spawned = self.children.pop(number)
        if kill:
            await Kill(spawned.pid)
        else:
            await Send(spawned.slot, b"exit 5")
        info = await Wait(spawned.pid, Nanos(await Now() + PATIENCE))
        self.actor.hidden.discard(spawned.slot)
        await CapClose(spawned.slot)
        return f"{info.code}.{info.signal} {await self.spawn(number)}"

    async def do(self, who: int, operation: Operation) -> str:
        """One operation by one task."""
        if operation[0] in {"exit", "kill"}:
            return await self.respawn(who, kill=operation[0] == "kill")
        if who == 0:
            return await self.actor.do(operation)
        return await self.command(who, f"do {encoded(operation)}")


def encoded(operation: Operation) -> str:
    """An operation as one line of text."""
    return " ".join(str(int(part)) if not isinstance(part, str) else part for part in operation)


def decoded(text: str) -> Operation:
    """The operation of a line."""
    name, *arguments = text.split()
    return (name, *(int(argument) for argument in arguments))


def conductor(reader: int, writer: int) -> Callable[[BootImage], Coroutine[Any, Any, None]]:
    """A root program that takes lines "WHO OPERATION" from a pipe and answers each with one.

    It waits in read(2) outside the kernel's sight: the system stands still between operations.
    """

    async def root(boot: BootImage) -> None:
        conducting = Conductor(boot)
        answer = await conducting.begin()
        with os.fdopen(reader, "r") as lines, os.fdopen(writer, "w", buffering=1) as answers:
            answers.write(answer + "\n")
            for line in lines:
                who, _, rest = line.strip().partition(" ")
                answers.write(await conducting.do(int(who), decoded(rest)) + "\n")
        for number in list(conducting.children):
            spawned = conducting.children[number]
            await Kill(spawned.pid)
            await Wait(spawned.pid, Nanos(await Now() + PATIENCE))

    return root
