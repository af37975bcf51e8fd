"""Messages no driver would send: the receiver drops them, counts them, and goes on."""

import ast
import errno
import fcntl
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    LINK_SIZE_MAX,
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    SLOTS_MAX,
    BootImage,
    CapClone,
    CapClose,
    CapKind,
    EndpointCreate,
    EventKind,
    LinkCreate,
    LinkTerms,
    Recv,
    Send,
    Status,
    TaskCounters,
    TaskStats,
)
from nexus.kernel.linux import harden
from nexus.kernel.linux.driver import Driver
from nexus.kernel.linux.frames import (
    FRAME_ATTACH,
    FRAME_DETACH,
    TRAILER_SIZE,
    Trailer,
    pack_attach,
    pack_trailer,
)
from nexus.testing.conformance.steps import ended_well, gone, refused, start, take
from nexus.testing.rig import Rig, Run, linux_rig
from tests.attack.hostile import driver, errno_of, socket_of, with_descriptors

pytestmark = pytest.mark.linux

WIDE: Final = LinkTerms(16, LINK_SIZE_MAX, 2)
SO_SNDBUF: Final = socket.SO_SNDBUF

Attack = Callable[[socket.socket], Any]


def _descriptor_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _attacked(
    rig: Rig, attack: Attack, *, terms: LinkTerms = WIDE
) -> tuple[Run, TaskCounters, TaskCounters, Any]:
    """Let a service attack root over a raw link; check that root's state did not change.

    Returns the run, root's counters before and after, and what the attack returned.
    """

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        outcome = attack(socket_of(given.cap))
        assert boot.control is not None
        await Send(boot.control, repr(outcome).encode())
        await take(boot.endpoint)
        # An honest message afterwards arrives as ever.
        socket_of(given.cap).send(b"honest")

    async def root(boot: BootImage) -> Any:
        target = await EndpointCreate()
        bystander = await LinkCreate(target)
        spawned = await start(boot, "hostile")
        link = await LinkCreate(target, terms)
        await Send(spawned.slot, b"attack over this", move=link.slot)
        outcome = (await take(boot.endpoint)).data.decode()
        descriptors = _descriptor_count()
        before = await TaskStats()

        for _ in range(3):
            await refused(Recv((target,), NO_WAIT), Status.QUEUE_EMPTY)
        await Send(bystander.slot, b"still served")
        assert (await take(target)).data == b"still served"

        after = await TaskStats()
        assert _descriptor_count() <= descriptors, "what came attached was closed"
        await Send(spawned.slot, b"be honest")
        message = await take(target)
        assert (message.data, message.link, message.cap) == (b"honest", link.link, None)
        await gone(target, link.link)
        await ended_well(spawned)
        return before, after, outcome

    run = rig.observe(root, programs={"hostile": hostile})
    before, after, outcome = run.result
    kept = {
        field: (getattr(before, field), getattr(after, field))
        for field in ("slots", "endpoints", "links", "reserved_size", "budget_used", "vmo_size")
    }
    assert all(old == new for old, new in kept.values()), kept
    return run, before, after, ast.literal_eval(outcome)


def _reasons(run: Run) -> list[str]:
    return [str(fields["reason"]) for fields in run.fields(EventKind.REFUSED)]


def test_an_oversize_frame_is_dropped_and_counted(linux: Rig) -> None:
    def attack(sock: socket.socket) -> int:
        return errno_of(lambda: sock.send(bytes(MESSAGE_SIZE_MAX + 1)))

    run, before, after, outcome = _attacked(linux, attack)

    assert outcome == 0, "Linux carried it"
    assert after.refused_oversize == before.refused_oversize + 1
    assert after.received == before.received + 1, "the bystander's message alone"
    assert _reasons(run) == ["oversize"]


def test_a_frame_beyond_the_receive_buffer_is_dropped_and_counted(linux: Rig) -> None:
    def attack(sock: socket.socket) -> int:
        return errno_of(lambda: sock.send(bytes(12_000)))

    run, before, after, outcome = _attacked(linux, attack)

    assert outcome == 0
    assert after.refused_oversize == before.refused_oversize + 1
    assert _reasons(run) == ["oversize"]


def test_an_empty_frame_is_dropped_and_is_no_end(linux: Rig) -> None:
    def attack(sock: socket.socket) -> int:
        return errno_of(lambda: sock.send(b""))

    run, before, after, outcome = _attacked(linux, attack)

    assert outcome == 0
    assert after.refused_oversize == before.refused_oversize + 1
    assert _reasons(run) == ["oversize"]


