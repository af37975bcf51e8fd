"""operator as a program."""

from typing import Final

from nexus.abi import BootImage, Nanos
from nexus.ipc import Peers, deadline_after
from nexus.log import Logger
from nexus.metrics import Metrics
from nexus.protocols.operator import PROTOCOL
from nexus.runtime import Server, ServiceConfig
from nexus.runtime.server import told_if_crashed
from nexus.services.operator.relay import Relay
from nexus.services.operator.service import ANY_UID, Operator

START_MAX: Final = Nanos(2_000_000_000)  # ns; for the first message, which is init's Bind


async def main(boot: BootImage) -> int:
    """Answer init's Bind, then serve the port until init says Stop."""
    config = ServiceConfig.of(boot)
    peers = Peers(boot, config.trace_seed)
    log = Logger(peers, config.uses, ring_size=config.log_ring)
    metrics = Metrics(peers, config.uses, page_size=config.metrics_page)
    await log.begin()
    await metrics.begin()
    (port,) = boot.ports
    uid = int(config.settings.get("uid", ANY_UID))
    operator = Operator(port, Relay(peers, config.uses), log, metrics.recorder, uid)
    sources = (port, await peers.inbox())
    server = Server(
        operator, PROTOCOL, boot, peers.caller, log=log, metrics=metrics, sources=sources
    )
    _ = await server.step(deadline_after(boot.now, START_MAX))
    return await told_if_crashed(boot, server.run(), log)
