"""The clients of the campaign: calls of every kind, each with a deadline and a known outcome,
and every trap that a call does not make.

A client makes its calls in a fixed rotation while faults fire, and prints what came of them. The
judge is spared by the faults; when they have stopped it waits the stated time and then expects
every call to succeed. What the lines say is compared outside, by nexus.proof.campaign.
"""

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import msgspec

from nexus.abi import (
    AbiError,
    BootImage,
    CapClone,
    CapClose,
    CapDerive,
    CapInfo,
    CapKind,
    CapQuery,
    ClockMap,
    ConsoleWrite,
    EndpointClose,
    EndpointCreate,
    Fence,
    Nanos,
    Now,
    PolicyRead,
    Rights,
    SetTaskQos,
    SleepUntil,
    Slot,
    Status,
    TaskQos,
    TaskStats,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
)
from nexus.ipc import (
    CallFailure,
    Client,
    NotFound,
    Peers,
    Refused,
    RetryBudget,
    RouteFailure,
    call_until,
    deadline_after,
)
from nexus.protocols.init import GetTasks, Shutdown, TaskRows, TaskState
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import Reason
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.testsvc import Echo, Echoed, Hold, Release, Released
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Cancel, Cancelled, Register, Seen, Sleep, Timer, Whoami, Woken
from nexus.runtime import Call, Server, ServiceConfig
from nexus.runtime.authority import Authority
from nexus.wire import ReplyStatus

CALL_WAIT: Final = Nanos(100_000_000)  # ns; deadline of each call
CONNECT_WAIT: Final = Nanos(200_000_000)  # ns; deadline of finding a service
BACKOFF: Final = Nanos(5_000_000)  # ns; first pause of a retry
ATTEMPTS_MAX: Final = 12
LATE_MAX: Final = Nanos(40_000_000)
"""How much later than its deadline an outcome may be seen, in ns of the kernel clock: late timers
and wake-ups (3 ms) and a hundred resumes on a CPU that was made slow (0.4 ms each)."""