def test_a_frame_beyond_the_wall_is_refused_by_linux(linux: Rig) -> None:
    def attack(sock: socket.socket) -> tuple[int, int]:
        wall = sock.getsockopt(socket.SOL_SOCKET, SO_SNDBUF)
        return wall, errno_of(lambda: sock.send(bytes(wall), socket.MSG_DONTWAIT))

    _, before, after, (wall, error) = _attacked(linux, attack, terms=LinkTerms(2, 4096, 0))

    assert error == errno.EMSGSIZE
    assert wall < 2 * 4096 + 1280 * 4 + 2 * TRAILER_SIZE * 2 + 64
    assert after.refused_oversize == before.refused_oversize


@pytest.mark.parametrize("count", [2, 3, 20])
def test_several_descriptors_in_one_message_are_closed_and_counted(linux: Rig, count: int) -> None:
    def attack(sock: socket.socket) -> int:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with left, right:
            return with_descriptors(sock, b"gifts", [left.fileno()] * count)

    run, before, after, outcome = _attacked(linux, attack)

    assert outcome == 0
    assert after.refused_caps == before.refused_caps + 1
    assert _reasons(run) == ["several_caps"]


def _gift(make: Callable[[], list[int]]) -> Attack:
    def attack(sock: socket.socket) -> int:
        descriptors = make()
        trailer = pack_trailer(Trailer(CapKind.LINK, LinkTerms(1, 1, 0)))
        error = with_descriptors(sock, b"gift" + trailer, descriptors[:1])
        for descriptor in descriptors:
            os.close(descriptor)
        return error

    return attack


def _unsealed() -> list[int]:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    return [descriptor]


def _huge() -> list[int]:
    descriptor = os.memfd_create("huge", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1 << 30)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return [descriptor]


_KEPT: list[Any] = []


