"""Both kernels do the same for the same operations, compared after every step.

The sim kernel is the readable one, so it plays the model; three rules have a counter of their
own beside it. Ranges are small, so that slots, depths and sizes collide with their limits.
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from nexus.abi import MESSAGE_SIZE_MAX, NO_WAIT, PAGE_SIZE, SLOTS_MAX
from nexus.testing.rig import Rig, linux_rig, sim_rig
from tests.stateful.interpreter import PAST, Operation
from tests.stateful.session import Session

EXAMPLES = 60
STEPS = 40

WHO = st.integers(0, 2)
CHILD = st.integers(1, 2)
SLOT = st.one_of(st.integers(0, 14), st.integers(0, 14), st.sampled_from((-1, 50, SLOTS_MAX)))
LINK = st.integers(0, 9)
SIZE = st.sampled_from((0, 1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 150, 200))
LARGE = st.sampled_from((MESSAGE_SIZE_MAX, MESSAGE_SIZE_MAX + 1))
DEADLINE = st.sampled_from((NO_WAIT, NO_WAIT, PAST))


class TwoKernels(RuleBasedStateMachine):
    """The same operations on a simulated and on a Linux system."""

    rigs: tuple[Rig, Rig]

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self.log: list[str] = []
        self.sent = [0, 0, 0]
        self.broken = False

    @initialize()
    def start(self) -> None:
        for rig in self.rigs:
            self.sessions.append(Session(rig))
        first = [session.first for session in self.sessions]
        assert first[0] == first[1]

    def do(self, who: int, *operation: Any) -> str:
        self.broken = True  # until both have answered the same
        answers = [session.do(who, operation) for session in self.sessions]
        line = f"{who} {operation} -> {answers[0]}"
        self.log.append(line)
        if answers[0] != answers[1]:
            history = "\n".join(self.log[-60:])
            names = [rig.name for rig in self.rigs]
            raise AssertionError(
                f"after\n{history}\n{names[0]}: {answers[0]}\n{names[1]}: {answers[1]}"
            )
        self.broken = False
        return answers[0]

    @rule(who=WHO)
    def endpoint_create(self, who: int) -> None:
        self.do(who, "endpoint_create")

    @rule(who=WHO, slot=SLOT)
    def endpoint_close(self, who: int, slot: int) -> None:
        self.do(who, "endpoint_close", slot)

    @rule(who=WHO, slot=SLOT)
    def close(self, who: int, slot: int) -> None:
        self.do(who, "close", slot)

    @rule(who=WHO, slot=SLOT)
    def clone(self, who: int, slot: int) -> None:
        self.do(who, "clone", slot)

    @rule(who=WHO, slot=SLOT, rights=st.integers(1, 16))
    def derive(self, who: int, slot: int, rights: int) -> None:
        self.do(who, "derive", slot, rights)

    @rule(who=WHO, slot=SLOT)
    def query(self, who: int, slot: int) -> None:
        self.do(who, "query", slot)

    @rule(
        who=WHO,
        slot=st.integers(1, 9),
        depth=st.integers(0, 3),
        size=st.sampled_from((0, 1, 8, 16, 64, 300)),
        delegations=st.integers(0, 2),
    )
    def link(self, who: int, slot: int, depth: int, size: int, delegations: int) -> None:
        self.do(who, "link", slot, depth, size, delegations)

    @rule(who=WHO, slot=st.integers(0, 12), size=SIZE, deadline=DEADLINE, again=st.integers(1, 3))
    def send(self, who: int, slot: int, size: int, deadline: int, again: int) -> None:
        for _ in range(again):
            if self.do(who, "send", slot, size, 64, deadline) == "sent":
                self.sent[who] += 1

    @rule(who=WHO, slot=SLOT, size=LARGE, first=st.sampled_from((0, 0xEF, 0xF0, 0xFF)))
    def send_at_the_limits(self, who: int, slot: int, size: int, first: int) -> None:
        if self.do(who, "send", slot, size, first, NO_WAIT) == "sent":
            self.sent[who] += 1

    @rule(who=WHO, slot=SLOT, way=WHO, size=SIZE, deadline=DEADLINE)
    def move(self, who: int, slot: int, way: int, size: int, deadline: int) -> None:
        if self.do(who, "move", slot, way, size, deadline) == "moved":
            self.sent[who] += 1

    @rule(
        who=WHO,
        slot=st.integers(1, 9),
        link=LINK,
        size_max=st.sampled_from((0, 8, 64, MESSAGE_SIZE_MAX)),
        deadline=DEADLINE,
    )
    def take(self, who: int, slot: int, link: int, size_max: int, deadline: int) -> None:
        self.do(who, "take", slot, link, size_max, deadline)

    @rule(who=WHO, slot=st.integers(1, 9))
    def drain(self, who: int, slot: int) -> None:
        self.do(who, "drain", slot)

    @rule(who=WHO)
    def drain_the_first(self, who: int) -> None:
        self.do(who, "drain", 1)

    @rule(who=WHO, slot=st.integers(0, 12), inbox=st.integers(0, 9), link=LINK, size=SIZE)
    def call(self, who: int, slot: int, inbox: int, link: int, size: int) -> None:
        if self.do(who, "call", slot, inbox, link, size).endswith("sent=True"):
            self.sent[who] += 1

    @rule(who=WHO, slot=st.integers(0, 12), size=SIZE)
    def reply_recv(self, who: int, slot: int, size: int) -> None:
        self.do(who, "reply_recv", slot, size)

    @rule(who=WHO, size=st.sampled_from((0, 1, PAGE_SIZE, PAGE_SIZE + 1, 1 << 20, (1 << 20) + 1)))
    def vmo(self, who: int, size: int) -> None:
        self.do(who, "vmo", size)

    @rule(
        who=WHO,
        slot=SLOT,
        offset=st.sampled_from((-1, 0, 5, PAGE_SIZE - 8, PAGE_SIZE)),
        size=SIZE,
    )
    def write(self, who: int, slot: int, offset: int, size: int) -> None:
        self.do(who, "write", slot, offset, size)

    @rule(who=WHO, slot=SLOT)
    def seal(self, who: int, slot: int) -> None:
        self.do(who, "seal", slot)

    @rule(who=WHO, slot=SLOT)
    def map(self, who: int, slot: int) -> None:
        self.do(who, "map", slot)

    @rule(who=CHILD, raw=st.integers(-1, 4))
    def qos(self, who: int, raw: int) -> None:
        self.do(who, "qos", raw)

    @rule(who=CHILD, how=st.sampled_from(("exit", "kill")))
    def end_and_start_again(self, who: int, how: str) -> None:
        self.do(who, how)
        self.sent[who] = 0

    @rule(who=WHO)
    def stats(self, who: int) -> None:
        self.do(who, "stats")

    def teardown(self) -> None:
        for session in self.sessions:
            if self.broken:
                session.kill()
            else:
                for who in range(3):
                    session.do(who, ("stats",))
                session.close()


# An allowed difference: only the simulator has one heap for all tasks. Here it does not run out.
HEAP = 64 << 20
SIMS = tuple(
    sim_rig(seed=seed, cpu_count=cpu_count, heap_size=HEAP)
    for seed, cpu_count in ((11, 1), (12, 2))
)


@pytest.mark.linux
@pytest.mark.parametrize("sim", SIMS, ids=lambda rig: rig.name)
def test_both_kernels_do_the_same_for_the_same_operations(sim: Rig) -> None:
    machine = type("Machine", (TwoKernels,), {"rigs": (sim, linux_rig())})

    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=EXAMPLES // len(SIMS), stateful_step_count=STEPS),
    )


def _script() -> list[tuple[int, Operation]]:
    """A fixed walk through every operation."""
    return [
        (0, ("link", 1, 2, 64, 1)),
        (0, ("move", 6, 1, 5, NO_WAIT)),
        (1, ("drain", 1)),
        (1, ("stats",)),
        (2, ("vmo", 5000)),
        (2, ("write", 5, 10, 20)),
        (2, ("seal", 5)),
        (2, ("move", 5, 1, 7, NO_WAIT)),
        (1, ("drain", 1)),
        (2, ("kill",)),
        (1, ("exit",)),
        (0, ("drain", 1)),
        (0, ("stats",)),
    ]


def test_two_seeds_and_cpu_counts_of_the_simulator_do_the_same() -> None:
    sessions = [Session(rig) for rig in SIMS]

    for who, operation in _script():
        answers = {session.do(who, operation) for session in sessions}
        assert len(answers) == 1, (who, operation, answers)

    for session in sessions:
        session.close()


def test_the_comparison_notices_a_difference() -> None:
    """A control experiment: a kernel with a deeper queue is found out."""

    class Deep(Session):
        def do(self, who: int, operation: Operation) -> str:
            if operation[0] == "link":
                name, slot, depth, *rest = operation
                operation = (name, slot, depth + 1, *rest)
            return super().do(who, operation)

    machine = type("Machine", (TwoKernels,), {"rigs": SIMS})
    run = machine()
    run.sessions = [Session(SIMS[0]), Deep(SIMS[0])]
    slot = int(run.do(0, "link", 1, 1, 64, 0).strip("(").split(",")[0])
    run.do(0, "send", slot, 5, 64, NO_WAIT)

    with pytest.raises(AssertionError, match="QUEUE_FULL"):
        run.do(0, "send", slot, 5, 64, NO_WAIT)

    run.teardown()
