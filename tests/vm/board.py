"""A board with U-Boot, its disks files on the host, and somebody in the guest who updates it.

Whatever it writes can be kept: QEMU logs every write and flush of each disk, and while it runs the
lengths of the logs are read again and again. So it is known in which order the disks were written,
as far as it can be told apart, and what was durable when a word came.
"""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from threading import Event as Pause
from typing import Final, NamedTuple

import nexus
from nexus.abi import BLOCK_SIZE, EventKind
from nexus.bootctl import (
    BootRecord,
    Cause,
    EnvironmentBoot,
    Reason,
    SlotInfo,
    SlotName,
    open_boot,
    staged,
    staging,
    switch,
)
from nexus.bootctl.provision import provision
from nexus.bundle import Release, build, package_folder
from nexus.drivers import finished
from nexus.init.plan import load_plan
from nexus.loader.devices import boot_path, opened, slot_path
from nexus.proof.job import Job
from nexus.proof.notes import NOTE
from nexus.proof.record import decode_event
from nexus.proof.slots import BAD_ENTRY
from nexus.sets import BytesSource
from nexus.vm import image as images
from nexus.vm import qemu
from nexus.vm.compiled import compiled
from nexus.vm.contract import NOTE_OFF, PERSIST, STOP_WORD
from nexus.vm.disks import check_tools, disks_of
from nexus.vm.host import overlay_of
from nexus.vm.image import INIT, SITE, Image
from nexus.vm.initramfs import Tree
from nexus.vm.machines import DEFAULT
from nexus.vm.packages import NotHad, cache_folder
from nexus.vm.qmp import Qmp
from nexus.vm.writelog import Entry, Kind, count_of, entries_of
from tests.linux.slotted import Set, Signer, set_of
from tests.vm import person, uboot

SYSTEM: Final = Path(__file__).parents[1] / "linux" / "slotted.toml"
A, B = SlotName.A, SlotName.B
FLASH: Final = "loader.flash"
QMP: Final = "qmp.sock"
BOOT: Final = "disk-boot"  # QEMU's name of the boot device
LOGGED: Final = ("boot", "slot-a", "slot-b", "disk")
TRIES: Final = person.TRIES
HEALTH: Final = 60_000_000_000  # ns of the guest's clock for a trial
LIMIT: Final = 180_000_000_000  # ns of the guest's clock
BOOT_MAX: Final = 240.0  # seconds of ours for one boot, on a busy host
TOOL_MAX: Final = 20.0  # seconds for fw_printenv
POLL: Final = 0.001  # seconds between two looks at the logs
UP: Final = "init: ready"
HEALTHY: Final = "init: health ok (slot b)"
SCRIPT_STARTS: Final = "nexus: boot.scr"
COUNTED: Final = "nexus: counted "
KERNEL_STARTS: Final = "Starting kernel "
NEVER: Final = "no line begins like this"
BROKEN_INIT: Final = {"python/nexus/vm/guest.py": b"raise SystemExit('this init is broken')\n"}
PERSON: Final = "NEXUS_PERSON=1"  # Linux hands on to process 1 what it does not know
STARTS_PERSON: Final = """\
import os
if os.environ.get("NEXUS_PERSON") and not os.fork():
    from person import main
    sys.exit(main())
"""
FW_CONFIG: Final = "/persist/state/boot.img 0x0 0x4000\n/persist/state/boot.img 0x4000 0x4000\n"


class Counts(NamedTuple):
    """How many entries the log of each disk has, in the order of LOGGED."""

    of: tuple[int, ...]


class Word(NamedTuple):
    """A line of a console, and what the disks had when it had come, at the latest."""

    text: str
    counts: Counts


