"""A whole device in the simulator, with a test inside it.

The system file of a test is booted as it is, with one more service: the tester, which may use
every other service and look at and act on the system. The test is a coroutine that gets a
`Device` and runs as that service; when it ends, the system shuts down in order. ::

    async def scenario(device: Device) -> None:
        await device.call("pump", Start())
        device.freeze("sensor", "3s")
        await device.sleep("2s")
        assert not (await device.call("pump", GetState())).running

    simulate(Path("system.toml"), scenario, seed=7)

What a device keeps outlives its runs: `simulate(..., after=run)` boots it again with the disks,
the secrets and the boot memory that an earlier run has left, also one that ended by a power cut.
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from msgspec import structs

from nexus.abi import (
    NEVER,
    BootImage,
    Event,
    EventKind,
    Nanos,
    Now,
    Program,
    SecretBackend,
    Signal,
    SleepUntil,
    Trap,
)
from nexus.init.declare import duration
from nexus.init.ground import init_program, limits_of, programs_of
from nexus.init.plan import Plan, make_plan, sources_of
from nexus.init.programs import protocols_of
from nexus.init.system import System, load, parse
from nexus.ipc import CallFailure, Client, Exchange, Peers, Refused, RetryBudget
from nexus.kernel.core import PowerCut
from nexus.kernel.sim import SimKernel
from nexus.kernel.sim.clock import WALL_START
from nexus.kernel.sim.disk import NOTHING, Disk
from nexus.protocols.init import (
    AwaitReady,
    GetService,
    GetSystem,
    Ready,
    Restart,
    Restarting,
    ServiceRecord,
    SystemInfo,
)
from nexus.protocols.interactive import PROTOCOL as UNSERVED
from nexus.protocols.logd import EVERY_RECORD, PAGE_MAX, THIS_BOOT, Query, Record
from nexus.runtime import Call, Server, ServiceConfig
from nexus.wire import Protocol, ReplyStatus, Request

TESTER: Final = "tester"
TESTER_SIZE: Final = 1024**2  # bytes of link shares; it has a link to every service
START_MAX: Final = Nanos(60_000_000_000)  # virtual ns a system may take to be ready
CALL_MAX: Final = "2s"  # of a call for which the test names no time
RUN_MAX: Final = "10min"  # virtual time of a whole test
CONNECT_ATTEMPTS_MAX: Final = 200
CONNECT_BACKOFF: Final = Nanos(1_000_000)  # ns
PAGES_MAX: Final = 1_024  # of one search of the journal
CRASHES_SHOWN_MAX: Final = 2  # tracebacks of services that a failed run shows
LINES_SHOWN_MAX: Final = 40  # last console lines that a failed run shows
RIGHTS: Final = ("ipc.core", "log.read", "proof.control", "policy.delegate", "policy.reload")

_DURATION: Final = duration(Nanos(0), Nanos(3_600_000_000_000), "2s")
_ENTRY: Final = """
[system]
name = "{tester}"
[service.{tester}]
program = "demo.interactive"
owner_size = "{size}B"
endpoints = 16
capabilities = [{rights}]
health = {{ deadline = "60s", every = "0s" }}
[service.{tester}.uses]
{uses}
"""

ReplyT = TypeVar("ReplyT")
Scenario = Callable[["Device"], Awaitable[None]]


class CallFailed(AssertionError):
    """A call of the test did not end with a reply; `outcome` says how it ended."""

    def __init__(self, service: str, request: object, outcome: Refused | CallFailure) -> None:
        what = outcome.status.name if isinstance(outcome, Refused) else repr(outcome)
        super().__init__(f"{type(request).__name__} to {service}: {what}")
        self.outcome = outcome


class SystemDied(AssertionError):
    """The system ended, or hung, before the scenario did."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a simulated run left behind: `log` is the kernel's event log, equal for equal seeds.

    `cut` says where the power was cut; it is empty, and `exit_code` init's, if it was not.
    `disks`, `secrets`, `boot_memory` and `wall`, what the machine's clock says then, are for the
    next boot.
    """

    seed: int
    exit_code: int
    console: tuple[str, ...]
    log: tuple[str, ...]
    cut: str = ""
    disks: Mapping[str, Disk] = field(default_factory=dict)
    secrets: Mapping[tuple[str, SecretBackend], bytes] = field(default_factory=dict)
    boot_memory: bytes = b""
    wall: int = WALL_START


class Device:
    """The device as the test sees it: its services, its clock, and what can go wrong."""

    def __init__(
        self,
        boot: BootImage,
        peers: Peers,
        control: Exchange,
        clients: dict[str, Client],
        kernel: SimKernel,
    ) -> None:
        self._boot = boot
        self._peers = peers
        self._control = control
        self._clients = clients
        self.kernel = kernel

    # ------------------------------------------------------------------ services

    def client(self, service: str) -> Client:
        """The client of a service, for calls whose outcome the test looks at itself."""
        return self._clients[service]

    async def call(self, service: str, request: Request[ReplyT], within: str = CALL_MAX) -> ReplyT:
        """The reply of a service. Raises CallFailed for anything else."""
        outcome = await self.ask(service, request, within)
        if isinstance(outcome, Refused | CallFailure):
            raise CallFailed(service, request, outcome)
        return outcome

    async def ask(
        self, service: str, request: Request[ReplyT], within: str = CALL_MAX
    ) -> ReplyT | Refused | CallFailure:
        """How a call ends, whatever way."""
        return await self._clients[service].call(request, await self._after(within))

    async def state(self, service: str) -> ServiceRecord:
        """What init knows of a service."""
        return await self.init(GetService(service))

    async def system(self) -> SystemInfo:
        """What init knows of the system."""
        return await self.init(GetSystem())

    async def logs(self, key: str = "", value: str = "", *, boots_back: int = 0) -> list[Record]:
        """The journal, or what of it has that field; of an earlier boot what is left of it.

        The system has logd.
        """
        found: list[Record] = []
        since = 1
        wanted = structs.replace(EVERY_RECORD, key=key, value=value)
        for _ in range(PAGES_MAX):
            query = Query(THIS_BOOT - boots_back, since, PAGE_MAX, wanted)
            page = await self.call("logd", query)
            found += page.records
            if page.next > page.total:
                break
            since = page.next
        return found

    # ------------------------------------------------------------------ time and faults

    async def now(self) -> Nanos:
        """The virtual clock, ns."""
        return await Now()

    async def sleep(self, span: str) -> None:
        """Let virtual time pass: "250ms", "2s"."""
        _ = await SleepUntil(await self._after(span))

    async def kill(self, service: str) -> Restarting:
        """End an instance, as SIGKILL does; init does what the system file says."""
        return await self.init(Restart(service))

    def freeze(self, service: str, span: str) -> None:
        """Stop a service for a while, as SIGSTOP and SIGCONT do."""
        until = Nanos(self.kernel.now + span_of(span))
        assert self.kernel.freeze(service, until), f"{service} is not running"

    async def cut_power(self) -> NoReturn:
        """End the run at this instant, as a power cut does: what is not durable is lost."""
        self.kernel.at(self.kernel.now, lambda: self.kernel.power.cut("the test cut it"))
        _ = await SleepUntil(NEVER)
        raise AssertionError("the power was cut")

    def signal(self, signal: Signal) -> None:
        """Send init a signal from outside."""
        self.kernel.signal(signal)

    # ------------------------------------------------------------------ inside

    async def init(self, request: Request[ReplyT]) -> ReplyT:
        """The reply of init, within the rights of the tester. Raises CallFailed."""
        outcome = await self._control.call(request, await self._after(CALL_MAX))
        if isinstance(outcome, Refused | CallFailure):
            raise CallFailed("init-lite", request, outcome)
        return outcome

    async def _after(self, span: str) -> Nanos:
        return Nanos(await Now() + span_of(span))


def simulate(
    system: Path,
    scenario: Scenario,
    *,
    seed: int,
    within: str = RUN_MAX,
    rights: tuple[str, ...] = (),
    boot_memory: bytes = b"",
    after: Run | None = None,
) -> Run:
    """Boot a system file in the simulator and run `scenario` inside it.

    `rights` are the tester's beside those it needs to look at the system. `after` is an earlier
    run of the device, which began with `boot_memory`; give each run a seed of its own, for with
    the same one chance repeats itself.

    What the scenario raises is raised here. Raises SystemFileError for a wrong file, SystemDied
    with the last console lines when the system ends before the scenario does.
    """
    plan = plan_with_tester(load(system), rights)
    test = Inside(plan, scenario)
    kernel = SimKernel(
        {**programs_of(plan), plan.by_name[TESTER].program: test.program},
        seed=seed,
        recorder=test.record,
        cpu_count=plan.smp,
        limits=limits_of(plan),
        boot_memory=boot_memory if after is None else after.boot_memory,
        hardware=plan.hardware,
        disks={} if after is None else {name: copied(disk) for name, disk in after.disks.items()},
        secrets={} if after is None else after.secrets,
        wall_start=WALL_START if after is None else after.wall,
    )
    test.kernel = kernel
    until = Nanos(kernel.now + span_of(within))
    try:
        ended = kernel.run(init_program(plan, plan.smp), plan.digest.encode(), until=until)
    except PowerCut as cut:
        left = {name: disk.survivors(NOTHING) for name, disk in kernel.bus.disks.items()}
        return test.left(1, left, cut.why)
    except Exception as error:
        if test.raised is None:
            raise SystemDied(test.told(f"{type(error).__name__}: {error}")) from error
        raise test.raised from error
    if test.raised is not None:
        raise test.raised
    if not test.finished:
        raise SystemDied(test.told(f"the system ended with code {ended.code}"))
    return test.left(ended.code, kernel.bus.disks)


def is_end(raised: BaseException) -> bool:
    """Whether that is what a tester meets whose system goes down around it."""
    if isinstance(raised, CallFailed):
        return not isinstance(raised.outcome, Refused)
    return isinstance(raised, SystemDied)


def copied(disk: Disk) -> Disk:
    """A disk with the same content, so that a run may be followed by several others."""
    return Disk(disk.block_count, disk.image())


def plan_with_tester(system: System, rights: tuple[str, ...] = ()) -> Plan:
    """The plan of a system file with the tester added. Raises SystemFileError."""
    uses = "\n".join(f'"{service.name}" = {{}}' for service in system.services)
    text = _ENTRY.format(
        tester=TESTER,
        size=TESTER_SIZE,
        rights=", ".join(f'"{right}"' for right in (*RIGHTS, *rights)),
        uses=uses,
    )
    (tester,) = parse(text.encode(), system.file).services
    return make_plan(
        replace(
            system,
            services=(*system.services, tester),
            ends_with=TESTER,
            total_size=system.total_size + TESTER_SIZE,
        )
    )


class Tester:
    """What the tester answers on its own endpoint: init's meta requests, and nothing else."""

    def handle(self, call: Call, _request: object) -> Any:
        """Nobody has business with the tester."""
        raise call.refuse(ReplyStatus.DENIED)


