"""Is this still entropy? The health tests of NIST SP 800-90B on a source, and one more.

A sample is a byte. What is assumed: the sources behind rngd (virtio-rng, the kernel's hardware
source, getrandom) deliver conditioned output, so a byte has its full 8 bits of entropy; these tests
do not measure that. They find a source that broke: stuck, strongly biased, or repeating itself.
What conditioning hides from them is the business of the tests inside the source.

The tests need to remember two samples (the last, and the one being counted) and a digest of each of
the last deliveries, from which nothing can be told about a delivery of full entropy.
"""

from collections import OrderedDict
from enum import Enum
from hashlib import blake2b
from typing import Final

ENTROPY_BITS: Final = 8  # H, assumed of each sample
ALPHA_BITS: Final = 40
"""False alarms: at most one in 2**40 samples or windows. SP 800-90B 4.4 recommends 2**-20 to
2**-40. A client at full rate draws 2**14 bytes a second: 2**-20 would be an alarm a minute for it,
and 2**-40 is one in two years."""

REPETITION_CUTOFF: Final = 1 + -(-ALPHA_BITS // ENTROPY_BITS)
"""C = 1 + ceil(-log2 alpha / H) equal samples in a row. Source: SP 800-90B 4.4.1."""

PROPORTION_WINDOW: Final = 512  # samples, of an alphabet of more than two (SP 800-90B 4.4.2)
PROPORTION_CUTOFF: Final = 19
"""C = 1 + CRITBINOM(W, 2**-H, 1 - alpha) of the first sample in a window. Source: SP 800-90B 4.4.2;
a unit test computes it anew."""

START_SIZE: Final = 1024  # samples of a start-up test (SP 800-90B 4.3: at least 1024)

MATCH_SIZE: Final = 32  # bytes of a delivery that are compared; two of full entropy never agree
DIGEST_SIZE: Final = 16  # bytes
DIGESTS_MAX: Final = 64  # deliveries remembered: cycles up to that length are found

assert START_SIZE >= 2 * PROPORTION_WINDOW, "a start-up test sees whole windows"
assert DIGEST_SIZE < MATCH_SIZE, "a digest says less than what it is made of"


class Failure(Enum):
    """Which test found the source broken."""

    REPETITION = "the same byte too often in a row"
    PROPORTION = "the same byte too often in a window"
    REPEATED = "a delivery that was delivered before"


class Health:
    """The tests of one source. `failure_of` gets every delivery, in order."""

    def __init__(self) -> None:
        self._last = -1  # no sample
        self._run = 0
        self._counted = -1
        self._count = 0
        self._left = 0  # samples of the window
        self._digests: OrderedDict[bytes, None] = OrderedDict()  # of deliveries, the oldest first

    def restart(self) -> None:
        """Before a start-up test. What was delivered is still known: it must not come again."""
        self._last = self._counted = -1
        self._run = self._count = self._left = 0

    def failure_of(self, delivery: bytearray) -> Failure | None:
        """The first test that `delivery` fails: all of its bytes, as they came."""
        failure = self._continuous(delivery)
        if failure is None and len(delivery) >= MATCH_SIZE:  # a shorter one may agree by chance
            failure = self._repeated(delivery)
        return failure

    def _continuous(self, samples: bytearray) -> Failure | None:
        """The two tests of SP 800-90B 4.4."""
        for sample in samples:
            self._run = self._run + 1 if sample == self._last else 1
            self._last = sample
            if self._run >= REPETITION_CUTOFF:
                return Failure.REPETITION
            if not self._left:
                self._counted, self._count, self._left = sample, 0, PROPORTION_WINDOW
            self._left -= 1
            self._count += sample == self._counted
            if self._count >= PROPORTION_CUTOFF:
                return Failure.PROPORTION
        return None

    def _repeated(self, delivery: bytearray) -> Failure | None:
        """Whether the source goes in a circle. Not of SP 800-90B, which allows more tests (4.5)."""
        with memoryview(delivery) as view:
            digest = blake2b(view[:MATCH_SIZE], digest_size=DIGEST_SIZE).digest()
        if digest in self._digests:
            return Failure.REPEATED
        self._digests[digest] = None
        if len(self._digests) > DIGESTS_MAX:
            _ = self._digests.popitem(last=False)
        return None
