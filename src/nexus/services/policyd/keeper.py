"""The policy in force: taken from init, given to init, and known by the generation of the page.

    none --taken from init--> held(generation) --the page's generation is another--> outdated
    outdated --taken from init--> held            outdated --init does not answer--> outdated

init keeps the policy, so a restart of policyd loses nothing. A page that moved on may stand for
another policy: nothing is decided before init was asked.
"""

from dataclasses import dataclass
from typing import Final

import msgspec

from nexus.abi import INIT_NAME, CapClose, Exit, Nanos, Now, PolicyRead, Slot
from nexus.ipc import (
    Answer,
    Bulk,
    CallFailure,
    Closed,
    Exchange,
    Peers,
    Refused,
    RetryBudget,
    RetryTokens,
    Stale,
    accept_bulk,
    deadline_after,
    nested_deadline,
    offer_bulk,
    retry_until,
)
from nexus.protocols.init import GetPolicy, InitStatus, PolicyGiven, PolicyTaken, SetPolicy
from nexus.protocols.policy import Policy, decode_policy
from nexus.protocols.policyd import PolicydStatus
from nexus.services.policyd.judge import Judge
from nexus.wire import ReplyStatus

ASK_MAX: Final = Nanos(400_000_000)  # ns for one answer of init; less than who waits for us waits
START_ATTEMPTS_MAX: Final = 6  # with doubling pauses; init is alive, or there is no system
EXIT_NO_INIT: Final = 3  # the control link is closed
START_BACKOFF: Final = Nanos(10_000_000)  # ns
NONE_YET: Final = -1  # no generation: whatever the page says, init has to be asked

Failure = Refused | CallFailure


@dataclass(frozen=True, slots=True)
class Unreadable:
    """init gave what is no policy."""

    detail: str


class Keeper:
    """Holds the policy and its judge; `judge` is that of `generation`."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._tokens = RetryTokens()
        self.judge: Judge | None = None
        self.generation = NONE_YET

    @property
    def digest(self) -> str:
        """The policy's digest; empty before there is one."""
        return "" if self.judge is None else self.judge.policy.digest

    async def start(self, until: Nanos) -> Failure | Unreadable | None:
        """Take the policy from init, with a few attempts; None, or why there is none."""
        budget = RetryBudget(attempts_max=START_ATTEMPTS_MAX, backoff=START_BACKOFF, deadline=until)

        async def attempt() -> Failure | Unreadable | None:
            return await self._take(until)

        return await retry_until(attempt, _may_pass, budget, self._tokens)

    async def current(self, until: Nanos) -> Judge | None:
        """The judge of the policy that the page stands for now; None if init did not give it."""
        word = await PolicyRead()
        if word.generation != self.generation and await self._take(until) is not None:
            return None
        return self.judge

    async def replace(self, data: bytes, until: Nanos) -> PolicydStatus | None:
        """Give init another policy and put it in force; None, or why the old one stays.

        If init has taken it and its answer is missing, the page has moved on all the same: init
        is asked before the next decision what it has.
        """
        try:
            policy = decode_policy(data)
        except msgspec.DecodeError:
            return PolicydStatus.BAD_POLICY
        if not self._is_of_this_system(policy):
            return PolicydStatus.BAD_POLICY
        encoded = policy.encoded()
        slot = await offer_bulk(encoded)
        if slot is None:
            return PolicydStatus.INIT_REFUSED
        match await self._give(slot, len(encoded), until):
            case Answer(reply=PolicyTaken(generation=generation)):
                self.judge = Judge(policy)
                self.generation = generation
                return None
            case Refused(status=status):
                refused = status is InitStatus.BAD_POLICY
                return PolicydStatus.BAD_POLICY if refused else PolicydStatus.INIT_REFUSED
            case _:
                return PolicydStatus.INIT_REFUSED

    async def _give(
        self, slot: Slot, size: int, until: Nanos
    ) -> Answer[PolicyTaken] | Refused | CallFailure:
        """init's answer to SetPolicy; what was not sent is closed here."""
        control = await self._control(until)
        if not isinstance(control, Exchange):
            await CapClose(slot)
            return control
        outcome = await control.ask(SetPolicy(size), until, move=slot)
        if isinstance(outcome, Closed | Stale):
            await CapClose(slot)
        return outcome

    async def _take(self, until: Nanos) -> Failure | Unreadable | None:
        """Ask init once; None when the policy is held."""
        until = nested_deadline(until, deadline_after(await Now(), ASK_MAX))
        control = await self._control(until)
        if not isinstance(control, Exchange):
            return control
        outcome = await control.ask(GetPolicy(), until)
        if isinstance(outcome, Closed):
            # Without the link to init nothing is decided. If init lives, it starts another.
            await Exit(EXIT_NO_INIT)
        if not isinstance(outcome, Answer):
            return outcome
        return await self._read(outcome)

    async def _read(self, answer: Answer[PolicyGiven]) -> Unreadable | None:
        bulk = await accept_bulk(answer.cap, 0, answer.reply.size)
        if not isinstance(bulk, Bulk):
            return Unreadable(bulk.value)
        try:
            policy = decode_policy(bytes(bulk.view))
        except msgspec.DecodeError as error:
            return Unreadable(str(error))
        finally:
            await bulk.release()
        self.judge = Judge(policy)
        self.generation = answer.reply.generation
        return None

    async def _control(self, until: Nanos) -> Exchange | CallFailure:
        return await self._peers.control(until)

    def _is_of_this_system(self, policy: Policy) -> bool:
        """Whether it has init's services, all of them and no other, and no rights for others."""
        assert self.judge is not None
        services = set(self.judge.policy.services)
        return set(policy.services) == services and policy.allow.keys() <= services | {INIT_NAME}


def _may_pass(outcome: Failure | Unreadable | None) -> bool:
    """Whether another attempt can end better."""
    if isinstance(outcome, Refused):
        return outcome.status in (ReplyStatus.BUSY, ReplyStatus.EXPIRED)
    return isinstance(outcome, CallFailure)