@dataclass(kw_only=True)
class Kept:
    """What a board did to its disks, over all of its boots. `moments` are lengths that all the logs
    had at once, in their order; between two of them it is not known which disk was written first.
    """

    before: dict[str, bytes]
    entries: dict[str, list[Entry]] = field(default_factory=lambda: {name: [] for name in LOGGED})
    moments: list[Counts] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    lasting_before: bytes = b""
    lasting: list[Entry] = field(default_factory=list)
    """Of the disk with the file system that the trees of the slots are in."""
    lasting_counts: list[int] = field(default_factory=list)
    """How many of these there were at each of the moments."""
    through: list[bool] = field(default_factory=list)
    """Whether the boot disk was written through whenever U-Boot had counted, by QEMU's word."""

    def now(self, name: str) -> list[Entry]:
        """What was written to a disk; a write of U-Boot's, which knows no flush, lasts."""
        entries = list(self.entries[name])
        place = LOGGED.index(name)
        start = 0
        for text, counts in self.words:
            if text.startswith(SCRIPT_STARTS):
                start = counts.of[place]
            elif text.startswith(KERNEL_STARTS):
                for number in range(start, counts.of[place]):
                    entries[number] = entries[number]._replace(kind=Kind.FUA)
        return entries


@dataclass
class Seen:
    """What came out of a boot."""

    console: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    off: int | None = None
    ended: qemu.Ended | None = None
    seconds: float = 0.0

    @property
    def script(self) -> list[str]:
        """What boot.scr said."""
        return [line[7:] for line in self.console if line.startswith("nexus: ")]

    def told(self) -> str:
        """For whoever reads why a test failed."""
        return "\n".join([*self.console[-60:], *self.lines[-20:], str(self.ended), str(self.off)])


