"""More of what U-Boot boots, for `make campaign`: `pytest tests/vm/boot_loader_long.py`.

A kernel that never comes to process 1, a service that never gets ready (staged and switched to in
the guest, and named there by `nexus why`), and a healthy set, which is committed.
"""

from pathlib import Path

import pytest

from nexus.bootctl import Cause, SlotName
from nexus.bootctl.handover import EXIT_SLOT_FAILED
from nexus.proof.slots import STUCK
from nexus.vm.image import Image
from tests.linux.slotted import Set, Signer
from tests.vm import board, person
from tests.vm.board import HEALTHY, NEVER, Board

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

B = SlotName.B
BROKEN_WORDS = "rdinit=/missing"


def test_a_kernel_that_never_comes_to_process_1_has_two_tries_too(
    board_image: Image, first: Set, tmp_path: Path
) -> None:
    device = Board(board_image, tmp_path, broken_words=BROKEN_WORDS)
    device.provision(first)
    device.try_in_b(first.as_version(2))

    tries = board.falls_back(device)[:-1]

    for seen in tries:
        assert any("Unable to mount root fs" in line for line in seen.console), seen.told()
    assert [seen.script[-2] for seen in tries] == ["counted 1", "counted 2"]  # and nobody else did
    record = device.record()
    causes = [reason.cause for reason in record.reasons]
    assert causes == [Cause.SWITCHED, Cause.LOST, Cause.LOST, Cause.ROLLED_BACK]
    assert [reason.boot for reason in record.reasons[1:]] == [1, 2, 3]
    assert (record.boots, record.slot(B).attempts) == (3, 2)


def test_a_service_that_never_gets_ready_is_named_when_the_good_set_runs_again(
    board_image: Image, first: Set, tmp_path: Path
) -> None:
    second = board.stuck_set(tmp_path)
    device = Board(board_image, tmp_path, update=Signer().update(second))
    device.provision(first)

    asked = device.boot(NEVER)
    tries = board.falls_back(device, person.DONE)

    assert asked.lines[-1] == "init: stopped", asked.told()
    assert [seen.off for seen in tries[:-1]] == [EXIT_SLOT_FAILED, EXIT_SLOT_FAILED]
    reasons = device.record().reasons
    causes = [reason.cause for reason in reasons]
    assert causes == [Cause.SWITCHED, Cause.NOT_READY, Cause.NOT_READY, Cause.ROLLED_BACK]
    assert {reason.service for reason in reasons[1:]} == {STUCK}
    why = "\n".join(tries[-1].console)
    assert "2.0.0 (version 2) in slot b was rolled back" in why, tries[-1].told()
    assert why.count(f"cause      {STUCK}: a service was not ready in time") == 2
    assert "then       1.0.0 (version 1) in slot a was booted again" in why


def test_a_healthy_set_is_committed_and_booted_without_a_count_from_then_on(
    board_image: Image, first: Set, tmp_path: Path
) -> None:
    device = Board(board_image, tmp_path)
    device.provision(first)
    device.try_in_b(first.as_version(2))

    trial, after = device.boot(HEALTHY), device.printed()
    again = device.boot()

    assert trial.script[-2:] == ["counted 1", "slot b"], trial.told()
    assert (after["nexus_active"], after["nexus_b_state"]) == ("b", "good"), trial.told()
    assert "nexus_trying" not in after
    assert again.script[-1] == "slot b", again.told()
    assert not any(line.startswith("counted") for line in again.script)
    record = device.record()
    assert [reason.cause for reason in record.reasons[-2:]] == [Cause.SWITCHED, Cause.COMMITTED]
    assert (record.boots, record.slot(B).attempts) == (2, 1)
