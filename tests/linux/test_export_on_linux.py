"""What exportd says to the outside, read by programs that share no code with it.

One running system for all of it. Prometheus, promtool and opentelemetry-proto are the readers.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic_ns
from typing import Any, Final

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from nexus.cli.client import OperatorClient
from nexus.protocols.rngd import PROTOCOL as RNGD
from nexus.protocols.rngd import GetEntropy
from nexus.testing.outside import free_tcp_port
from tests.fakes.exportsystem import OPERATED, system_text
from tests.fakes.machine import Machine, machine, python_of
from tests.fakes.otlpreader import read_metrics, read_traces
from tests.fakes.traceevents import check_trace_events

pytestmark = pytest.mark.linux

STROKES: Final = 7
PATIENCE: Final = 60.0  # seconds for what takes a moment on a free machine
SCRAPE_MAX: Final = 4_000_000_000  # ns; less than exportd waits for who asks and reads slowly
PACKAGE: Final = 'the Debian package "prometheus" is not installed: apt-get install prometheus'


class Exporting:
    """A running system with a page, and with a collector that may come."""

    def __init__(self, host: Machine) -> None:
        self.host = host
        self.page_port = free_tcp_port()
        self.collector_port = free_tcp_port()
        text = system_text(self.page_port, self.collector_port) + OPERATED
        _ = host.ok("up", "-d", host.write("exporting.toml", text))

    @property
    def socket_path(self) -> Path:
        return self.host.home / "r" / "exporting" / "metrics.sock"

    def scrape(self, **fields: str) -> tuple[int, str, str]:
        """Status, content type and content over the Unix socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self.socket_path))
            client = http.client.HTTPConnection("device")
            client.sock = sock
            client.request("GET", "/metrics", headers=fields)
            answer = client.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read().decode()

    def page(self) -> tuple[str, str]:
        """Content type and content, once metricsd is read in time: a busy machine has 503 first."""

        def look() -> tuple[str, str] | None:
            status, kind, text = self.scrape()
            return (kind, text) if status == 200 else None

        found: tuple[str, str] = eventually(look, "the page")
        return found

    def call(self, service: str, request: str, *words: str) -> Any:
        return self.host.ok("call", service, request, *words, "--json").json

    def stats(self) -> Any:
        return self.call("exportd", "get-stats")


@pytest.fixture(scope="module")
def system() -> Iterator[Exporting]:
    python = python_of(os.getuid())
    assert python is not None
    with machine(os.getuid(), python) as host:
        running = Exporting(host)
        _ = running.call("metricsd", "add", "name=pump.strokes", "labels=[]", f"value={STROKES}")
        yield running
        _ = host.ok("down")


def eventually(look: Callable[[], Any], what: str) -> Any:
    """What `look` gives as soon as it is something."""
    until = monotonic_ns() + int(PATIENCE * 1e9)
    while monotonic_ns() < until:
        found = look()
        if found:
            return found
        _ = threading.Event().wait(0.05)
    raise AssertionError(f"not in {PATIENCE:.0f} s: {what}")


def test_the_page_is_read_by_prometheus_client(system: Exporting) -> None:
    kind, text = system.page()

    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    samples = {
        sample.name: (sample.value, sample.labels)
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }
    value, labels = samples["pump_strokes_total"]
    assert (value, labels) == (STROKES, {"service": "operator", "instance": "1"})


def test_promtool_has_nothing_against_the_page(system: Exporting) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(PACKAGE)
    address = f"http://127.0.0.1:{system.page_port}/metrics"
    wanted = urllib.request.Request(address, headers={"Accept": "text/plain"})

    def look() -> tuple[str, bytes] | None:
        try:
            with urllib.request.urlopen(wanted, timeout=PATIENCE) as answer:
                return answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            assert error.code == 503, "metricsd was not read in time"
            return None

    kind, text = eventually(look, "the page")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert f'pump_strokes_total{{service="operator",instance="1"}} {STROKES}\n' in text.decode()

    said = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, timeout=PATIENCE
    )

    assert (said.returncode, said.stdout, said.stderr) == (0, b"", b"")
    broken = subprocess.run(
        [promtool, "check", "metrics"],
        input=text.replace(b"# TYPE", b"# KIND", 1) + b"pump_strokes_total oops\n",
        capture_output=True,
        timeout=PATIENCE,
    )
    assert broken.returncode != 0


