"""`nexus logs`: what is asked for, and how it is told."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Self

import pytest

from nexus.abi import service_id
from nexus.cli.client import NANOS, Unanswered
from nexus.cli.errors import UsageError
from nexus.cli.logs import Filter, logs
from nexus.protocols.logd import (
    EVERY_RECORD,
    PAGE_MAX,
    THIS_BOOT,
    Field,
    Follow,
    Level,
    Query,
    Record,
    Records,
)
from nexus.protocols.operator import OperatorStatus

WALL = 1_790_000_000_000_000_000


def record(number: int, text: str = "text", wall: int = WALL) -> Record:
    return Record(
        record=number,
        boot=3,
        at=number,
        written=0,
        wall=wall,
        trace=bytes(range(16)),
        span=b"",
        level=Level.WARN,
        service=service_id("pump"),
        pid=7,
        generation=1,
        scope="pump",
        text=text,
        fields=[Field("valve", "a b")],
    )


class Journal:
    """A system whose logd has these records, and answers as long as it is asked to."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []
        self.names = {service_id("pump"): "pump"}

    def client(self) -> "Journal":
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def relay(self, service: str, _protocol: Any, request: Any, _seconds: float) -> Records:
        assert service == "logd"
        self.asked.append(request)
        answer = self.answers.pop(0) if self.answers else KeyboardInterrupt()
        if isinstance(answer, BaseException):
            raise answer
        return Records(*answer)


def unanswered(status: OperatorStatus) -> Unanswered:
    return Unanswered("logd", "Follow", status)


def shown(journal: Any, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    defaults: dict[str, Any] = {"last": 50, "follow": False, "as_json": False}
    wanted = options.pop("wanted", Filter())
    if options.get("follow"):
        with pytest.raises(KeyboardInterrupt):
            logs(journal, wanted, **{**defaults, **options})
    else:
        logs(journal, wanted, **{**defaults, **options})
    return capsys.readouterr().out.splitlines()


def test_pages_are_read_to_the_end_and_the_last_records_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal = Journal((3, 1, 4, 0, [record(1), record(2)]), (5, 1, 4, 0, [record(3), record(4)]))

    lines = shown(journal, capsys, last=3, as_json=True)

    assert [json.loads(line)["record"] for line in lines] == [2, 3, 4]
    assert journal.asked == [Query(THIS_BOOT, since, PAGE_MAX, EVERY_RECORD) for since in (1, 3)]


def test_a_record_is_told_with_the_walls_clock_and_in_json_with_all_it_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = shown(Journal((2, 1, 1, 0, [record(1)])), capsys)
    (as_json,) = shown(Journal((2, 1, 1, 0, [record(1)])), capsys, as_json=True)

    at = datetime.fromtimestamp(WALL / NANOS).astimezone()
    assert line == f'{at:%Y-%m-%d %H:%M:%S}.000 warn  pump  text valve="a b"'
    told = json.loads(as_json)
    assert datetime.fromisoformat(told["time"]) == at
    assert (told["boot"], told["pid"], told["trace"]) == (3, 7, bytes(range(16)).hex())


def test_follow_goes_on_where_the_pages_ended_and_asks_again_when_logd_was_away(
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal = Journal(
        (2, 1, 1, 0, [record(1)]),
        (3, 1, 2, 0, [record(2)]),
        (3, 1, 2, 0, []),
        unanswered(OperatorStatus.CUT_OFF),
        unanswered(OperatorStatus.TOO_LARGE),
        (1 << 40 | 2, 1 << 40 | 1, 1 << 40 | 1, 0, [record(1 << 40 | 1)]),
    )

    lines = shown(journal, capsys, follow=True, as_json=True)

    assert [json.loads(line)["record"] for line in lines] == [1, 2, 1 << 40 | 1]
    asked = [(each.since, each.count) for each in journal.asked if isinstance(each, Follow)]
    assert asked == [(2, 16), (3, 16), (3, 16), (3, 16), (3, 8), (1 << 40 | 2, 8)]


def test_every_filter_of_the_command_line_reaches_logd() -> None:
    wanted = Filter(
        level="Error",
        service="pump",
        field="a=b=c",
        pid=9,
        text="open",
        trace="00" * 15 + "01",
        since="2026-02-03T12:30",
    ).asked()

    assert (wanted.level, wanted.service, wanted.pid) == (Level.ERROR, service_id("pump"), 9)
    assert (wanted.key, wanted.value, wanted.text) == ("a", "b=c", "open")
    assert wanted.trace == bytes(15) + b"\1"
    assert wanted.since == int(datetime(2026, 2, 3, 12, 30).astimezone().timestamp() * NANOS)
    assert Filter().asked() == EVERY_RECORD


def test_a_time_may_be_told_as_how_long_ago_or_as_todays() -> None:
    ago = datetime.now().astimezone() - timedelta(hours=2)
    today = datetime.now().astimezone().replace(hour=12, minute=30, second=0, microsecond=0)

    assert abs(Filter(since="2h").asked().since - ago.timestamp() * NANOS) < 5 * NANOS
    assert Filter(until="12:30").asked().until == int(today.timestamp() * NANOS)


@pytest.mark.parametrize(
    ("boot", "asked"), [(None, THIS_BOOT), (0, THIS_BOOT), (-1, THIS_BOOT - 1), (4, 4)]
)
def test_a_boot_is_told_by_its_number_or_by_how_long_ago_it_was(
    boot: int | None, asked: int
) -> None:
    assert Filter(boot=boot).boot_asked == asked


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Filter(level="loud").asked(), "there is no level loud"),
        (lambda: Filter(field="a").asked(), "write KEY=VALUE"),
        (lambda: Filter(trace="12").asked(), "write the 32 digits"),
        (lambda: Filter(trace="zz").asked(), "write the 32 digits"),
        (lambda: Filter(since="soon").asked(), "write 10m, 2h or 3d ago"),
        (lambda: Filter(boot=1 << 40).boot_asked, "write a number, or -1"),
    ],
)
def test_what_cannot_be_asked_for_is_a_sentence(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _ = make()


def test_an_earlier_boot_is_not_followed() -> None:
    with pytest.raises(UsageError, match="come no more"):
        logs(
            Journal(),  # type: ignore[arg-type]
            Filter(boot=-1),
            last=1,
            follow=True,
            as_json=False,
        )
