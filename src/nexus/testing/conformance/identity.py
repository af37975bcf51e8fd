"""Promise 1: the receiver learns the sender from the kernel."""

from nexus.abi import (
    INIT_NAME,
    BootImage,
    Call,
    LinkCreate,
    LinkTerms,
    QosClass,
    Send,
    Sender,
    SetTaskQos,
    Slot,
    service_id,
)
from nexus.testing.conformance.steps import control, ended_well, gone, soon, start, take, tell
from nexus.testing.rig import Rig


def test_a_request_carries_the_kernels_word_about_its_sender(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await tell(boot, b"I am init-lite, service 1, pid 1")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "asker")

        message = await take(boot.endpoint)

        assert message.sender == Sender(
            service_id("asker"), spawned.pid, spawned.generation, QosClass.NORMAL
        )
        assert message.link == spawned.link
        assert message.source == boot.endpoint
        assert message.cap is None
        await ended_well(spawned)

    rig.run(root, programs={"asker": child})


def test_a_reply_carries_the_kernels_word_about_its_sender(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        request = await take(boot.endpoint)
        assert request.sender.service == service_id(INIT_NAME)
        assert request.sender.generation == 1
        await tell(boot, b"reply to " + request.data)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "server")

        reply = await Call(spawned.slot, b"ask", boot.endpoint, spawned.link, await soon())

        assert reply.data == b"reply to ask"
        assert reply.sender.service == service_id("server")
        assert reply.sender.pid == spawned.pid
        await ended_well(spawned)

    rig.run(root, programs={"server": child})


def test_a_message_to_oneself_carries_ones_own_identity(rig: Rig) -> None:
    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        await Send(link.slot, b"to myself")

        message = await take(boot.endpoint)

        assert message.sender.service == boot.service == service_id(INIT_NAME)
        assert message.sender.pid == boot.pid
        assert message.link == link.link

    rig.run(root)


def test_a_message_keeps_its_sender_after_the_sender_was_reaped(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        for index in range(3):
            await tell(boot, b"last words %d" % index)

    async def root(boot: BootImage) -> None:
        first = await start(boot, "first", program="child")
        await ended_well(first)
        second = await start(boot, "second", program="child")
        await ended_well(second)

        words = [await take(boot.endpoint) for _ in range(6)]

        for spawned, name in ((first, "first"), (second, "second")):
            mine = [word for word in words if word.link == spawned.link]
            assert [word.data for word in mine] == [b"last words %d" % i for i in range(3)]
            assert {word.sender.service for word in mine} == {service_id(name)}
            assert {word.sender.pid for word in mine} == {spawned.pid}

    rig.run(root, programs={"child": child})


def test_the_generation_counts_the_starts_of_a_service(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await tell(boot, b"%d" % boot.generation)

    async def root(boot: BootImage) -> None:
        for generation in (1, 2, 3):
            spawned = await start(boot, "phoenix")
            message = await take(boot.endpoint, link=spawned.link)
            assert spawned.generation == generation
            assert message.sender.generation == generation
            assert message.data == b"%d" % generation
            await ended_well(spawned)
        other = await start(boot, "other", program="phoenix")
        assert other.generation == 1
        await ended_well(other)

    rig.run(root, programs={"phoenix": child})


def test_a_moved_link_speaks_for_its_holder(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        await Send(given.cap, b"over a link that was root's")

    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        spawned = await start(boot, "holder")
        await Send(spawned.slot, b"take this", move=link.slot)

        message = await take(boot.endpoint, link=link.link)

        assert message.sender.service == service_id("holder")
        assert message.sender.pid == spawned.pid
        await ended_well(spawned)

    rig.run(root, programs={"holder": child})


def test_two_services_are_told_apart_on_links_of_one_endpoint(rig: Rig) -> None:
    async def left(boot: BootImage) -> None:
        await tell(boot, b"left")

    async def right(boot: BootImage) -> None:
        await tell(boot, b"right")

    async def root(boot: BootImage) -> None:
        spawned = {name: await start(boot, name) for name in ("left", "right")}

        for name, each in spawned.items():
            message = await take(boot.endpoint, link=each.link)
            assert message.data == name.encode()
            assert message.sender.service == service_id(name)
            assert message.sender.pid == each.pid

    rig.run(root, programs={"left": left, "right": right})


def test_a_link_between_two_services_names_each_to_the_other(rig: Rig) -> None:
    async def server(boot: BootImage) -> None:
        request = await take(boot.endpoint)
        assert request.sender.service == service_id(INIT_NAME)
        ask = await take(boot.endpoint)
        assert ask.sender.service == service_id("client"), ask
        assert ask.cap is not None
        await Send(ask.cap, b"answer")

    async def client(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        inbox = await LinkCreate(boot.endpoint)
        assert inbox.link is not None
        await Send(given.cap, b"ask", move=inbox.slot)
        answer = await take(boot.endpoint, link=inbox.link)
        assert answer.sender.service == service_id("server"), answer
        await tell(boot, answer.data)

    async def root(boot: BootImage) -> None:
        serving = await start(boot, "server", delegations=1)
        asking = await start(boot, "client")
        await Send(serving.slot, b"hello")
        fresh = await LinkCreate(serving.slot, LinkTerms(4, 9000, 0))
        await Send(asking.slot, b"your link", move=fresh.slot)

        told = await take(boot.endpoint, link=asking.link)

        assert told.data == b"answer"
        await ended_well(serving)
        await ended_well(asking)

    rig.run(root, programs={"server": server, "client": client})


def test_the_sender_carries_the_class_the_kernel_holds(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await tell(boot, b"before")
        await SetTaskQos(None, QosClass.IDLE)
        await tell(boot, b"after")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "sinking", qos=QosClass.INTERACTIVE)
        before = await take(boot.endpoint)
        assert before.data == b"before"
        await ended_well(spawned)

        after = await take(boot.endpoint)

        assert after.data == b"after"
        assert after.sender.qos is QosClass.IDLE

    rig.run(root, programs={"sinking": child})


def test_a_boot_image_says_what_the_spawner_was_told(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        assert boot.control == Slot(0)
        assert boot.endpoint == Slot(1)
        assert boot.argument == b"\x00an argument\xff"
        assert boot.now > 0
        words = f"{boot.name} {boot.service} {boot.pid} {boot.generation}"
        await tell(boot, words.encode())

    async def root(boot: BootImage) -> None:
        assert boot.control is None
        assert boot.endpoint == Slot(1)
        assert boot.name == INIT_NAME
        assert boot.argument == b"for root"
        spawned = await start(boot, "reader", argument=b"\x00an argument\xff")

        message = await take(boot.endpoint)

        assert message.data.decode().split() == [
            "reader", str(service_id("reader")), str(spawned.pid), str(spawned.generation),
        ]  # fmt: skip
        assert spawned.service == service_id("reader")
        await ended_well(spawned)

    rig.run(root, programs={"reader": child}, argument=b"for root")


def test_a_dead_senders_link_ends_only_after_its_words(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        await Send(control(boot), b"one")
        await Send(control(boot), b"two")

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "child")
        await ended_well(spawned)

        assert (await take(boot.endpoint)).data == b"one"
        assert (await take(boot.endpoint)).data == b"two"
        await gone(boot.endpoint, spawned.link)

    rig.run(root, programs={"child": child})