NAP: Final = Nanos(20_000)  # ns; a sleep that a client takes by itself
ROUND_PAUSE: Final = Nanos(1_000_000)  # ns; between two rounds of a client
TELL_EVERY: Final = 16  # rounds; a client that is killed takes at most that much with it
GIVEN: Final = "proof.control"  # a right that the system file gives each client
NOT_GIVEN: Final = "keystore.sign"  # and one that it gives nobody
JUDGE_ROUNDS: Final = 3  # rounds without a failure that the judge wants to see


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether this client is the judge; how long faults fire after its start, and how long
    recovery may take then, in ns."""

    judge: bool
    faults: int
    healthy_within: int


class NoRoom(NamedTuple):
    """The kernel refused an object or a change of class; what was made before it is closed."""

    status: Status


class Unavailable(NamedTuple):
    """A right was denied because policyd did not answer; nothing else was asked."""

    status: Status


Step = Callable[[], Awaitable[object]]


class Workload:
    """One client's connections, its rotation of calls, and what came of each."""

    def __init__(
        self,
        boot: BootImage,
        peers: Peers,
        authority: Authority,
        timed: Client,
        testsvc: Client,
    ) -> None:
        self._boot = boot
        self._peers = peers
        self._authority = authority
        self.available_again = 0
        self._denied = False
        self._timed = timed
        self._testsvc = testsvc
        self._round = 0
        self.outcomes: Counter[str] = Counter()
        self.late: list[int] = []
        self.wrong: list[str] = []
        self.recovered = 0
        self._failing = False
        self._generation = 0  # of the policy page, when it was last read

    @property
    def rebinds(self) -> int:
        """How often a new instance of a service was found."""
        return self._timed.rebinds + self._testsvc.rebinds

    async def round(self) -> bool:
        """Every kind of call once. Whether all of them were answered."""
        self._round += 1
        steps = (self._whoami, self._echo, self._timer, self._sleep, self._held, self._batch)
        others = (self._unknown_name, self._objects, self._policy)
        answered = [await self._measure(step) for step in (*steps, *others)]
        return all(answered)

    async def _measure(self, step: Step) -> bool:
        """Take a step and judge its outcome: known, in time, and right if it is an answer."""
        deadline = await self._ahead()
        outcome = await step()
        late = await Now() - deadline
        if late > LATE_MAX:
            self.late.append(late)
        failed = isinstance(outcome, CallFailure | Refused | NoRoom | Unavailable)
        name = type(outcome).__name__ if failed else "answered"
        if isinstance(outcome, Refused | NoRoom | Unavailable):
            name = f"{name} {outcome.status.name}"
        self.outcomes[name] += 1
        if self._failing and not failed:
            self.recovered += 1
        self._failing = failed
        return not failed

    async def _ahead(self) -> Nanos:
        return deadline_after(await Now(), CALL_WAIT)

    def _expect(self, outcome: object, kind: type, right: bool, what: str) -> object:
        """An answer that is not the right one is wrong; a failure is an outcome like others."""
        if not isinstance(outcome, CallFailure | Refused) and not (
            isinstance(outcome, kind) and right
        ):
            self.wrong.append(f"{what}: {outcome!r}"[:120])
        return outcome

    async def _whoami(self) -> object:
        budget = RetryBudget(
            attempts_max=ATTEMPTS_MAX, backoff=BACKOFF, deadline=await self._ahead()
        )
        seen = await call_until(self._timed, Whoami(0, "somebody else"), budget)
        right = isinstance(seen, Seen) and (seen.pid, seen.service, seen.generation) == (
            self._boot.pid,
            self._boot.service,
            self._boot.generation,
        )
        return self._expect(seen, Seen, right, "whoami")

    async def _echo(self) -> object:
        data = bytes([self._round & 0xFF]) * (1 << self._round % 12)
        echoed = await self._testsvc.call(Echo(data), await self._ahead())
        right = isinstance(echoed, Echoed) and echoed.data == data
        return self._expect(echoed, Echoed, right, "echo")

    async def _timer(self) -> object:
        deadline = await self._ahead()
        timer = await self._timed.call(Register(deadline), deadline)
        if not isinstance(timer, Timer):
            return self._expect(timer, Timer, False, "register")
        cancelled = await self._timed.call(Cancel(timer.timer_id), deadline)
        right = isinstance(cancelled, Cancelled) and cancelled.timer_id == timer.timer_id
        return self._expect(cancelled, Cancelled, right, "cancel")

    async def _sleep(self) -> object:
        deadline = await self._ahead()
        until = Nanos(await Now() + 2_000_000)
        woken = await self._timed.call(Sleep(until), deadline)
        right = isinstance(woken, Woken) and woken.now >= woken.deadline >= until
        return self._expect(woken, Woken, right, "sleep")

    async def _held(self) -> object:
        """Two calls in flight, the first answered only because of the second."""
        token = self._boot.pid << 16 | self._round & 0xFFFF
        deadline = await self._ahead()
        held = await self._testsvc.start(Hold(token), deadline)
        if isinstance(held, CallFailure):
            return held
        released = await self._testsvc.call(Release([token]), deadline)
        if not isinstance(released, Released):
            self._testsvc.forget(held)
            return self._expect(released, Released, False, "release")
        answer = await self._testsvc.finish(held)
        return self._expect(answer, Released, isinstance(answer, Released), "hold")

    async def _batch(self) -> object:
        requests = [Echo(bytes([number])) for number in range(8)]
        answers = await self._testsvc.call_many(requests, await self._ahead())
        for request, answer in zip(requests, answers, strict=True):
            right = isinstance(answer, Echoed) and answer.data == request.data
            _ = self._expect(answer, Echoed, right, "batch")
        failures = [answer for answer in answers if isinstance(answer, CallFailure | Refused)]
        return failures[0] if failures else answers[0]

    async def _unknown_name(self) -> object:
        deadline = await self._ahead()
        budget = RetryBudget(attempts_max=1, backoff=BACKOFF, deadline=deadline)
        found = await self._peers.connect("nobody", TIMED, budget)
        right = isinstance(found, NotFound | CallFailure)
        return self._expect(found, NotFound, right, "unknown name")

    async def _policy(self) -> object:
        """Two questions to policyd, whatever ends and starts again meanwhile.

        What the policy does not give is never allowed; what it gives is allowed, or denied
        because policyd does not answer; and the generation of the page never goes back.
        """
        generation = (await PolicyRead()).generation
        if generation < self._generation:
            self.wrong.append(f"policy: generation {generation} after {self._generation}")
        self._generation = generation
        deadline = await self._ahead()
        service = self._boot.service
        stolen = await self._authority.check(service, NOT_GIVEN, "", deadline)
        mine = await self._authority.check(service, GIVEN, "", deadline)
        if stolen.allowed or not (mine.allowed or mine.reason is Reason.UNAVAILABLE):
            self.wrong.append(f"policy: {stolen}, {mine}"[:120])
        if mine.allowed:
            self.available_again += self._denied
            self._denied = False
            return mine
        self._denied = True
        return Unavailable(Status.TIMED_OUT)

    async def _objects(self) -> object:
        """The traps that no call makes: memory, capabilities, endpoints, classes, sleep."""
        held: list[Slot] = []
        try:
            await self._use_objects(held)
        except AbiError as error:
            if error.status not in (Status.NO_SPACE, Status.QUEUE_FULL):
                raise
            for slot in held:
                await CapClose(slot)
            return NoRoom(error.status)
        return None

    async def _use_objects(self, held: list[Slot]) -> None:
        """Make, use and close one of each; `held` is what has to be closed."""
        data = bytes([self._round & 0xFF]) * 8
        held.append(await VmoCreate(len(data)))
        vmo = held[0]
        await VmoWrite(vmo, 0, data)
        await VmoSeal(vmo)
        held.append(await CapClone(vmo))
        held.append(await CapDerive(vmo, Rights.MAP))
        info = await CapQuery(held[2])
        view = await VmoMap(held[2])
        if bytes(view[: len(data)]) != data or info != CapInfo(CapKind.VMO, Rights.MAP, len(view)):
            self.wrong.append(f"objects: {info}, {bytes(view[: len(data)]).hex()}"[:120])
        view.release()
        await self._share(held, data)
        endpoint = await EndpointCreate()
        await EndpointClose(endpoint)
        await SetTaskQos(None, await TaskQos())
        until = Nanos(await Now() + NAP)
        if await SleepUntil(until) < until:
            self.wrong.append("objects: slept too short")
        while held:
            await CapClose(held.pop())

    async def _share(self, held: list[Slot], data: bytes) -> None:
        """Write and watch memory, which lasts as long as its views; look at the clock."""
        held.append(await VmoCreate(len(data)))
        written = await VmoShare(held[-1])
        seen = await VmoWatch(held[-1])
        await CapClose(held.pop())
        written[: len(data)] = data
        await Fence()
        if bytes(seen[: len(data)]) != data:
            self.wrong.append(f"share: {bytes(seen[: len(data)]).hex()}")
        seen.release()
        written.release()
        now = (await ClockMap()).monotonic()
        if now > await Now():
            self.wrong.append(f"share: the mapped clock is ahead, at {now}")