@pytest.mark.parametrize("make", [_unsealed, _huge], ids=["unsealed memory", "a huge memory"])
def test_a_descriptor_that_is_no_capability_is_closed_and_counted(
    linux: Rig, make: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The receiver looks at the length itself, though Linux refuses a service such an object.
    monkeypatch.setattr(harden.Hardening, "_memory", lambda _self: None)

    run, before, after, outcome = _attacked(linux, _gift(make))

    assert outcome == 0
    assert after.refused_caps == before.refused_caps + 1
    assert _reasons(run) == ["several_caps"]


def test_a_descriptor_without_a_trailer_is_closed_and_counted(linux: Rig) -> None:
    def attack(sock: socket.socket) -> int:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with left, right:
            return with_descriptors(sock, b"x", [left.fileno()])

    run, before, after, outcome = _attacked(linux, attack)

    assert outcome == 0
    assert after.refused_caps == before.refused_caps + 1
    assert _reasons(run) == ["several_caps"]


@pytest.mark.parametrize(
    "frame",
    [b"\xf0", b"\xf0" + bytes(8), b"\xf1", b"\xf1\xf1", b"\xf3", b"\xfe" * 100, b"\xff" * 8240],
    ids=["attach", "attach terms", "detach", "detaches", "unknown", "long", "largest"],
)
def test_kernel_frames_sent_raw_change_nothing(linux: Rig, frame: bytes) -> None:
    def attack(sock: socket.socket) -> int:
        return errno_of(lambda: sock.send(frame))

    run, before, after, outcome = _attacked(linux, attack)

    assert outcome == 0
    assert after.refused_links == before.refused_links + 1
    assert after.received == before.received + 1
    assert _reasons(run) == ["excess_link"]


def _attach(terms: LinkTerms, *, count: int = 1) -> Attack:
    """Attach links of one's own making to the owner's endpoint; see which stay open."""

    def attack(sock: socket.socket) -> int:
        error = 0
        for _ in range(count):
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            error = error or with_descriptors(sock, pack_attach(terms), [far.fileno()])
            far.close()
            _KEPT.append(near)
        return error

    return attack


@pytest.mark.parametrize(
    ("held", "asked", "count"),
    [
        (LinkTerms(16, 4096, 0), LinkTerms(1, 1, 0), 1),
        (LinkTerms(16, 4096, 0), LinkTerms(1, 1, 0), 5),
        (LinkTerms(16, 4096, 2), LinkTerms(17, 1, 0), 1),
        (LinkTerms(16, 4096, 2), LinkTerms(1, 4097, 0), 1),
        (LinkTerms(16, 4096, 2), LinkTerms(1, 1, 1), 1),
    ],
    ids=["no delegation", "five times", "too deep", "too large", "delegations of its own"],
)
def test_attaching_beyond_the_delegations_is_refused_and_counted(
    linux: Rig, held: LinkTerms, asked: LinkTerms, count: int
) -> None:
    run, before, after, outcome = _attacked(linux, _attach(asked, count=count), terms=held)

    assert outcome == 0
    assert after.refused_links == before.refused_links + count
    assert _reasons(run) == ["excess_link"] * count


def test_attaching_within_the_delegations_works_and_the_next_is_refused(linux: Rig) -> None:
    """The control experiment: the same raw frame is a link as long as it is within its rights."""

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        sock = socket_of(given.cap)
        assert _attach(LinkTerms(1, 1, 0), count=3)(sock) == 0
        for near in _KEPT[-3:]:
            near.send(b"x")
        assert boot.control is not None
        await Send(boot.control, b"attached")
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        target = await EndpointCreate()
        spawned = await start(boot, "hostile")
        link = await LinkCreate(target, LinkTerms(16, 4096, 2))
        await Send(spawned.slot, b"attack over this", move=link.slot)
        await take(boot.endpoint)
        messages = [await take(target), await take(target)]
        await refused(Recv((target,), NO_WAIT), Status.QUEUE_EMPTY)
        stats = await TaskStats()
        await Send(spawned.slot, b"end")
        await ended_well(spawned)
        return len({message.link for message in messages}), stats.refused_links

    assert linux.run(root, programs={"hostile": hostile}) == (2, 1)


def test_a_full_table_keeps_a_raw_capability_queued(linux: Rig) -> None:
    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        trailer = pack_trailer(Trailer(CapKind.LINK, LinkTerms(1, 1, 0)))
        sock = socket_of(given.cap)
        for _ in range(3):
            assert with_descriptors(sock, b"gift" + trailer, [left.fileno()]) == 0
        assert boot.control is not None
        await Send(boot.control, b"sent")
        await take(boot.endpoint)
        right.close()
        left.close()

    async def root(boot: BootImage) -> None:
        target = await EndpointCreate()
        spawned = await start(boot, "hostile")
        link = await LinkCreate(target, WIDE)
        await Send(spawned.slot, b"attack", move=link.slot)
        await take(boot.endpoint)
        filler = await LinkCreate(boot.endpoint)
        clones = []
        for _ in range(SLOTS_MAX - (await TaskStats()).slots):
            clones.append(await CapClone(filler.slot))  # noqa: PERF401
        descriptors = _descriptor_count()

        for _ in range(10):
            await refused(Recv((target,), NO_WAIT), Status.NO_SPACE)

        assert _descriptor_count() == descriptors, "looking installs no descriptor"
        stats = await TaskStats()
        assert stats.refused_caps == 0
        for clone in clones[:3]:
            await CapClose(clone)
        caps = [(await take(target)).cap for _ in range(3)]
        assert caps == clones[:3]
        assert _descriptor_count() == descriptors + 3
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

    linux.run(root, programs={"hostile": hostile})


def test_raw_frames_the_other_way_reach_no_task(linux: Rig) -> None:
    """An owner writes into the reverse direction of a link: its holder's driver drops that."""

    async def owner(boot: BootImage) -> None:
        await take(boot.endpoint)
        held: Any = driver().table.entries[boot.endpoint].object
        for far in held.links.values():
            for frame in (b"hello", bytes([FRAME_DETACH]), bytes([FRAME_ATTACH]), b"\xff"):
                errno_of(partial(far.sock.send, frame, socket.MSG_DONTWAIT))
        assert boot.control is not None
        await Send(boot.control, b"sent")
        await take(boot.endpoint)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "owner", delegations=1)
        await LinkCreate(spawned.slot, LinkTerms(1, 100, 0))
        before = await TaskStats()
        await Send(spawned.slot, b"go")
        await take(boot.endpoint)

        # A forged return of the delegation is the owner's own loss; it gives no second one.
        link = await LinkCreate(spawned.slot, LinkTerms(1, 100, 0))
        await refused(LinkCreate(spawned.slot, LinkTerms(1, 100, 0)), Status.NO_SPACE)
        await CapClose(link.slot)

        await refused(Recv((boot.endpoint,), NO_WAIT), Status.QUEUE_EMPTY)
        after = await TaskStats()
        assert after.slots == before.slots
        await Send(spawned.slot, b"end")
        await ended_well(spawned)

    linux.run(root, programs={"owner": owner})


