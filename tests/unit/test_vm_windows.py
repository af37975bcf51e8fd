"""Rungs 50, 51 and 140 in a machine: what process 1 saw in the memory maps and what QEMU said of
its devices carry them, and each of it alone makes them red."""

import copy
import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Final

import pytest

from nexus.abi import BLOCK_SIZE, INIT_NAME, PAGE_SIZE, Event, EventKind, HardwareKind, Nanos, Pid
from nexus.kernel.core import VIRTIO_MAGIC, VIRTIO_VERSION, Hardware
from nexus.kernel.sim.virtio import FEATURE_VERSION_1
from nexus.proof.checks_devices import block_up, mmio_map, window_mapped
from nexus.proof.remains import Remains
from nexus.proof.trace import Trace
from nexus.proof.verdict import Check, Mismatch
from nexus.protocols.ladder import SELFTEST, Ground, rung
from nexus.protocols.rngd import DRAW_SIZE_MAX

DISK: Final = Hardware("disk", HardwareKind.BLOCK, 64 * BLOCK_SIZE)
STICK: Final = Hardware("stick", HardwareKind.BLOCK, BLOCK_SIZE)
NOISE: Final = Hardware("noise", HardwareKind.ENTROPY)
SPARE: Final = Hardware("spare", HardwareKind.EMPTY)
HOLDERS: Final = {"statefsd": (DISK,), "rngd": (NOISE,), SELFTEST: (SPARE, STICK)}
PAGES: Final = {"disk": 0xA00_1000, "noise": 0xA00_2000, "spare": 0xA00_3000, "stick": 0xA00_4000}
RIGHTS: Final = {
    "disk": "device.mmio.blk",
    "noise": "device.mmio.rng",
    "spare": "device.mmio.empty",
}
PID: Final = Pid(7)  # who prints the line
OTHER: Final = Pid(8)


def _told(path: str, kind: HardwareKind) -> dict[str, Any]:
    """What QEMU says of a device in use."""
    return {
        "path": path,
        "device_id": int(kind),
        "features": ["VIRTIO_F_VERSION_1", "VIRTIO_RING_F_EVENT_IDX"],
        "status": ["VIRTIO_CONFIG_S_DRIVER", "VIRTIO_CONFIG_S_DRIVER_OK"],
        "used": 3,
    }


class Bench:
    """A rung with what a true run in a machine would leave behind, to be falsified in one place."""

    def __init__(self, number: int, check: Check, device: Hardware, evidence: dict[str, Any]):
        row = rung(number)
        self.evidence = evidence
        self.name, self._check, self._device = row.printer, check, device
        self.grants = [[row.printer, RIGHTS[device.name], f"window {device.name}", "allow"]]
        self.holders = [[PID, PAGES[device.name], PAGE_SIZE]]
        self.pages = [
            [
                int(each.kind),
                PAGES[each.name],
                "" if each.kind is not HardwareKind.BLOCK else each.name,
            ]
            for each in (STICK, DISK, NOISE, SPARE)
        ]
        self.look: dict[str, Any] = {"guest": "windows", "line": row.marker, "pid": PID}
        self.devices = [
            _told("/machine/peripheral/disk-stick", HardwareKind.BLOCK),
            _told("/machine/peripheral/disk-disk", HardwareKind.BLOCK),
            _told("/machine/peripheral/noise", HardwareKind.ENTROPY),
        ]
        self.answer: dict[str, Any] = {"host": "devices", "answer": self.devices}
        self.left = Remains(size=device.size)
        self.more: Trace | None = None  # a boot behind
        self.used: list[tuple[Pid, str]] = []  # who used which device, by the kernel's own record

    @property
    def told(self) -> dict[str, Any]:
        """What QEMU says of the device that the rung is about."""
        at = {"disk": 1, "noise": 2}[self._device.name]
        return self.devices[at]

    def check(self) -> None:
        """Raises Mismatch."""
        line = {"line": self.look["line"], "evidence": self.evidence}
        ready = {"line": "init: ready", "evidence": {"grants": self.grants}}
        events = [
            _console(PID, name=self.name, **line),
            _console(Pid(1), name=INIT_NAME, **ready),
        ]
        events += [
            Event(Nanos(2), EventKind.DEVICE, pid, {"name": name, "what": "map"})
            for pid, name in self.used
        ]
        notes: list[dict[str, Any]] = [
            {"guest": "up"},
            {"guest": "pages", "pages": self.pages},
            # of another line, and what QEMU said then: neither is looked at
            {"guest": "windows", "line": "another", "pid": PID, "holders": []},
            {"host": "devices", "answer": []},
            {**self.look, "holders": self.holders},
            self.answer,
        ]
        trace = Trace(events=events, notes=notes, left=self.left)
        services = [
            SimpleNamespace(name=name, grants=SimpleNamespace(hardware=hardware))
            for name, hardware in HOLDERS.items()
        ]
        plan = SimpleNamespace(
            services=services,
            by_name={each.name: each for each in services},
            hardware=(STICK, DISK, NOISE, SPARE),
        )
        scope = SimpleNamespace(ground=Ground.VM)
        boots = (trace,) if self.more is None else (trace, self.more)
        case: Any = SimpleNamespace(plan=plan, scope=scope, boots=boots)
        self._check(case, trace, trace.lines[0])


