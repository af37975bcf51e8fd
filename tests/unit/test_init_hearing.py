"""Silence is judged once all that came before a deadline was looked at, and not much later."""

from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final

import pytest

from nexus.abi import INIT_NAME, BootImage, Event, EventKind, Nanos, Now, SleepUntil
from nexus.bootctl.handover import SlotBoot
from nexus.init.hearing import Hearing
from nexus.init.memory import Memory, decode_memory, encode_memory
from nexus.init.reasons import Reason
from nexus.init.record import Record
from nexus.init.supervisor import DRAIN_MAX, Supervisor
from nexus.kernel.sim import SimKernel
from nexus.protocols.init import GetService
from nexus.protocols.meta import Health as Probe
from nexus.protocols.meta import Healthy
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.protocols.updated import Committed
from nexus.runtime import Server, serve
from nexus.wire import encode
from tests.fakes.initrig import (
    DRIVER,
    MS,
    SECOND,
    SYSTEM,
    Boot,
    Driver,
    Main,
    Nothing,
    Run,
    Script,
    boot,
    healthy,
    idle,
    play,
    status,
)

__all__ = ["boot"]  # the fixture

QUEUED: Final = 3
WATCHED: Final = 'health = { deadline = "200ms", every = "50ms", answer = "40ms" }'
WORDS: Final = 600


def test_nothing_at_a_deadline_is_silence_up_to_it() -> None:
    hearing = Hearing(Nanos(10), QUEUED)

    hearing.on_nothing(Nanos(20))

    assert hearing.until == 20


def test_a_message_tells_nothing_of_those_that_wait_behind_it() -> None:
    hearing = Hearing(Nanos(10), QUEUED)

    for now in (30, 31, 32):
        hearing.on_taken(Nanos(now))

    assert hearing.until == 10


def test_more_than_can_have_waited_is_everything_that_came_before_the_first() -> None:
    hearing = Hearing(Nanos(10), QUEUED)

    for now in (30, 31, 32, 33):
        hearing.on_taken(Nanos(now))
    assert hearing.until == 30

    for now in (40, 41, 42):
        hearing.on_taken(Nanos(now))
    assert hearing.until == 30
    hearing.on_taken(Nanos(43))
    assert hearing.until == 40


def test_a_deadline_long_past_takes_nothing_back() -> None:
    hearing = Hearing(Nanos(10), 0)
    hearing.on_taken(Nanos(30))

    hearing.on_nothing(Nanos(20))

    assert hearing.until == 30


def deaf_after(count: int) -> Main:
    async def main(boot: BootImage) -> int:
        def script(request: Any, nth: int) -> bytes | None:
            if not isinstance(request, Probe):
                return status(boot)
            return healthy(boot) if nth <= count or boot.generation > 1 else None

        return await play(boot, script)

    return main


