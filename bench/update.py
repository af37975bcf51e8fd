"""bench/update: what it takes to stage an update, against copying and hashing the same bytes.

Each round boots bench/stager.toml on devices of its own, whose client has updated stage the set
that is on its stick: received, written to the slot, made durable, read back, compared with what was
signed, every chunk unpacked and compared. Before and after it the same file is copied into one
beside the devices, which is made durable, read back and hashed, in blocks of the same size.
"""

import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from bench.boot_child import CHILD
from bench.pairing import Spread, WorkerError
from bench.report import Target, UpdateResult, UpdateRow
from bench.stager import BEGUN_LINE, INDEX_BLOCKS, STAGED_LINE, Index, Sample
from nexus.abi import BLOCK_SIZE, Event, EventKind
from nexus.bootctl import BlockBoot, SlotInfo
from nexus.bootctl.provision import provision
from nexus.bundle import base_of
from nexus.drivers import finished
from nexus.loader.devices import opened
from nexus.proof.runner import Job, run_boot
from nexus.sets import About, BytesSource, CallSource, Content, verify, write
from nexus.trust import Target as Signed
from nexus.trust import encode_metadata
from nexus.trust.sign import ROLES, RoleKeys, Term, first_root, newest, release, signer_of

SYSTEM: Final = Path(__file__).with_name("stager.toml")
MIB: Final = 1024 * 1024
BLOCK: Final = MIB  # bytes at a time of copying and hashing; a piece of a transfer
SIZE: Final = 64 * MIB  # bytes of the files of a round
LARGE: Final = 1024 * MIB  # bytes of the one whose memory is looked at
QUICK: Final = 16 * MIB
RATIO_MAX: Final = 1.5
GROWTH_MAX: Final = 16.0  # MiB that a stage may add to updated's memory, whatever the set's size
BOOT_MAX: Final = 600_000_000_000  # ns of one boot; staging a gigabyte takes some seconds
SEED: Final = 1
ISSUED: Final = 1_790_000_000  # s since 1970
TERM: Final = Term(ISSUED, ISSUED + 365 * 86_400)
RANDOM: Final = "bytes that do not pack"
SOURCE: Final = "Python source"


class Watcher:
    """Sees a boot's events, and how much memory updated had at the beginning and at most."""

    def __init__(self) -> None:
        self.sample: Sample | None = None
        self.before = 0
        self.most = 0
        self._pid = 0

    def __call__(self, event: Event) -> bool:
        """Take in one event; True when the set is staged."""
        if event.kind is EventKind.SPAWN and event.fields["name"] == "updated":
            self._pid = event.pid
        if event.kind is not EventKind.CONSOLE:
            return False
        if event.fields["line"] == BEGUN_LINE:
            self.before = _memory_of(self._pid)["VmRSS"]
        if event.fields["line"] == STAGED_LINE:
            self.most = _memory_of(self._pid)["VmHWM"]
            self.sample = msgspec.convert(event.fields["evidence"], Sample)
        return self.sample is not None


def _memory_of(pid: int) -> dict[str, int]:
    """Bytes by name, of the interpreter that runs updated; what it maps of others counts too."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def contents(kind: str, size: int) -> bytes:
    """A set file of about `size` bytes unpacked."""
    data = os.urandom(size) if kind == RANDOM else _source(size)
    return _set_file(2, data)


def _source(size: int) -> bytes:
    """The standard library's modules one after the other, numbered so that no chunk is twice."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts, have, turn = [], 0, 0
    while have < size:
        for file in files:
            part = b"# %d\n" % turn + file.read_bytes()
            parts.append(part)
            have += len(part)
        turn += 1
    return b"".join(parts)[:size]


def _set_file(version: int, data: bytes) -> bytes:
    files = {
        "system/system.toml": Content(data=b'[system]\nname = "bench"\n'),
        "sbom.cdx.json": Content(data=b"{}\n"),
        "data": Content(data=data),
    }
    about = About(
        version=version,
        name=f"1.{version}",
        system="system/system.toml",
        sbom="sbom.cdx.json",
        health=10_000_000_000,
        base=base_of(),
        services={},
        schemas={},
    )
    return write(about, files)


