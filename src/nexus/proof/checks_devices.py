"""The evidence behind the rungs about devices and entropy: what the devices themselves recorded."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any, Final

from nexus.abi import BLOCK_SIZE, PAGE_SIZE, Event, EventKind, HardwareKind, service_id
from nexus.init.grants import MMIO_RIGHTS
from nexus.kernel.core import VIRTIO_MAGIC, VIRTIO_VERSION, WINDOW_SIZE, Hardware
from nexus.kernel.sim.bus import BUS_BASE
from nexus.kernel.sim.chance import Chance
from nexus.kernel.sim.virtio import FEATURE_VERSION_1
from nexus.proof.checks import healthy, hex_of, measured, of_init
from nexus.proof.leaks import Leaks
from nexus.proof.notes import NOTE, NOTE_PAGES, NOTE_WINDOWS
from nexus.proof.trace import Line, Trace
from nexus.proof.verdict import Case, Check, Mismatch, demand, demand_equal
from nexus.protocols.ladder import SELFTEST, Ground
from nexus.protocols.rngd import DRAW_RIGHT, DRAW_SIZE_MAX

BACKING: Final = "virtio-mmio"
HWRNG: Final = "hwrng"  # where Linux's driver has the entropy device
HEX_RUN: Final = re.compile(r"[0-9a-f]{64,}")
DRAW_SIZE: Final = 32  # bytes; ladder #98


def _device_of(case: Case, service: str, kind: HardwareKind) -> Hardware:
    """The line of the bus map that the plan gives to a service."""
    names = {grant.name for grant in case.plan.by_name[service].grants.hardware}
    found = [each for each in case.plan.hardware if each.name in names and each.kind is kind]
    demand_equal(len(found), 1, f"devices of kind {kind.name.lower()} that {service} is to have")
    return found[0]


def granted(trace: Trace, device: str, right: str, holders: list[str]) -> None:
    """By init's grant table these services have the device, and nobody else. A run that is cut or
    fails before the system is ready does not see that table: then another rung is red."""
    ready = of_init(trace, "init: ready")
    if ready is None:
        return
    rows = [row for row in ready.evidence["grants"] if row[2] == f"window {device}"]
    wanted = [[holder, right, f"window {device}", "allow"] for holder in holders]
    demand_equal(rows, wanted, f"init's grants of {device}")


def _told_by(trace: Trace, device: str, what: str = "") -> list[tuple[int, Event]]:
    """What a simulated device recorded about itself; `what` is the kind of its entry."""
    return [
        (at, event)
        for at, event in trace.of_kind(EventKind.DEVICE)
        if event.fields.get("name") == device and what in {"", event.fields.get("what")}
    ]


def _touched_by_its_holder_alone(trace: Trace, device: Hardware, service: str) -> None:
    granted(trace, device.name, MMIO_RIGHTS[device.kind], [service])
    pids = {event.pid for _, event in trace.spawns(service)}
    others = {event.pid for _, event in _told_by(trace, device.name) if event.pid not in pids}
    demand(not others, f"{device.name} was used by {sorted(others)}, {service} is {sorted(pids)}")


def _live(trace: Trace, line: Line, device: Hardware) -> Mapping[str, Any]:
    """How the device's own side says that its driver has set it up, before this line."""
    entries = [event for at, event in _told_by(trace, device.name, "live") if at < line.place]
    demand(entries, f"{device.name} was never set up by a driver")
    fields = entries[0].fields
    demand_equal(fields["version"], VIRTIO_VERSION, f"register version of {device.name}")
    demand_equal(fields["device"], int(device.kind), f"device id of {device.name}")
    features = fields["features"]
    demand(isinstance(features, int) and features & FEATURE_VERSION_1, "VERSION_1 negotiated")
    return fields


def _seen_in_machine(case: Case, trace: Trace, line: Line, device: Hardware) -> None:
    """What process 1 saw in the memory maps when the line came, the holder alone has the registers;
    and what QEMU said of its device: who drives it has agreed to VERSION_1."""
    wanted = (NOTE_WINDOWS, line.text, line.pid)
    notes = list(trace.notes)
    at = [n for n, each in enumerate(notes) if _claim(each) == wanted]
    demand_equal(len(at), 1, f"looks of process 1 at {line.text!r}")
    page = _page_of(trace, device)
    holders = sorted({pid for pid, address, _ in notes[at[0]]["holders"] if address == page})
    demand_equal(holders, [line.pid], f"processes that have the registers of {device.name} mapped")
    told = next((each for each in notes[at[0] :] if each.get("host") == "devices"), {})
    demand("answer" in told, f"QEMU did not say what its devices are: {told.get('failed')}")
    same = [each for each in told["answer"] if _is_of(each, device)]
    demand_equal(len(same), 1, f"devices of QEMU's that are {device.name}")
    demand("VIRTIO_F_VERSION_1" in same[0]["features"], "VERSION_1 negotiated, by QEMU")
    demand("VIRTIO_CONFIG_S_DRIVER_OK" in same[0]["status"], "a driver drives it, by QEMU")
    demand(same[0].get("used"), "it has answered no request, by QEMU")
    granted(trace, device.name, MMIO_RIGHTS[device.kind], [_holder_of(case, device)])