def test_a_prometheus_that_scrapes_the_system_answers_with_the_value(
    system: Exporting, tmp_path: Path
) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip(PACKAGE)
    port = free_tcp_port()
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {
                "job_name": "nexus",
                "honor_labels": True,
                "static_configs": [{"targets": [f"127.0.0.1:{system.page_port}"]}],
            }
        ],
    }
    file = tmp_path / "prometheus.yml"
    _ = file.write_text(json.dumps(config))  # JSON is YAML
    log = tmp_path / "log"

    def asked(query: str) -> list[Any]:
        words = urllib.parse.urlencode({"query": query})
        try:
            address = f"http://127.0.0.1:{port}/api/v1/query?{words}"
            with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
                return found
        except OSError:
            return []  # it does not listen yet

    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={file}",
                f"--storage.tsdb.path={tmp_path / 'storage'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=output,
        )
        _ = stack.callback(process.wait, PATIENCE)
        _ = stack.callback(process.terminate)

        query = 'pump_strokes_total{service="operator"}'
        (result,) = eventually(lambda: asked(query), f"an answer of Prometheus to {query}")
        assert result["value"][1] == str(STROKES)
        assert result["metric"]["instance"] == "1"
        _ = system.call("metricsd", "add", "name=pump.strokes", "labels=[]", "value=2")
        wanted = str(STROKES + 2)
        _ = eventually(
            lambda: [each for each in asked(query) if each["value"][1] == wanted], "the new value"
        )
        _ = eventually(
            lambda: [each for each in asked('up{job="nexus"}') if each["value"][1] == "1"],
            "that it is up",
        )
        _ = system.call("metricsd", "add", "name=pump.strokes", "labels=[]", "value=0")


