"""The long run of the store, shortened: `make campaign` does a million puts."""

import pytest

from nexus.proof import longrun
from nexus.services.statefsd.engine import Store


def test_many_puts_stay_within_disk_and_memory() -> None:
    found = longrun.run(20_000, keys=500, disk_size=512 * 1024)

    assert found.problem is None
    assert found.compactions > 20
    assert found.blocks_used <= found.blocks == 1024
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
