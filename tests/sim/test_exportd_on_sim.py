"""exportd in a whole system, scraped and with a collector that comes and goes."""

from pathlib import Path
from typing import Final

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from nexus.abi import PORT_PEERS_MAX, service_id
from nexus.ipc import Stale
from nexus.kernel.sim import SimPeer
from nexus.protocols.exportd import CollectorState, GetStats, Stats
from nexus.protocols.logd import Level
from nexus.protocols.metricsd import Add, Label, Observe, SetGauge, SpanEnd, SpanStart, SpanStatus
from nexus.services.exportd.exposition import Format
from nexus.testing.device import Device, Run, simulate
from tests.fakes.exportsystem import (
    PAGE_PORT,
    SYSTEM,
    TCP_PORT,
    CollectorDouble,
    system_text,
)
from tests.fakes.otlpreader import read_metrics, read_traces

ASK: Final = b"GET /metrics HTTP/1.1\r\nHost: device\r\n\r\n"


def run(tmp_path: Path, scenario: object, seed: int = 3) -> Run:
    file = tmp_path / "exporting.toml"
    file.write_text(system_text())
    return simulate(file, scenario, seed=seed)  # type: ignore[arg-type]


def connect(device: Device, *, tcp: bool = False) -> SimPeer:
    name = f"127.0.0.1 {TCP_PORT}" if tcp else PAGE_PORT
    return device.kernel.port(name).connect(77, device.kernel.uid)


