"""A hostile service cannot speak as another: not in words, credentials, links or numbers."""

import errno
import json
import os
from collections.abc import Mapping
from typing import Any

import pytest

from nexus.abi import (
    BootImage,
    CapClose,
    EventKind,
    LinkCreate,
    Send,
    TaskStats,
    service_id,
)
from nexus.testing.conformance.steps import control, ended_well, start, take
from nexus.testing.rig import Rig, linux_rig
from tests.attack.hostile import forged, reporting_back, socket_of

pytestmark = pytest.mark.linux


async def _prey(boot: BootImage) -> None:
    await take(boot.endpoint)


def test_words_in_a_payload_change_nothing(linux: Rig) -> None:
    async def hostile(boot: BootImage) -> None:
        sock = socket_of(control(boot))
        words = b"\x00" + service_id("init-lite").to_bytes(8, "little") + b" init-lite pid=1"
        sock.send(words)

    async def root(boot: BootImage) -> None:
        spawned = await start(boot, "hostile")
        message = await take(boot.endpoint)
        assert message.sender.service == service_id("hostile")
        assert message.sender.pid == spawned.pid
        await ended_well(spawned)

    linux.run(root, programs={"hostile": hostile})


def _forge(boot: BootImage, told: Mapping[str, Any]) -> dict[str, int]:
    sock = socket_of(control(boot))
    own = {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid()}
    forgeries = {
        "init's pid": own | {"pid": told["root"]},
        "a sibling's pid": own | {"pid": told["prey"]},
        "a sibling's pid and ids": {"pid": told["prey"], "uid": told["uid"], "gid": told["gid"]},
        "pid 1": own | {"pid": 1},
        "a free pid": own | {"pid": 4_000_000},
        "another uid": own | {"uid": told["other"]},
        "another gid": own | {"gid": told["other"]},
        "root's ids": own | {"uid": 0, "gid": 0},
    }
    outcome = {name: forged(sock, name.encode(), **values) for name, values in forgeries.items()}
    outcome["its own"] = forged(sock, b"its own", **own)
    return outcome


def _forge_run(rig: Rig) -> Any:
    async def root(boot: BootImage) -> Any:
        prey = await start(boot, "prey")
        spawned = await start(boot, "hostile")
        words = b'{"root": %d, "prey": %d, "uid": %d, "gid": %d, "other": 12345}' % (
            boot.pid, prey.pid, os.getuid(), os.getgid(),
        )  # fmt: skip
        await Send(spawned.slot, words)
        came = []
        while True:
            message = await take(boot.endpoint)
            if message.data[:1] in b"+.":
                break
            came.append((message.data.decode(), message.sender.pid, message.sender.service))
        text = message.data[1:]
        outcome = json.loads(text)
        await take(boot.endpoint)
        refused = (await TaskStats()).refused_identity
        await Send(prey.slot, b"end")
        await ended_well(prey)
        await ended_well(spawned)
        return outcome, came, refused, spawned.pid, prey.pid

    return rig.run(root, programs={"hostile": reporting_back(_forge), "prey": _prey})


def test_credentials_cannot_be_forged(linux: Rig) -> None:
    outcome, came, refused, hostile, _ = _forge_run(linux)

    assert outcome.pop("its own") == 0
    if linux.user is not None or os.getuid():
        # An ordinary user's services share its uid: naming it is naming oneself.
        assert outcome.pop("root's ids") == errno.EPERM
    assert {name: error for name, error in outcome.items() if error != errno.EPERM} == {}
    assert came == [("its own", hostile, service_id("hostile"))]
    assert refused == 0, "Linux refused to send them; nothing was left for us to refuse"


def test_without_hardening_root_forges_a_sibling_and_the_test_sees_it() -> None:
    if os.getuid():
        pytest.skip("only root can forge without hardening")

    outcome, came, _, _, prey = _forge_run(linux_rig(harden=False))

    assert outcome["a sibling's pid"] == 0
    assert ("a sibling's pid", prey, service_id("prey")) in came


def test_a_free_or_unknown_pid_is_refused_by_the_receiver() -> None:
    if os.getuid():
        pytest.skip("only root can forge without hardening")

    outcome, came, refused, _, _ = _forge_run(linux_rig(harden=False))

    # Root may name any living process, but one outside the table is nobody, and so is a task
    # under other ids than it was given.
    accepted = {name for name, error in outcome.items() if error == 0}
    delivered = {name for name, _, _ in came}
    assert "pid 1" in accepted - delivered or outcome["pid 1"] != 0
    assert {"another uid", "another gid"} <= accepted - delivered
    assert refused == len(accepted - delivered)


def test_a_link_that_was_anothers_still_carries_its_holders_identity(linux: Rig) -> None:
    async def hostile(boot: BootImage) -> None:
        given = await take(boot.endpoint)
        assert given.cap is not None
        socket_of(given.cap).send(b"I am root: it was root's link")
        await CapClose(given.cap)

    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b"yours", move=link.slot)
        message = await take(boot.endpoint, link=link.link)
        assert message.sender.service == service_id("hostile")
        assert message.sender.pid == spawned.pid
        await ended_well(spawned)

    linux.run(root, programs={"hostile": hostile})


def test_a_sender_outside_the_table_is_counted_and_dropped(linux: Rig) -> None:
    """A process that is no task of ours, here a child of init's own, is nobody."""

    async def root(boot: BootImage) -> None:
        link = await LinkCreate(boot.endpoint)
        sock = socket_of(link.slot)
        before = await TaskStats()
        pid = os.fork()
        if pid == 0:
            sock.send(b"who am I?")
            os._exit(0)
        os.waitpid(pid, 0)
        await Send(link.slot, b"and who am I?")

        message = await take(boot.endpoint)

        assert message.data == b"and who am I?"
        after = await TaskStats()
        assert after.refused_identity == before.refused_identity + 1

    run = linux.observe(root)

    (refusal,) = run.fields(EventKind.REFUSED)
    assert refusal["reason"] == "identity"
