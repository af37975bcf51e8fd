"""Boot-control records for tests: strategies, and the steps that lead from one to the next."""

from collections.abc import Callable

from hypothesis import strategies as st

from nexus.bootctl import (
    COUNT_MAX,
    COUNTER_LAST,
    DETAIL_SIZE_MAX,
    DIGEST_SIZE,
    NAME_SIZE_MAX,
    REASONS_MAX,
    TAIL_SIZE_MAX,
    TRACE_SIZE,
    TRIES_MAX,
    BlockBoot,
    BootControl,
    BootRecord,
    Cause,
    Counted,
    EnvironmentBoot,
    Reason,
    SlotInfo,
    SlotName,
    SlotState,
    clip,
    provisioned,
)
from nexus.drivers import BlockDevice

BOOT_BLOCKS = 128
BACKENDS: dict[str, Callable[[BlockDevice], BootControl]] = {
    "block": BlockBoot,
    "environment": EnvironmentBoot,
}

counts = st.one_of(st.integers(0, 5), st.integers(0, COUNT_MAX))
counters = st.one_of(st.integers(0, 5), st.integers(0, COUNTER_LAST - 100))


def texts(size_max: int) -> st.SearchStrategy[str]:
    """Text of at most so many bytes, control characters and all planes included."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=size_max).map(
        lambda text: clip(text, size_max)
    )


@st.composite
def infos(draw: st.DrawFn, states: st.SearchStrategy[SlotState], *, tries: bool) -> SlotInfo:
    """What may be known of a slot in one of these states."""
    return SlotInfo(
        state=draw(states),
        tries_left=draw(st.integers(0, TRIES_MAX)) if tries else 0,
        attempts=draw(counters),
        version=draw(counts),
        name=draw(texts(NAME_SIZE_MAX)),
        digest=draw(st.binary(min_size=DIGEST_SIZE, max_size=DIGEST_SIZE)),
        size=draw(counts),
        floor=draw(counts),
    )


reasons = st.builds(
    Reason,
    cause=st.sampled_from(Cause),
    slot=st.sampled_from(SlotName),
    version=counts,
    boot=counts,
    wall=counts,
    trace=st.binary(min_size=TRACE_SIZE, max_size=TRACE_SIZE),
    service=texts(NAME_SIZE_MAX),
    detail=texts(DETAIL_SIZE_MAX),
    tail=texts(TAIL_SIZE_MAX),
)

by_loader = st.builds(Counted, boots=st.integers(0, TRIES_MAX), slot=st.sampled_from(SlotName))


@st.composite
def records(draw: st.DrawFn, *, counted: bool) -> BootRecord:
    """Any record that problem_of has nothing against; with `counted`, also of a board whose boot
    loader counts, which no block keeps."""
    active = draw(st.sampled_from(SlotName))
    trying = draw(st.sampled_from([None, active.other]))
    settled = st.sampled_from([SlotState.EMPTY, SlotState.STAGED, SlotState.GOOD, SlotState.BAD])
    tried = st.sampled_from([SlotState.STAGED, SlotState.TRYING])
    first = draw(infos(settled, tries=False))
    second = draw(infos(settled if trying is None else tried, tries=trying is not None))
    snapshot = draw(counts)
    return BootRecord(
        sequence=draw(counters),
        active=active,
        trying=trying,
        slots=(first, second) if active is SlotName.A else (second, first),
        boots=draw(counters),
        floor=draw(counts),
        snapshot=snapshot,
        restore=snapshot > 0 and draw(st.booleans()),
        reasons=tuple(draw(st.lists(reasons, max_size=REASONS_MAX))),
        counted=draw(st.none() | by_loader) if counted else None,
    )


def a_set(version: int, *, floor: int = 0) -> SlotInfo:
    """A set of that version, with a digest of its own."""
    return SlotInfo(
        version=version,
        name=f"{version}.0.0",
        digest=bytes([version % 256]) * DIGEST_SIZE,
        size=1000 + version,
        floor=floor,
    )


def a_reason(
    cause: Cause, slot: SlotName, record: BootRecord, *, detail: str = "", tail: str = ""
) -> Reason:
    """A reason of now."""
    return Reason(
        cause=cause,
        slot=slot,
        version=record.slot(slot).version,
        boot=record.boots,
        detail=detail,
        tail=tail,
    )


def new(version: int = 1) -> BootRecord:
    """The record of a new device with that version in slot a."""
    return provisioned(a_set(version))