class Idle:
    """A service without requests: a client answers its runtime's ones, such as the probe."""

    def handle(self, call: Call, _request: object) -> object:
        """Refuse: nobody has a link to a client of the campaign."""
        raise call.refuse(ReplyStatus.UNSUPPORTED)


class Task:
    """One client task: its runtime, and its workload once the services were found."""

    def __init__(self, boot: BootImage) -> None:
        config = ServiceConfig.of(boot)
        self.boot = boot
        self.settings = config.settings_as(Settings)
        self.peers = Peers(boot, config.trace_seed)
        self.server = Server(Idle(), TESTSVC, boot, self.peers.caller)
        self.workload: Workload | None = None
        self._found: list[Client] = []

    async def round(self) -> bool:
        """Answer what is asked of this task, then make every call once."""
        _ = await self.server.step(Nanos(await Now() + ROUND_PAUSE))
        if self.workload is None:
            await self._look_for_services()
        return self.workload is not None and await self.workload.round()

    async def _look_for_services(self) -> None:
        """One bounded look for the next service: init's echo must not wait for long."""
        name, protocol = (("timed", TIMED), ("demo.testsvc", TESTSVC))[len(self._found)]
        budget = RetryBudget(
            attempts_max=ATTEMPTS_MAX,
            backoff=BACKOFF,
            deadline=deadline_after(await Now(), CONNECT_WAIT),
        )
        client = await self.peers.connect(name, protocol, budget)
        if isinstance(client, Client):
            self._found.append(client)
        if len(self._found) == 2:
            authority = Authority(self._find_policyd, None)
            self.workload = Workload(self.boot, self.peers, authority, *self._found)

    async def _find_policyd(self, until: Nanos) -> Client | RouteFailure:
        budget = RetryBudget(attempts_max=ATTEMPTS_MAX, backoff=BACKOFF, deadline=until)
        return await self.peers.connect("policyd", POLICYD, budget)


