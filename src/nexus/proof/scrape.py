"""What the runner itself reads from outside while a system runs: one page of exportd's, over the
socket that the plan declares.

On linux the runner connects as any scraper does, in a machine a process of the guest's own that has
no part in the system. In the simulator there is nothing to connect to:
the process that simulates plays the scraper, at the outer end of the simulated port. Either way
the bytes that came are left in the state directory, and nobody has looked into them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nexus.abi import Event, EventKind, StreamRole
from nexus.init.plan import Plan
from nexus.proof.scraper import REQUEST, kept_at
from nexus.protocols.ladder import SELFTEST
from nexus.services.selftest.export_rungs import EXPORTD_NAME, SCRAPE_LINE

if TYPE_CHECKING:
    from nexus.kernel.sim.kernel import SimKernel
    from nexus.kernel.sim.ports import SimPeer

SCRAPER_PID: Final = 1  # of a process outside of the simulated system


def port_of(plan: Plan) -> str | None:
    """The name of the Unix socket that exportd serves on, None if the plan gives it none."""
    exportd = plan.by_name.get(EXPORTD_NAME)
    ports = exportd.grants.stream_ports if exportd is not None else ()
    return next((port.name for port in ports if port.role is StreamRole.UNIX), None)


def scraped_of(state: Path, boot: int) -> bytes:
    """The bytes that came, empty if nobody scraped in that boot."""
    file = kept_at(state, boot)
    return file.read_bytes() if file.exists() else b""


def is_asked(event: Event) -> bool:
    """Whether the client asks for a scrape with this line of its own."""
    fields = event.fields
    return (
        event.kind is EventKind.CONSOLE
        and fields.get("line") == SCRAPE_LINE
        and fields.get("name") == SELFTEST
    )


class SimScraper:
    """The same in the simulator, as its events come."""

    def __init__(self, machine: "SimKernel", port: str, keep: Callable[[bytes], object]) -> None:
        self._machine = machine
        self._port = port
        self._keep = keep
        self._data = b""

    def on_event(self, event: Event) -> None:
        """Connect when the client asks for it."""
        if not is_asked(event):
            return
        try:
            peer = self._machine.port(self._port).connect(SCRAPER_PID, UID_SYSTEM)
        except ConnectionRefusedError:
            return  # exportd is not there
        peer.on_data = self._heard
        _ = peer.send(REQUEST)

    def _heard(self, peer: "SimPeer") -> None:
        self._data += b"".join(peer.take())
        _ = self._keep(self._data)


UID_SYSTEM: Final = 1000  # the user who runs the simulated system
