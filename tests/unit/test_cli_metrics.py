"""`nexus metrics` and `nexus reload` as they print what a running system answers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from nexus.abi import service_id
from nexus.cli.ask import Asked
from nexus.cli.client import ServiceRefused
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.metrics import metrics, quantile
from nexus.cli.reload import reload
from nexus.protocols.init import (
    InitStatus,
    Reloading,
    ReloadOutcome,
    ReloadRow,
    ReloadSettings,
)
from nexus.protocols.metricsd import (
    GetHistory,
    GetSeries,
    Kind,
    Label,
    MetricsdStatus,
    Series,
    SeriesPage,
    Window,
    WindowPage,
)

TIMED = service_id("timed")
BOUNDS = [10, 20, 40]


class Client:
    """A system that answers as it is told."""

    def __init__(self, *series: Series, windows: list[Window] | None = None) -> None:
        self.series = series
        self.windows = windows
        self.done: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def relay(self, _service: str, _protocol: Any, request: Any, _wait: float) -> Any:
        match request:
            case GetSeries():
                wanted = [
                    each
                    for each in self.series
                    if each.series >= request.since
                    and each.name.startswith(request.name)
                    and request.service in (0, each.service)
                ]
                following = wanted[1].series if len(wanted) > 1 else 0
                return SeriesPage(following, wanted[:1])
            case GetHistory():
                if self.windows is None:
                    raise ServiceRefused("metricsd", "GetHistory", MetricsdStatus.NOT_FOUND)
                return WindowPage(0, self.windows)
            case ReloadSettings():
                if isinstance(self.done, InitStatus):
                    raise ServiceRefused("init-lite", "ReloadSettings", self.done)
                return self.done
            case _:
                raise AssertionError(request)


class Fake(Asked):
    """What a command asks, with that client."""

    def __init__(self, client: Client) -> None:
        object.__setattr__(self, "running", SimpleNamespace(title="plant", file=Path("plant.toml")))
        object.__setattr__(self, "given", client)
        self.__dict__["names"] = {TIMED: "timed"}
        self.__dict__["plan"] = None

    def client(self) -> Any:
        return self.__dict__["given"]


def series(number: int, kind: Kind = Kind.COUNTER, **options: Any) -> Series:
    known: dict[str, Any] = {
        "series": number,
        "service": TIMED,
        "generation": 1,
        "kind": kind,
        "name": "hits",
        "unit": "",
        "labels": [],
        "value": 0,
        "count": 0,
        "sum": 0,
        "bounds": [],
        "buckets": [],
        "at": 1,
        "live": True,
        "since": 0,
    }
    return Series(**(known | options))


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("buckets", "share", "value"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([4, 0, 0, 0], 0.5, 5.0),
        ([2, 2, 0, 0], 0.75, 15.0),
        ([1, 0, 1, 0], 0.99, 20 + 20 * 0.98),
        ([0, 0, 0, 3], 0.5, 40.0),
    ],
)
def test_a_quantile_lies_where_its_share_of_a_bucket_ends(
    buckets: list[int], share: float, value: float | None
) -> None:
    assert quantile(BOUNDS, buckets, share) == (value if value is None else pytest.approx(value))


def test_every_page_is_shown_with_labels_units_and_what_has_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = Client(
        series(1, value=7, unit="pieces", labels=[Label("way", 'a"\n')]),
        series(4, Kind.HISTOGRAM, count=4, sum=20, bounds=BOUNDS, buckets=[4, 0, 0, 0]),
        series(9, Kind.GAUGE, value=-3, live=False, service=0),
    )

    metrics(Fake(client), "", service=None, history=None, as_json=False)

    counter, histogram, gauge = shown(capsys)
    assert counter.split() == ["timed", 'hits{way="a\\"\\n"}', "7", "pieces"]
    assert histogram.split()[2:] == ["count=4", "sum=20", "p50~5", "p90~9", "p99~10"]
    assert gauge.split() == ["(metricsd)", "hits", "-3", "(ended)"]


def test_a_unit_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    metrics(
        Fake(Client(series(1, unit="B\x1b[2J\n"))), "", service=None, history=None, as_json=False
    )

    (line,) = shown(capsys)
    assert line.split() == ["timed", "hits", "0", "B\\x1b[2J\\n"]


def test_json_has_the_numbers_and_the_history(capsys: pytest.CaptureFixture[str]) -> None:
    client = Client(series(1, value=7), windows=[Window(5, 1, 2, 7, 3, 4, 7, [])])

    metrics(Fake(client), "hi", service="timed", history="short", as_json=True)

    (told,) = json.loads(capsys.readouterr().out)
    assert (told["service"], told["value"]) == ("timed", 7)
    assert told["history"] == [
        {"start_ns": 5, "boot": 1, "count": 2, "sum": 7, "min": 3, "max": 4, "last": 7}
    ]


def test_a_series_without_history_is_shown_without(capsys: pytest.CaptureFixture[str]) -> None:
    metrics(Fake(Client(series(1))), "", service=None, history="long", as_json=False)

    assert len(shown(capsys)) == 1


def test_there_are_two_histories() -> None:
    with pytest.raises(UsageError, match="short or long"):
        metrics(Fake(Client()), "", service=None, history="week", as_json=False)


def test_a_reload_says_per_service_what_happened_and_fails_if_one_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = Client()
    client.done = Reloading(
        2,
        3,
        [
            ReloadRow("logd", ReloadOutcome.REFUSED),
            ReloadRow("metricsd", ReloadOutcome.IN_FORCE),
            ReloadRow("pump", ReloadOutcome.AT_START),
        ],
    )

    code = reload(Fake(client), as_json=False)

    said = capsys.readouterr()
    assert code == 1
    assert [line.partition(":")[0] for line in said.out.splitlines()] == [
        "logd",
        "metricsd",
        "pump",
    ]
    assert "3 other changes" in said.err


def test_a_reload_of_another_system_is_refused() -> None:
    client = Client()
    client.done = InitStatus.BAD_SYSTEM_FILE

    with pytest.raises(CommandFailed, match="nothing was changed"):
        _ = reload(Fake(client), as_json=False)
