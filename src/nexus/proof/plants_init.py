"""Saboteurs of what init prints and of `timed: ready`: 5, 13, 14, 27-29, 32.

Those that another service can have as well are public: `plants_policy` plants them there."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

from nexus.abi import BootImage, Nanos, Now, Pid, Sender, SleepUntil, service_id
from nexus.init import links
from nexus.init.plan import PlannedService
from nexus.init.record import Record
from nexus.init.supervisor import Supervisor
from nexus.init.watch import Watch
from nexus.kernel.linux.identity import IdentityView
from nexus.kernel.sim.ipc import Ipc
from nexus.proof.sabotage import Saboteur, replace
from nexus.protocols.ladder import SELFTEST, Ground
from nexus.runtime import Server
from nexus.services.timed import Timed

BOTH: Final = frozenset(Ground)
PROBES_UNREADY: Final = 150  # of 20 ms each: past the readiness deadline of 2 s
START_MAX: Final = Nanos(4_000_000_000)  # ns; the longest readiness deadline of the system
PATIENCE: Final = Nanos(8_000_000_000)  # ns that init waits longer than the system file says

Lookup = Callable[[Pid], Sender | None]


def _plan_unchecked() -> None:
    _ = replace(Supervisor, "checked_digest", lambda _supervisor: "")


def missing(name: str) -> None:
    """One service is not started."""

    def faulty(supervisor: Supervisor) -> tuple[PlannedService, ...]:
        services: tuple[PlannedService, ...] = original(supervisor)
        return tuple(service for service in services if service.name != name)

    original = replace(Supervisor, "start_list", faulty)


def withheld(name: str) -> None:
    """Nobody finds the task in the identity table, so its messages are refused."""
    withheld = service_id(name)

    def known(sender: Sender | None) -> Sender | None:
        return None if sender is not None and sender.service == withheld else sender

    def make_lookup(ipc: Ipc) -> Lookup:
        lookup: Lookup = original_lookup(ipc)
        return lambda pid: known(lookup(pid))

    def sender_of(view: IdentityView, credentials: bytes) -> Sender | None:
        return known(original_sender(view, credentials))

    original_lookup = replace(Ipc, "make_lookup", make_lookup)
    original_sender = replace(IdentityView, "sender_of", sender_of)


def _client_withheld() -> None:
    """The same of the ladder's client, which gives up as late as it may: with its end everything
    ends, and the others are to have their own time to start."""
    withheld(SELFTEST)
    client = import_module("nexus.services.selftest.main")

    async def late(rung: str, why: str) -> None:
        _ = await SleepUntil(Nanos(await Now() + START_MAX))
        await original(rung, why)

    original = replace(client, "_fail", late)


def _link_left_out() -> None:
    _ = replace(links, "planned_rows", _all_but_the_last(links.planned_rows))


def _all_but_the_last(original: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """Without the last one between services that are there from the start on."""

    def rows(plan: Any) -> list[Any]:
        made = original(plan)
        demanded = {service.name for service in plan.services if service.by}
        last = max(
            index
            for index, row in enumerate(made)
            if demanded.isdisjoint({row.planned.client, row.planned.server})
        )
        return made[:last] + made[last + 1 :]

    return rows


def ready_late(kind: type, unready: int = PROBES_UNREADY) -> None:
    """A service of this class becomes ready after its deadline, and init waits all the same."""
    unready_first(kind, unready)
    wait_longer()


def wait_longer() -> None:
    """init waits for a health probe that is answered late."""

    def patient(watch: Watch, record: Record, since: Nanos) -> Nanos:
        return Nanos(original(watch, record, since) + PATIENCE)

    original = replace(Watch, "late_time", patient)


def unready_first(kind: type, unready: int) -> None:
    """A service of this class is not ready for so many probes.

    Only its first instance: a later one, in a process of its own on linux, is ready at once.
    """
    probes = 0

    def made(
        server: Server, service: Any, protocol: Any, boot: BootImage, *rest: Any, **options: Any
    ) -> None:
        nonlocal probes
        if boot.generation > 1:
            probes = unready
        original_init(server, service, protocol, boot, *rest, **options)

    def faulty(_service: Any) -> bool:
        nonlocal probes
        probes += 1
        return probes > unready

    kind.ready = faulty  # type: ignore[attr-defined]
    original_init = replace(Server, "__init__", made)


SABOTEURS: Final = (
    Saboteur(rung=5, grounds=BOTH, plant=_plan_unchecked),
    Saboteur(rung=13, grounds=BOTH, plant=partial(missing, "timed")),
    Saboteur(rung=14, grounds=BOTH, plant=partial(withheld, "timed")),
    Saboteur(rung=27, grounds=BOTH, plant=partial(missing, SELFTEST)),
    Saboteur(rung=28, grounds=BOTH, plant=_client_withheld),
    Saboteur(rung=29, grounds=BOTH, plant=_link_left_out),
    Saboteur(rung=32, grounds=BOTH, plant=partial(ready_late, Timed)),
)