async def main(boot: BootImage) -> int:
    """The program: a client or the judge, as its settings say."""
    task = Task(boot)
    return await (_judge(task) if task.settings.judge else _client(task))


async def _client(task: Task) -> int:
    """Make calls until init says stop."""
    rounds = 0
    while not task.server.stopping:
        _ = await task.round()
        rounds += 1
        if rounds % TELL_EVERY == 0 and task.workload is not None:
            await _tell_outcomes("outcomes", task.workload)
    if task.workload is not None:
        await _tell_outcomes("outcomes", task.workload)
    return 0


async def _judge(task: Task) -> int:
    """Make calls while faults fire, then see the system healthy in time, or say that it is not."""
    faults_end = task.boot.now + task.settings.faults
    while await Now() < faults_end:
        _ = await task.round()
    deadline = faults_end + task.settings.healthy_within
    good = 0
    while good < JUDGE_ROUNDS and await Now() < deadline:
        good = good + 1 if await task.round() and await _all_up(task) else 0
    if task.workload is not None:
        await _tell_outcomes("outcomes", task.workload)
    after = await Now() - faults_end
    await _tell("healthy" if good == JUDGE_ROUNDS else "not healthy", after=after)
    await _end_the_run(task)
    return 0


async def _end_the_run(task: Task) -> None:
    """Have init stop every service, this one too, which answers until it is asked."""
    while not task.server.stopping:
        deadline = deadline_after(await Now(), CALL_WAIT)
        control = await task.peers.control(deadline)
        if not isinstance(control, CallFailure):
            _ = await control.call(Shutdown(), deadline)
        _ = await task.server.step(deadline)


async def _all_up(task: Task) -> bool:
    """Whether every service of the system has a running task."""
    deadline = deadline_after(await Now(), CALL_WAIT)
    control = await task.peers.control(deadline)
    if isinstance(control, CallFailure):
        return False
    rows = await control.call(GetTasks(), deadline)
    return isinstance(rows, TaskRows) and all(row.state is TaskState.UP for row in rows.rows)


async def _tell(text: str, **evidence: Any) -> None:
    """Print a line; when the console refuses it, the run goes on without."""
    try:
        await ConsoleWrite(f"campaign: {text}", json.dumps(evidence).encode())
    except AbiError as error:
        assert error.status is Status.QUEUE_FULL, str(error)


async def _tell_outcomes(text: str, workload: Workload) -> None:
    await _tell(
        text,
        outcomes=dict(workload.outcomes),
        late=workload.late[:8],
        wrong=workload.wrong[:8],
        rebinds=workload.rebinds,
        recovered=workload.recovered,
        available_again=workload.available_again,
        slots=(await TaskStats()).slots,
    )
