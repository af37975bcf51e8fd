"""Whatever bytes stand where updated keeps its own: it opens, and goes on or says what is wrong."""

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from nexus.drivers import finished
from nexus.protocols.updated import UpdatedStatus
from nexus.services.updated.faults import Declined
from nexus.services.updated.kept import HISTORY, TRANSFER, TRUST
from tests.fakes.updates import ASKER, Device, Made


@cache
def cut_off() -> tuple[Device, Made, dict[bytes, bytes]]:
    """A device in the midst of a transfer, the update, and what it keeps."""
    device = Device()
    _ = device.boot()
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:1024])
    finished(device.engine.sync())
    return device, made, dict(device.memory.values)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A kept value that is another's, any bytes, or the true one with some changed or cut off."""
    _, _, values = cut_off()
    value = bytearray(draw(st.sampled_from([*values.values(), b""])))
    for _ in range(draw(st.integers(0, 3))):
        if value:
            value[draw(st.integers(0, len(value) - 1))] = draw(st.integers(0, 255))
    return bytes(value[: draw(st.integers(0, len(value)))]) + draw(st.binary(max_size=8))


@given(key=st.sampled_from([TRUST, TRANSFER, HISTORY]), value=damaged())
def test_any_bytes_are_read_and_never_believed_beyond_their_bounds(
    key: bytes, value: bytes
) -> None:
    device, made, values = cut_off()
    device.memory.values = {**values, key: value}

    engine = device.start()

    assert engine.opened
    try:
        begun = finished(engine.begin(made.metadata, ASKER))
    except Declined as declined:
        assert key == TRUST, declined
        assert declined.status in (
            UpdatedStatus.NO_ANCHOR,
            UpdatedStatus.REPLAYED,
            UpdatedStatus.ROLLED_BACK,
            UpdatedStatus.MIXED,
            UpdatedStatus.EXPIRED_METADATA,
            UpdatedStatus.BELOW_FLOOR,
            UpdatedStatus.WRONG_KEY,
            UpdatedStatus.BAD_SIGNATURE,
        ), declined
        return
    assert begun.offset in (0, 1024) or key == TRANSFER
    assert 0 <= begun.offset <= len(made.data)
    assert begun.offset % 512 == 0 or begun.offset == len(made.data)
