"""Bugs as somebody could make them, a line left out each, and the searches that find them.

`make docs` writes them as a table into docs/claims.md; test_planted_bugs.py plants each, and holds
that it is found as the table says. A search is an ordinary test's, with its machinery and its
sample: it plants nothing, and knows nothing of the bug.
"""

import subprocess
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest

from nexus.abi import AbiError, ServiceId, Status, service_id
from nexus.init.supervisor import Supervisor
from nexus.ipc import Correlator, ReplyBuffer
from nexus.ipc.buffer import Push
from nexus.kernel.sim.ipc import Ipc
from nexus.kernel.sim.sched import Scheduler
from nexus.proof import powercut, runner
from nexus.proof.campaign import Campaign, seeds_campaign
from nexus.proof.powercut import Explorer
from nexus.proof.prove import prove
from nexus.proof.request import Request
from nexus.proof.verdict import State
from nexus.protocols.init import TaskState
from nexus.protocols.ladder import Ground, Phase
from nexus.services.policyd.judge import Judge
from nexus.services.selftest import call_rungs
from nexus.services.statefsd.engine import Store
from tests.property import test_ipc_bounds
from tests.sim.sweeper import FLOOD_MS, SYSTEM, Fork
from tests.sim.test_powercut import SAMPLE
from tests.sim.test_prove_campaign import SAMPLE_SEEDS

EXAMPLES: Final = 100  # of a property test, where the profile says nothing else
TIMEOUT: Final = 280 * 10**9  # ns, of a boot of the ladder; it has what is left of two CPUs


class Found(NamedTuple):
    """What a search came upon, and at which of its cuts, seeds, boots or examples."""

    at: int
    why: str


Search = Callable[[pytest.MonkeyPatch, int], Found | None]
"""Given where it may patch, and after how many cuts, seeds, boots or examples it may give up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bug:
    """A bug, the search that finds it, and what that says then; `found_by` makes the search of
    what is as it should be.

    It was found at the `needed`th of `unit`. Where that changes with what has nothing to do with
    it (which modules are imported, how many messages init sends), `within` so many is held.
    """

    area: str
    what: str
    plant: Callable[[pytest.MonkeyPatch], None]
    search: Search
    found_by: str
    why: str
    unit: str
    needed: int
    within: int

    @property
    def told(self) -> tuple[str, ...]:
        """Its row of the table."""
        needed = f"{self.needed} {self.unit}"
        return (self.area, self.what, f"`{self.found_by}`", needed, str(self.within))


# ---------------------------------------------------------------- searches


def power_cuts(patch: pytest.MonkeyPatch, at_most: int) -> Found | None:
    """A sample of every workload's power cuts, until something is lost."""
    patch.setattr(powercut, "PROBLEMS_MAX", 1)
    tried = 0
    for workload in powercut.WORKLOADS:
        if tried >= at_most:
            break
        explorer = Explorer(workload, 1, subsets_max=powercut.SUBSETS_SAMPLE, every=SAMPLE)
        explored = explorer.run()
        tried += explored.cases
        if explored.problems:
            return Found(tried, explored.problems[0].what)
    return None


def seeds(_patch: pytest.MonkeyPatch, at_most: int) -> Found | None:
    """Seeds of the campaign, until a promise is broken."""
    for seed in range(1, min(at_most, SAMPLE_SEEDS) + 1):
        campaign = Campaign()
        seeds_campaign(campaign, seed, 1, lambda _line: None)
        if campaign.problems:
            return Found(seed, "; ".join(campaign.problems))
    return None


def ladder(patch: pytest.MonkeyPatch, _at_most: int) -> Found | None:
    """The ladder on two simulated CPUs, as far as policy goes. Each boot is a fork of this
    process, and so has what is planted here."""
    forking = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
    patch.setattr(runner, "subprocess", forking)
    patch.setattr(call_rungs, "FLOOD_MS", FLOOD_MS)
    with TemporaryDirectory(prefix="planted-") as name:
        request = Request(
            ground=Ground.SIM,
            system=SYSTEM,
            smp=2,
            seed=3,
            phase=Phase.POLICY,
            timeout=TIMEOUT,
            record=Path(name) / "record.jsonl",
        )
        outcome = prove(request, Path(name))
    if not outcome.verdict.exit_code:
        return None
    red = [f"#{each.number} {each.reason}" for each in outcome.verdict.of(State.RED)]
    return Found(len(outcome.traces), "; ".join(red or outcome.verdict.findings))


def examples(name: str, patch: pytest.MonkeyPatch, _at_most: int) -> Found | None:
    """The examples that hypothesis draws for a property, until it does not hold."""
    test = vars(test_ipc_bounds)[name]
    holds = test.hypothesis.inner_test
    numbers = count(1)
    found: list[Found] = []

    def counted(*drawn: Any, **named: Any) -> None:
        number = next(numbers)
        try:
            holds(*drawn, **named)
        except AssertionError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            found.append(Found(number, last.line or ""))
            raise

    counted.__wrapped__ = holds  # type: ignore[attr-defined]  # what is drawn depends on its text
    patch.setattr(test.hypothesis, "inner_test", counted)
    with suppress(AssertionError):
        test()
    return found[0] if found else None


# ---------------------------------------------------------------- bugs


def _not_flushed(patch: pytest.MonkeyPatch) -> None:
    async def flush(store: Any) -> None:
        store._has_unflushed = False
        store.durable = store._committed

    patch.setattr(Store, "_flush", flush)


