"""Both kernels do the same for the same operations, compared after every step.

Each kernel is the other's model: they share the rules of kernel/core and nothing that queues,
moves, wakes or ends. Ranges are small, so that slots, depths and sizes collide with their limits;
how often each kind of outcome was reached is counted, and a zero is red.
"""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, settings
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
STEPS = 60

WHO = st.integers(0, 2)
CHILD = st.integers(1, 2)
LOW = st.integers(0, 14)
WILD = st.sampled_from((-1, 0, 1, 3, 7, 50, SLOTS_MAX))
# Mostly an index into what the task is known to hold, now and then any slot at all.
PICK = st.one_of(LOW, LOW, LOW, WILD.map(lambda slot: ("wild", slot)))
SIZE = st.sampled_from((1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 150, 200, 301, 0))
SIZES = st.lists(SIZE, min_size=1, max_size=5)
LARGE = st.sampled_from((MESSAGE_SIZE_MAX, MESSAGE_SIZE_MAX + 1))
DEADLINE = st.sampled_from((NO_WAIT, NO_WAIT, PAST))
CAP = re.compile(r"cap=(\d+)")

Pick = int | tuple[str, int]

# What a run must have seen at least once: operation, and a part of its result.
OUTCOMES = (
    ("link", "("), ("link", "NO_SPACE"), ("link", "INVALID_ARGUMENT"), ("link", "PERMISSION"),
    ("send", "sent"), ("send", "QUEUE_FULL"), ("send", "NO_SPACE"), ("send", "TIMED_OUT"),
    ("send", "NO_SUCH_ENDPOINT"), ("send", "PERMISSION"), ("send", "INVALID_ARGUMENT"),
    ("move", "moved"), ("move", "QUEUE_FULL"), ("move", "NO_SPACE"), ("move", "PERMISSION"),
    ("take", " from "), ("take", "gone"), ("take", "QUEUE_EMPTY"), ("take", "TIMED_OUT"),
    ("take", "INVALID_ARGUMENT"), ("drain", "cap=None"), ("drain", "gone"), ("drain", "new"),
    ("call", "sent=True"), ("call", "QUEUE_FULL sent=False"), ("reply_recv", "reply=None"),
    ("vmo", "NO_SPACE"), ("map", ":"), ("map", "PERMISSION"), ("write", "written"),
    ("share", ":"), ("share", "PERMISSION"), ("watch", ":"), ("watch", "PERMISSION"),
    ("policy_raise", "available=True"), ("policy_raise", "PERMISSION"),
    ("policy_read", "available=True"), ("policy_read", "available=False"),
    ("query", "CapInfo"), ("qos", "PERMISSION"), ("exit", "5.0"), ("kill", "0.9"),
)  # fmt: skip