def test_a_client_cannot_raise_the_wall_of_its_link(linux: Rig) -> None:
    def attack(sock: socket.socket) -> tuple[int, int, int, int]:
        before = sock.getsockopt(socket.SOL_SOCKET, SO_SNDBUF)
        error = errno_of(lambda: sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUF, 8 << 20))
        forced = errno_of(lambda: sock.setsockopt(socket.SOL_SOCKET, 32, 8 << 20))
        return before, error, forced, sock.getsockopt(socket.SOL_SOCKET, SO_SNDBUF)

    _, _, _, (before, error, forced, after) = _attacked(linux, attack)

    assert error == forced == errno.EPERM
    assert after == before


def test_without_the_filter_the_wall_can_be_raised() -> None:
    def attack(sock: socket.socket) -> tuple[int, int, int]:
        before = sock.getsockopt(socket.SOL_SOCKET, SO_SNDBUF)
        error = errno_of(lambda: sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUF, 60_000))
        return before, error, sock.getsockopt(socket.SOL_SOCKET, SO_SNDBUF)

    _, _, _, (before, error, after) = _attacked(linux_rig(harden=False), attack)

    assert error == 0
    assert after > before


def _own_near_end(sock: socket.socket) -> int:
    trailer = pack_trailer(Trailer(CapKind.LINK, WIDE))
    return with_descriptors(sock, b"answer over this" + trailer, [sock.fileno()])


def test_a_link_sent_over_itself_is_refused_and_its_holders_death_is_seen(linux: Rig) -> None:
    """Kept by its receiver, the copy would hide the death: `_attacked` waits for it."""
    run, before, after, outcome = _attacked(linux, _own_near_end)

    assert outcome == 0
    assert after.refused_caps == before.refused_caps + 1
    assert _reasons(run) == ["several_caps"]


def test_a_link_into_a_service_sent_over_itself_does_not_hide_a_death(linux: Rig) -> None:
    async def server(boot: BootImage) -> None:
        assert (await take(boot.endpoint)).data == b"in use"
        await gone(boot.endpoint, None)
        assert (await TaskStats()).refused_caps == 1

    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        await Send(given.cap, b"in use")
        assert _own_near_end(socket_of(given.cap)) == 0

    async def root(boot: BootImage) -> None:
        serving = await start(boot, "server", delegations=2)
        spawned = await start(boot, "hostile")
        link = await LinkCreate(serving.slot, LinkTerms(8, 4096, 1))
        await Send(spawned.slot, b"yours", move=link.slot)
        await ended_well(spawned)
        await ended_well(serving)

    linux.run(root, programs={"server": server, "hostile": hostile})


def test_an_unused_link_may_come_back_to_its_owner_and_a_used_one_is_derived(linux: Rig) -> None:
    async def root(boot: BootImage) -> None:
        target = await EndpointCreate()
        carrier = await LinkCreate(target)
        unused = await LinkCreate(target, LinkTerms(8, 4096, 1))
        derived = await LinkCreate(unused.slot, LinkTerms(1, 100, 0))
        await Send(carrier.slot, b"unused", move=derived.slot)
        assert (await take(target)).cap is not None
        await Send(unused.slot, b"used now")
        await take(target)
        await Send(carrier.slot, b"one more", move=(await LinkCreate(target)).slot)
        assert (await take(target)).cap is not None

    linux.run(root)


def test_copies_of_the_control_links_left_with_init_do_not_hide_a_death(linux: Rig) -> None:
    async def hostile(boot: BootImage) -> None:
        assert boot.control is not None
        sock = socket_of(boot.control)
        trailer = pack_trailer(Trailer(CapKind.LINK, WIDE))
        far = next(iter(driver().links.values())).sock.fileno()
        assert with_descriptors(sock, b"mine" + trailer, [sock.fileno()]) == 0
        assert with_descriptors(sock, b"yours" + trailer, [far]) == 0
        await Send(boot.control, b"last words")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hostile")
        await ended_well(spawned)
        kept = await take(boot.endpoint)
        assert (kept.data, kept.cap is not None) == (b"yours", True)
        assert (await take(boot.endpoint)).data == b"last words"
        await gone(boot.endpoint, None)
        await refused(Send(spawned.slot, b"anybody there"), Status.NO_SUCH_ENDPOINT)

    linux.run(root, programs={"hostile": hostile})


def test_without_the_check_init_hears_of_the_death_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Init's ends are shut down at the death, whatever copies of the others it holds."""
    monkeypatch.setattr(Driver, "_localise", lambda *_: None)

    async def hostile(boot: BootImage) -> None:
        assert boot.control is not None
        assert _own_near_end(socket_of(boot.control)) == 0

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hostile")
        assert (await take(boot.endpoint)).cap is not None, "init holds a copy"
        await gone(boot.endpoint, None)
        await ended_well(spawned)

    linux_rig().run(root, programs={"hostile": hostile})
