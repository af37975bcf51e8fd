"""A service of one's own: its start, its context, and what is said when it cannot be."""

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import pytest

from nexus.abi import INIT_NAME, BootImage, Nanos, Now, Send, SleepUntil
from nexus.ipc import Client, Exchange, Peers, Refused, RetryBudget, TimedOut
from nexus.protocols.meta import GetStatus, Health, Healthy, MetaStatus, Stop, Stopping
from nexus.runtime import Server, ServiceConfig
from nexus.runtime.program import (
    CONNECT_MAX,
    EXIT_SETTINGS,
    EXIT_UNREACHABLE,
    Context,
    OrdinaryContext,
    load,
    load_ordinary,
    program_of,
)
from nexus.wire import ReplyStatus
from tests.fakes.adder import Add, Adder, AdderStatus, Sum
from tests.fakes.own import PROTOCOL, DoublingAdder, Lazy
from tests.fakes.pair import FAR, SEED
from tests.fakes.policy import PolicySystem, policy_of
from tests.fakes.tinykernel import Task, TinyKernel

SECOND: Final = 1_000_000_000


class Around:
    """A service of one's own with an adder, a logd and an init that binds it."""

    def __init__(self, *, adder: bool = True) -> None:
        self.system = PolicySystem(policy_of({}), policyd=False)
        self.kernel = self.system.kernel
        self.peers = Peers(self.kernel.boot(self.kernel.task("prober")), SEED)
        if adder:
            self.start_adder()

    def start_adder(self) -> None:
        self.system.start("adder", lambda boot: Server(Adder(), PROTOCOL, boot).run())

    def start(
        self,
        main: Callable[[BootImage], Any],
        *,
        uses: tuple[str, ...] = ("adder", "logd"),
        posts: tuple[str, ...] = ("logd",),
        settings: dict[str, Any] | None = None,
    ) -> Task:
        config = ServiceConfig(
            uses=list(uses), posts=list(posts), settings=settings or {}, trace_seed=SEED
        )
        return self.system.start("own", main, config.encoded())

    def ask(self, *requests: Any, deadline: int = 5 * SECOND, name: str = "app") -> list[Any]:
        """The outcomes of requests to the service of one's own."""

        async def body(peers: Peers) -> list[Any]:
            until = Nanos(await Now() + deadline)
            budget = RetryBudget(attempts_max=3, backoff=Nanos(1_000_000), deadline=FAR)
            found = await peers.connect("own", PROTOCOL, budget)
            assert isinstance(found, Client), found
            return [await found.call(request, until) for request in requests]

        outcomes: list[Any] = self.system.client(body, name)
        return outcomes

    def added(self) -> list[str]:
        """The values of the lines that reached logd, behind the one about the start."""
        started, *lines = self.system.logd.records
        assert started.text == "started"
        return [field.value for line in lines for field in line.fields if field.key == "value"]

    def lines(self) -> list[str]:
        return [line for _, line, _ in self.kernel.console]


def test_it_is_started_and_serves_with_its_clients_and_settings() -> None:
    around = Around()
    around.start(program_of(DoublingAdder), settings={"offset": 5})

    assert around.ask(Add(1, 2)) == [Sum(11)]


def test_the_words_of_an_entry_make_the_same_program() -> None:
    around = Around()
    around.start(load("tests.fakes.own:DoublingAdder"))

    assert around.ask(Add(1, 2)) == [Sum(6)]


def test_the_protocol_of_the_system_file_may_be_given_beside_the_class() -> None:
    around = Around()
    around.start(load("tests.fakes.own:Lazy", "tests.fakes.own"))

    assert around.ask(Add(1, 2)) == [Sum(3)]