class Board:
    """A board with U-Boot: its disks are files in `folder`."""

    def __init__(
        self,
        image: Image,
        folder: Path,
        *,
        broken_words: str = "",
        update: bytes = b"",
        is_kept: bool = False,
    ) -> None:
        """`broken_words` are for the kernel of slot b; with an `update` there is somebody in the
        guest, as long as slot a runs; what is written `is_kept`, or not."""
        self.folder = folder
        self._image = image
        self._disks = disks_of(load_plan(SYSTEM), folder)
        self._config = folder / "fw_env.config"
        boot = boot_path(folder)
        _ = self._config.write_text(f"{boot} 0x0 0x4000\n{boot} 0x4000 0x4000\n")
        job = Job(ground="vm", system=str(SYSTEM), smp=1, seed=1, limit=LIMIT, slots=True)
        initrd = folder / "initrd"
        overlay = overlay_of(job, plain=True)
        words = " ".join([f"console={DEFAULT.console}", *qemu.WORDS, *DEFAULT.append])
        if update:
            _add_person(overlay, image, update)
        image.write_initrd(initrd, overlay)
        own = {A: PERSON if update else "", B: broken_words}
        starts = {
            name: uboot.Start(
                kernel=image.kernel, initrd=initrd, words=f"{words} {own[name]}".rstrip()
            )
            for name in SlotName
        }
        uboot.make_disk(folder / "loader.disk", starts)
        initrd.unlink()
        uboot.make_flash(folder / FLASH)
        self.is_kept = is_kept
        self.kept: Kept | None = None

    def provision(self, first: Set) -> None:
        """The first set in slot a, and the record in an environment."""
        with (
            opened(boot_path(self.folder), writable=True) as boot,
            opened(slot_path(self.folder, A), writable=True) as slot,
        ):
            control = EnvironmentBoot(boot)
            source = BytesSource(first.data)
            _ = finished(provision(control, slot, source, info_of(first), Signer().root))

    def try_in_b(self, made: Set) -> None:
        """Stage it and switch to it, by the transitions that updated makes."""
        with (
            opened(boot_path(self.folder), writable=True) as boot,
            opened(slot_path(self.folder, B), writable=True) as slot,
        ):
            control, record = finished(open_boot(boot))
            record = finished(control.store(staging(record)))
            data = made.data + bytes(-len(made.data) % BLOCK_SIZE)
            finished(slot.write(0, data, durable=True))
            record = finished(control.store(staged(record, info_of(made))))
            version = made.manifest.version
            why = Reason(cause=Cause.SWITCHED, slot=B, version=version, boot=record.boots)
            _ = finished(control.store(switch(record, TRIES, why)))

    def printed(self) -> dict[str, str]:
        """The variables, as libubootenv has them."""
        done = subprocess.run(
            ["fw_printenv", "-c", str(self._config)],
            capture_output=True,
            timeout=TOOL_MAX,
            check=True,
        )
        lines = done.stdout.decode("latin-1").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def record(self) -> BootRecord:
        """As we read it."""
        with opened(boot_path(self.folder)) as boot:
            control, record = finished(open_boot(boot))
            assert isinstance(control, EnvironmentBoot)
            return record

    def put(self, disks: Mapping[str, bytes]) -> None:
        """Make these its disks."""
        for disk in self._disks:
            if disk.name in disks:
                _ = disk.file.write_bytes(disks[disk.name])

    def boot(self, until: str = UP) -> Seen:
        """Boot it until it goes off or starts again; a system that says `until` is told to end."""
        seen, say = Seen(), list[qemu.Say]()

        with self._logged() as (disks, heard):

            def evidence(_seconds: float, line: bytes) -> bool:
                if line.startswith(b'{"dropped"'):
                    return False
                if NOTE in (entry := json.loads(line)):
                    seen.off = entry["code"] if entry[NOTE] == NOTE_OFF else seen.off
                    return False
                event = decode_event(line)
                if event.kind is EventKind.CONSOLE:
                    seen.lines.append(str(event.fields.get("line")))
                    heard(seen.lines[-1])
                    if seen.lines[-1].startswith(until):
                        say[0](STOP_WORD)
                return False

            def told(seconds: float, text: str) -> None:
                heard(text)
                seen.seconds = seconds
                seen.console.append(text)
                if text.startswith(until):
                    say[0](STOP_WORD)

            loader = qemu.Disk(name=uboot.NAME, file=self.folder / "loader.disk", read_only=True)
            setup = qemu.Setup(
                machine=self._image.machine,
                bios=uboot.LOADER,
                flash=self.folder / FLASH,
                disks=(loader, *disks),
                qmp=self.folder / QMP if self.is_kept else None,
            )
            seen.ended = qemu.run(
                setup, deadline=BOOT_MAX, told=told, evidence=evidence, started=say.append
            )
        return seen

    @contextmanager
    def _logged(self) -> Iterator[tuple[Sequence[qemu.Disk], Callable[[str], None]]]:
        """The disks of a boot, and who hears its console; with what they wrote kept, if it is."""
        if not self.is_kept:
            yield self._disks, _unheard
            return
        files = {disk.name: disk.file for disk in self._disks}
        if self.kept is None:
            self.kept = Kept(before={name: files[name].read_bytes() for name in LOGGED})
            self.kept.lasting_before = files[PERSIST].read_bytes()
        kept = self.kept
        logs = {name: self.folder / f"{name}.writes" for name in LOGGED}
        lasting = self.folder / f"{PERSIST}.writes"
        for log in (*logs.values(), lasting):
            _ = log.write_bytes(b"")
        lasting_start = len(kept.lasting)
        start = tuple(len(kept.entries[name]) for name in LOGGED)

        def look() -> Counts:
            counts = (count_of(log) for log in logs.values())
            return Counts(tuple(map(sum, zip(start, counts, strict=True))))

        def heard(text: str) -> None:
            kept.words.append(Word(text, look()))
            if text.startswith(COUNTED):
                with Qmp(self.folder / QMP) as control:
                    (boot,) = (
                        each for each in control.ask("query-block") if each["qdev"].endswith(BOOT)
                    )
                kept.through.append(not boot["inserted"]["cache"]["writeback"])

        ended = Pause()

        def watch() -> None:
            last = Counts(start)
            while not ended.wait(POLL):
                now = look()
                if now != last:
                    count = lasting_start + count_of(lasting)
                    if look() == now:  # all of them had these at once
                        kept.moments.append(now)
                        kept.lasting_counts.append(count)
                        last = now

        named = {**logs, PERSIST: lasting}
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield (
                [replace(disk, log=named.get(disk.name)) for disk in self._disks],
                heard,
            )
        finally:
            ended.set()
            watcher.join()
            for name, log in logs.items():
                kept.entries[name] += entries_of(log) if count_of(log) else []
                log.unlink()
            kept.lasting += entries_of(lasting) if count_of(lasting) else []
            lasting.unlink()
            last = Counts(tuple(len(kept.entries[name]) for name in LOGGED))
            if kept.moments[-1:] != [last]:
                kept.moments.append(last)
                kept.lasting_counts.append(len(kept.lasting))


