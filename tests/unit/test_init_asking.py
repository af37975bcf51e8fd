"""Questions of init to its services: each that was sent ends in exactly one `done`."""

from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import INIT_NAME, LinkId, Message, Nanos, Pid, QosClass, Sender, Slot
from nexus.init.asking import Asking
from nexus.init.plan import make_plan
from nexus.init.record import Record
from nexus.init.system import parse
from nexus.ipc import Spans
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import MetaStatus, Stop, Stopping
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import CheckFor, Decision, Reason, Verdict
from nexus.wire import ReplyStatus, answer, encode

SYSTEM: Final = b"""
[system]
name = "test"

[service.timed]
program = "timed"
"""
DEADLINE: Final = Nanos(1_000)
LINK: Final = LinkId(7)


def finish(work: Coroutine[Any, Any, None]) -> None:
    """Run what needs no kernel."""
    with pytest.raises(StopIteration):
        work.send(None)


class Asked:
    """A question that is out, and every end it met."""

    def __init__(self) -> None:
        (planned,) = make_plan(parse(SYSTEM, Path("test.toml"))).services
        self.record = Record(planned=planned, pid=Pid(5), generation=1, answers=LINK)
        self.asking = Asking(Spans(b"", INIT_NAME, 1))
        self.ends: list[tuple[Any, int]] = []
        self.nonce, self.frame = self.asking.frame(self.record, Stop(), DEADLINE, self.on_end)

    async def on_end(self, reply: Any, nonce: int) -> None:
        self.ends.append((reply, nonce))

    def tell(self, status: int, body: bytes) -> None:
        """The service answers."""
        sender = Sender(self.record.planned.service, Pid(5), 1, QosClass.NORMAL)
        data = bytes(answer(self.frame, status, body))
        finish(self.asking.on_message(Message(data, sender, LINK, None, Nanos(1), Slot(2))))

    def let_pass(self, now: int) -> None:
        finish(self.asking.on_time(Nanos(now)))

    def end_instance(self) -> None:
        finish(self.asking.forget(self.record))


def test_an_answer_ends_a_question_once() -> None:
    asked = Asked()

    asked.tell(ReplyStatus.OK, encode(Stopping()))
    asked.tell(ReplyStatus.OK, encode(Stopping()))
    asked.let_pass(DEADLINE)
    asked.end_instance()

    assert asked.ends == [(Stopping(), asked.nonce)]
    assert asked.asking.strays == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (ReplyStatus.OK, b"\xc1"),
        (ReplyStatus.OK, b""),
        (ReplyStatus.DENIED, b"x"),
        (MetaStatus.NOT_READY, b""),
        (0x7777, b""),
    ],
)
def test_an_answer_that_is_none_ends_a_question_without_a_reply(status: int, body: bytes) -> None:
    asked = Asked()

    asked.tell(status, body)
    asked.let_pass(DEADLINE)

    assert asked.ends == [(None, asked.nonce)]
    assert asked.asking.malformed == 1


def test_a_question_to_policyd_is_answered_in_its_protocol_only() -> None:
    asked = Asked()
    question = CheckFor(1, "proof.control", "")
    nonce, frame = asked.asking.frame(asked.record, question, DEADLINE, asked.on_end)
    decision = Decision(Verdict.DENY, Reason.POLICY, 1, 1)
    sender = Sender(asked.record.planned.service, Pid(5), 1, QosClass.NORMAL)
    reply = bytes(answer(frame, ReplyStatus.OK, encode(decision)))
    other = reply[:4] + META.number.to_bytes(2, "little") + reply[6:]  # the protocol's number

    finish(asked.asking.on_message(Message(other, sender, LINK, None, Nanos(1), Slot(2))))
    early = list(asked.ends)
    finish(asked.asking.on_message(Message(reply, sender, LINK, None, Nanos(1), Slot(2))))

    assert frame[:8] == POLICYD.codecs[CheckFor].prefix
    assert early == []
    assert asked.ends == [(decision, nonce)]
    assert asked.asking.strays == 1


def test_a_question_expires_at_its_deadline_and_not_before() -> None:
    asked = Asked()
    assert asked.asking.next_time() == DEADLINE

    asked.let_pass(DEADLINE - 1)
    early = list(asked.ends)
    asked.let_pass(DEADLINE)
    asked.let_pass(DEADLINE)

    assert early == []
    assert asked.ends == [(None, asked.nonce)]
    assert asked.asking.next_time() is None


def test_the_end_of_the_instance_ends_its_questions() -> None:
    asked = Asked()

    asked.end_instance()
    asked.let_pass(DEADLINE)

    assert asked.ends == [(None, asked.nonce)]


def test_a_question_that_could_not_be_sent_ends_with_its_sender_and_not_here() -> None:
    asked = Asked()

    asked.asking.withdraw(asked.nonce)
    asked.let_pass(DEADLINE)

    assert asked.ends == []