def _claim(note: Mapping[str, Any]) -> tuple[object, object, object]:
    return note.get(NOTE), note.get("line"), note.get("pid")


def _page_of(trace: Trace, device: Hardware) -> int | None:
    """The address of the page of registers that the machine has for a device; None without."""
    for note in trace.notes:
        if note.get(NOTE) == NOTE_PAGES:
            for kind, address, name in note["pages"]:
                if kind == int(device.kind) and name in {"", device.name}:
                    return int(address)
    return None


def _is_of(told: Mapping[str, Any], device: Hardware) -> bool:
    """Whether QEMU speaks of this device: a disk has its name in its path."""
    is_kind = told["device_id"] == int(device.kind)
    is_disk = device.kind is HardwareKind.BLOCK
    return is_kind and (not is_disk or told["path"].endswith(f"/disk-{device.name}"))


def _holder_of(case: Case, device: Hardware) -> str:
    """The service that the plan gives a device to."""
    return next(
        service.name
        for service in case.plan.services
        if device.name in {grant.name for grant in service.grants.hardware}
    )


def rngd_ready(case: Case, trace: Trace, line: Line) -> None:
    """#33: the source it names is the one behind its device, and has passed its test."""
    facts = healthy(case, trace, line)
    demand_equal(facts["fit"], 1, "fit")
    demand(facts["start_tests_passed_total"] >= 1, "no start-up test has passed")
    device = _device_of(case, "rngd", HardwareKind.ENTROPY)
    demand_equal(line.evidence["source"], _backing(case, trace, device), "source")
    granted(trace, device.name, MMIO_RIGHTS[device.kind], ["rngd"])


def _backing(case: Case, trace: Trace, device: Hardware) -> str:
    """What is behind a device, as the runner finds it out itself."""
    if case.scope.ground is Ground.SIM:
        return BACKING
    if case.scope.ground is Ground.VM:
        return BACKING if _page_of(trace, device) is not None else HWRNG
    from nexus.kernel.linux.hardware import Bus

    (entry,) = Bus([device], None).scan()
    return entry.backing


def legacy_refused(case: Case, trace: Trace, line: Line) -> None:
    """#49: listed with its version, granted to nobody, and its status register untouched."""
    old = [each for each in case.plan.hardware if each.legacy]
    demand_equal(line.evidence["transports"], [[each.name, 1] for each in old], "refused ones")
    demand_equal(line.evidence["granted"], [], "holders by init's record")
    for each in old:
        granted(trace, each.name, MMIO_RIGHTS[each.kind], [])
        entries = [event.fields for _, event in _told_by(trace, each.name)]
        touched = [entry for entry in entries if entry.get("value") != 0]
        demand(not touched, f"{each.name} has recorded {touched}")


def block_up(case: Case, trace: Trace, line: Line) -> None:
    """#50: set up as a modern device, as large as the image, and the first sector is its own."""
    device = _device_of(case, "statefsd", HardwareKind.BLOCK)
    evidence = line.evidence
    demand_equal(evidence["version"], VIRTIO_VERSION, "register version, by statefsd")
    demand_equal(evidence["device_id"], int(HardwareKind.BLOCK), "device id, by statefsd")
    count = device.size // BLOCK_SIZE
    if case.scope.ground is Ground.SIM:
        fields = _live(trace, line, device)
        demand_equal(evidence["features"], fields["features"], "features, on both sides")
        count = int.from_bytes(bytes.fromhex(fields["config"])[:8], "little")
        demand_equal(count * BLOCK_SIZE, device.size, "capacity on the device's side")
        _touched_by_its_holder_alone(trace, device, "statefsd")
    else:
        demand(evidence["features"] & FEATURE_VERSION_1, "VERSION_1 negotiated, by statefsd")
        _seen_in_machine(case, trace, line, device)
    demand_equal(evidence["block_count"], count, "capacity, by statefsd")
    demand_equal(trace.left.size, device.size, "bytes of the image")
    for boot in case.boots:
        _first_sector(boot, line.text)