def test_a_queue_that_is_never_seen_empty_keeps_no_silent_one_alive(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word of the driver finds init with more to take, as under a flood."""
    monkeypatch.setattr(Hearing, "on_nothing", lambda _self, _deadline: None)
    text = SYSTEM + DRIVER + 'health = { every = "0s" }\n'
    text += f'\n[service.a]\nprogram = "a"\n{WATCHED}\n'

    async def driver(driver: Driver) -> None:
        for _ in range(WORDS):
            _ = await driver.record("timed")
            await driver.pause(MS)

    run = boot(driver, text=text, mains={"a": deaf_after(1)})

    assert run.evidence("init: end of a")["reason"] == "hang"
    due = run.time("init: health a ok") + 90 * MS  # 50 until it is asked, 40 for an answer
    assert due < run.time("init: end of a") < due + 2 * DRAIN_MAX * len(run.plan.services) * 2 * MS


# ---------------------------------------------------------------- what each rule judges by

NAMES: Final = ("a", "b", "c")  # what one of them says is looked at before the others
ONCE: Final = dict.fromkeys(NAMES, 1)
QUIET: Final = SYSTEM + DRIVER + 'health = { every = "0s" }\n'  # it does not serve its endpoint
THINKS: Final = 20 * MS
HELD: Final = 700 * MS  # longer than any service here may take


def services(*rest: str, names: tuple[str, ...] = NAMES) -> str:
    lines = "\n".join(('restart = { backoff = "20ms", backoff_max = "20ms" }', *rest))
    return "".join(f'\n[service.{name}]\nprogram = "{name}"\n{lines}\n' for name in names)


def freeze(kernel: SimKernel) -> None:
    assert kernel.freeze(INIT_NAME, Nanos(kernel.now + HELD))


def held_up(boot: Boot, since: Callable[[Run], int], **kinds: Any) -> Run:
    """The same system twice: as it is, and with init stopped at a time of the first run."""
    first = boot(**kinds)
    begin = since(first) - first.events[0].time
    return boot(**kinds, at=[(begin, freeze)])


def well(boot: BootImage) -> Script:
    return lambda request, _nth: healthy(boot) if isinstance(request, Probe) else status(boot)


async def thinking(boot: BootImage) -> int:
    return await play(boot, well(boot), thinks=THINKS)


async def starting(boot: BootImage) -> int:
    _ = await SleepUntil(Nanos(await Now() + THINKS))
    return await play(boot, well(boot))


async def waiting(driver: Driver) -> None:
    await driver.pause(2 * SECOND)


def instances(run: Run) -> dict[str, int]:
    return {name: len(run.spawns(name)) for name in NAMES}


def test_an_echo_that_was_given_in_time_counts(boot: Boot) -> None:
    run = held_up(
        boot,
        lambda run: run.spawns("c")[0].time + 5 * MS,
        driver=waiting,
        text=QUIET + services('health = { deadline = "300ms", every = "0s" }'),
        mains=dict.fromkeys(NAMES, starting),
    )

    assert instances(run) == ONCE


def test_who_was_well_in_time_is_not_late(boot: Boot) -> None:
    run = held_up(
        boot,
        lambda run: run.time("init: up c") + MS,
        driver=waiting,
        text=QUIET + services('health = { deadline = "300ms", every = "50ms" }'),
        mains=dict.fromkeys(NAMES, thinking),
    )

    assert [line for line in run.lines("init: health ") if line.endswith(" late")] == []
    assert instances(run) == ONCE


def test_who_ended_in_time_was_not_killed(boot: Boot) -> None:
    run = held_up(
        boot,
        lambda run: next(event.time for event in run.events if is_end_of_driver(event)) + 5 * MS,
        text=QUIET + services('health = { every = "0s" }', 'stop = "100ms"'),
        mains=dict.fromkeys(NAMES, thinking),
    )

    assert [run.init.records[name].reason for name in NAMES] == [Reason.EXIT] * len(NAMES)
    assert run.ended.code == 0


def is_end_of_driver(event: Event) -> bool:
    return event.kind is EventKind.EXIT and event.fields["name"] == "driver"


def test_a_wrong_answer_in_time_is_no_hang(boot: Boot) -> None:
    async def main(boot: BootImage) -> int:
        another = encode(Healthy(boot.generation, sha256(b"another").hexdigest(), 0, 0, 0, ""))

        def script(request: Any, nth: int) -> bytes | int | None:
            is_wrong = isinstance(request, Probe) and nth == 2 and boot.generation == 1
            return another if is_wrong else well(boot)(request, nth)

        return await play(boot, script, thinks=THINKS)

    run = held_up(
        boot,
        lambda run: run.time("init: health c ok") + 60 * MS,
        driver=waiting,
        text=QUIET + services('health = { deadline = "200ms", every = "50ms", answer = "40ms" }'),
        mains=dict.fromkeys(NAMES, main),
    )

    assert {run.evidence(f"init: end of {name}")["reason"] for name in NAMES} == {"not ready"}


def test_a_probe_that_found_no_room_is_tried_again_after_init_was_held_up(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """a's queue is full, as far as init can tell, for 10 ms; in these init is held up."""
    full = (0, 0)
    ask = Supervisor.ask

    async def asked(
        self: Supervisor, record: Record, request: Any, *rest: Any, **kinds: Any
    ) -> Any:
        if record.name == "a" and isinstance(request, Probe) and full[0] <= self.now < full[1]:
            return False
        return await ask(self, record, request, *rest, **kinds)

    monkeypatch.setattr(Supervisor, "ask", asked)
    kinds: dict[str, Any] = {
        "driver": waiting,
        "text": QUIET + services(WATCHED),
        "mains": dict.fromkeys(NAMES, starting),
    }
    first = boot(**kinds)
    due = first.time("init: health a ok") + 50 * MS
    full = (due, due + 10 * MS)

    run = boot(**kinds, at=[(due + 5 * MS - first.events[0].time, freeze)])

    assert instances(run) == ONCE


SETTLING: Final = SYSTEM.replace('name = "test"', 'name = "test"\ntrial_settle = "300ms"') + DRIVER
TRIAL: Final = SlotBoot(
    slot="b",
    version=7,
    name="1.7.0",
    digest="ab" * 32,
    trial=True,
    attempt=1,
    deadline=20 * SECOND,
)


class Updater:
    """updated, as far as init asks it."""

    def handle(self, _call: Any, request: Any) -> Committed:
        return Committed(request.nonce, request.slot, TRIAL.version, 12, False)


async def updated(boot: BootImage) -> int:
    return await serve(Updater(), UPDATED, boot)


def ends_at(*times: int) -> Main:
    """A service whose first instances end as they should not, at these times."""

    async def main(boot: BootImage) -> int:
        server = Server(Nothing(), TESTSVC, boot)
        if boot.generation > len(times):
            return await server.run()
        end = Nanos(times[boot.generation - 1])
        while await Now() < end:
            _ = await server.step(end)
        return 3

    return main


async def asking(driver: Driver) -> None:
    """Has something queued for init most of the time."""
    until = await driver.ahead(2 * SECOND)
    while await Now() < until:
        _ = await driver.ask(GetService("timed"), wait=2 * SECOND)
        _ = await driver.server.step(await driver.ahead(10 * MS))


def test_a_trial_does_not_fail_for_who_was_well_in_time(boot: Boot) -> None:
    text = SETTLING + services('health = { deadline = "300ms", every = "50ms" }')
    text += services('health = { every = "0s" }', names=("updated",))

    run = held_up(
        boot,
        lambda run: run.time("init: up c") + MS,
        driver=asking,
        text=text,
        mains={"updated": updated, **dict.fromkeys(NAMES, thinking)},
        slot_boot=TRIAL,
        ready=False,
        memory=b"",
    )

    assert run.lines("init: slot failed") == []
    assert "init: health ok (slot b)" in run.lines()


def test_an_end_before_a_trial_has_settled_is_seen_before_the_trial_is_judged(boot: Boot) -> None:
    text = SETTLING + services('health = { every = "0s" }', names=("a", "updated"))
    kinds: dict[str, Any] = {
        "driver": asking,
        "text": text,
        "slot_boot": TRIAL,
        "ready": False,
        "memory": b"",
    }
    committed = "init: health ok (slot b)"
    first = boot(**kinds, mains={"updated": updated, "a": idle})
    due = first.time(committed)

    run = boot(
        **kinds,
        mains={"updated": updated, "a": ends_at(due - 20 * MS)},
        at=[(due - 60 * MS - first.events[0].time, freeze)],
    )

    assert run.time(committed) - run.time("init: health a ok") > 300 * MS
    assert run.time("init: restart a") < run.time(committed)


def test_an_end_before_a_boot_is_stable_is_seen_before_it_is(boot: Boot) -> None:
    """The group of a may not end again: the boot counts as unstable, after the one before it."""
    text = (SYSTEM + DRIVER).replace('name = "test"', 'name = "test"\nstable = "500ms"')
    text += '\n[group.g]\nrestarts = 1\nwithin = "10s"\nexceeded = "give-up"\n'
    text += services('health = { every = "0s" }', 'group = "g"', names=("a",))
    kinds: dict[str, Any] = {
        "driver": asking,
        "text": text,
        "ready": False,
        "memory": encode_memory(Memory(boots=7, unstable=1, why="", ends=[])),
    }
    first = boot(**kinds, mains={"a": idle})
    stable = first.events[0].time + 500 * MS

    run = boot(
        **kinds,
        mains={"a": ends_at(stable - 200 * MS, stable - 20 * MS)},
        at=[(stable - 60 * MS - first.events[0].time, freeze)],
    )

    assert decode_memory(first.memory).unstable == 0
    assert decode_memory(run.memory).unstable == 2
