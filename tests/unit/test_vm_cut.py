"""A power cut in a machine: what its disk is afterwards, and when the power goes."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from nexus.abi import Event, EventKind, HardwareKind, Nanos, Pid
from nexus.proof.job import Job
from nexus.proof.record import encode_event
from nexus.protocols.ladder import SELFTEST
from nexus.vm import cut as module
from nexus.vm.cut import TORN_SIZE, WRITE_WAIT, Cut
from nexus.vm.qemu import Disk
from nexus.vm.writelog import ENTRY, MAGIC, SUPERBLOCK, Entry, Kind

SECTOR: Final = 512
COUNT: Final = 8  # sectors of the disk
LINE: Final = f"{SELFTEST}: about to lose the power"
FLUSH: Final = Entry(Kind.FLUSH, 0, 0, b"")
DISCARD: Final = Entry(Kind.DISCARD, 0, SECTOR, b"")
OLD: Final = bytes(range(1, 9))
"""The first bytes of the disk's sectors before the boot: none is the other's, and none is zero."""


def sectors(letters: bytes) -> bytes:
    """A sector for each letter, full of it."""
    return b"".join(bytes([letter]) * SECTOR for letter in letters)


def write(number: int, letters: bytes) -> Entry:
    """A write of whole sectors, from this one on."""
    return Entry(Kind(0), number * SECTOR, len(letters) * SECTOR, sectors(letters))


class Machine:
    """A machine with two disks, that of statefsd logged: `wait` of its cut is over when it has made
    one poll for each entry of `later`, or at its deadline. `now` is its clock."""

    def __init__(self, state: Path) -> None:
        self.image = state / "disk.img"
        _ = self.image.write_bytes(sectors(OLD))
        self.other = Disk(name="stick", file=state / "stick.img")
        device = SimpleNamespace(name="disk", kind=HardwareKind.BLOCK)
        service = SimpleNamespace(grants=SimpleNamespace(hardware=[device]))
        plan: Any = SimpleNamespace(by_name={"statefsd": service}, hardware=[device])
        job = Job(ground="vm", system="", smp=1, seed=0, limit=0, cut_at=LINE)
        self.cut = Cut(job, plan, (self.other, Disk(name="disk", file=self.image)), state)
        (log,) = (each.log for each in self.cut.disks if each.log is not None)
        self.log = log
        self.now = 0
        self.polls = 0
        self._entries: list[Entry] = []
        self._later: list[Entry] = []

    def does(self, *entries: Entry) -> None:
        """QEMU has logged these too."""
        self._entries += entries
        out = SUPERBLOCK.pack(MAGIC, 1, len(self._entries), SECTOR).ljust(SECTOR, b"\0")
        for entry in self._entries:
            head = ENTRY.pack(entry.offset // SECTOR, entry.size // SECTOR, entry.kind, 0)
            out += head.ljust(SECTOR, b"\0") + entry.data
        _ = self.log.write_bytes(out)

    def later(self, *entries: Entry) -> None:
        """It does one of these at each poll."""
        self._later += entries

    def poll(self, seconds: float) -> bool:
        """In the place of a pause."""
        self.polls += 1
        self.now += round(seconds * 1e9)
        if self._later:
            self.does(self._later.pop(0))
        return False

    def left(self, before: Iterable[Entry] = (), after: Iterable[Entry] = ()) -> bytes:
        """The disk of a boot that did these before the word, and these after it."""
        self.cut.begin()
        self.does(*before)
        self.later(*after)
        self.cut.wait()
        while self._later:
            self.does(self._later.pop(0))
        self.cut.leave()
        return self.image.read_bytes()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(module, "Pause", lambda: SimpleNamespace(wait=made.poll))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic_ns=lambda: made.now))
    return made


def test_the_disk_of_statefsd_is_logged_and_no_other(machine: Machine) -> None:
    first, second = machine.cut.disks

    assert first == machine.other
    assert (second.name, second.file, second.log) == ("disk", machine.image, machine.log)


def test_a_boot_that_wrote_nothing_leaves_what_was_there_when_it_began(machine: Machine) -> None:
    _ = machine.image.write_bytes(sectors(b"12345678"))  # of the boot before, after its own start

    assert machine.left() == sectors(b"12345678")


def test_what_qemu_has_brought_to_the_file_is_on_the_disk_only_if_the_log_says_so(
    machine: Machine,
) -> None:
    machine.cut.begin()
    _ = machine.image.write_bytes(sectors(b"abcdefgh"))
    machine.does(write(2, b"c"), FLUSH)
    machine.cut.wait()
    machine.cut.leave()

    assert machine.image.read_bytes() == sectors(OLD[:2] + b"c" + OLD[3:])


def test_what_was_flushed_before_the_word_has_lasted(machine: Machine) -> None:
    left = machine.left([write(0, b"ab"), FLUSH, write(1, b"c"), FLUSH])

    assert left == sectors(b"ac" + OLD[2:])


def test_what_was_not_flushed_is_lost_but_for_one_sector_of_the_first_of_it(
    machine: Machine,
) -> None:
    left = machine.left([write(0, b"a"), FLUSH, write(1, b"b"), write(2, b"c"), write(3, b"d")])

    assert left == sectors(b"ab" + OLD[2:])


def test_a_flush_after_the_word_saves_nothing(machine: Machine) -> None:
    left = machine.left([write(0, b"a"), FLUSH, write(1, b"bb"), write(4, b"c")], [FLUSH])

    assert left == sectors(b"ab" + OLD[2:])


def test_the_next_write_is_torn_after_its_first_sector_where_it_was_to_be(
    machine: Machine,
) -> None:
    data = bytes(number % 251 for number in range(3 * SECTOR))

    left = machine.left(
        [write(0, b"a"), FLUSH], [Entry(Kind(0), 4 * SECTOR, 3 * SECTOR, data), write(1, b"z")]
    )

    assert TORN_SIZE == SECTOR
    assert left[: 4 * SECTOR] == sectors(b"a" + OLD[1:4])
    assert left[4 * SECTOR : 5 * SECTOR] == data[:SECTOR]
    assert left[5 * SECTOR :] == sectors(OLD[5:])


def test_what_has_no_bytes_is_no_write_that_could_be_torn(machine: Machine) -> None:
    left = machine.left([write(3, b"a"), FLUSH], [FLUSH, DISCARD, write(5, b"bb")])

    assert left == sectors(OLD[:3] + b"a" + OLD[4:5] + b"b" + OLD[6:])


def test_the_log_is_no_more_when_the_disk_is_made(machine: Machine) -> None:
    _ = machine.left([write(0, b"a"), FLUSH])

    assert not machine.log.exists()


def printed(
    line: str = LINE, *, kind: EventKind = EventKind.CONSOLE, name: str = SELFTEST, more: str = ""
) -> bytes:
    fields = {"name": name, "line": line, "evidence": {"said": more}}
    return encode_event(Event(Nanos(1), kind, Pid(5), fields))


def test_the_word_is_the_line_of_the_task_that_it_names(machine: Machine) -> None:
    assert machine.cut.is_word(printed())


@pytest.mark.parametrize(
    "line",
    [
        printed(name="rngd"),
        printed(kind=EventKind.KERNEL),
        printed(f"{LINE} again"),
        printed(f"rngd: {LINE}"),
        printed("rngd: ready", name="rngd", more=LINE),
        printed(f"{SELFTEST}: ready", more=LINE),
        printed(f"{SELFTEST}: ready"),
        b'{"dropped":0}',
    ],
)
def test_nothing_else_is_the_word(line: bytes, machine: Machine) -> None:
    assert not machine.cut.is_word(line)


def test_the_cut_is_made_when_the_word_came(machine: Machine) -> None:
    assert not machine.cut.is_made

    machine.cut.wait()  # with nothing in the log as yet

    assert machine.cut.is_made


def test_the_machine_runs_on_until_its_next_write_and_no_longer(machine: Machine) -> None:
    machine.does(write(0, b"a"), FLUSH)
    machine.cut.begin()
    machine.later(write(1, b"b"), write(2, b"c"))

    machine.cut.wait()

    assert machine.polls == 1
    assert machine.now < WRITE_WAIT


def test_a_machine_that_writes_nothing_more_is_waited_for_until_the_deadline(
    machine: Machine,
) -> None:
    machine.does(write(0, b"a"), FLUSH)
    machine.now = start = 7 * WRITE_WAIT

    machine.cut.wait()

    assert start + WRITE_WAIT <= machine.now < start + WRITE_WAIT + 10_000_000
