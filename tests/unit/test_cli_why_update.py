"""`nexus why` without a service: what became of the last update, in words."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Self

import msgspec

from nexus.bootctl import Cause
from nexus.cli.client import ServiceRefused
from nexus.cli.why_update import UpdateStory, left_for, lines, story_document, story_of
from nexus.protocols.updated import (
    Event,
    EventKind,
    Events,
    GetHistory,
    GetReasons,
    GetUpdate,
    ReasonRow,
    Reasons,
    Slot,
    SlotState,
    UpdatedStatus,
)
from tests.unit.test_cli_ota import GOOD, PLAIN, STAGED

WALL = 1_790_000_000 * 10**9
TRACE = bytes(range(16))
LEFT = msgspec.structs.replace(
    PLAIN, slots=[GOOD, msgspec.structs.replace(STAGED, state=SlotState.BAD)]
)


def reason(cause: Cause, **values: Any) -> ReasonRow:
    plain = ReasonRow(int(cause), Slot.B, 11, 4, WALL, bytes(16), "", "", b"")
    return msgspec.structs.replace(plain, **values)


def event(kind: EventKind, number: int = 9, **values: Any) -> Event:
    plain = Event(number, kind, 0, Slot.B, 11, "1.1.0", 4, 0, WALL, 0, bytes(16), "")
    return msgspec.structs.replace(plain, **values)


SWITCHED = reason(Cause.SWITCHED, boot=3, trace=TRACE[::-1], detail="1.1.0 is tried")
FAILED = reason(
    Cause.NOT_READY,
    service="pump",
    trace=TRACE,
    detail="pump was not ready within its deadline of 2000 ms",
    tail=b"pump: waiting\ninit: slot failed",
)
BACK = reason(Cause.ROLLED_BACK, service="pump", trace=TRACE, boot=5)
TOLD = UpdateStory("plant", LEFT, (BACK, FAILED, SWITCHED))


def told(story: UpdateStory) -> str:
    return "\n".join(lines(story))


def test_a_rollback_is_told_with_its_cause_its_last_words_and_what_followed() -> None:
    text = told(TOLD)

    assert "1.1.0 (version 11) in slot b was rolled back" in text
    assert "pump: a service was not ready in time" in text
    assert "within its deadline of 2000 ms" in text
    assert "console    pump: waiting" in text
    assert f"trace      {TRACE.hex()}  (`nexus trace {TRACE.hex()}`)" in text
    assert "written down before the first boot" in text
    assert text.endswith("then       1.0.0 (version 10) in slot a was booted again")


def test_that_the_data_were_put_back_is_told() -> None:
    story = UpdateStory("plant", LEFT, TOLD.reasons, (event(EventKind.RESTORED),))

    assert "with its data as they were before the switch" in told(story)


def test_that_the_data_could_not_be_put_back_is_told_and_not_that_they_were() -> None:
    gone = event(EventKind.RESTORED, status=int(UpdatedStatus.NO_SNAPSHOT), detail="copy 3 is gone")

    text = told(UpdateStory("plant", LEFT, TOLD.reasons, (gone,)))

    assert "as they were" not in text
    assert "its data could not be put back: copy 3 is gone" in text


def test_what_was_put_back_after_an_earlier_trial_is_not_told_of_this_one() -> None:
    events = (
        event(EventKind.ROLLED_BACK, 12),
        event(EventKind.SWITCHED, 11),
        event(EventKind.RESTORED, 9),
    )

    assert "as they were" not in told(UpdateStory("plant", LEFT, TOLD.reasons, events))


def test_a_refused_update_is_told_as_long_as_nothing_came_after_it() -> None:
    refused = event(
        EventKind.REFUSED, status=int(UpdatedStatus.THRESHOLD), detail="1 of 2", version=0, name=""
    )

    text = told(UpdateStory("plant", PLAIN, (), (refused,)))
    later = told(UpdateStory("plant", PLAIN, (), (event(EventKind.STAGED, 10), refused)))

    assert "an update was refused" in text
    assert "THRESHOLD, too few of those whom this device trusts have signed it (1 of 2)" in text
    assert "refused" not in later


def test_a_device_that_was_never_updated_has_nothing_to_tell() -> None:
    story = UpdateStory("plant", PLAIN, (reason(Cause.PROVISIONED, slot=Slot.A, version=10),))

    assert told(story) == "plant: 1.0.0 (version 10) runs in slot a, good"


def test_an_older_trial_is_not_taken_for_the_evidence_of_this_one() -> None:
    older = msgspec.structs.replace(FAILED, version=10, service="valve")

    assert TOLD.evidence(BACK) == (FAILED,)
    assert UpdateStory("plant", LEFT, (BACK, older)).evidence(BACK) == ()


def test_what_characters_a_service_shows_end_no_line() -> None:
    bad = msgspec.structs.replace(FAILED, tail=b"pump: \x1b[2Jhi")

    assert "\x1b" not in told(UpdateStory("plant", LEFT, (BACK, bad)))


def test_a_service_hears_for_which_sets_it_is_blamed() -> None:
    assert list(left_for(TOLD.reasons, "pump")) == [
        "version 11 was left in slot b for its sake: `nexus why` tells more"
    ]
    assert list(left_for(TOLD.reasons, "valve")) == []


def test_as_json_it_holds_every_reason_and_event() -> None:
    found = story_document(TOLD)

    assert found["end"]["cause"] == "rolled_back"
    assert [each["cause"] for each in found["evidence"]] == ["not_ready"]
    assert found["evidence"][0]["console"] == ["pump: waiting", "init: slot failed"]
    assert len(found["reasons"]) == 3


class Updated:
    """updated, asked through operator: pages of two reasons, and a history that may be gone."""

    def __init__(self, reasons: Sequence[ReasonRow], history: Events | IntEnum) -> None:
        self._reasons = reasons
        self._history = history

    def __enter__(self) -> Self:
        return self

    def relay(self, service: str, _protocol: Any, request: Any, _seconds: float) -> Any:
        match request:
            case GetUpdate():
                return LEFT
            case GetReasons(index=index):
                return Reasons(list(self._reasons[index : index + 2]), len(self._reasons))
            case GetHistory() if isinstance(self._history, Events):
                return self._history
            case _:
                assert isinstance(self._history, IntEnum)
                raise ServiceRefused(service, type(request).__name__, self._history)


def test_every_page_of_reasons_is_asked_for() -> None:
    client: Any = Updated(TOLD.reasons, Events([event(EventKind.FAILED)], False))

    story = story_of(client, "plant")

    assert story.reasons == TOLD.reasons
    assert [each.kind for each in story.events] == [EventKind.FAILED]
    assert story.unknown == ()


def test_a_history_that_cannot_be_had_is_said_and_the_rest_is_told() -> None:
    client: Any = Updated(TOLD.reasons, UpdatedStatus.UNAVAILABLE)

    story = story_of(client, "plant")

    assert "rolled back" in told(story)
    assert "not known: history: updated: UNAVAILABLE" in told(story)
