"""operator's relay on the tiny kernel: what others in its task have met belongs to it."""

from collections.abc import Awaitable, Callable
from typing import Any

from nexus.abi import EndpointCreate, LinkCreate, LinkId, Now, Recv, Send
from nexus.ipc import Client, Peer, Peers, RetryBudget
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Bound, GetStatus
from nexus.services.operator.relay import Relay, Spanned
from nexus.wire import HEADER_SIZE, answer, encode
from tests.fakes.adder import ADDER, Later, Sum
from tests.fakes.pair import FAR
from tests.fakes.route import System

CLIENT = LinkId(1)
CODEC = META.codecs[GetStatus]
INNER = CODEC.prefix + bytes(HEADER_SIZE - len(CODEC.prefix))
BUDGET = RetryBudget(attempts_max=3, backoff=1_000_000, deadline=FAR)  # type: ignore[arg-type]


def with_an_answer_in_the_buffer(body: Callable[[Relay, Peers], Awaitable[Any]]) -> Any:
    """Run `body` when another call's wait has met the answer of a hostile service, and with it a
    capability; also how many slots the task has more than before."""
    system = System("other")
    task = system.kernel.task("hostile")
    boot = system.kernel.boot(task, system.init)
    system.services["hostile"] = task

    async def hostile() -> int:
        bind = await Recv((boot.endpoint,), FAR)
        assert bind.cap is not None
        await Send(bind.cap, answer(bind.data, 0, encode(Bound(1))))
        asked = await Recv((boot.endpoint,), FAR)
        unasked = await LinkCreate(await EndpointCreate())
        await Send(bind.cap, answer(asked.data, 0, b""), move=unasked.slot)
        _ = await Recv((boot.endpoint,), FAR)
        return 0

    system.kernel.start(task, hostile())

    async def main(peers: Peers) -> Any:
        other = await peers.connect("other", ADDER, BUDGET)
        assert isinstance(other, Client)
        relay = Relay(peers, ["hostile"])
        peer = await relay.reach("hostile", await Now())
        assert isinstance(peer, Peer)
        table = next(each.table for each in system.kernel.tasks if each.name == "client")
        slots = len(table)
        span = Spanned(bytes(24))
        sent = await relay.send(
            peer, INNER, FAR, client=CLIENT, outer=INNER, codec=CODEC, span=span
        )
        assert sent is None
        assert await other.finish(await other.start(Later(1, 5_000_000), FAR)) == Sum(1)
        assert len(peers.caller.correlator.buffer) == 1
        return await body(relay, peers), len(table) - slots

    return system.client(main)


def test_the_capability_of_an_answer_that_was_met_elsewhere_is_given_to_be_closed() -> None:
    async def body(relay: Relay, _peers: Peers) -> Any:
        (ended,) = relay.swept()
        return ended.answer is not None, ended.cap is not None

    assert with_an_answer_in_the_buffer(body) == ((True, True), 1)


def test_a_client_that_goes_leaves_no_answer_in_the_buffer() -> None:
    async def body(relay: Relay, peers: Peers) -> Any:
        (ended,) = relay.forget_client(CLIENT)
        return ended.cap is not None, len(peers.caller.correlator.buffer), len(relay)

    assert with_an_answer_in_the_buffer(body) == ((True, 0, 0), 1)
