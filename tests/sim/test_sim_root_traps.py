"""What the simulated kernel adds to the root task's traps: the host's side, faults, and the log."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nexus.abi import (
    INIT_NAME,
    NEVER,
    NO_WAIT,
    AbiError,
    BootImage,
    BootMemoryRead,
    BootMemoryReplace,
    Event,
    EventKind,
    Grants,
    Isolation,
    Nanos,
    Notify,
    Now,
    PolicyRaise,
    PolicyRead,
    Program,
    Recv,
    Signal,
    SleepUntil,
    Spawn,
    SpawnSpec,
    Status,
    Trap,
    Wait,
)
from nexus.kernel.sim import Faults, NthFailure, Plan, SimKernel

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
MS = 1_000_000


def made(main: Main, **options: Any) -> tuple[SimKernel, Callable[[], None]]:
    """A kernel, and what runs it to its end."""
    programs = {"root": Program(name="root", main=main, digest="r")}
    options.setdefault("recorder", lambda _event: None)
    kernel = SimKernel(programs, seed=options.pop("seed", 1), **options)

    def run() -> None:
        end = kernel.run(programs["root"], b"", until=Nanos(kernel.now + 60_000 * MS))
        assert kernel.crashes == []
        assert end.code == 0
        assert set(kernel.resources().values()) == {0}

    return kernel, run


def test_the_host_acts_at_exactly_the_virtual_time_it_declared() -> None:
    told: list[tuple[bytes, int]] = []

    async def main(boot: BootImage) -> None:
        for _ in range(2):
            message = await Recv((boot.endpoint,), NEVER)
            told.append((message.data, message.now))

    kernel, run = made(main)
    start = kernel.now
    kernel.at(Nanos(start + 7 * MS), lambda: kernel.signal(Signal.HUP))
    kernel.at(Nanos(start + 3 * MS), lambda: kernel.signal(Signal.INT))
    run()

    assert [data for data, _ in told] == [b"SIGINT", b"SIGHUP"]
    assert [time - start for _, time in told] == [3 * MS, 7 * MS]


def test_host_actions_of_one_time_are_done_in_the_order_they_were_declared() -> None:
    done: list[int] = []

    async def main(boot: BootImage) -> None:
        await SleepUntil(Nanos(boot.now + 2 * MS))

    kernel, run = made(main)
    for number in range(5):
        kernel.at(Nanos(kernel.now + MS), lambda number=number: done.append(number))  # type: ignore[misc]
    run()

    assert done == [0, 1, 2, 3, 4]


def test_host_actions_wait_for_the_end_of_the_self_tests() -> None:
    seen: list[bytes] = []

    async def main(boot: BootImage) -> None:
        seen.append((await Recv((boot.endpoint,), NEVER)).data)

    kernel, run = made(main, selftest=True)
    kernel.at(Nanos(kernel.now + 1), lambda: kernel.signal(Signal.TERM))
    run()

    assert seen == [b"SIGTERM"]
    failed = [event for event in kernel.log if "FAIL" in str(event.fields.get("line"))]
    assert failed == []


def test_a_signal_before_the_run_is_a_mistake_of_the_host() -> None:
    async def main(boot: BootImage) -> None:
        return None

    kernel, _ = made(main)

    with pytest.raises(AssertionError, match="use at"):
        kernel.signal(Signal.TERM)


def test_a_signal_that_nobody_receives_costs_nothing_in_the_end() -> None:
    async def main(boot: BootImage) -> None:
        used, audited = kernel.heap_audit()
        for signal in Signal:
            kernel.signal(signal)
            kernel.signal(signal)
        after, audited_after = kernel.heap_audit()
        assert used == audited
        assert after == audited_after > used

    kernel, run = made(main)
    run()


def test_one_seed_and_the_same_host_actions_give_one_log() -> None:
    async def main(boot: BootImage) -> None:
        end = boot.now + 20 * MS
        while await Now() < end:
            try:
                await Recv((boot.endpoint,), Nanos(await Now() + MS))
            except AbiError:
                await PolicyRaise(True)
        await BootMemoryReplace(b"twelve bytes")
        await Notify("READY=1")

    def lines(at: int, seed: int = 5) -> list[str]:
        kernel, run = made(main, seed=seed, trace=True)
        kernel.at(Nanos(kernel.now + at), lambda: kernel.signal(Signal.HUP))
        run()
        return list(kernel.log_lines())

    first = lines(4 * MS)
    assert first == lines(4 * MS)
    assert first != lines(5 * MS)
    assert first != lines(4 * MS, seed=6)
    text = "\n".join(first)
    for word in (" signal ", " policy ", " boot-memory 12", " notice 7", " sent link0 6B"):
        assert word in text, word


def test_what_was_stored_is_there_in_the_next_boot_and_what_was_said_is_kept() -> None:
    async def first_main(boot: BootImage) -> None:
        assert await BootMemoryRead() == b"from before"
        await BootMemoryReplace(b"from the first")
        await Notify("READY=1")
        await Notify("")
        await Notify("STATUS=fine")

    async def second_main(boot: BootImage) -> None:
        assert await BootMemoryRead() == b"from the first"

    first, run = made(first_main, boot_memory=b"from before")
    run()
    second, run_again = made(second_main, boot_memory=first.boot_memory)
    run_again()

    assert first.notices == ["READY=1", "STATUS=fine"]
    assert second.boot_memory == b"from the first"


def test_a_planned_failure_of_the_store_keeps_what_was_stored() -> None:
    async def main(boot: BootImage) -> None:
        await BootMemoryReplace(b"first")
        with pytest.raises(AbiError) as refusal:
            await BootMemoryReplace(b"second")
        assert refusal.value.status is Status.NO_SPACE
        assert await BootMemoryRead() == b"first"

    failure = NthFailure(trap=BootMemoryReplace, nth=2, status=Status.NO_SPACE, task=INIT_NAME)
    faults = Faults(Plan(nth=(failure,)))
    kernel, run = made(main, faults=faults)
    run()

    assert kernel.boot_memory == b"first"
    assert faults.counts()["nth"][1] == 1


def test_a_new_boot_begins_the_policy_page_anew() -> None:
    words: list[int] = []

    async def main(boot: BootImage) -> None:
        words.append((await PolicyRead()).generation)
        await PolicyRaise(True)

    for _ in range(2):
        _, run = made(main)
        run()

    assert words == [0, 0]


def test_grants_are_taken_note_of_and_an_ordinary_program_runs_its_double() -> None:
    events: list[Event] = []
    grants = Grants(isolation=Isolation.EXEC, threads=2, connect=(443,), streams=True)

    async def double(boot: BootImage) -> None:
        assert boot.descriptors == ()

    async def main(boot: BootImage) -> None:
        child = await Spawn(SpawnSpec("child", "child", boot.endpoint, grants=grants))
        assert (await Wait(child.pid, NEVER)).code == 0

    program = Program(
        name="child", main=double, digest="c", entry="a.real:program", path=("x",), ordinary=True
    )
    kernel, run = made(main, recorder=events.append)
    kernel.programs = {**kernel.programs, "child": program}
    run()

    (spawned,) = [e for e in events if e.kind is EventKind.SPAWN and e.fields["name"] == "child"]
    told = spawned.fields["grants"]
    assert isinstance(told, dict)
    assert (told["isolation"], told["threads"], told["connect"]) == ("exec", 2, [443])


def test_a_pending_signal_does_not_end_a_receive_that_looks_elsewhere() -> None:
    async def main(boot: BootImage) -> None:
        kernel.signal(Signal.TERM)
        with pytest.raises(AbiError) as refusal:
            await Recv((boot.endpoint,), NO_WAIT, size_max=2)
        assert refusal.value.status is Status.INVALID_ARGUMENT
        assert (await Recv((boot.endpoint,), NO_WAIT)).data == b"SIGTERM"

    kernel, run = made(main)
    run()
