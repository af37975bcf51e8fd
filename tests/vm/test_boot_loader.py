"""A device under U-Boot updates itself to a set that is broken, and comes back by itself.

Somebody in the guest stages the update and switches to it, by `nexus ota` and through `updated`;
U-Boot counts each try before anything of the slot runs; after two of them the set that was proven
good runs again, and `nexus why` says there what happened. Between the boots libubootenv reads the
same variables, on the host and in the guest: a reader that is none of ours.

Everything that was written to the disks is kept, and a sample of power cuts is tried on it: what
each would have left still boots, and has lost nothing that was acknowledged. There are more boots,
and more cuts, in `make campaign` (boot_loader_long.py, powercut_update.py).
"""

from pathlib import Path

import pytest

from nexus.bootctl import Cause
from nexus.vm import guest
from nexus.vm.contract import PERSIST_STATE
from nexus.vm.image import Image
from tests.linux.slotted import Set, Signer, changed
from tests.vm import board, person
from tests.vm.board import BROKEN_INIT, NEVER, Board
from tests.vm.powercut_update import Judge, judged

CUT_EVERY = 10  # of so many cuts one is tried


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_device_that_updates_itself_to_a_broken_set_comes_back_and_says_why(
    board_image: Image, first: Set, tmp_path: Path
) -> None:
    second = changed(first.as_version(2), BROKEN_INIT)
    device = Board(board_image, tmp_path, update=Signer().update(second), is_kept=True)
    device.provision(first)

    asked = device.boot(NEVER)
    tries = board.falls_back(device, person.DONE)

    told = "\n".join(asked.console)
    assert "is staged in slot b: " in told, asked.told()
    assert "is to be tried up to 2 times: the system restarts now" in told, asked.told()
    assert asked.script[-1] == "slot a"
    for seen in tries[:-1]:
        assert any("this init is broken" in line for line in seen.console), seen.told()
    record = device.record()
    causes = [reason.cause for reason in record.reasons]
    assert causes == [Cause.SWITCHED, Cause.LOST, Cause.LOST, Cause.ROLLED_BACK]
    why = "\n".join(tries[-1].console)
    assert "slotted: 1.0.0 (version 1) runs in slot a, good" in why, tries[-1].told()
    assert "2.0.0 (version 2) in slot b was rolled back" in why, tries[-1].told()
    assert why.count("cause      the power went, or the machine was reset") == 2
    inside = [line for line in tries[-1].console if line.startswith("nexus_")]
    outside = [f"{name}={value}" for name, value in device.printed().items()]
    assert inside == [line for line in outside if line.startswith("nexus_")]

    assert device.kept is not None
    found = judged(
        device.kept, Judge(Signer().root, (first.digest, second.digest)), every=CUT_EVERY
    )
    assert found.problems == []
    assert found.steps == ["staged", "switched", "counted 1", "counted 2", "fallen back"]
    assert found.tried > 20


def test_somebody_in_the_guest_looks_where_the_guest_has_it() -> None:
    state = guest.PERSIST_AT / PERSIST_STATE

    assert guest.RUNTIME == person.HOME
    assert str(state) == person.STATE
    assert board.FW_CONFIG.startswith(f"{state}/boot.img 0x0 ")
