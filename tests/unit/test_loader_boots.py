"""What the loader's children say of the trial that was booted last."""

from pathlib import Path

import msgspec
import pytest

from nexus.bootctl import (
    BOOT_BLOCKS_MIN,
    BlockBoot,
    BootRecord,
    Cause,
    SlotName,
    TrialFailure,
    attempt,
    staged,
    staging,
    switch,
)
from nexus.bootctl.handover import TrialReason
from nexus.drivers import finished
from nexus.kernel.linux.bootmemory import BootMemory
from nexus.loader.boots import verdict
from nexus.loader.devices import boot_path, opened
from nexus.loader.main import FAILING, JUDGED, OPEN
from tests.fakes.bootrecords import a_reason, a_set, new

FAILURE = TrialFailure(
    slot="b",
    version=2,
    attempt=1,
    boot=1,
    at=1,
    trace="ab" * 16,
    service="app",
    reason=TrialReason.CRASHED,
    detail="app ended",
)


def in_trial() -> BootRecord:
    record = staged(staging(new()), a_set(2))
    reason = a_reason(Cause.SWITCHED, SlotName.B, record)
    return attempt(switch(record, 2, reason))[0]


def asked(state: Path, record: BootRecord, failure: TrialFailure | None) -> int:
    """The verdict on a device with this record, whose init left this word."""
    _ = boot_path(state).write_bytes(bytes(BOOT_BLOCKS_MIN * 512))
    with opened(boot_path(state), writable=True) as device:
        _ = finished(BlockBoot(device).create(record))
    BootMemory(state).replace(msgspec.json.encode({"trial": failure}))
    return verdict({"running": {"state": str(state)}})


def test_a_trial_is_open_until_init_says_that_it_failed(tmp_path: Path) -> None:
    assert asked(tmp_path, in_trial(), None) == OPEN
    assert asked(tmp_path, in_trial(), FAILURE) == FAILING


@pytest.mark.parametrize("other", [{"slot": "a"}, {"version": 1}, {"attempt": 2}])
def test_inits_word_about_another_trial_leaves_this_one_open(
    tmp_path: Path, other: dict[str, object]
) -> None:
    failure = msgspec.structs.replace(FAILURE, **other)

    assert asked(tmp_path, in_trial(), failure) == OPEN


def test_without_a_trial_there_is_nothing_to_judge(tmp_path: Path) -> None:
    assert asked(tmp_path, new(), FAILURE) == JUDGED