def _console(pid: int, **fields: object) -> Event:
    return Event(Nanos(1), EventKind.CONSOLE, Pid(pid), {"generation": 1, **fields})


def block() -> Bench:
    evidence = {
        "version": VIRTIO_VERSION,
        "device_id": 2,
        "features": FEATURE_VERSION_1,
        "block_count": 64,
        "first_block": hashlib.sha256(bytes(BLOCK_SIZE)).hexdigest(),
    }
    return Bench(50, block_up, DISK, evidence)


def entropy() -> Bench:
    evidence = {
        "magic": VIRTIO_MAGIC,
        "version": VIRTIO_VERSION,
        "device_id": 4,
        "asked": DRAW_SIZE_MAX,
        "full_draws": 1,
    }
    return Bench(51, window_mapped, NOISE, evidence)


def empty() -> Bench:
    registers = [VIRTIO_MAGIC, VIRTIO_VERSION, 0]
    evidence = {"device": "spare", "registers": registers, "length": PAGE_SIZE}
    bench = Bench(140, mmio_map, SPARE, evidence)
    bench.answer = {"guest": "stage", "name": "over"}  # QEMU is asked, and nobody looks at it
    return bench


DRIVEN: Final = {"disk": block, "noise": entropy}
ALL: Final = {**DRIVEN, "spare": empty}


@pytest.fixture(params=list(DRIVEN))
def driven(request: pytest.FixtureRequest) -> Bench:
    """The rung of a device that a service drives itself."""
    return DRIVEN[request.param]()


@pytest.fixture(params=list(ALL))
def any_bench(request: pytest.FixtureRequest) -> Bench:
    return ALL[request.param]()


def test_what_a_true_run_leaves_behind_is_green(any_bench: Bench) -> None:
    any_bench.check()


def test_who_has_pages_of_others_mapped_as_well_is_still_alone_in_its_own(driven: Bench) -> None:
    driven.holders += [[OTHER, PAGES["stick"], PAGE_SIZE], [PID, 0x4000_0000, PAGE_SIZE]]

    driven.check()


def _second_holder(bench: Bench) -> None:
    bench.holders.append([OTHER, bench.holders[0][1], PAGE_SIZE])


def _another_holder(bench: Bench) -> None:
    bench.holders[0][0] = OTHER


def _no_holder(bench: Bench) -> None:
    bench.holders.clear()


def _page_of_another(bench: Bench) -> None:
    bench.holders[0][1] = PAGES["stick"]


def _look_of_another(bench: Bench) -> None:
    bench.look["pid"] = OTHER


def _qemu_failed(bench: Bench) -> None:
    bench.answer = {"host": "devices", "failed": "it did not answer"}


def _answer_of_a_question_before(bench: Bench) -> None:
    bench.answer = {"guest": "stage", "name": "over"}