def _first_sector(boot: Trace, text: str) -> None:
    """What statefsd read first in a boot is what the boot before left: at first, nothing. Where it
    was not started, as in safe mode, that is another rung's to say."""
    lines = [each for each in boot.lines if (each.printer, each.text) == ("statefsd", text)]
    if not lines and of_init(boot, "init: start statefsd") is None:
        return
    demand(lines, f"no such line in boot {boot.number}")
    before = boot.earlier[-1].left.first_block if boot.earlier else bytes(BLOCK_SIZE)
    digest = hashlib.sha256(before).hexdigest()
    demand_equal(lines[0].evidence["first_block"], digest, f"first sector, boot {boot.number}")


def window_mapped(case: Case, trace: Trace, line: Line) -> None:
    """#51: a modern entropy device, driven by rngd alone, has delivered a full draw."""
    device = _device_of(case, "rngd", HardwareKind.ENTROPY)
    evidence = line.evidence
    identity = [evidence[name] for name in ("magic", "version", "device_id")]
    demand_equal(identity, [VIRTIO_MAGIC, VIRTIO_VERSION, int(device.kind)], "identity")
    demand_equal(evidence["asked"], DRAW_SIZE_MAX, "bytes of a full draw")
    if case.scope.ground is not Ground.SIM:
        demand(evidence["full_draws"] >= 1, "full draws, by rngd")
        _seen_in_machine(case, trace, line, device)
        return
    _ = _live(trace, line, device)
    sizes = [
        event.fields["size"]
        for at, event in _told_by(trace, device.name, "draw")
        if at < line.place
    ]
    demand(DRAW_SIZE_MAX in sizes, f"the device delivered {sizes}, and no full draw")
    demand(1 <= evidence["full_draws"] <= sizes.count(DRAW_SIZE_MAX), "full draws, by rngd")
    _touched_by_its_holder_alone(trace, device, "rngd")


def rngd_policy_allow(_case: Case, trace: Trace, line: Line) -> None:
    """#97: what rngd says was decided stands in the journal as policyd's decision."""
    subject = f"{service_id(SELFTEST):016x}"
    demand_equal(hex_of(line.evidence["subject"]), subject, "subject, by rngd")
    demand_equal(line.evidence["right"], DRAW_RIGHT, "right, by rngd")
    record = measured(trace, 97)
    demand_equal(record["service"], service_id("policyd"), "sender of the audit record")
    wanted = {
        "decision": "allow",
        "reason": "policy",
        "subject": SELFTEST,
        "action": DRAW_RIGHT,
        "asked_by": "rngd",
        "trace": line.evidence["trace"],
    }
    fields = record["fields"]
    demand_equal({name: fields.get(name) for name in wanted}, wanted, "the audit record")


def entropy_drawn(case: Case, trace: Trace, line: Line) -> None:
    """#98: the source's own count covers what was given, and the bytes are in no record.

    In the simulator the draws are known, as the device's stream is a function of the seed: they
    are looked for in every form that nexus.proof.leaks knows. Elsewhere there are their digests
    alone, and what `_shown` sees is looked at: whole draws as lowercase hexadecimal digits. A
    piece of one, raw bytes or base64 would not be found there.
    """
    evidence = line.evidence
    demand_equal(evidence["given"], 2 * DRAW_SIZE, "bytes given")
    if case.scope.ground is Ground.SIM:
        device = _device_of(case, "rngd", HardwareKind.ENTROPY)
        sizes = [
            int(event.fields["size"])  # type: ignore[call-overload]
            for at, event in _told_by(trace, device.name, "draw")
            if at < line.place
        ]
        counted = evidence["delivered_total"]
        demand(sum(sizes) >= counted, f"rngd counts {counted}, the device {sum(sizes)}")
        demand(counted >= 2 * DRAW_SIZE, "rngd has counted too few")
    digests = set(evidence["digests"])
    demand_equal(len(digests), 2, "different draws")
    if case.scope.ground is Ground.SIM:
        draws = _draws(digests, delivered(case, trace, line))
        demand_equal(len(draws), 2, "draws that the entropy device delivered")
        found = Leaks(draws).among(_told(trace))
        demand(not found, f"a draw stands in the clear in {', '.join(sorted(found))}")
    shown = digests & {hashlib.sha256(each).hexdigest() for each in _shown(trace)}
    demand(not shown, "a draw stands in the clear in the events or the output")


def delivered(case: Case, trace: Trace, line: Line) -> Iterator[bytes]:
    """What a simulated entropy device delivered up to a line: its stream is a function of the seed
    of the boot, cut as its own record says. The bytes themselves are in no record."""
    (name,) = (grant.name for grant in case.plan.by_name["rngd"].grants.hardware)
    stream = Chance(trace.seed).of_device(name)
    for at, event in trace.of_kind(EventKind.DEVICE):
        if at > line.place:
            return
        if (event.fields["name"], event.fields["what"]) == (name, "draw"):
            size = event.fields["size"]
            assert isinstance(size, int), "the device counts bytes"
            yield stream.randbytes(size)


