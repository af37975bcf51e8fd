"""Posts over a link that others use, too: each brings a way back of its own, used once.

    derived --moved with its post--> at the peer --its answer--> answered --its end--> gone
    derived --not sent-------------> closed

A Bind over a link that somebody else has bound would take the way back from him. A request with a
moved link is answered over that, once, and the peer closes it.
"""

from typing import Any, Final

from nexus.abi import (
    AbiError,
    CapClose,
    LinkCreate,
    LinkId,
    LinkTerms,
    Nanos,
    Slot,
    Status,
    service_id,
)
from nexus.ipc.correlate import GENERATION_ANY, Peer, Pending, Taker
from nexus.ipc.exchange import Caller, Exchange
from nexus.ipc.outcome import CallFailure, Closed, Refused
from nexus.wire import Protocol, ReplyStatus, Request

ONE_SHOT_TERMS: Final = LinkTerms(1, 512, 0)  # of a way back: one acknowledgement, which is short
NO_LINK: Final = LinkId(0)  # the link as such is answered over no reply link; ids begin with 1
WAYS_MAX: Final = 16  # ways back of which the end has not been seen


class OneShots(Exchange):
    """Posts over `slot`; answers come over links derived from `reply` into the endpoint `inbox`.

    The three stay whose they are. `reply` has to allow a delegation for every post that is without
    an answer. Only `post` and `take` are of use: there is no reply link to call over.
    """

    def __init__(
        self, caller: Caller, protocol: Protocol, name: str, slot: Slot, reply: Slot, inbox: Slot
    ) -> None:
        self._slot = slot
        self._inbox = inbox
        self._reply = reply
        self._name = name
        self._ways: dict[LinkId, Peer] = {}
        super().__init__(caller, protocol, self._peer_by(NO_LINK))

    async def probe(self) -> bool:
        """Whether ways back into this task's own endpoint can be derived; nothing is sent."""
        try:
            way = await LinkCreate(self._reply, ONE_SHOT_TERMS)
        except AbiError:
            return False
        await self._close_unsent(way.slot)
        if way.link is None:
            return False
        _ = self._expect(way.link)
        await self.take(WAYS_MAX)
        return True

    async def post(
        self,
        request: Request[Any],
        deadline: Nanos,
        taker: Taker,
        *,
        move: Slot | None = None,
    ) -> Pending | Refused | CallFailure:
        """As Exchange.post; BUSY also while as many answers are open as `reply` has delegations."""
        assert move is None, "the way back is what moves with a one-shot"
        await self.take(WAYS_MAX)  # the end of a way back that has been used frees its delegation
        if not self.peer.alive:
            return Closed()
        if len(self._ways) >= WAYS_MAX:
            return Refused(ReplyStatus.BUSY)
        try:
            way = await LinkCreate(self._reply, ONE_SHOT_TERMS)
        except AbiError as error:
            if error.status is not Status.NO_SPACE:
                raise
            return Refused(ReplyStatus.BUSY)
        if way.link is None:
            await self._close_unsent(way.slot)
            self.peer.alive = False  # answers would reach somebody else
            return Closed()
        peer = self._expect(way.link)
        posted: Pending | Refused | CallFailure = Closed()
        try:
            posted = await self._send_now(peer, request, deadline, taker, way.slot)
        finally:
            if not isinstance(posted, Pending):
                await self._close_unsent(way.slot)
        return posted

    async def take(self, count_max: int) -> None:
        """Take answers, `count_max` at most, and the ends of the ways they came by."""
        taken = 0
        for link, peer in list(self._ways.items()):
            if taken < count_max:
                taken += await self._take_from(peer, count_max - taken + 1)
            if not self._is_open(peer):
                del self._ways[link]

    def end(self) -> None:
        """Expect nothing any more, answers and ends of ways; what is without one is Unknown."""
        for link in (NO_LINK, *self._ways):
            self._correlator.on_gone(link)
        self._ways.clear()

    async def _close_unsent(self, slot: Slot) -> None:
        """A way back that did not leave is closed here, or each lost post costs a slot (W35)."""
        await CapClose(slot)

    def _expect(self, link: LinkId) -> Peer:
        """An answer, or the end, comes by this way."""
        peer = self._ways[link] = self._peer_by(link)
        self._correlator.on_bound(peer)
        return peer

    def _peer_by(self, link: LinkId) -> Peer:
        """The peer, as the one that answers over `link`."""
        return Peer(
            self._name,
            slot=self._slot,
            inbox=self._inbox,
            link=link,
            service=service_id(self._name),
            generation=GENERATION_ANY,
            terms=LinkTerms(),
            reply_terms=LinkTerms(),
        )
