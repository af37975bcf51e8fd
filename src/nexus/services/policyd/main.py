"""Starts policyd: the policy first, then the service."""

from contextlib import suppress
from typing import Final

import msgspec

from nexus.abi import AbiError, BootImage, ConsoleWrite, Nanos
from nexus.ipc import Client, Refused, RetryBudget, deadline_after
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.policyd import PROTOCOL
from nexus.runtime import Server, ServiceConfig
from nexus.runtime.program import EXIT_SETTINGS, SENTENCE_SIZE_MAX, Context
from nexus.runtime.server import told_if_crashed
from nexus.services.policyd.audit import LOOK_MAX, Audit
from nexus.services.policyd.keeper import Keeper
from nexus.services.policyd.service import Policyd
from nexus.services.policyd.shares import Settings, Shares

LOGD_NAME: Final = "logd"
BIND_MAX: Final = Nanos(500_000_000)  # ns for init's Bind, which is on its way when we start
START_MAX: Final = Nanos(1_500_000_000)  # ns; inside the readiness deadline of 2 s
EXIT_NO_POLICY: Final = 1  # init gave none; its supervisor, which is init, tries again


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
    await context.log.begin()  # beside the audit, which is posted and acknowledged
    await context.metrics.begin()

    async def look(until: Nanos) -> Client | None:
        budget = RetryBudget(attempts_max=1, backoff=LOOK_MAX, deadline=until)
        found = await peers.connect(LOGD_NAME, LOGD, budget)
        return found if isinstance(found, Client) else None

    keeper = Keeper(peers)
    service = Policyd(keeper, Audit(look if LOGD_NAME in config.uses else None, Shares(settings)))
    server = Server(service, PROTOCOL, boot, peers.caller, log=context.log, metrics=context.metrics)
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