class TwoKernels(RuleBasedStateMachine):
    """The same operations on a simulated and on a Linux system."""

    rigs: tuple[Rig, Rig]
    reached: Counter[tuple[str, str]]

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self.log: list[str] = []
        self.broken = False
        # What a task is believed to hold, by what it was told; only guides the choice of slots.
        self.held: list[dict[int, str]] = [{}, {}, {}]
        self.met: list[list[tuple[int, int]]] = [[], [], []]  # endpoint and number of own links

    @initialize()
    def start(self) -> None:
        for rig in self.rigs:
            self.sessions.append(Session(rig))
        first = [session.first for session in self.sessions]
        assert first[0] == first[1]
        for who in range(3):
            self.begin(who)

    def begin(self, who: int) -> None:
        """What every task holds when it starts: its endpoint, and ways."""
        self.held[who] = {1: "endpoint", 2: "link", 3: "link", 4: "link"}
        self.met[who] = [(1, 0)]

    def do(self, who: int, *operation: Any) -> str:
        self.broken = True  # until both have answered the same
        answers = [session.do(who, operation) for session in self.sessions]
        self.log.append(f"{who} {operation} -> {answers[0]}")
        if answers[0] != answers[1]:
            history = "\n".join(self.log[-60:])
            names = [rig.name for rig in self.rigs]
            raise AssertionError(
                f"after\n{history}\n{names[0]}: {answers[0]}\n{names[1]}: {answers[1]}"
            )
        self.broken = False
        for outcome in OUTCOMES:
            if operation[0] == outcome[0] and outcome[1] in answers[0]:
                self.reached[outcome] += 1
        for slot in CAP.findall(answers[0]):
            self.held[who][int(slot)] = "moved"
        return answers[0]

    def pick(self, who: int, choice: Pick, *kinds: str) -> int:
        """The slot of a choice among what the task holds of some kinds; newest first."""
        if isinstance(choice, tuple):
            return choice[1]
        slots = [slot for slot, kind in self.held[who].items() if kind in kinds]
        return slots[-1 - choice % len(slots)] if slots else choice

    def keep(self, who: int, answer: str, kind: str) -> None:
        """Note a slot that an operation has filled."""
        if answer.isdigit():
            self.held[who].pop(int(answer), None)
            self.held[who][int(answer)] = kind

    @rule(who=WHO)
    def endpoint_create(self, who: int) -> None:
        self.keep(who, self.do(who, "endpoint_create"), "endpoint")

    @rule(who=WHO, choice=PICK)
    def endpoint_close(self, who: int, choice: Pick) -> None:
        slot = self.pick(who, choice, "endpoint", "link")
        if self.do(who, "endpoint_close", slot) == "closed":
            del self.held[who][slot]

    @rule(who=WHO, choice=PICK)
    def close(self, who: int, choice: Pick) -> None:
        slot = self.pick(who, choice, "endpoint", "link", "vmo", "moved")
        if self.do(who, "close", slot) == "closed":
            self.held[who].pop(slot, None)

    @rule(who=WHO, choice=PICK, rights=st.one_of(st.none(), st.integers(1, 16)))
    def clone_or_derive(self, who: int, choice: Pick, rights: int | None) -> None:
        slot = self.pick(who, choice, "link", "vmo", "moved", "endpoint")
        kind = self.held[who].get(slot, "link")
        operation = ("clone", slot) if rights is None else ("derive", slot, rights)
        self.keep(who, self.do(who, *operation), kind)

    @rule(who=WHO, choice=PICK)
    def query(self, who: int, choice: Pick) -> None:
        self.do(who, "query", self.pick(who, choice, "vmo", "moved", "link"))

    @rule(
        who=WHO,
        choice=PICK,
        own=st.booleans(),
        depth=st.sampled_from((1, 1, 2, 3, 0, 257)),
        size=st.sampled_from((8, 16, 64, 300, 1, 0)),
        delegations=st.integers(0, 2),
    )
    def link(
        self, who: int, choice: Pick, own: bool, depth: int, size: int, delegations: int
    ) -> None:
        slot = self.pick(who, choice, *(("endpoint",) if own else ("link", "moved")))
        answer = self.do(who, "link", slot, depth, size, delegations)
        if answer.startswith("("):
            made, number = answer.strip("()").split(", ")
            self.keep(who, made, "link")
            if number != "None":
                self.met[who].append((slot, int(number)))

    @rule(who=WHO, choice=PICK, size=SIZE, deadline=DEADLINE, again=st.integers(1, 4))
    def send(self, who: int, choice: Pick, size: int, deadline: int, again: int) -> None:
        slot = self.pick(who, choice, "link", "moved")
        for _ in range(again):
            self.do(who, "send", slot, size, 64, deadline)

    @rule(who=WHO, choice=PICK, size=LARGE, first=st.sampled_from((0, 0xEF, 0xF0, 0xFF)))
    def send_at_the_limits(self, who: int, choice: Pick, size: int, first: int) -> None:
        self.do(who, "send", self.pick(who, choice, "link"), size, first, NO_WAIT)

    @rule(who=WHO, choice=PICK, way=WHO, size=SIZE, deadline=DEADLINE)
    def move(self, who: int, choice: Pick, way: int, size: int, deadline: int) -> None:
        slot = self.pick(who, choice, "link", "vmo", "moved", "vmo", "endpoint")
        if self.do(who, "move", slot, way, size, deadline) == "moved":
            self.held[who].pop(slot, None)

    @rule(
        who=WHO,
        choice=LOW,
        wild=st.one_of(st.none(), st.none(), st.none(), LOW),
        size_max=st.sampled_from((MESSAGE_SIZE_MAX, MESSAGE_SIZE_MAX, 0, 8, 64)),
        deadline=DEADLINE,
    )
    def take(self, who: int, choice: int, wild: int | None, size_max: int, deadline: int) -> None:
        slot, number = self.met[who][-1 - choice % len(self.met[who])]
        self.do(who, "take", slot if wild is None else wild, number, size_max, deadline)

    @rule(who=WHO, choice=PICK)
    def drain(self, who: int, choice: Pick) -> None:
        self.do(who, "drain", self.pick(who, choice, "endpoint"))

    @rule(who=WHO)
    def drain_the_first(self, who: int) -> None:
        self.do(who, "drain", 1)

    @rule(who=WHO, choice=PICK, link=LOW, size=SIZE)
    def call(self, who: int, choice: Pick, link: int, size: int) -> None:
        inbox, number = self.met[who][-1 - link % len(self.met[who])]
        self.do(who, "call", self.pick(who, choice, "link", "moved"), inbox, number, size)

    @rule(who=WHO, choice=PICK, size=SIZE)
    def reply_recv(self, who: int, choice: Pick, size: int) -> None:
        self.do(who, "reply_recv", self.pick(who, choice, "link", "moved"), size)

    @rule(
        who=WHO,
        size=st.sampled_from((PAGE_SIZE, PAGE_SIZE + 1, 1, 1 << 20, 0, (1 << 20) + 1)),
        offset=st.sampled_from((0, 5, PAGE_SIZE - 8)),
    )
    def vmo(self, who: int, size: int, offset: int) -> None:
        answer = self.do(who, "vmo", size)
        self.keep(who, answer, "vmo")
        if size == 1 << 20:  # the budget holds one of these
            self.keep(who, self.do(who, "vmo", size), "vmo")
        if answer.isdigit():
            self.do(who, "write", int(answer), offset, 8)

    @rule(
        who=WHO,
        choice=PICK,
        offset=st.sampled_from((-1, 0, 5, PAGE_SIZE - 8, PAGE_SIZE)),
        size=SIZE,
    )
    def write(self, who: int, choice: Pick, offset: int, size: int) -> None:
        self.do(who, "write", self.pick(who, choice, "vmo", "moved"), offset, size)

    @rule(who=WHO, choice=PICK, share=st.booleans())
    def seal_or_share(self, who: int, choice: Pick, share: bool) -> None:
        slot = self.pick(who, choice, "vmo", "moved")
        if share:
            self.do(who, "share", slot, 64)
        else:
            self.do(who, "seal", slot)

    @rule(who=WHO, choice=PICK)
    def look(self, who: int, choice: Pick) -> None:
        slot = self.pick(who, choice, "vmo", "moved")
        self.do(who, "map", slot)
        self.do(who, "watch", slot)

    # Walks through several operations, so that the deep states are reached as well.

    def make_link(self, who: int, depth: int, size: int, delegations: int) -> tuple[int, int]:
        """A link into the task's first endpoint: slot and number, (50, 0) if it was refused."""
        answer = self.do(who, "link", 1, depth, size, delegations)
        if not answer.startswith("("):
            return 50, 0
        made, number = (int(part) for part in answer.strip("()").split(", "))
        self.keep(who, str(made), "link")
        self.met[who].append((1, number))
        return made, number

    @rule(who=WHO, depth=st.integers(1, 3), size=st.sampled_from((8, 16, 64)), sizes=SIZES)
    def fill_and_empty_a_link(self, who: int, depth: int, size: int, sizes: list[int]) -> None:
        slot, number = self.make_link(who, depth, size, 0)
        for each in sizes:
            self.do(who, "send", slot, each, 64, NO_WAIT)
        self.do(who, "call", slot, 1, number, 7)
        self.do(who, "take", 1, number, 6, NO_WAIT)
        self.do(who, "take", 1, number, MESSAGE_SIZE_MAX, PAST)
        for each in sizes:
            self.do(who, "send", slot, each, 64, PAST)

    @rule(who=WHO, again=st.integers(0, 3))
    def end_a_link(self, who: int, again: int) -> None:
        slot, number = self.make_link(who, 2, 300, 1)
        for _ in range(again):
            self.do(who, "send", slot, 9, 64, NO_WAIT)
        self.do(who, "close", slot)
        self.held[who].pop(slot, None)
        for _ in range(again + 1):
            self.do(who, "take", 1, number, MESSAGE_SIZE_MAX, NO_WAIT)

    @rule(who=WHO, way=WHO, used=st.booleans(), alias=st.booleans(), delegations=st.integers(0, 2))
    def give_a_link(self, who: int, way: int, used: bool, alias: bool, delegations: int) -> None:
        slot, number = self.make_link(who, 2, 64, delegations)
        if used:
            self.do(who, "send", slot, 9, 64, NO_WAIT)
        if alias:
            self.keep(who, self.do(who, "clone", slot), "link")
        if self.do(who, "move", slot, way, 9, NO_WAIT) == "moved":
            self.held[who].pop(slot, None)
            self.do(way, "drain", 1)
            for given in [s for s, kind in self.held[way].items() if kind == "moved"][-2:]:
                self.do(way, "link", given, 1, 8, 0)
                self.do(way, "send", given, 9, 64, NO_WAIT)
        self.do(who, "take", 1, number, MESSAGE_SIZE_MAX, NO_WAIT)
        self.do(who, "drain", 1)

    @rule(who=WHO, way=WHO, how=st.sampled_from(("seal", "share", "neither")))
    def give_memory(self, who: int, way: int, how: str) -> None:
        answer = self.do(who, "vmo", 5000)
        if not answer.isdigit():
            return
        slot = int(answer)
        self.keep(who, answer, "vmo")
        self.do(who, "write", slot, 4090, 20)
        self.do(who, "map", slot)
        if how == "seal":
            self.do(who, "seal", slot)
            self.do(who, "map", slot)
        elif how == "share":
            self.do(who, "share", slot, 64)
            self.do(who, "share", slot, 65)
            self.do(who, "watch", slot)
        self.do(who, "query", slot)
        if self.do(who, "move", slot, way, 9, NO_WAIT) == "moved":
            self.held[who].pop(slot, None)
            self.do(way, "drain", 1)
            for given in [s for s, kind in self.held[way].items() if kind == "moved"][-1:]:
                self.do(way, "map", given)
                self.do(way, "watch", given)
                self.do(way, "query", given)

    @rule(who=WHO, way=WHO, size=SIZE, deadline=DEADLINE, count=st.integers(2, 4))
    def crowd_a_way(self, who: int, way: int, size: int, deadline: int, count: int) -> None:
        for _ in range(count):
            slot, _number = self.make_link(who, 1, 16, 0)
            if self.do(who, "move", slot, way, size, deadline) == "moved":
                self.held[who].pop(slot, None)
        self.do(who, "stats")
        self.do(way, "drain", 1)

    @rule(who=WHO, count=st.integers(1, 3))
    def close_an_endpoint_with_links(self, who: int, count: int) -> None:
        answer = self.do(who, "endpoint_create")
        if not answer.isdigit():
            return
        self.do(who, "send", int(answer), 7, 64, NO_WAIT)  # an endpoint is no link
        made = [self.do(who, "link", int(answer), 1, 8, 0) for _ in range(count)]
        slots = [int(m.strip("()").split(", ")[0]) for m in made if m.startswith("(")]
        for slot in slots:
            self.do(who, "send", slot, 7, 64, NO_WAIT)
        self.do(who, "endpoint_close", int(answer))
        for slot in slots:
            self.do(who, "send", slot, 7, 64, NO_WAIT)
            self.keep(who, str(slot), "link")

    @rule(who=CHILD, raw=st.integers(-1, 4))
    def qos(self, who: int, raw: int) -> None:
        self.do(who, "qos", raw)

    @rule(who=WHO, available=st.booleans())
    def raise_and_read_the_policy_page(self, who: int, available: bool) -> None:
        self.do(who, "policy_raise", int(available))
        for reader in range(3):
            self.do(reader, "policy_read")

    @rule(who=CHILD, how=st.sampled_from(("exit", "kill")))
    def end_and_start_again(self, who: int, how: str) -> None:
        self.do(who, how)
        self.begin(who)

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
def test_both_kernels_do_the_same_for_the_same_operations() -> None:
    reached: Counter[tuple[str, str]] = Counter()
    for sim in SIMS:
        machine = type("Machine", (TwoKernels,), {"rigs": (sim, linux_rig()), "reached": reached})

        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES // len(SIMS),
                stateful_step_count=STEPS,
                # The failure shows what was done; to shrink it takes minutes of real processes.
                phases=(Phase.explicit, Phase.generate),
            ),
        )

    assert [outcome for outcome in OUTCOMES if not reached[outcome]] == []