def _no_such_device(bench: Bench) -> None:
    bench.devices.remove(bench.told)


def _two_such_devices(bench: Bench) -> None:
    bench.devices.append(copy.deepcopy(bench.told))


def _no_version_1(bench: Bench) -> None:
    bench.told["features"].remove("VIRTIO_F_VERSION_1")


def _no_driver(bench: Bench) -> None:
    bench.told["status"].remove("VIRTIO_CONFIG_S_DRIVER_OK")


def _no_request(bench: Bench) -> None:
    bench.told["used"] = 0


def _no_queue(bench: Bench) -> None:
    del bench.told["used"]


FAULTS: Final[dict[str, tuple[Callable[[Bench], None], str]]] = {
    "second holder": (
        _second_holder,
        r"have the registers of \w+ mapped: \[7, 8\], expected \[7\]",
    ),
    "another holder": (_another_holder, r"have the registers of \w+ mapped: \[8\], expected \[7\]"),
    "no holder": (_no_holder, r"have the registers of \w+ mapped: \[\], expected \[7\]"),
    "another page": (_page_of_another, r"have the registers of \w+ mapped: \[\], expected \[7\]"),
    "another's look": (_look_of_another, r"^looks of process 1 at .*: 0, expected 1$"),
    "QEMU failed": (_qemu_failed, "QEMU did not say what its devices are: it did not answer"),
    "QEMU not asked": (_answer_of_a_question_before, "QEMU did not say what its devices are: None"),
    "no device": (_no_such_device, r"devices of QEMU's that are \w+: 0, expected 1"),
    "two devices": (_two_such_devices, r"devices of QEMU's that are \w+: 2, expected 1"),
    "no VERSION_1": (_no_version_1, "^VERSION_1 negotiated, by QEMU$"),
    "no driver": (_no_driver, "^a driver drives it, by QEMU$"),
    "used not grown": (_no_request, "^it has answered no request, by QEMU$"),
    "no queue": (_no_queue, "^it has answered no request, by QEMU$"),
}


@pytest.mark.parametrize(("falsify", "why"), FAULTS.values(), ids=FAULTS.keys())
def test_a_device_that_is_not_driven_by_its_holder_alone_is_red(
    falsify: Callable[[Bench], None], why: str, driven: Bench
) -> None:
    falsify(driven)

    with pytest.raises(Mismatch, match=why):
        driven.check()


@pytest.mark.parametrize("lacking", ["VERSION_1", "used"])
def test_what_qemu_says_of_another_disk_makes_up_for_nothing(lacking: str) -> None:
    bench = block()
    (_no_version_1 if lacking == "VERSION_1" else _no_request)(bench)
    assert "VIRTIO_F_VERSION_1" in bench.devices[0]["features"]
    assert bench.devices[0]["used"]

    with pytest.raises(Mismatch, match="by QEMU"):
        bench.check()


def _granted_to_two(bench: Bench) -> None:
    bench.grants.append(["timed", *bench.grants[0][1:]])


def _granted_to_another(bench: Bench) -> None:
    bench.grants[0][0] = "timed"


def _granted_with_another_right(bench: Bench) -> None:
    bench.grants[0][1] = "device.mmio.other"


def _granted_to_nobody(bench: Bench) -> None:
    bench.grants.clear()


def _denied(bench: Bench) -> None:
    bench.grants[0][3] = "deny"


