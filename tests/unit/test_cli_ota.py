"""`nexus ota`: what is asked of updated, what is printed, and what a refusal tells people."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from nexus.bootctl.record import Cause
from nexus.cli import defaults, ota
from nexus.cli.client import ServiceRefused
from nexus.cli.errors import CommandFailed, UsageError
from nexus.protocols import updated
from nexus.protocols.updated import (
    BeginInline,
    Begun,
    ChunkInline,
    Commit,
    Committed,
    Event,
    EventKind,
    Events,
    Finish,
    GetHistory,
    GetUpdate,
    MetadataTaken,
    Phase,
    PutMetadata,
    Rollback,
    RolledBack,
    Slot,
    SlotRow,
    SlotState,
    Staged,
    Switch,
    Switched,
    Taken,
    Transfer,
    Update,
    UpdatedStatus,
)
from nexus.trust.update import UPDATE_MAGIC, UPDATE_VERSION
from nexus.wire import ReplyStatus

OLD, NEW = bytes(range(32)), bytes(range(100, 132))
SET = bytes(20_000)
METADATA = b"m" * 10_000
TRANSFER = Transfer(Phase.IDLE, Slot.NONE, 0, "", bytes(32), 0, 0, 0, 0, "")
GOOD = SlotRow(Slot.A, SlotState.GOOD, 0, 10, "1.0.0", OLD, 700_000, 8 << 20)
STAGED = SlotRow(Slot.B, SlotState.STAGED, 0, 11, "1.1.0", NEW, len(SET), 8 << 20)
PLAIN = Update(7, 3, Slot.A, Slot.NONE, Slot.A, 9, 0, 0, False, [GOOD, STAGED], TRANSFER, 2, 4)
TRIAL = msgspec.structs.replace(
    PLAIN,
    trying=Slot.B,
    running=Slot.B,
    slots=[GOOD, msgspec.structs.replace(STAGED, state=SlotState.TRYING, tries_left=1)],
)
BEGUN = Begun(Slot.B, 11, "1.1.0", NEW, len(SET), 0, False)
DONE = Staged(Slot.B, 11, "1.1.0", NEW, len(SET), 8)


class Updated:
    """A running system whose operator passes requests on to this."""

    def __init__(self, answers: dict[type, Any]) -> None:
        self.answers = answers
        self.asked: list[Any] = []

    def client(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def relay(self, service: str, protocol: Any, request: Any, seconds: float) -> Any:
        assert service == protocol.name == "updated"
        self.asked.append(request)
        answer = self.answers[type(request)]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if callable(answer) and not isinstance(answer, IntEnum):
            answer = answer(request)
        if isinstance(answer, IntEnum):
            raise ServiceRefused(service, type(request).__name__, answer)
        return answer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "update.nxu"
    head = UPDATE_MAGIC + UPDATE_VERSION.to_bytes(2, "little") + len(METADATA).to_bytes(4, "little")
    path.write_bytes(head + METADATA + SET)
    return path


def staging(**answers: Any) -> Any:
    return Updated(
        {
            PutMetadata: lambda asked: MetadataTaken(asked.offset + len(asked.data)),
            BeginInline: BEGUN,
            ChunkInline: lambda asked: Taken(asked.offset + len(asked.data), 0),
            Finish: DONE,
            GetUpdate: PLAIN,
            **{getattr(updated, name): answer for name, answer in answers.items()},
        }
    )


def sent(system: Any, kind: Any) -> bytes:
    """What came in requests of a kind, each where it says that it belongs."""
    data = b""
    for request in (each for each in system.asked if type(each) is kind):
        assert request.offset == len(data) or not data
        data += request.data
    return data


def test_an_update_goes_piece_by_piece_and_is_verified(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = staging()

    ota.stage(system, file, as_json=False)

    assert sent(system, PutMetadata) == METADATA
    assert BeginInline(len(METADATA)) in system.asked
    assert sent(system, ChunkInline) == SET
    assert system.asked[-1] == Finish()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1.1.0 (version 11) is staged in slot b: 20000 bytes, verified there"


def test_how_far_it_is_is_shown(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int, int]] = []

    @contextmanager
    def counting(text: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: shown.append((text, done, total))

    monkeypatch.setattr(ota, "counting", counting)

    ota.stage(staging(Finish=[ReplyStatus.EXPIRED, DONE]), file, as_json=False)

    places = [done for text, done, _ in shown if text == "staging 1.1.0 (version 11)"]
    assert (places[0], places[-1]) == (0, len(SET))
    assert places == sorted(set(places))
    assert shown[-1] == ("verifying 1.1.0 (version 11)", 0, len(SET))


def test_a_transfer_that_was_cut_off_goes_on_where_it_was(file: Path) -> None:
    system = staging(BeginInline=msgspec.structs.replace(BEGUN, offset=14_336))

    ota.stage(system, file, as_json=False)

    pieces = [each for each in system.asked if isinstance(each, ChunkInline)]
    assert [each.offset for each in pieces] == [14_336]
    assert pieces[0].data == SET[14_336:]


def test_who_takes_a_piece_and_is_no_further_is_not_sent_it_for_ever(file: Path) -> None:
    system = staging(ChunkInline=[Taken(0, 0)])

    with pytest.raises(CommandFailed, match="took a piece and is at 0"):
        ota.stage(system, file, as_json=False)


def test_what_is_staged_already_is_not_sent_again(file: Path) -> None:
    system = staging(BeginInline=msgspec.structs.replace(BEGUN, offset=len(SET), staged=True))

    ota.stage(system, file, as_json=False)

    assert not [each for each in system.asked if isinstance(each, ChunkInline)]
    assert system.asked[-1] == Finish()


def test_a_check_that_takes_long_is_waited_for(file: Path) -> None:
    system = staging(Finish=[ReplyStatus.EXPIRED, ReplyStatus.EXPIRED, DONE])

    ota.stage(system, file, as_json=False)

    assert [type(each) for each in system.asked[-5:]] == [
        Finish,
        GetUpdate,
        Finish,
        GetUpdate,
        Finish,
    ]


def test_a_file_that_was_cut_off_is_not_sent(file: Path) -> None:
    system = staging()
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(CommandFailed, match="19999 bytes of a set, and 20000 were signed"):
        ota.stage(system, file, as_json=False)

    assert not [each for each in system.asked if isinstance(each, ChunkInline)]


@pytest.mark.parametrize(
    "content", [b"", b"no update at all", UPDATE_MAGIC + b"\x01\0\xff\xff\0\0"]
)
def test_what_is_no_update_is_said_before_anybody_is_asked(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    system = staging()

    with pytest.raises(UsageError, match="is no update"):
        ota.stage(system, file, as_json=False)

    assert system.asked == []


def test_a_refusal_is_told_with_updated_s_own_sentence(file: Path) -> None:
    kept = Event(
        5, EventKind.REFUSED, 47, Slot.B, 0, "", 3, 0, 0, 0, bytes(16), "1 of 2 keys signed"
    )
    status = UpdatedStatus.THRESHOLD
    kept = msgspec.structs.replace(kept, status=int(status))
    system = staging(BeginInline=status, GetHistory=Events([kept], False))

    with pytest.raises(CommandFailed) as refused:
        ota.stage(system, file, as_json=False)

    assert str(refused.value) == (
        "updated: THRESHOLD, too few of those whom this device trusts have signed it "
        "(1 of 2 keys signed)"
    )


def test_a_missing_right_is_named(file: Path) -> None:
    system = staging(PutMetadata=ReplyStatus.DENIED)

    with pytest.raises(CommandFailed, match=r"operator has no right update\.stage"):
        ota.stage(system, file, as_json=False)


def test_switch_names_the_staged_set_by_its_digest(capsys: pytest.CaptureFixture[str]) -> None:
    system: Any = Updated({GetUpdate: PLAIN, Switch: Switched(Slot.B, 2, 0, 9, False)})

    ota.switch(system, None, 2, reboot=True, as_json=False)

    assert system.asked[-1] == Switch(NEW, 2, True)
    assert capsys.readouterr().out == (
        "1.1.0 (version 11) in slot b is to be tried up to 2 times: the system restarts now\n"
    )


def test_switch_to_another_set_than_the_one_that_is_staged_asks_for_nothing() -> None:
    system: Any = Updated({GetUpdate: PLAIN})

    with pytest.raises(CommandFailed, match="holds no set ffff"):
        ota.switch(system, "ffff", 2, reboot=False, as_json=False)

    assert system.asked == [GetUpdate()]


def test_commit_keeps_the_set_on_trial_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trial: Any = Updated({GetUpdate: TRIAL, Commit: Committed(0, Slot.B, 11, 9, False)})
    plain: Any = Updated({GetUpdate: PLAIN})

    ota.commit(trial, as_json=False)
    with pytest.raises(CommandFailed, match="nothing is on trial"):
        ota.commit(plain, as_json=False)

    assert trial.asked[-1] == Commit(NEW)
    assert capsys.readouterr().out == "1.1.0 (version 11) in slot b is committed\n"


@pytest.mark.parametrize(
    ("update", "back", "said"),
    [
        (TRIAL, Slot.A, "1.0.0 (version 10) in slot a is booted from the next start on"),
        (
            msgspec.structs.replace(PLAIN, trying=Slot.B),
            Slot.A,
            "1.0.0 (version 10) in slot a goes on as before",
        ),
        (
            msgspec.structs.replace(PLAIN, active=Slot.B, running=Slot.B),
            Slot.A,
            "1.0.0 (version 10) in slot a is booted from the next start on",
        ),
    ],
)
def test_rollback_leads_away_from_what_is_tried_or_active(
    update: Update, back: Slot, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    system: Any = Updated({GetUpdate: update, Rollback: RolledBack(back, 9, False, False)})

    ota.rollback(system, reboot=False, as_json=False)

    assert system.asked[-1] == Rollback(back, False)
    assert capsys.readouterr().out == f"{said}\n"


def test_status_shows_both_slots(capsys: pytest.CaptureFixture[str]) -> None:
    transfer = msgspec.structs.replace(
        TRANSFER, phase=Phase.RECEIVING, name="1.2.0", version=12, size=2048, offset=512
    )
    system: Any = Updated({GetUpdate: msgspec.structs.replace(TRIAL, transfer=transfer)})

    ota.status(system, as_json=False)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    ota.status(system, as_json=True)
    document = json.loads(capsys.readouterr().out)

    assert shown[1] == ["a", "1.0.0", "10", "good", "683.6", "KiB", OLD.hex()[:12]]
    assert shown[2][:5] == ["b", "1.1.0", "11", "on", "trial"]
    assert " ".join(shown[2]).endswith("running, 1 tries left")
    assert " ".join(shown[4]) == "transfer of 1.2.0 (version 12): 512 B of 2.0 KiB (25 %) came"
    assert document["slots"]["b"]["digest"] == NEW.hex()
    assert (document["active"], document["trying"], document["running"]) == ("a", "b", "b")


def test_everything_that_can_be_said_has_words() -> None:
    told_elsewhere = {UpdatedStatus.BAD_BULK}  # of memory that a command never sends
    assert set(UpdatedStatus) - ota.WHY.keys() == told_elsewhere
    assert set(Cause) == ota.CAUSES.keys()
    assert set(SlotState) == ota.STATES.keys()
    assert (defaults.TRIES_DEFAULT, defaults.TRIES_MAX) == (
        updated.TRIES_DEFAULT,
        updated.TRIES_MAX,
    )
    assert set(ota.RIGHTS) >= {
        GetHistory,
        *(getattr(updated, name) for name in ("Switch", "Commit", "Rollback", "Finish")),
    }