def _prepare(state: Path, data: bytes) -> Path:
    """A provisioned device with `data` on its stick; the system file, with room for it."""
    signers = [signer_of(sha256(f"bench {role}".encode()).digest()) for role in ROLES]
    roles = {role: RoleKeys([key.public_key], 1) for role, key in zip(ROLES, signers, strict=True)}
    repository = first_root(roles, signers, TERM, development=False)
    first = _set_file(1, b"the first")
    info = SlotInfo(version=1, name="1.1", digest=sha256(first).digest(), size=len(first))
    signed = Signed(name="1.2", length=len(data), sha256=sha256(data).digest(), version=2, floor=1)
    metadata = encode_metadata(newest(release(repository, signed, signers, TERM)))
    content_block = INDEX_BLOCKS + -(-len(metadata) // BLOCK_SIZE)
    index = Index((INDEX_BLOCKS, len(metadata)), (content_block, len(data)))
    sizes = {
        "boot": 64 * 1024,
        "slot-a": MIB,
        "slot-b": _whole(len(data)),
        "stick": _whole(content_block * BLOCK_SIZE + len(data)),
    }
    for name, size in sizes.items():
        _filled(state / f"{name}.img", size)
    with (state / "stick.img").open("r+b") as stick:
        _ = stick.write(msgspec.json.encode(index))
        _ = stick.seek(INDEX_BLOCKS * BLOCK_SIZE)
        _ = stick.write(metadata)
        _ = stick.seek(content_block * BLOCK_SIZE)
        _ = stick.write(data)
        stick.flush()
        os.fsync(stick.fileno())
    with (
        opened(state / "boot.img", writable=True) as boot,
        opened(state / "slot-a.img", writable=True) as slot,
    ):
        root = repository["1.root.json"]
        _ = finished(provision(BlockBoot(boot), slot, BytesSource(first), info, root))
    text = SYSTEM.read_text("utf-8").replace('path = [".."]', f'path = ["{SYSTEM.parent.parent}"]')
    for name in ("slot-b", "stick"):
        old = f'[device.{name}]\nkind = "block"\nsize = "1MiB"'
        assert old in text, f"{SYSTEM.name} has a {name} of 1 MiB"
        text = text.replace(old, old.replace("1MiB", f"{sizes[name] // MIB}MiB"))
    file = state / SYSTEM.name
    _ = file.write_text(text, "utf-8")
    return file


def _whole(size: int) -> int:
    return -(-size // MIB) * MIB


def _filled(path: Path, size: int) -> None:
    """A file whose blocks are there, as those of a partition are: full of zeros, and durable."""
    with path.open("wb") as file:
        for at in range(0, size, BLOCK):
            _ = file.write(bytes(min(BLOCK, size - at)))
        file.flush()
        os.fsync(file.fileno())


def copy_and_hash(source: Path, target: Path) -> float:
    """Seconds to copy a file into one that is there, make that durable, read it back and hash
    it."""
    start = time.perf_counter()
    digest = sha256()
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    with source.open("rb", buffering=0) as reading, target.open("rb+", buffering=0) as copy:
        while size := reading.readinto(buffer):
            _ = copy.write(view[:size])
        os.fsync(copy.fileno())
        _ = copy.seek(0)
        while size := copy.readinto(buffer):
            digest.update(view[:size])
    return time.perf_counter() - start


def _stage(state: Path, file: Path) -> Watcher:
    """One boot, in which the set is staged."""
    watcher = Watcher()
    job = Job(
        ground="linux",
        system=str(file),
        smp=len(os.sched_getaffinity(0)),
        seed=SEED,
        limit=BOOT_MAX,
        state=str(state),
    )
    trace = run_boot(job, timeout=BOOT_MAX, watch=watcher, command=CHILD)
    if watcher.sample is None:
        raise WorkerError(f"{SYSTEM.name}: nothing was staged\n{trace.output}")
    return watcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One stage: its times; s of a copy, the mean of one before and one after it; s of the strict
    reader over the same file in one process; and bytes of updated's memory, before and at most."""

    sample: Sample
    copied: float
    checked: float
    before: int
    most: int


def _round(folder: Path, data: bytes) -> Round:
    with tempfile.TemporaryDirectory(prefix="round", dir=folder) as name:
        state = Path(name)
        plain = folder / "plain"
        _ = plain.write_bytes(data)
        os.sync()
        file = _prepare(state, data)
        copy = state / "copy"
        _filled(copy, len(data))
        before = copy_and_hash(plain, copy)
        watcher = _stage(state, file)
        after = copy_and_hash(plain, copy)
        checked = _checked(copy)
        plain.unlink()
    assert watcher.sample is not None, "checked by _stage"
    return Round(
        sample=watcher.sample,
        copied=(before + after) / 2,
        checked=checked,
        before=watcher.before,
        most=watcher.most,
    )


def _checked(file: Path) -> float:
    with file.open("rb", buffering=0) as opened_file:
        descriptor = opened_file.fileno()
        source = CallSource(
            lambda at, size: os.pread(descriptor, size, at), os.fstat(descriptor).st_size
        )
        start = time.perf_counter()
        _ = finished(verify(source))
        return time.perf_counter() - start


def run(
    *, rounds: int, quick: bool, progress: Callable[[str], None]
) -> tuple[UpdateResult, list[Target]]:
    """Stage sets of both kinds, then a large one."""
    rows = []
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        for kind in (RANDOM, SOURCE):
            data = contents(kind, QUICK if quick else SIZE)
            rows.append(_row(kind, len(data), [_round(folder, data) for _ in range(rounds)]))
            progress(f"update: {kind}: {rows[-1].ratio.median:.2f} x copy and hash")
        large = contents(RANDOM, QUICK if quick else LARGE)
        found = _round(folder, large)
    growth = Spread.of([(found.most - found.before) / MIB])
    progress(f"update: {len(large) >> 20} MiB: {growth.median:.1f} MiB more memory at most")
    result = UpdateResult(
        rounds,
        rows,
        len(large),
        found.before,
        found.most,
        found.sample.staged,
        found.copied,
    )
    return result, [
        Target(
            "update received, hashed and in the slot, against copy and hash",
            RATIO_MAX,
            at_most=True,
            measured=rows[0].received_ratio,
            unit=" x",
        ),
        Target(
            "the same and verified, against copy and hash",
            RATIO_MAX,
            at_most=True,
            measured=rows[0].ratio,
            unit=" x",
        ),
        Target(
            "memory of updated that a stage of 1 GiB adds",
            GROWTH_MAX,
            at_most=True,
            measured=None if quick else growth,
            why_not="a smoke test stages 16 MiB",
            unit=" MiB",
        ),
    ]


def _row(kind: str, size: int, found: Sequence[Round]) -> UpdateRow:
    return UpdateRow(
        kind,
        size,
        Spread.of([each.sample.received for each in found]),
        Spread.of([each.sample.staged for each in found]),
        Spread.of([each.copied for each in found]),
        Spread.of([each.checked for each in found]),
        Spread.of([each.sample.received / each.copied for each in found]),
        Spread.of([each.sample.staged / each.copied for each in found]),
    )


if __name__ == "__main__":
    print(msgspec.json.encode(run(rounds=1, quick="--quick" in sys.argv, progress=print)).decode())