@pytest.mark.parametrize(
    "falsify",
    [
        _granted_to_two,
        _granted_to_another,
        _granted_with_another_right,
        _granted_to_nobody,
        _denied,
    ],
)
def test_grants_that_are_not_those_of_the_plan_are_red(
    falsify: Callable[[Bench], None], any_bench: Bench
) -> None:
    falsify(any_bench)

    with pytest.raises(Mismatch, match=r"^init's grants of \w+: "):
        any_bench.check()


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("magic", 0, "^identity: "),
        ("version", 1, "^identity: "),
        ("device_id", 2, "^identity: "),
        ("asked", DRAW_SIZE_MAX - 1, "^bytes of a full draw: "),
        ("full_draws", 0, "^full draws, by rngd$"),
    ],
)
def test_an_entropy_device_that_rngd_itself_calls_another_is_red(
    field: str, value: int, why: str
) -> None:
    bench = entropy()
    bench.evidence[field] = value

    with pytest.raises(Mismatch, match=why):
        bench.check()


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("version", 1, "^register version, by statefsd: "),
        ("device_id", 4, "^device id, by statefsd: "),
        ("features", FEATURE_VERSION_1 >> 1, "^VERSION_1 negotiated, by statefsd$"),
        ("block_count", 63, "^capacity, by statefsd: 63, expected 64$"),
        ("first_block", hashlib.sha256(b"other").hexdigest(), "^first sector, boot 0: "),
    ],
)
def test_a_disk_that_statefsd_itself_calls_another_is_red(
    field: str, value: object, why: str
) -> None:
    bench = block()
    bench.evidence[field] = value

    with pytest.raises(Mismatch, match=why):
        bench.check()


@pytest.mark.parametrize(("said", "is_red"), [("init: start statefsd", True), ("other", False)])
def test_a_boot_without_the_line_is_red_where_statefsd_was_started(said: str, is_red: bool) -> None:
    """In safe mode it is not."""
    bench = block()
    bench.more = Trace([_console(Pid(1), name=INIT_NAME, line=said, evidence={})], number=1)

    with pytest.raises(Mismatch, match="no such line in boot 1") if is_red else nullcontext():
        bench.check()


def test_an_image_of_another_size_than_the_disk_is_red() -> None:
    bench = block()
    bench.left = Remains(size=DISK.size - BLOCK_SIZE)

    with pytest.raises(Mismatch, match=r"^bytes of the image: "):
        bench.check()


@pytest.mark.parametrize(
    "holders",
    [
        [[PID, PAGES["spare"], PAGE_SIZE], [PID, PAGES["stick"], PAGE_SIZE]],
        [[PID, PAGES["stick"], PAGE_SIZE]],
        [[OTHER, PAGES["spare"], PAGE_SIZE]],
        [],
    ],
)
def test_whoever_has_the_empty_transport_has_its_page_and_no_other(
    holders: list[list[int]],
) -> None:
    bench = empty()
    bench.holders = holders

    with pytest.raises(Mismatch, match=f"^pages that {SELFTEST} has mapped: "):
        bench.check()


def test_pages_of_others_do_not_count_as_those_of_the_empty_transports_holder() -> None:
    bench = empty()
    bench.holders.append([OTHER, PAGES["noise"], PAGE_SIZE])

    bench.check()


def test_devices_that_the_plan_gives_the_empty_transports_holder_may_be_used_and_no_others() -> (
    None
):
    bench = empty()
    bench.used = [(PID, "spare"), (PID, "stick"), (OTHER, "disk")]
    bench.check()
    bench.used.append((PID, "disk"))

    with pytest.raises(Mismatch, match=rf"^devices that {SELFTEST} has used: "):
        bench.check()


def test_a_machine_without_a_page_for_the_empty_transport_is_red() -> None:
    bench = empty()
    bench.pages = [each for each in bench.pages if each[0] != int(HardwareKind.EMPTY)]

    with pytest.raises(Mismatch, match=r"has mapped: .*, expected \{None\}$"):
        bench.check()


def test_an_empty_transport_that_process_1_has_not_looked_at_is_red() -> None:
    bench = empty()
    bench.look["guest"] = "up"

    with pytest.raises(Mismatch, match=r"^looks of process 1 at .*: 0, expected 1$"):
        bench.check()


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("device", "stick", "^device: "),
        ("registers", [VIRTIO_MAGIC, VIRTIO_VERSION, 2], "^registers: "),
        ("registers", [VIRTIO_MAGIC, 1, 0], "^registers: "),
        ("length", 2 * PAGE_SIZE, "^bytes of the window: "),
    ],
)
def test_a_transport_that_its_holder_itself_calls_another_is_red(
    field: str, value: object, why: str
) -> None:
    bench = empty()
    bench.evidence[field] = value

    with pytest.raises(Mismatch, match=why):
        bench.check()
