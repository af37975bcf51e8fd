"""The storage engine and SQLite, given the same operations, give the same answers."""

import sqlite3

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nexus.drivers import finished
from nexus.kernel.sim.disk import NOTHING, Disk
from nexus.proof.powercut import DiskDevice
from nexus.services.statefsd.engine import Change, OverQuota, Quota, Store, StoreLimits

BLOCKS = 200
KEYS_MAX = 9
LIMITS = StoreLimits(
    quota=Quota(size=1 << 30, keys=KEYS_MAX),
    quotas={},
    reserves={},
    areas_max=4,
    clients_kept=2,
    requests_kept=50,
    lost_kept=4,
)
keys = st.builds(
    lambda area, name: b"/state/%s%d" % (area, name),
    st.sampled_from((b"", b"a/", b"b/", b"a/b/")),
    st.integers(0, 5),
)
values = st.binary(max_size=40) | st.integers(0, 900).map(lambda size: b"v" * size)
changes = st.builds(Change, keys, values | st.none())


class Pair(RuleBasedStateMachine):
    """A store and a database."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk(BLOCKS)
        self.store = finished(Store.open(DiskDevice(self.disk), LIMITS))
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        _ = self.database.execute("CREATE TABLE state (key BLOB PRIMARY KEY, value BLOB)")
        _ = self.database.execute("CREATE TABLE request (id INTEGER PRIMARY KEY)")

    def teardown(self) -> None:
        self.database.close()

    def counts(self) -> dict[bytes, int]:
        """Keys by area, as the database has them."""
        found: dict[bytes, int] = {}
        for (key,) in self.database.execute("SELECT key FROM state"):
            at = key.find(b"/", 7)
            area = key[: at + 1] if at >= 0 else b"/state/"
            found[area] = found.get(area, 0) + 1
        return found

    @rule(batch=st.lists(changes, min_size=1, max_size=6), request=st.integers(0, 12))
    def change(self, batch: list[Change], request: int) -> None:
        """A batch, perhaps with a request id."""
        before = self.counts()
        _ = self.database.execute("BEGIN")
        known = (
            request
            and self.database.execute("SELECT 1 FROM request WHERE id = ?", (request,)).fetchone()
        )
        if not known:
            for key, value in batch:
                if value is None:
                    _ = self.database.execute("DELETE FROM state WHERE key = ?", (key,))
                else:
                    _ = self.database.execute(
                        "INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value)
                    )
            if request:
                _ = self.database.execute("INSERT INTO request VALUES (?)", (request,))
        after = self.counts()
        over = any(
            count > KEYS_MAX and count > before.get(area, 0) for area, count in after.items()
        )
        if over:
            _ = self.database.execute("ROLLBACK")
            with pytest.raises(OverQuota):
                _ = self.store.stage(batch, client=1, request_id=request)
        else:
            _ = self.database.execute("COMMIT")
            applied = self.store.stage(batch, client=1, request_id=request)
            assert applied.repeated == bool(known)

    @rule(durable=st.booleans())
    def commit(self, durable: bool) -> None:
        """Everything staged is written."""
        finished(self.store.commit(durable))

    @rule(steps=st.integers(1, 4))
    def maintain(self, steps: int) -> None:
        """A few steps of tidying up, begun whether there is need or not."""
        if self.store._builder is None:
            self.store._begin_build()
        for _ in range(steps):
            if not finished(self.store.maintain()):
                return

    @rule(in_order=st.booleans(), cut=st.booleans())
    @precondition(lambda self: self.store.sequence)
    def reopen(self, in_order: bool, cut: bool) -> None:
        """End and open again, also by a power cut behind a durable commit."""
        finished(self.store.commit(True))
        if in_order:
            finished(self.store.close())
        if cut:
            self.disk = self.disk.survivors(NOTHING)
        self.store = finished(Store.open(DiskDevice(self.disk), LIMITS))
        assert self.store.lost_count == 0

    @rule(
        prefix=st.sampled_from((b"/state/", b"/state/a/", b"/state/b/1")), after=keys | st.just(b"")
    )
    def list(self, prefix: bytes, after: bytes) -> None:
        """A page of keys."""
        rows = self.database.execute(
            "SELECT key FROM state WHERE substr(key, 1, ?) = ? AND key > ? ORDER BY key LIMIT 4",
            (len(prefix), prefix, after),
        ).fetchall()
        found, more = self.store.keys(prefix, after, 3, lambda _: True)
        assert (found, more) == ([key for (key,) in rows[:3]], len(rows) > 3)

    @invariant()
    def the_same_is_there(self) -> None:
        """Every key, every value, and what they take."""
        rows = self.database.execute("SELECT key, value FROM state ORDER BY key").fetchall()
        found, _ = self.store.keys(b"/state/", b"", 1000, lambda _: True)
        assert found == [key for key, _ in rows]
        for key, value in rows:
            entry = finished(self.store.get(key))
            assert entry is not None
            assert entry.value == value
        assert self.store.used == sum(48 + len(key) + len(value) for key, value in rows)
        assert {area: self.store.usage(area).keys for area in self.store.areas()} == self.counts()


def test_the_same_operations_give_the_same_answers() -> None:
    run_state_machine_as_test(
        Pair, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
