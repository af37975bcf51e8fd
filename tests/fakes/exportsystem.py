"""A small system that can be scraped and that sends to a collector, and doubles of who reads it."""

import json
from typing import Any, Final

import h11

from nexus.kernel.sim import SimKernel, SimPeer

PAGE_PORT: Final = "metrics"
COLLECTOR_PORT: Final = 4318
TCP_PORT: Final = 9464

SYSTEM: Final = """
[system]
name = "exporting"
total_size = "8MiB"
owner_size = "512KiB"

[service.policyd]
program = "policyd"
capabilities = ["ipc.core", "policy.authority"]
uses = {{ logd = {{ depth = 64, sync = false }}, metricsd = {{ sync = false }} }}
health = {{ deadline = "2s", every = "250ms", answer = "500ms" }}

[service.logd]
program = "logd"
stage = "core"
capabilities = ["ipc.core", "policy.delegate"]
uses = {{ policyd = {{}} }}

[service.metricsd]
program = "metricsd"
stage = "core"
capabilities = ["ipc.core", "policy.delegate"]
uses = {{ policyd = {{}}, logd = {{ sync = false }} }}

[service.metricsd.settings]
read_every = "100ms"

[service.timed]
program = "timed"
stage = "core"
capabilities = ["ipc.core"]
uses = {{ logd = {{ sync = false }}, metricsd = {{ sync = false }} }}

[service.exportd]
program = "exportd"
isolation = "exec"
capabilities = [
    "ipc.core", "metrics.read", "port.stream.metrics", "port.stream.scrape", "port.dial.collector",
]
uses = {{ metricsd = {{}}, logd = {{ sync = false }} }}

[service.exportd.streams]
metrics = {{ role = "unix" }}
scrape = {{ role = "tcp", port = {tcp} }}
collector = {{ role = "dial", port = {collector} }}

[service.exportd.settings]
every_ms = 200
queue_count = 8
pause_max_ms = 1000
"""

OPERATED: Final = """
[device.rng]
kind = "entropy"

[service.rngd]
program = "rngd"
stage = "core"
hardware = ["rng"]
capabilities = ["ipc.core", "policy.delegate", "device.mmio.rng:window rng"]
uses = { policyd = {}, logd = { sync = false }, metricsd = { sync = false } }
restart = { backoff = "10ms" }

[service.operator]
program = "operator"
stage = "core"
ports = ["operator"]
capabilities = [
    "ipc.core", "log.read", "metrics.read", "port.operator", "rng.entropy", "system.control",
    "system.observe",
]

[service.operator.uses]
policyd = { sync = false }
logd = { sync = false }
metricsd = { sync = false }
timed = { sync = false }
rngd = { sync = false }
exportd = { sync = false }
"""
"""A door for commands, for who runs the system for real."""


def system_text(tcp: int = TCP_PORT, collector: int = COLLECTOR_PORT) -> str:
    """The system file with these TCP ports."""
    return SYSTEM.format(tcp=tcp, collector=collector)


class Received:
    """A body that a collector was sent."""

    def __init__(self, target: str, content: bytes) -> None:
        self.target = target
        self.json: Any = json.loads(content)


class CollectorDouble:
    """Answers every body at once with `status`, in the simulated world."""

    def __init__(self, kernel: SimKernel) -> None:
        self._kernel = kernel
        self._servers: dict[SimPeer, h11.Connection] = {}
        self.received: list[Received] = []
        self.status = 200
        self.fields: list[tuple[str, str]] = []
        self._content = b""
        self._target = ""

    def come(self) -> None:
        """Listen."""
        _ = self._kernel.listen("127.0.0.1", COLLECTOR_PORT, self._on_connect)

    def leave(self) -> None:
        """Listen no more, and end what is there."""
        self._kernel.unlisten("127.0.0.1", COLLECTOR_PORT)
        for peer in self._servers:
            peer.close()
        self._servers.clear()

    def _on_connect(self, peer: SimPeer) -> None:
        self._servers[peer] = h11.Connection(h11.SERVER)
        peer.on_data = self._on_data

    def _on_data(self, peer: SimPeer) -> None:
        server = self._servers.get(peer)
        if server is None or not (data := b"".join(peer.take())):
            return
        server.receive_data(data)
        while (event := server.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Request):
                self._target, self._content = event.target.decode(), b""
            elif isinstance(event, h11.Data):
                self._content += event.data
            elif isinstance(event, h11.EndOfMessage):
                if self.status == 200:
                    self.received.append(Received(self._target, self._content))
                headers = [("Content-Length", "2"), *self.fields]
                answer = server.send(h11.Response(status_code=self.status, headers=headers)) or b""
                answer += server.send(h11.Data(data=b"{}")) or b""
                answer += server.send(h11.EndOfMessage()) or b""
                assert peer.send(answer)
                if server.our_state is h11.DONE:
                    server.start_next_cycle()