def test_it_is_not_ready_before_start_is_done() -> None:
    around = Around(adder=False)
    around.start(program_of(DoublingAdder))

    early = around.ask(Health(), deadline=SECOND // 100)
    around.start_adder()
    later = around.ask(Health(), Add(1, 1))

    assert isinstance(early[0], TimedOut), "start looks for the adder"
    assert isinstance(later[0], Healthy)
    assert later[1] == Sum(4)


def test_the_health_probe_of_a_starting_server_is_refused() -> None:
    around = Around()
    servers: list[Server] = []

    def run(boot: BootImage) -> Any:
        servers.append(Server(Adder(), PROTOCOL, boot))
        servers[0].starting = True
        return servers[0].run()

    around.system.start("own", run)
    starting = around.ask(Health())
    servers[0].starting = False
    ready = around.ask(Health())

    assert starting == [Refused(MetaStatus.NOT_READY)]
    assert isinstance(ready[0], Healthy)


def test_a_use_that_is_not_there_in_time_ends_it_with_a_sentence() -> None:
    around = Around(adder=False)

    task = around.start(program_of(DoublingAdder))
    code = around.kernel.run(task)

    assert code == EXIT_UNREACHABLE
    assert around.lines() == ["own: cannot reach adder: Closed"]
    assert around.kernel.now < 2 * CONNECT_MAX + SECOND


@pytest.mark.parametrize(("uses", "posts"), [((), ()), (("adder",), ("adder",))])
def test_a_use_that_is_not_declared_or_only_posted_to_is_no_client(
    uses: tuple[str, ...], posts: tuple[str, ...]
) -> None:
    around = Around()

    code = around.kernel.run(around.start(program_of(DoublingAdder), uses=uses, posts=posts))

    assert code == EXIT_UNREACHABLE
    (line,) = around.lines()
    assert line.startswith("own: may not call adder: its entry in the system file does not have it")


def test_an_unreachable_use_of_a_request_is_busy_inside_its_deadline() -> None:
    around = Around(adder=False)
    around.start(program_of(Lazy))
    around.ask(Health())
    begun = around.kernel.now

    (outcome,) = around.ask(Add(1, 2), deadline=SECOND // 2)

    assert outcome == Refused(ReplyStatus.BUSY) or isinstance(outcome, TimedOut)
    assert around.kernel.now - begun <= SECOND // 2
    around.start_adder()
    assert around.ask(Add(1, 2)) == [Sum(3)], "it lives, and finds the adder later"


@pytest.mark.parametrize("settings", [{"offset": "five"}, {"off_set": 5}])
def test_settings_it_does_not_take_end_it_with_a_sentence(settings: dict[str, Any]) -> None:
    around = Around()

    code = around.kernel.run(around.start(program_of(DoublingAdder), settings=settings))

    assert code == EXIT_SETTINGS
    (line,) = around.lines()
    assert line.startswith("own: settings: ")
    assert line.endswith("; correct [service.own.settings] in the system file")


def test_an_unexpected_error_is_a_crash_with_its_name() -> None:
    around = Around()

    class Broken(DoublingAdder):
        async def start(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        around.kernel.run(around.start(program_of(Broken)))

    assert around.lines() == ["own: crashed, ZeroDivisionError"]


def test_its_status_has_its_own_facts_and_those_of_log_and_authority() -> None:
    around = Around()
    around.start(program_of(DoublingAdder), settings={"offset": 7})

    (status,) = around.ask(GetStatus())

    facts = {fact.name: fact.value for fact in status.facts}
    assert facts["offset"] == 7
    assert facts["authority_denied_total"] == 0
    assert any(name.startswith("log_") for name in facts)


def test_its_lines_reach_logd_and_logd_may_come_later() -> None:
    around = Around()
    around.system.keeper.down.add("logd")
    around.start(program_of(DoublingAdder))

    assert around.ask(Add(1, 2)) == [Sum(6)], "served without logd"
    around.system.keeper.down.clear()
    around.ask(Add(1, 3))
    around.kernel.run(around.system.add_client(_sleep(5 * SECOND)))

    assert around.added() == ["3", "4"]


def _sleep(span: int) -> Callable[[Peers], Coroutine[Any, Any, None]]:
    async def body(_peers: Peers) -> None:
        _ = await SleepUntil(Nanos(await Now() + span))

    return body


class SlowLog:
    """A log that waits 50 ms for logd whenever it is driven, and still has something left."""

    def __init__(self) -> None:
        self.due = True
        self.flushes = 0

    async def flush(self) -> None:
        self.flushes += 1
        _ = await SleepUntil(Nanos(await Now() + SECOND // 20))


def test_a_reply_goes_out_before_the_lines_of_its_request() -> None:
    around = Around()
    log = SlowLog()
    around.system.start("own", lambda boot: Server(Adder(), PROTOCOL, boot, log=log).run())

    async def body(peers: Peers) -> list[int]:
        budget = RetryBudget(attempts_max=3, backoff=Nanos(1_000_000), deadline=FAR)
        found = await peers.connect("own", PROTOCOL, budget)
        assert isinstance(found, Client)
        took = []
        for _ in range(4):
            _ = await SleepUntil(Nanos(await Now() + SECOND // 20))
            log.due = False
            _ = await SleepUntil(Nanos(await Now() + 3 * SECOND))
            log.due = True
            begun = await Now()
            assert await found.call(Add(1, 2), FAR) == Sum(3)
            took.append(await Now() - begun)
        return took

    assert around.system.client(body) == [0] * 4
    assert log.flushes >= 4


def test_lines_that_wait_are_looked_after_again_and_ever_more_rarely() -> None:
    around = Around()
    log = SlowLog()
    around.system.start("own", lambda boot: Server(Adder(), PROTOCOL, boot, log=log).run())

    around.kernel.run(around.system.add_client(_sleep(20 * SECOND)))

    assert 15 <= log.flushes <= 40, "about once a second, after a few early looks"


def test_a_time_that_comes_while_the_log_is_driven_is_not_slept_over() -> None:
    around = Around()

    class Hasty(Adder):
        """Its time comes whenever its log has been driven."""

        def __init__(self) -> None:
            super().__init__()
            self.late: list[int] = []

        def next_time(self) -> Nanos | None:
            return Nanos(1) if log.flushes > len(self.late) else None

        async def on_time(self, _now: Nanos) -> None:
            self.late.append(await Now() - log.driven)

    class TimedLog(SlowLog):
        """A log that remembers when it was last driven."""

        driven = Nanos(0)

        async def flush(self) -> None:
            await super().flush()
            self.driven = await Now()

    log = TimedLog()
    hasty = Hasty()
    around.system.start("own", lambda boot: Server(hasty, PROTOCOL, boot, log=log).run())

    around.kernel.run(around.system.add_client(_sleep(20 * SECOND)))

    assert len(hasty.late) >= 15
    assert set(hasty.late) == {0}


def test_the_context_tells_the_name_the_generation_and_the_time() -> None:
    around = Around()
    seen: list[Any] = []

    class Curious(Lazy):
        async def start(self) -> None:
            context = self.context
            now = await context.now()
            seen.extend([context.name, context.generation, context.settings, now])
            seen.append(await context.after(Nanos(5)) - now)

    around.start(program_of(Curious), settings={"a": 1})
    around.ask(Health())

    assert seen[:3] == ["own", 1, {"a": 1}]
    assert seen[4] == 5


# ------------------------------------------------------------------ frames


class Noting(Adder):
    """Notes what was malformed."""

    def __init__(self) -> None:
        super().__init__()
        self.malformed: list[bytes] = []

    def on_malformed(self, message: Any) -> None:
        self.malformed.append(message.data)


def test_a_service_hears_of_malformed_frames_and_of_no_others() -> None:
    around = Around()
    noting = Noting()
    around.system.start("own", lambda boot: Server(noting, PROTOCOL, boot).run())
    frame = bytearray(PROTOCOL.codecs[Add].prefix) + bytes(40)

    async def body(peers: Peers) -> None:
        budget = RetryBudget(attempts_max=3, backoff=Nanos(1_000_000), deadline=FAR)
        found = await peers.connect("own", PROTOCOL, budget)
        assert isinstance(found, Exchange)
        await Send(found.peer.slot, bytes(frame))
        await Send(found.peer.slot, bytes(frame[:2]) + b"\x66" + bytes(frame[3:]))
        _ = await found.call(Add(1, 2), FAR)
        _ = await found.call(Add(900, 900), FAR)

    around.system.client(body)

    assert noting.malformed == [bytes(frame)]


# ------------------------------------------------------------------ ordinary programs


class Inline:
    """Drives trap coroutines where every coroutine is one: the tiny kernel."""

    async def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await coroutine

    def lock(self) -> AbstractAsyncContextManager[object]:
        return Turn()


class Turn(AbstractAsyncContextManager[object]):
    """A lock that nobody ever has to wait for: two turns at once are a fault."""

    held = False

    async def __aenter__(self) -> None:
        assert not self.held, "two turns at once"
        self.held = True

    async def __aexit__(self, *_: object) -> None:
        self.held = False


def ordinary_main(target: str) -> Callable[[BootImage], Any]:
    main = load_ordinary(target, "tests.fakes.own")

    async def abi_main(boot: BootImage) -> int:
        return await main(boot, Inline())

    return abi_main


def test_an_ordinary_program_calls_and_serves_like_any_other() -> None:
    around = Around()
    task = around.start(ordinary_main("tests.fakes.own:ordinary"))

    outcomes = around.ask(Health(), Add(1, 2), Add(900, 900), Add(2, 2), GetStatus())

    assert isinstance(outcomes[0], Healthy)
    assert outcomes[1:4] == [Sum(103), Refused(AdderStatus.TOO_LARGE), Sum(104)]
    assert any(fact.name == "ordinary" for fact in outcomes[4].facts)
    around.kernel.run(around.system.add_client(_sleep(2 * SECOND)))
    assert around.added() == ["3", "4"]
    assert not task.over


def test_an_ordinary_program_ends_when_init_says_stop() -> None:
    around = Around()
    task = around.start(ordinary_main("tests.fakes.own:ordinary"))
    around.ask(Health())

    denied = around.ask(Stop())
    stopping = around.ask(Stop(), name=INIT_NAME)
    code = around.kernel.run(task)

    assert denied == [Refused(ReplyStatus.DENIED)], "only init stops it"
    assert (stopping, code) == ([Stopping()], 0)


def test_an_ordinary_program_without_its_use_ends_with_a_sentence() -> None:
    around = Around(adder=False)

    code = around.kernel.run(around.start(ordinary_main("tests.fakes.own:ordinary")))

    assert code == EXIT_UNREACHABLE
    assert around.lines() == ["own: cannot reach adder: Closed"]


def test_a_descriptor_is_found_by_the_name_of_its_grant() -> None:
    kernel = TinyKernel()
    task = kernel.task("camera")
    config = ServiceConfig(uses=[], posts=[], settings={}, trace_seed=SEED)
    boot = kernel.boot(task, argument=config.encoded())
    granted = BootImage(
        **{
            **{name: getattr(boot, name) for name in boot.__slots__},
            "descriptors": (("camera", 7),),
        }
    )

    context = OrdinaryContext(granted, Inline(), PROTOCOL)

    assert context.descriptor("camera") == 7
    with pytest.raises(KeyError):
        context.descriptor("lidar")


def test_both_contexts_have_the_same_names() -> None:
    names = {name for name in dir(Context) if not name.startswith("_")}
    of_the_runtime = {"peers", "take_links", "serve_by"}
    of_deferred_replies = {"send_given"}  # an ordinary program defers none

    assert names - of_the_runtime - of_deferred_replies <= {
        name for name in dir(OrdinaryContext) if not name.startswith("_")
    }