def _draws(digests: AbstractSet[str], chunks: Iterable[bytes]) -> dict[str, bytes]:
    """The draws with these digests, by digest, out of what a device delivered."""
    return {
        digest: draw
        for chunk in chunks
        for start in range(len(chunk) - DRAW_SIZE + 1)
        if (digest := hashlib.sha256(draw := chunk[start : start + DRAW_SIZE]).hexdigest())
        in digests
    }


def _told(trace: Trace) -> Iterator[tuple[str, bytes]]:
    """What a boot has left behind in words."""
    yield "the events", "\n".join(str(event.fields) for event in trace.events).encode()
    yield "the output", trace.output.encode()


def _shown(trace: Trace) -> Iterator[bytes]:
    """Whatever 32 bytes stand as lowercase hexadecimal digits, in a row, in what a boot has left
    behind. No other form is seen."""
    seen: set[str] = set()
    for _, text in _told(trace):
        for run in HEX_RUN.findall(text.decode()):
            if run in seen:
                continue
            seen.add(run)
            for start in range(len(run) - 2 * DRAW_SIZE + 1):
                yield bytes.fromhex(run[start : start + 2 * DRAW_SIZE])


def oversized(_case: Case, _trace: Trace, line: Line) -> None:
    """#99: what was refused has cost the source nothing."""
    before, between, after = line.evidence["delivered"]
    demand_equal(between, before, "bytes delivered for refused draws")
    demand_equal(after - between, DRAW_SIZE_MAX, "bytes delivered for the largest draw")


def mmio_policy_audit(_case: Case, trace: Trace, line: Line) -> None:
    """#139: the subject of the denied question has no grant at all."""
    subject = line.evidence["fields"]["subject"]
    ready = of_init(trace, "init: ready")
    demand(ready is not None, "init has not said which grants there are")
    held = [row for row in (ready.evidence["grants"] if ready else ()) if row[0] == subject]
    demand_equal(held, [], f"grants of {subject}")


def mmio_map(case: Case, trace: Trace, line: Line) -> None:
    """#140: it is the empty transport of the bus map, and its holder had no other window but those
    that the plan gives it."""
    device = _device_of(case, SELFTEST, HardwareKind.EMPTY)
    evidence = line.evidence
    demand_equal(evidence["device"], device.name, "device")
    demand_equal(evidence["registers"], [VIRTIO_MAGIC, VIRTIO_VERSION, 0], "registers")
    demand_equal(evidence["length"], PAGE_SIZE, "bytes of the window")
    if case.scope.ground is not Ground.SIM:
        seen = [each for each in trace.notes if _claim(each)[:2] == (NOTE_WINDOWS, line.text)]
        demand_equal(len(seen), 1, f"looks of process 1 at {line.text!r}")
        mapped = {address for pid, address, _ in seen[0]["holders"] if pid == line.pid}
        demand_equal(mapped, {_page_of(trace, device)}, f"pages that {SELFTEST} has mapped")
    granted(trace, device.name, MMIO_RIGHTS[device.kind], [SELFTEST])
    used = {
        event.fields.get("name")
        for _, event in trace.of_kind(EventKind.DEVICE)
        if event.pid == line.pid
    }
    planned = {grant.name for grant in case.plan.by_name[SELFTEST].grants.hardware}
    demand(used <= planned, f"devices that {SELFTEST} has used: {sorted(map(str, used))}")


def cap_query_mmio(case: Case, trace: Trace, line: Line) -> None:
    """#141: nothing in the answers is where the window is on the bus."""
    device = _device_of(case, SELFTEST, HardwareKind.EMPTY)
    base: int | None = BUS_BASE + case.plan.hardware.index(device) * WINDOW_SIZE
    if case.scope.ground is not Ground.SIM:
        base = _page_of(trace, device)
    if base is None:
        raise Mismatch(f"the machine has no page of registers for {device.name}")
    evidence = line.evidence
    demand_equal((evidence["answer"][0], evidence["answer"][2]), (2, PAGE_SIZE), "kind and length")
    answers = (*evidence["answer"], *evidence["device"])
    told = [value for value in answers if _tells(value, base)]
    demand(not told, f"the base {base:#x} is in the answer: {told}")


def _tells(value: object, base: int) -> bool:
    if isinstance(value, int):
        return value in {base, base // PAGE_SIZE}
    return f"{base:x}" in str(value) or str(base) in str(value)


CHECKS: Final[Mapping[int, Check]] = MappingProxyType(
    {
        33: rngd_ready,
        49: legacy_refused,
        50: block_up,
        51: window_mapped,
        97: rngd_policy_allow,
        98: entropy_drawn,
        99: oversized,
        139: mmio_policy_audit,
        140: mmio_map,
        141: cap_query_mmio,
    }
)