async def read(device: Device, peer: SimPeer, *, tries: int = 200) -> tuple[str, str]:
    """Head and content of one answer."""
    said = b""
    for _ in range(tries):
        said += b"".join(peer.take())
        head, found, content = said.partition(b"\r\n\r\n")
        sizes = [
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        if found and sizes and len(content) >= sizes[0]:
            return head.decode(), content.decode()
        await device.sleep("5ms")
    raise AssertionError(f"no answer: {said!r}")


async def scraped(device: Device, *, tcp: bool = False) -> tuple[str, str]:
    peer = connect(device, tcp=tcp)
    assert peer.send(ASK)
    answer = await read(device, peer)
    peer.close()
    return answer


def value_of(text: str, name: str, **labels: str) -> float:
    (found,) = [
        sample.value
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return float(found)


async def stats(device: Device) -> Stats:
    return await device.call("exportd", GetStats())


def test_a_scrape_says_what_was_counted_a_moment_ago(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        for total in (7, 9):
            count = 7 if total == 7 else 2
            _ = await device.call("metricsd", Add("pump.strokes", [Label("valve", "a")], count))

            head, text = await scraped(device, tcp=total == 9)

            assert head.startswith("HTTP/1.1 200 ")
            assert f"Content-Type: {Format.OPENMETRICS.value}" in head
            assert value_of(text, "pump_strokes_total", service="tester", valve="a") == total
        assert (await stats(device)).scrapes == 2

    console = run(tmp_path, scenario).console
    assert "exportd: ready" in console


def test_what_cannot_stand_in_a_page_is_counted_there_and_told_to_the_log_once(
    tmp_path: Path,
) -> None:
    async def scenario(device: Device) -> None:
        _ = await device.call("metricsd", Add("strokes", [], 7))
        _ = await device.call("metricsd", SetGauge("strokes_total", [], 3))
        _ = await scraped(device)
        await device.sleep("1s")

        _, text = await scraped(device)

        await device.sleep("1s")
        assert value_of(text, "strokes_total", service="tester") == 7
        assert value_of(text, "exportd_series_left_out", service="exportd") == 1
        lines = await device.logs("metric", "strokes_total")
        assert [each.level for each in lines] == [Level.WARN]

    _ = run(tmp_path, scenario)


def test_a_service_without_metrics_has_those_of_its_requests(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        await device.sleep("5s")
        for _ in range(3):
            _ = await stats(device)
        await device.sleep("2s")

        _, text = await scraped(device)

        assert value_of(text, "nexus_requests_total", service="exportd", instance="1") == 3
        assert value_of(text, "nexus_request_errors_total", service="exportd") == 0

    _ = run(tmp_path, scenario)


def test_a_peer_that_reads_nothing_and_one_that_says_nothing_hold_nobody_up(
    tmp_path: Path,
) -> None:
    async def scenario(device: Device) -> None:
        for number in range(24):
            labels = [Label("number", f"{number}"), Label("text", "x" * 90)]
            _ = await device.call("metricsd", Add(f"wide{number}", labels, 1))
        deaf, mute, trickle = (connect(device) for _ in range(3))
        for _ in range(40):
            _ = deaf.send(ASK)  # far more answers than any queue holds, and it reads none
        assert trickle.send(ASK[:-1])

        _, text = await scraped(device)
        assert value_of(text, "wide3_total") == 1
        await device.sleep("6s")

        assert mute.closed
        assert trickle.closed
        assert b"".join(trickle.take()).startswith(b"HTTP/1.1 408 ")
        await device.sleep("10s")
        assert deaf.closed
        _, text = await scraped(device)
        assert value_of(text, "wide3_total") == 1
        facts = device.kernel.resources()
        assert facts["connections"] <= 1

    _ = run(tmp_path, scenario)


def test_peers_that_hold_every_connection_and_ask_nothing_lock_nobody_out(
    tmp_path: Path,
) -> None:
    async def scenario(device: Device) -> None:
        holders = []
        for _ in range(2 * PORT_PEERS_MAX):
            holders.append(connect(device, tcp=True))
            await device.sleep("5ms")
            _, text = await scraped(device, tcp=True)
            assert text.endswith("# EOF\n")
            await device.sleep("100ms")

        kept = [peer for peer in holders if not peer.closed]
        assert kept == holders[-len(kept) :], "who was silent for longest gave way"
        assert 0 < len(kept) < PORT_PEERS_MAX

    _ = run(tmp_path, scenario)


def test_scrapes_beyond_a_rate_are_refused_and_counted(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        peer = connect(device)
        heads = []
        for _ in range(40):
            assert peer.send(ASK)
            heads.append((await read(device, peer))[0])

        refused = [head for head in heads if head.startswith("HTTP/1.1 503 ")]
        assert 0 < len(refused) < 40
        assert all("Retry-After: 1" in head for head in refused)
        account = await stats(device)
        assert (account.scrapes, account.scrapes_refused) == (40 - len(refused), len(refused))

    _ = run(tmp_path, scenario)


def test_without_metricsd_a_scrape_is_refused_and_with_the_next_one_answered(
    tmp_path: Path,
) -> None:
    async def scenario(device: Device) -> None:
        _ = await device.call("metricsd", Add("strokes", [], 1))
        assert (await scraped(device))[0].startswith("HTTP/1.1 200 ")
        device.freeze("metricsd", "1500ms")

        head, text = await scraped(device)

        assert head.startswith("HTTP/1.1 503 ")
        assert "metricsd" in text
        await device.sleep("2s")
        assert (await scraped(device))[0].startswith("HTTP/1.1 200 ")

    _ = run(tmp_path, scenario)


def test_a_restarted_exportd_listens_again(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        _ = await device.call("metricsd", Add("strokes", [], 5))
        peer = connect(device)
        _ = await device.kill("exportd")
        await device.sleep("2s")

        assert peer.closed
        assert value_of((await scraped(device))[1], "strokes_total") == 5
        assert isinstance(await device.ask("exportd", GetStats()), Stale)
        assert (await stats(device)).scrapes == 1

    assert "exportd: ready again" in run(tmp_path, scenario).console


def test_a_collector_that_was_away_gets_what_the_queue_has_kept(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        collector = CollectorDouble(device.kernel)
        own = service_id("tester")
        span = own.to_bytes(8, "little")[:4] + b"\1\2\3\4"
        trace, parent = bytes(range(16)), bytes(8)
        await device.sleep("100ms")
        started = SpanStart(span, trace, parent, int(await device.now()), "work", [Label("k", "v")])
        _ = await device.call("metricsd", started)
        end = SpanEnd(span, int(await device.now()), SpanStatus.ERROR, [])
        _ = await device.call("metricsd", end)
        _ = await device.call("metricsd", Add("strokes", [Label("valve", "a")], 7))
        _ = await device.call("metricsd", Observe("lifted", [], 5))
        await device.sleep("400ms")
        away = await stats(device)
        assert away.collector is CollectorState.AWAY
        assert away.bodies_queued > 0
        assert away.last_failure == "no connection"

        collector.come()
        await device.sleep("3s")

        there = await stats(device)
        assert there.collector is CollectorState.THERE
        assert (there.bodies_queued, there.size_queued, there.bodies_dropped) == (0, 0, 0)
        assert there.bodies_sent == len(collector.received)
        resources = [
            each
            for body in collector.received
            if body.target == "/v1/traces"
            for each in read_traces(body.json).resource_spans
        ]
        spans = [each for found in resources for scope in found.scope_spans for each in scope.spans]
        (work,) = [each for each in spans if each.name == "work"]
        assert (work.trace_id, work.span_id, work.parent_span_id) == (trace, span, b"")
        assert work.status.code == work.status.STATUS_CODE_ERROR
        assert work.end_time_unix_nano - work.start_time_unix_nano == end.at - started.at
        assert {each.key: each.value.string_value for each in work.attributes}["k"] == "v"
        (resource,) = [
            each.resource
            for each in resources
            if work in [span for scope in each.scope_spans for span in scope.spans]
        ]
        assert {each.key: each.value.string_value for each in resource.attributes}[
            "service.name"
        ] == "tester"
        told = [
            metric
            for body in collector.received
            if body.target == "/v1/metrics"
            for found in read_metrics(body.json).resource_metrics
            for scope in found.scope_metrics
            for metric in scope.metrics
        ]
        cumulative = [each for each in told if not each.HasField("gauge")]
        points = [
            point
            for each in cumulative
            for point in (*each.sum.data_points, *each.histogram.data_points)
        ]
        assert {"strokes", "lifted"} <= {each.name for each in cumulative}
        assert all(0 < each.start_time_unix_nano <= each.time_unix_nano for each in points)
        metrics = [each for each in told if each.name == "strokes"]
        starts = {each.sum.data_points[0].start_time_unix_nano for each in metrics}
        assert len(starts) == 1
        assert {metric.sum.data_points[0].as_int for metric in metrics} == {7}
        assert all(metric.sum.is_monotonic for metric in metrics)
        assert all(metric.sum.aggregation_temporality == 2 for metric in metrics)

        collector.leave()
        before = await stats(device)
        await device.sleep("10s")
        after = await stats(device)
        assert after.collector is CollectorState.AWAY
        assert after.bodies_queued <= 8
        assert after.bodies_dropped > before.bodies_dropped
        made = after.bodies_sent + after.bodies_queued + after.bodies_dropped
        assert made > before.bodies_sent + before.bodies_queued + before.bodies_dropped
        collector.come()
        await device.sleep("12s")
        again = await stats(device)
        assert again.bodies_sent > after.bodies_sent
        assert again.bodies_sent == len(collector.received)

    _ = run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("status", "fields"), [(503, [("Retry-After", "2")]), (429, [("Retry-After", "2")])]
)
def test_a_busy_collector_is_left_alone_as_long_as_it_asks(
    tmp_path: Path, status: int, fields: list[tuple[str, str]]
) -> None:
    async def scenario(device: Device) -> None:
        collector = CollectorDouble(device.kernel)
        collector.status, collector.fields = status, fields
        collector.come()
        _ = await device.call("metricsd", Add("strokes", [], 1))
        await device.sleep("1500ms")
        busy = await stats(device)
        assert (busy.bodies_sent, busy.failed) == (0, 1)
        assert busy.last_failure == f"status {status}"

        collector.status, collector.fields = 200, []
        await device.sleep("3s")

        assert (await stats(device)).bodies_sent > 0

    _ = run(tmp_path, scenario)


def test_what_a_collector_refuses_for_good_is_dropped(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        collector = CollectorDouble(device.kernel)
        collector.status = 400
        collector.come()
        _ = await device.call("metricsd", Add("strokes", [], 1))
        await device.sleep("2s")

        account = await stats(device)
        assert (account.bodies_sent, account.bodies_queued) == (0, 0)
        assert account.bodies_dropped >= 5

    _ = run(tmp_path, scenario)


def test_two_runs_of_a_seed_are_one(tmp_path: Path) -> None:
    async def scenario(device: Device) -> None:
        collector = CollectorDouble(device.kernel)
        collector.come()
        _ = await device.call("metricsd", Add("strokes", [], 1))
        _ = await scraped(device)
        await device.sleep("1s")

    assert run(tmp_path, scenario).log == run(tmp_path, scenario).log


def test_without_its_right_a_stream_port_is_not_granted(tmp_path: Path) -> None:
    file = tmp_path / "exporting.toml"
    text = SYSTEM.replace('"port.dial.collector",', "")
    file.write_text(text.format(tcp=TCP_PORT, collector=4318))

    async def scenario(device: Device) -> None:
        await device.sleep("1s")

    with pytest.raises(AssertionError, match="exportd"):
        _ = simulate(file, scenario, seed=1)
