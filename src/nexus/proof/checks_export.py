"""The evidence behind the rungs about exportd: what the kernel granted it, whom init's table links
it with, and the page that the runner fetched from outside, read by a parser that is not ours."""

import http.client
import io
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from nexus.abi import StreamRole
from nexus.kernel.core import grants_fields
from nexus.proof.checks import healthy, of_init
from nexus.proof.trace import Line, Trace
from nexus.proof.verdict import Case, Check, Mismatch, demand, demand_equal
from nexus.services.selftest.export_rungs import EXPORTD_NAME

CONTENT_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PARTNERS: Final = frozenset({"metricsd", "logd"})
VALUE: Final = 7  # of the counter that rung 123 has made


class Page(NamedTuple):
    """An answer to a scrape."""

    status: int
    content_type: str
    text: str


class Sample(NamedTuple):
    """A sample as the parser reads it; `kind` is its family's."""

    kind: str
    name: str
    labels: Mapping[str, str]
    value: float


def page_of(data: bytes) -> Page:
    """The HTTP answer that these bytes are. Raises Mismatch."""
    response = http.client.HTTPResponse(_Socket(data))  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
        return Page(response.status, response.getheader("Content-Type") or "", body.decode("utf-8"))
    except (http.client.HTTPException, ValueError) as error:
        raise Mismatch(f"what exportd sent is no answer: {error!r}") from error


class _Socket:
    """As much of a socket as http.client reads an answer from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        """What came."""
        return io.BytesIO(self._data)


def samples_of(text: str) -> Iterator[Sample]:
    """Every sample of an OpenMetrics page, by prometheus_client. Raises Mismatch."""
    from prometheus_client.openmetrics import parser

    families_of: Any = parser.text_string_to_metric_families  # it has no types
    try:
        for family in families_of(text):
            for sample in family.samples:
                yield Sample(family.type, sample.name, sample.labels, float(sample.value))
    except ValueError as error:
        raise Mismatch(f"the page is no OpenMetrics: {error}") from error


def exportd_ready(case: Case, trace: Trace, line: Line) -> None:
    """#38: it has the ports that the plan declares and no others, by the kernel's record; and links
    with metricsd and logd and nobody else, by init's table."""
    _ = healthy(case, trace, line)
    planned = case.plan.by_name[EXPORTD_NAME]
    wanted = _doors(grants_fields(planned.grants))
    demand(wanted, "the plan declares no port to listen on")
    roles = {port.name: port.role.name.lower() for port in planned.grants.stream_ports}
    demand_equal(line.evidence["streams"], roles, "ports that it says it has")
    (_, event) = trace.spawns(EXPORTD_NAME)[0]
    granted: Any = event.fields["grants"]
    demand_equal(granted, grants_fields(planned.grants), "what the kernel gave it")
    demand_equal(_doors(granted), wanted, "ports that the kernel gave it")
    others = {name: granted[name] for name in ("ports", "listen", "connect", "hardware")}
    demand(not any(others.values()), f"the kernel gave it more: {others}")
    ready = of_init(trace, "init: ready")
    if ready is not None:  # where the system does not get there another rung is red
        links = [row[1] for row in ready.evidence["links"] if row[0] == EXPORTD_NAME]
        demand_equal(sorted(links), sorted(PARTNERS), "services that it has links with")


DIALS: Final = StreamRole.DIAL.name.lower()


def _doors(granted: Mapping[str, Any]) -> list[str]:
    """What callers of it come to, each in one line."""
    return sorted(
        f"{port['name']} {port['role']} {port['address']} {port['port']}"
        for port in granted["stream_ports"]
        if port["role"] != DIALS
    )


def export_scrape(_case: Case, trace: Trace, line: Line) -> None:
    """#130: the page that the runner fetched holds the counter with the value that metricsd has."""
    evidence = line.evidence
    demand(trace.scraped, "nothing came over exportd's socket")
    page = page_of(trace.scraped)
    demand_equal(page.status, http.client.OK, "status")
    demand_equal(page.content_type, CONTENT_TYPE, "content type")
    demand_equal(evidence["value"], VALUE, "value of the counter at metricsd")
    name = f"{evidence['counter'].replace('.', '_')}_total"
    found = [
        sample
        for sample in samples_of(page.text)
        if sample.name == name and evidence["labels"].items() <= sample.labels.items()
    ]
    demand_equal(len(found), 1, f"samples {name} on the page")
    demand_equal((found[0].kind, found[0].value), ("counter", VALUE), "kind and value on the page")
    before, after = evidence["scrapes"]
    demand_equal(after, before + 1, "pages that exportd has counted")


CHECKS: Final[Mapping[int, Check]] = MappingProxyType({38: exportd_ready, 130: export_scrape})
