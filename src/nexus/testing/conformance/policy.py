"""Promise 8, the policy page: a word that init raises and every task reads without a message."""

from nexus.abi import (
    BootImage,
    PolicyRaise,
    PolicyRead,
    PolicyWord,
    Send,
    Status,
    TaskStats,
)
from nexus.testing.conformance.steps import ended_well, refused, start, take, tell
from nexus.testing.rig import Rig


def test_before_the_first_raise_nothing_is_available(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        assert await PolicyRead() == PolicyWord(0, available=False)

    async def root(boot: BootImage) -> None:
        assert await PolicyRead() == PolicyWord(0, available=False)
        await ended_well(await start(boot, "child"))

    rig.run(root, programs={"child": child})


def test_a_raise_counts_one_up_and_is_seen_by_the_next_read_of_every_task(rig: Rig) -> None:
    async def reader(boot: BootImage) -> None:
        before = await TaskStats()
        for _ in range(3):
            expected = (await take(boot.endpoint)).data
            word = await PolicyRead()
            assert b"%d %d" % word == expected
            await tell(boot, b"read")
        after = await TaskStats()
        # The three messages are the test's own; a read is none.
        assert (after.sent - before.sent, after.received - before.received) == (3, 3)

    async def root(boot: BootImage) -> None:
        readers = [await start(boot, name, program="reader") for name in ("one", "two")]
        for generation, available in ((1, True), (2, True), (3, False)):
            word = await PolicyRaise(available)
            assert word == PolicyWord(generation, available=available)
            assert await PolicyRead() == word
            for each in readers:
                await Send(each.slot, b"%d %d" % word)
            for each in readers:
                assert (await take(boot.endpoint, link=each.link)).data == b"read"
        for each in readers:
            await ended_well(each)

    rig.run(root, programs={"reader": reader})


def test_a_task_that_starts_later_reads_the_word_as_it_is(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        assert await PolicyRead() == PolicyWord(2, available=True)

    async def root(boot: BootImage) -> None:
        await PolicyRaise(False)
        await PolicyRaise(True)
        await ended_well(await start(boot, "child"))

    rig.run(root, programs={"child": child})


def test_nobody_but_the_root_task_raises_the_word(rig: Rig) -> None:
    async def child(boot: BootImage) -> None:
        before = await TaskStats()
        for available in (True, False):
            await refused(PolicyRaise(available), Status.PERMISSION_DENIED)
        assert await TaskStats() == before
        assert await PolicyRead() == PolicyWord(1, available=True)

    async def root(boot: BootImage) -> None:
        await PolicyRaise(True)
        await ended_well(await start(boot, "child"))
        assert await PolicyRead() == PolicyWord(1, available=True)

    rig.run(root, programs={"child": child})