def _requester_not_compared(patch: pytest.MonkeyPatch) -> None:
    def requester_of(_judge: Judge, _sender: ServiceId, requester: str) -> ServiceId | None:
        return service_id(requester) if requester.isascii() else None

    patch.setattr(Judge, "_requester", requester_of)


def _answerer_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Correlator, "is_foreign", lambda _self, peer, message: message.link != peer.link)


def _links_not_awaited(patch: pytest.MonkeyPatch) -> None:
    def is_ready(supervisor: Supervisor) -> bool:
        return all(
            record.is_up
            for record in supervisor.records.values()
            if not record.is_demanded and record.state is not TaskState.LEFT_OUT
        )

    patch.setattr(Supervisor, "is_ready", is_ready)


def _replies_not_counted(patch: pytest.MonkeyPatch) -> None:
    def push(buffer: Any, nonce: int, reply: Any) -> Push:
        size = len(reply.data)
        if nonce in buffer._replies or size > buffer.size_max:
            buffer.drops += 1
            return Push(kept=False, evicted=())
        evicted = []
        while buffer._size + size > buffer.size_max:
            evicted.append(buffer._evict())
        buffer._replies[nonce] = reply
        buffer._size += size
        return Push(kept=True, evicted=tuple(evicted))

    patch.setattr(ReplyBuffer, "push", push)


def _depth_not_compared(patch: pytest.MonkeyPatch) -> None:
    def room(_ipc: Ipc, link: Any, size: int) -> Status | None:
        return Status.NO_SPACE if link.queued_size + size > link.size else None

    patch.setattr(Ipc, "room", room)


def _no_tick_instead_of_a_signal(patch: pytest.MonkeyPatch) -> None:
    def request_resched(scheduler: Any, index: int) -> None:
        if not scheduler.in_range(index):
            raise AbiError(Status.INVALID_ARGUMENT, f"CPU {index}")
        cpu = scheduler.cpus[index]
        if not scheduler.is_online(cpu):
            raise AbiError(Status.UNSUPPORTED, f"CPU {index} is not online")
        cpu.requests += 1
        cpu.pending = True
        _ = scheduler.send_signal(cpu)

    patch.setattr(Scheduler, "request_resched", request_resched)


THE_LADDER: Final = (
    "tests/sim/test_prove_runs.py::test_the_selftest_system_is_green_on_two_simulated_cpus"
)
PROPERTIES: Final = "tests/property/test_ipc_bounds.py"
BELIEVED: Final = "test_only_the_one_asked_is_ever_believed_and_every_stray_is_counted_once"
BUFFERED: Final = "test_a_reply_buffer_never_exceeds_its_bounds_and_loses_nothing_uncounted"
BUGS: Final = (
    Bug(
        area="a missing flush in statefsd",
        what="`Store._flush` asks the device for nothing, and calls all that is committed durable",
        plant=_not_flushed,
        search=power_cuts,
        found_by="tests/sim/test_powercut.py::test_a_power_cut_anywhere_loses_nothing_acknowledged",
        why="loss: the store says that it lost ",
        unit="power cuts",
        needed=32,
        within=32,
    ),
    Bug(
        area="a skipped identity check",
        what="policyd's `Judge._requester` does not compare who asks with whom it asks for",
        plant=_requester_not_compared,
        search=ladder,
        found_by=THE_LADDER,
        why="#79 SELFTEST: policyd requester spoof denied FAIL",
        unit="boot",
        needed=1,
        within=1,
    ),
    Bug(
        area="a skipped identity check",
        what="`Correlator.is_foreign` compares the link of an answer, and not the service",
        plant=_answerer_not_compared,
        search=partial(examples, BELIEVED),
        found_by=f"{PROPERTIES}::{BELIEVED}",
        why="(target.peer.name, target.peer.link) == (what, link)",
        unit="examples",
        needed=68,
        within=EXAMPLES,
    ),
    Bug(
        area="a marker printed too early",
        what="`Supervisor.is_ready` does not wait for links: `init: ready` comes when all are up",
        plant=_links_not_awaited,
        search=ladder,
        found_by=THE_LADDER,
        why="#29 links that exist: ",
        unit="boot",
        needed=1,
        within=1,
    ),
    Bug(
        area="an unbounded queue",
        what="`ReplyBuffer.push` bounds the bytes of early replies, and not their number",
        plant=_replies_not_counted,
        search=partial(examples, BUFFERED),
        found_by=f"{PROPERTIES}::{BUFFERED}",
        why="len(buffer) <= count_max",
        unit="examples",
        needed=12,
        within=EXAMPLES,
    ),
    Bug(
        area="an unbounded queue",
        what="`Ipc.room` does not compare the messages of a link with its depth",
        plant=_depth_not_compared,
        search=ladder,
        found_by=THE_LADDER,
        why="the flood never met QueueFull",
        unit="boot",
        needed=1,
        within=1,
    ),
    Bug(
        area="a lost wake-up",
        what="`Scheduler.request_resched` sets no tick where the signal to an idle CPU is lost",
        plant=_no_tick_instead_of_a_signal,
        search=seeds,
        found_by="tests/sim/test_prove_campaign.py::"
        "test_a_sample_of_seeds_and_of_the_sweep_breaks_no_promise",
        why="init ended with code 1",  # it has killed a client that never said anything again
        unit="seeds",
        needed=5,
        within=SAMPLE_SEEDS,
    ),
)