class Inside:
    """One run: the tester's program, what it raised, what the console said.

    A tester whose system dies around it ends, and so does the run, or it `stays` until it is ended:
    then the system's own verdict about itself is what ends the run.
    """

    def __init__(self, plan: Plan, scenario: Scenario, *, stays: bool = False) -> None:
        self._scenario = scenario
        self._stays = stays
        self._protocols = _protocols_by_service(plan)
        self.program = Program(
            name=plan.by_name[TESTER].program,
            main=self._main,
            digest=plan.by_name[TESTER].program_digest,
        )
        self.kernel: SimKernel
        self.console: list[str] = []
        self.raised: BaseException | None = None
        self.finished = False

    def record(self, event: Event) -> None:
        """Keep the console."""
        if event.kind is EventKind.CONSOLE:
            self.console.append(str(event.fields["line"]))

    def left(self, exit_code: int, disks: Mapping[str, Disk], cut: str = "") -> Run:
        """What the run left behind."""
        return Run(
            seed=self.kernel.seed,
            exit_code=exit_code,
            console=tuple(self.console),
            log=tuple(self.kernel.log_lines()),
            cut=cut,
            disks=dict(disks),
            secrets=dict(self.kernel.secrets.kept),
            boot_memory=self.kernel.boot_memory or b"",
            wall=self.kernel.next_wall,
        )

    def told(self, what: str) -> str:
        """Why the run failed, for a person."""
        lines = "\n".join(f"  {line}" for line in self.console[-LINES_SHOWN_MAX:])
        crashes = "\n".join(self.kernel.crashes[:CRASHES_SHOWN_MAX])
        return f"{what}\nlast lines of the console:\n{lines}\n{crashes}"

    def _main(self, boot: BootImage) -> Coroutine[Trap[Any], Any, int]:
        return self._run(boot)

    async def _run(self, boot: BootImage) -> int:
        try:
            device = await self._begin(boot)
            await self._scenario(device)
        except GeneratorExit:  # the kernel ends the run; nothing was raised by the scenario
            raise
        except BaseException as error:  # noqa: BLE001 (pytest's own outcomes are no Exceptions)
            for crash in self.kernel.crashes[:CRASHES_SHOWN_MAX]:
                error.add_note(f"a service crashed before:\n{crash}")
            self.raised = error
            if self._stays and is_end(error):
                _ = await SleepUntil(NEVER)
            return 1
        self.finished = True
        return 0

    async def _begin(self, boot: BootImage) -> Device:
        """Answer init, connect to everybody, wait until the system is ready."""
        config = ServiceConfig.of(boot)
        peers = Peers(boot, config.trace_seed)
        server = Server(Tester(), UNSERVED, boot, peers.caller)
        until = Nanos(boot.now + START_MAX)
        _ = await server.step(until)
        control = await peers.control(until)
        if not isinstance(control, Exchange):
            raise SystemDied(self.told(f"no link to init: {control!r}"))
        budget = RetryBudget(
            attempts_max=CONNECT_ATTEMPTS_MAX, backoff=CONNECT_BACKOFF, deadline=until
        )
        clients: dict[str, Client] = {}
        for name in config.uses:
            found = await peers.connect(name, self._protocols[name], budget)
            if not isinstance(found, Client):
                raise SystemDied(self.told(f"{name} cannot be reached: {found!r}"))
            clients[name] = found
        started = await control.start(AwaitReady(), until)
        _ = await control.call(GetSystem(), until)  # init knows now that we wait
        _ = await server.step(until)  # its health probe
        ready = await control.finish(started)
        if not isinstance(ready, Ready):
            raise SystemDied(self.told(f"the system did not become ready: {ready!r}"))
        return Device(boot, peers, control, clients, self.kernel)


def _protocols_by_service(plan: Plan) -> dict[str, Protocol]:
    """The protocol each service serves first."""
    sources = sources_of(plan)
    return {
        service.name: next(iter(protocols_of(sources[service.program])), UNSERVED)
        for service in plan.services
    }


def span_of(text: str) -> int:
    """Nanoseconds in "250ms". Raises WrongValue with a sentence for anything else."""
    return int(_DURATION.read(text, ()))
