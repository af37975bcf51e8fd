"""The steps that cases are written in: small coroutines over single traps."""

from typing import Any, Final

from nexus.abi import (
    NO_WAIT,
    AbiError,
    BootImage,
    ExitInfo,
    LinkId,
    Message,
    Nanos,
    Now,
    PeerGone,
    Recv,
    Send,
    Slot,
    Spawn,
    Spawned,
    SpawnSpec,
    Status,
    TaskCounters,
    TaskStats,
    Trap,
    Wait,
)

PATIENCE: Final = Nanos(20_000_000_000)  # a wait that a correct kernel ends long before
MS: Final = 1_000_000  # nanoseconds
PAST: Final = Nanos(1)  # a deadline that has passed, and is not NO_WAIT


async def soon() -> Nanos:
    """A deadline that is only reached when something is wrong."""
    return Nanos(await Now() + PATIENCE)


async def refused(trap: Trap[Any], status: Status) -> AbiError:
    """Await a trap that must be refused with exactly `status`; PeerGone does not count."""
    name = type(trap).__name__
    try:
        result = await trap
    except PeerGone as error:
        raise AssertionError(f"{name} raised {error!r}, expected {status.name}") from error
    except AbiError as error:
        assert error.status is status, f"{name} refused with {error}, expected {status.name}"
        return error
    raise AssertionError(f"{name} gave {result!r}, expected {status.name}")


async def gone(source: Slot, link: LinkId | None, *, only: bool = False) -> LinkId:
    """Receive the PeerGone of `link` (of any link if None); `only` asks for that link alone."""
    try:
        message = await Recv((source,), await soon(), link=link if only else None)
    except PeerGone as error:
        assert error.status is Status.NO_SUCH_ENDPOINT
        assert link is None or error.link == link, f"PeerGone of {error.link}, expected {link}"
        return error.link
    raise AssertionError(f"received {message!r}, expected PeerGone of {link}")


async def take(source: Slot, *, link: LinkId | None = None) -> Message:
    """The next message of an endpoint, or of one link of it."""
    return await Recv((source,), await soon(), link=link)


async def nothing_queued(source: Slot) -> None:
    """Assert that an endpoint has neither a message nor a PeerGone to give."""
    await refused(Recv((source,), NO_WAIT), Status.QUEUE_EMPTY)


def control(boot: BootImage) -> Slot:
    """The link to the spawner, which every task but root has."""
    assert boot.control is not None, "only root has no control link"
    return boot.control


async def tell(boot: BootImage, data: bytes, *, move: Slot | None = None) -> None:
    """Send to the spawner, waiting for room."""
    await Send(control(boot), data, move=move, deadline=await soon())


async def start(boot: BootImage, name: str, **values: Any) -> Spawned:
    """Spawn the program of the same name, or `program=`, controlled over root's endpoint."""
    values.setdefault("program", name)
    return await Spawn(SpawnSpec(name=name, control=boot.endpoint, **values))


async def ended(child: Spawned) -> ExitInfo:
    """Wait for the end of a task."""
    return await Wait(child.pid, await soon())


async def ended_well(child: Spawned) -> None:
    """Wait for the end of a task that must return 0."""
    exit_info = await ended(child)
    assert (exit_info.code, exit_info.signal) == (0, 0), f"the child ended with {exit_info}"


async def fill(slot: Slot, data: bytes = b"x") -> tuple[int, Status]:
    """Send the same message until it is refused: how many went, and the refusal."""
    count = 0
    while True:
        try:
            await Send(slot, data)
        except AbiError as error:
            return count, error.status
        count += 1


async def holdings() -> TaskCounters:
    """The caller's account without what only ever grows."""
    stats = await TaskStats()
    return stats._replace(
        sent=0,
        sent_size=0,
        received=0,
        received_size=0,
        timeouts=0,
        refused_size=0,
        refused_align=0,
    )