class Collector:
    """An HTTP server of Python's that refuses as many bodies as it is told and keeps the rest."""

    def __init__(self, port: int, busy: int) -> None:
        self.received: list[tuple[str, Any]] = []
        self.refused = 0
        self._connections: list[socket.socket] = []
        keeper = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                keeper._connections.append(self.connection)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if keeper.refused < busy:
                    keeper.refused += 1
                    self.send_response(503)
                    self.send_header("Retry-After", "1")
                    taken = []
                else:
                    assert self.headers["Content-Type"] == "application/json"
                    taken = [(self.path, json.loads(content))]
                    self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                _ = self.wfile.write(b"{}")
                keeper.received += taken  # who looks for it then ends the connection

            def log_message(self, *words: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:  # they would live on in their threads
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


def visited_by_a_collector(system: Exporting, busy: int) -> list[tuple[str, Any]]:
    """What a collector gets that comes, refuses as many bodies, and goes again."""
    before = system.stats()
    collector = Collector(system.collector_port, busy)
    try:
        _ = eventually(
            lambda: any(path == "/v1/metrics" for path, _ in collector.received),
            "a body after the collector had come",
        )
    finally:
        collector.end()
    assert collector.refused == busy
    after = eventually(
        lambda: (s := system.stats())["bodies_sent"] > before["bodies_sent"] and s, "a body sent"
    )
    assert after["bodies_queued"] <= 8
    return collector.received


def test_a_collector_that_goes_and_comes_back_gets_what_opentelemetry_reads(
    system: Exporting,
) -> None:
    away = eventually(lambda: (s := system.stats())["failed"] and s, "a failed attempt")
    assert away["collector"] in ("AWAY", 1)

    received = [body for busy in (2, 0) for body in visited_by_a_collector(system, busy)]

    points = [
        point.as_int
        for path, body in received
        if path == "/v1/metrics"
        for resource in read_metrics(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "pump.strokes"
        for point in metric.sum.data_points
    ]
    assert points
    assert set(points) <= {STROKES, STROKES + 2}
    for path, body in received:
        if path == "/v1/traces":
            assert read_traces(body).resource_spans


def test_a_slow_reader_and_a_silent_one_hold_up_no_scrape(system: Exporting) -> None:
    silent = [socket.create_connection(("127.0.0.1", system.page_port)) for _ in range(3)]
    deaf = socket.create_connection(("127.0.0.1", system.page_port))
    deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: d\r\n\r\n" * 50)

    def answer() -> tuple[int, str] | None:
        begun = monotonic_ns()
        status, _, text = system.scrape()
        assert monotonic_ns() - begun < SCRAPE_MAX
        return (status, text) if status == 200 else None  # the deaf one uses up its second

    _, text = eventually(answer, "the page")
    assert "pump_strokes_total" in text
    for each in (*silent, deaf):
        each.close()


def test_it_listens_at_what_was_declared_and_nowhere_else(system: Exporting) -> None:
    rows = system.host.ok("status", "--json").json["services"]
    (pid,) = [row["pid"] for row in rows if row["service"] == "exportd"]
    held = {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if f"socket:[{line.split()[9]}]" in held and line.split()[3] == "0A"
    ]

    assert [row[1] for row in listening] == [f"0100007F:{system.page_port:04X}"]


def test_one_command_is_one_trace_through_three_services(system: Exporting, tmp_path: Path) -> None:
    answer = system.host.ok("call", "rngd", "get-entropy", "size=8", "--verbose", "--json")
    trace = answer.err.split()[-1]

    def spans() -> Any:
        shown = system.host.run("trace", trace, "--json")
        found = shown.json[0]["spans"] if shown.code == 0 else []
        return found if len(found) > 2 else None

    passed, drawn, checked = eventually(spans, "the spans")

    assert (passed["service"], passed["name"]) == ("operator", "operator.Relay")
    assert drawn["parent"] == passed["span"]
    assert (drawn["service"], drawn["name"]) == ("rngd", "rngd.GetEntropy")
    assert (checked["service"], checked["name"]) == ("policyd", "policyd.CheckFor")
    assert checked["parent"] == drawn["span"]
    assert 0 < checked["duration_ns"] < drawn["duration_ns"]
    lines = system.host.ok("trace", trace[:12], "--logs").out.splitlines()
    assert lines[0].startswith(f"trace {trace}  3 spans of 3 services")
    assert lines[1].startswith("operator.Relay")
    assert lines[2].startswith("└─ rngd.GetEntropy")
    assert any(line.startswith("   └─ policyd.CheckFor") for line in lines)
    file = tmp_path / "trace.json"
    _ = system.host.ok("trace", trace, "--chrome", str(file))
    check_trace_events(json.loads(file.read_text()))
    assert "no span of the trace" in system.host.run("trace", "00" * 16).err


def test_one_trace_goes_on_over_a_restart(system: Exporting) -> None:
    runtime = system.socket_path.parent
    with OperatorClient(runtime, "exporting", lambda: True) as client:
        _ = client.relay("rngd", RNGD, GetEntropy(8), PATIENCE)
        _ = system.host.ok("restart", "rngd")
        _ = client.relay("rngd", RNGD, GetEntropy(8), PATIENCE)
        trace = client.trace

    def generations() -> Any:
        shown = system.host.run("trace", trace, "--json")
        spans = shown.json[0]["spans"] if shown.code == 0 else []
        found = [each["generation"] for each in spans if each["name"] == "rngd.GetEntropy"]
        return found if len(found) > 1 else None

    first, second = eventually(generations, "the spans of both instances")
    assert second == first + 1
    text = system.host.ok("trace", trace).out
    assert f"rngd#{first} " in text
    assert f"rngd#{second} " in text
