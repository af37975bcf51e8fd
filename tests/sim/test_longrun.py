"""The long run of the store, shortened: `make campaign` does a million puts."""

import pytest

from nexus.proof import longrun
from nexus.services.statefsd.engine import Store, checkpoint


def test_many_puts_stay_within_disk_and_memory() -> None:
    found = longrun.run(20_000, keys=500, disk_size=512 * 1024)

    assert found.problem is None
    assert found.compactions > 20
    assert found.step_writes == longrun.STEP_WRITES_MAX
    assert found.step_size <= longrun.STEP_SIZE_MAX
    assert 500 * longrun.VALUE_SIZE < found.checkpoint <= 256 * 1024
    assert found.memory < 2 * 1024 * 1024


def test_a_store_that_forgets_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genuine = Store.stage
    count = 0

    def forgetful(self: Store, changes: object) -> object:
        nonlocal count
        count += 1
        return genuine(self, [] if count == 1990 else changes)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "stage", forgetful)

    assert longrun.main(["--puts", "2000"]) == 1
    shown = capsys.readouterr().out
    assert "is not what was put last" in shown or "keys, 0 lost" in shown


def test_a_step_that_writes_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "STEP_RECORDS", 1 << 20)
    monkeypatch.setattr(checkpoint, "STEP_SIZE", 1 << 20)

    found = longrun.run(8_000, keys=2_000, disk_size=1024 * 1024)

    assert found.step_size > longrun.STEP_SIZE_MAX
    assert found.problem is not None
    assert found.problem.startswith(f"a step of {found.step_size} bytes")


def test_a_checkpoint_that_takes_too_much_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "memory", 512 * 1024)

    found = longrun.run(200, keys=50, disk_size=512 * 1024)

    assert found.problem == "a checkpoint of 524288 bytes in memory"
