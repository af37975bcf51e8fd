"""Starts policyd: the policy first, then the service."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import msgspec

from nexus.abi import AbiError, BootImage, ConsoleWrite, Nanos
from nexus.ipc import Client, Refused, RetryBudget, deadline_after
from nexus.log.line import FieldValue, make_line
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.logd import Level
from nexus.protocols.policyd import PROTOCOL
from nexus.runtime import Server, ServiceConfig
from nexus.runtime.program import EXIT_SETTINGS, SENTENCE_SIZE_MAX, Context
from nexus.runtime.server import told_if_crashed
from nexus.services.policyd.audit import LOOK_MAX, SCOPE, Audit
from nexus.services.policyd.keeper import Keeper
from nexus.services.policyd.service import Policyd
from nexus.services.policyd.shares import Settings, Shares

LOGD_NAME: Final = "logd"
BIND_MAX: Final = Nanos(500_000_000)  # ns for init's Bind, which is on its way when we start
START_MAX: Final = Nanos(1_500_000_000)  # ns; inside the readiness deadline of 2 s
EXIT_NO_POLICY: Final = 1  # init gave none; its supervisor, which is init, tries again


class OwnLog:
    """The log of policyd itself: its records take the audit's way, acknowledged one by one. It has
    no ring, so what it says last may be lost with it."""

    wake: Final = None  # the audit is driven by its own times

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    async def flush(self) -> None:
        """There is nothing that waits here."""

    def info(self, text: str, /, *, token: str) -> None:
        """One record, for a log probe."""
        _ = self.write(Level.INFO, text, {"token": token})

    def write(self, level: Level, text: str, fields: Mapping[str, FieldValue]) -> bool:
        """One record; whether there was a place for it."""
        told = make_line(level, SCOPE, text, fields).request
        return self._audit.say(level, told.text, {each.key: each.value for each in told.fields})


async def main(boot: BootImage) -> int:
    """Answer init's Bind, take the policy from init, then serve until init says Stop."""
    config = ServiceConfig.of(boot)
    try:
        settings = config.settings_as(Settings)
    except msgspec.ValidationError as error:
        where = f"[service.{boot.name}.settings] in the system file"
        await _tell(boot, f"settings: {error}; correct {where}")
        return EXIT_SETTINGS
    context = Context(boot, config)
    peers = context.peers
    await context.metrics.begin()

    async def look(until: Nanos) -> Client | None:
        budget = RetryBudget(attempts_max=1, backoff=LOOK_MAX, deadline=until)
        found = await peers.connect(LOGD_NAME, LOGD, budget)
        return found if isinstance(found, Client) else None

    keeper = Keeper(peers)
    audit = Audit(look if LOGD_NAME in config.uses else None, Shares(settings))
    service = Policyd(keeper, audit)
    server = Server(
        service, PROTOCOL, boot, peers.caller, log=OwnLog(audit), metrics=context.metrics
    )
    _ = await server.step(deadline_after(boot.now, BIND_MAX))
    failure = await keeper.start(deadline_after(boot.now, START_MAX))
    if failure is not None:
        why = failure.status.name if isinstance(failure, Refused) else type(failure).__name__
        await _tell(boot, f"init gives no policy: {why}")
        return EXIT_NO_POLICY
    return await told_if_crashed(boot, server.run(), context.log)


async def _tell(boot: BootImage, sentence: str) -> None:
    """Say on the console why the program ends."""
    printable = "".join(each if each.isprintable() else "?" for each in sentence)
    with suppress(AbiError):
        await ConsoleWrite(f"{boot.name}: {printable[:SENTENCE_SIZE_MAX]}")