def _unheard(_text: str) -> None:
    """Nobody keeps it."""


def _add_person(overlay: Tree, image: Image, update: bytes) -> None:
    """Somebody at the device, the commands that they have, and what they bring."""
    head, _, rest = INIT.partition("from nexus")
    overlay.file("init", f"{head}{STARTS_PERSON}from nexus{rest}".encode(), 0o755)
    overlay.file("etc/fw_env.config", FW_CONFIG.encode())
    overlay.file(str(person.UPDATE)[1:], update)
    folder = Path(nexus.__file__).parent
    sources = {
        f"/{SITE}/nexus/{path.relative_to(folder)}": path.read_bytes()
        for path in sorted((folder / "cli").glob("*.py"))
    }
    sources[f"/{SITE}/person.py"] = Path(person.__file__).read_bytes()
    tag = f"cpython-{image.python.replace('.', '')}"
    for shown, data in compiled(sources, image.python, cache_folder()).items():
        source = PurePosixPath(shown[1:])
        overlay.file(str(source), sources[shown])
        overlay.file(str(source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc"), data)


def falls_back(board: Board, until: str = UP) -> list[Seen]:
    """The two tries, and the boot after them out of the good slot, which says `until`; with what
    libubootenv reads in between."""
    before = board.printed()
    assert [before[f"nexus_{name}"] for name in ("active", "trying", "b_tries")] == ["a", "b", "2"]
    boots = []
    for left in ("1", "0"):
        seen = board.boot(NEVER)
        assert "slot b" in seen.script, seen.told()
        between = board.printed()
        assert between["nexus_active"] == "a"
        assert between["nexus_trying"] == "b"
        assert between["nexus_b_tries"] == left
        boots.append(seen)
    back = board.boot(until)
    assert "slot a" in back.script, back.told()
    assert any(line.startswith(until) for line in (*back.lines, *back.console)), back.told()
    after = board.printed()
    assert "nexus_trying" not in after
    assert "nexus_counted" not in after
    assert (after["nexus_active"], after["nexus_b_state"]) == ("a", "bad")
    assert after["nexus_reason_1_cause"] == "rolled_back"
    return [*boots, back]


def info_of(made: Set) -> SlotInfo:
    """What a record says of a set."""
    about = made.manifest
    return SlotInfo(version=about.version, name=about.name, digest=made.digest, size=len(made.data))


def built() -> Image:
    """The image, if there is all that a board needs. Raises NotHad."""
    _ = qemu.check(DEFAULT)
    check_tools()
    _ = uboot.check()
    if shutil.which("fw_printenv") is None:
        raise NotHad("there is no fw_printenv; try `apt-get install libubootenv-tool`")
    return images.build(DEFAULT, cache_folder())


def first_set() -> Set:
    """What a board is provisioned with."""
    release = Release(version=1, name="1.0.0", health=HEALTH)
    return set_of(build(SYSTEM, release, package=package_folder()))


def stuck_set(folder: Path) -> Set:
    """Version 2, in which a service never gets ready."""
    system = folder / "worse" / SYSTEM.name
    system.parent.mkdir()
    _ = system.write_text(SYSTEM.read_text("utf-8") + BAD_ENTRY, "utf-8")
    release = Release(version=2, name="2.0.0", health=HEALTH)
    return set_of(build(system, release, package=package_folder()))
