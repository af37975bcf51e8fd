"""A ring whose writer laps its reader while that copies: nothing is given that was never put."""

import pytest

from nexus.telemetry import RingReader, RingWriter
from nexus.telemetry import ring as ring_module
from nexus.telemetry.ring import COMMIT_WORD, RECORD_SIZE, RING_HEADER_SIZE

SIZE = 4096
WHOLE = 32  # bytes of a record with its header: each lap has them at the same places
LAP = (SIZE - RING_HEADER_SIZE) // WHOLE
BEFORE = 60  # records that are there when the reader begins

assert (SIZE - RING_HEADER_SIZE) % WHOLE == 0


def payload_of(number: int) -> bytes:
    return b"%04d" % number * ((WHOLE - RECORD_SIZE) // 4)


class Slow(RingReader):
    """Copies a header, then the writer makes a lap, and then it copies the rest."""

    writer: RingWriter
    cells: memoryview
    is_halted = False  # whether its last put is not done when the reader looks again
    until = 0  # the number that the writer is at after its lap
    commit: int | None = None  # of the last put, while that is not done

    def _copy(self, position: int, size: int) -> bytes:
        data = super()._copy(position, min(size, RECORD_SIZE))
        while self.writer.sequence < self.until:
            former = self.cells[COMMIT_WORD]
            self.writer.put(payload_of(self.writer.sequence))
            if self.is_halted and self.writer.sequence == self.until:
                self.commit, self.cells[COMMIT_WORD] = self.cells[COMMIT_WORD], former
        return data + super()._copy(position + RECORD_SIZE, max(0, size - RECORD_SIZE))


class SlowOneByOne(Slow):
    """Takes each record by itself, as a reader does after a jump."""

    def _take_some(self, commit: int, steps: int, payloads: list[bytes]) -> int:
        payload = self._take(commit)
        if payload is not None:
            payloads.append(payload)
        return steps - 1


@pytest.mark.parametrize("kind", [Slow, SlowOneByOne])
@pytest.mark.parametrize("more", [0, 1, 17, LAP])
@pytest.mark.parametrize("is_halted", [False, True])
def test_a_record_that_was_overwritten_while_it_was_copied_is_not_given(
    kind: type[Slow], more: int, is_halted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its checksum fits by chance: here each one does."""
    monkeypatch.setattr(ring_module, "crc32", lambda *_: 0)
    memory = bytearray(SIZE)
    writer = RingWriter(memoryview(memory))
    for number in range(BEFORE):
        writer.put(payload_of(number))
    reader = kind(memoryview(memory).toreadonly())
    reader.writer = writer
    reader.cells = memoryview(memory).cast("Q")
    reader.is_halted = is_halted
    reader.until = LAP + 1 + more

    payloads = reader.drain(16)
    if reader.commit is not None:
        reader.cells[COMMIT_WORD] = reader.commit
    for _ in range(2 * LAP):
        payloads += reader.drain(16)

    numbers = [int(each[:4]) for each in payloads]
    assert payloads == [payload_of(number) for number in numbers]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == writer.sequence - 1
    assert (reader.accepted, reader.damaged) == (len(numbers), 0)
    assert reader.accepted + reader.overwritten == reader.sequence == writer.sequence