def _script() -> list[tuple[int, Operation]]:
    """A fixed walk through every operation."""
    return [
        (0, ("link", 1, 2, 64, 1)),
        (0, ("move", 6, 1, 5, NO_WAIT)),
        (1, ("drain", 1)),
        (1, ("stats",)),
        (0, ("policy_raise", 1)),
        (1, ("policy_raise", 0)),
        (2, ("policy_read",)),
        (2, ("vmo", 5000)),
        (2, ("write", 5, 10, 20)),
        (2, ("seal", 5)),
        (2, ("move", 5, 1, 7, NO_WAIT)),
        (1, ("drain", 1)),
        (2, ("vmo", 5000)),
        (2, ("share", 5, 20)),
        (2, ("watch", 5)),
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

    machine = type("Machine", (TwoKernels,), {"rigs": SIMS, "reached": Counter()})
    run = machine()
    run.sessions = [Session(SIMS[0]), Deep(SIMS[0])]
    slot = int(run.do(0, "link", 1, 1, 64, 0).strip("(").split(",")[0])
    run.do(0, "send", slot, 5, 64, NO_WAIT)

    with pytest.raises(AssertionError, match="QUEUE_FULL"):
        run.do(0, "send", slot, 5, 64, NO_WAIT)

    run.teardown()
