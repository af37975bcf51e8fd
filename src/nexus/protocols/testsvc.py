"""demo.testsvc protocol: a peer that is slow, hostile or dies, on command.

It exists so that the proof ladder can provoke each outcome from a real task with an
identity and links of its own. Nothing here is a right that another service would have.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import U8, U16, U32, U64, Blob, List, Message, Protocol, Request, Text

ECHO_SIZE_MAX: Final = 4096  # bytes; half a message, so that a reply always fits
HELD_COUNT_MAX: Final = 32  # deferred answers kept at a time
PLACED_COUNT_MAX: Final = 96  # frames of one Place; more than the mismatch budget of 64
PLACED_SIZE_MAX: Final = 96  # bytes of one placed frame; a header and a small body
STEPS_MAX: Final = 96  # steps of one raw session
STEP_DATA_SIZE_MAX: Final = 128  # bytes
SESSION_WAIT_MAX_MS: Final = 5_000
ASKED_COUNT_MAX: Final = 8  # requests of one AskInit
LAST_LINE: Final = "demo.testsvc: last words are written"
HANG_MAX_MS: Final = 60_000  # longer than any watchdog of a test waits


class TestsvcStatus(IntEnum):
    """Why demo.testsvc refuses. The numbers are wire format and are never reused."""

    TOO_MANY_HELD = 16  # every place is taken, or the token is held already
    NOT_HELD = 17  # a token that no held request has
    NO_CAPABILITY = 18  # the request came without its link
    SESSION_BROKEN = 19  # a step was refused by the kernel, or a service cannot be reached
    NO_SUCH_ATTACK = 20  # unknown, or this ground has no system calls


class Step(IntEnum):
    """One step of a raw session, taken on an endpoint of demo.testsvc's own."""

    RECEIVE = 1  # take one message, bounded by the session's deadline
    ECHO = 2  # send the last message back unchanged
    SEND = 3  # send `data` as it is
    ANSWER = 4  # send `data` with the nonce (bytes 8..16) of the last message
    CLOSE = 5  # close the endpoint, so that the caller's link is dead


class Echoed(Message):
    """The bytes that were sent."""

    data: Annotated[bytes, Blob(size_max=ECHO_SIZE_MAX)]


class Echo(Request[Echoed], op=1, idempotent=True):
    """Send `data` back."""

    data: Annotated[bytes, Blob(size_max=ECHO_SIZE_MAX)]


class Released(Message):
    """How many held answers were given."""

    count: Annotated[int, U8()]


class Hold(Request[Released], op=2, idempotent=False, refuses=TestsvcStatus):
    """Answered only by a Release that names `token`."""

    token: Annotated[int, U32()]


class Release(Request[Released], op=3, idempotent=False, refuses=TestsvcStatus):
    """Answer the held requests in the order given, then this one."""

    tokens: Annotated[list[Annotated[int, U32()]], List(count_max=HELD_COUNT_MAX, count_min=1)]


class Placed(Message):
    """How many frames were queued, and how many the link had no room for."""

    sent: Annotated[int, U16()]
    refused: Annotated[int, U16()]


class Place(Request[Placed], op=4, idempotent=False, refuses=TestsvcStatus):
    """Send `frames` as they are on the caller's reply link, then answer."""

    frames: Annotated[
        list[Annotated[bytes, Blob(size_max=PLACED_SIZE_MAX, size_min=1)]],
        List(count_max=PLACED_COUNT_MAX),
    ]


class SessionStep(Message):
    """A step and its data."""

    step: Annotated[int, U8(minimum=1, maximum=5)]
    data: Annotated[bytes, Blob(size_max=STEP_DATA_SIZE_MAX)]


class SessionDone(Message):
    """How many steps were taken and how many bytes were received."""

    steps: Annotated[int, U16()]
    received: Annotated[int, U32()]


class RawSession(Request[SessionDone], op=5, idempotent=False, refuses=TestsvcStatus, moves=True):
    """Play a script over raw messages.

    The request carries a SEND link to an endpoint of the caller. demo.testsvc makes an endpoint
    of its own and sends one message with a link into it, then takes the steps.
    """

    depth: Annotated[int, U16(minimum=1, maximum=256)]
    wait_ms: Annotated[int, U32(maximum=SESSION_WAIT_MAX_MS)]
    script: Annotated[list[SessionStep], List(count_max=STEPS_MAX)]


class SeenBy(Message):
    """What timed's kernel said of demo.testsvc on the link it was given."""

    pid: Annotated[int, U32()]
    service: Annotated[int, U64()]
    generation: Annotated[int, U32()]


class UseLink(Request[SeenBy], op=6, idempotent=False, refuses=TestsvcStatus, moves=True):
    """The request carries a SEND link to timed; ask timed over it who is asking."""

    claimed_pid: Annotated[int, U32()]
    claimed_name: Annotated[str, Text(size_max=48)]


class FloodReport(Message):
    """What the flood met: sends that succeeded, and refusals by status."""

    sent: Annotated[int, U32()]
    queue_full: Annotated[int, U32()]
    no_space: Annotated[int, U32()]


class FloodTimed(Request[FloodReport], op=7, idempotent=False, refuses=TestsvcStatus):
    """Send requests to timed as fast as they go for `duration_ms`, reading no answer."""

    duration_ms: Annotated[int, U32(minimum=1, maximum=SESSION_WAIT_MAX_MS)]


class FillLink(Request[FloodReport], op=8, idempotent=False, refuses=TestsvcStatus, moves=True):
    """The request carries a SEND link; send messages of `size` bytes until the first refusal."""

    size: Annotated[int, U16(minimum=1, maximum=8240)]


class Dying(Message):
    """Never sent."""


class Die(Request[Dying], op=9, idempotent=False):
    """Exit with `code` at once, without an answer."""

    code: Annotated[int, U8()]


class ForgeReport(Message):
    """The answers timed gave to forged requests: statuses in order."""

    statuses: Annotated[list[Annotated[int, U16()]], List(count_max=16)]
    pid: Annotated[int, U32()]
    service: Annotated[int, U64()]


class Forge(Request[ForgeReport], op=10, idempotent=False, refuses=TestsvcStatus):
    """Claim another's name and pid in a payload, and send `header` (another sender's) to timed."""

    claimed_pid: Annotated[int, U32()]
    claimed_name: Annotated[str, Text(size_max=48)]
    header: Annotated[bytes, Blob(size_max=48, size_min=48)]


class AttackResult(Message):
    """What raw system calls met: one line per attempt, and how many were not refused."""

    lines: Annotated[list[Annotated[str, Text(size_max=120)]], List(count_max=40)]
    open_doors: Annotated[int, U16()]


class Attack(Request[AttackResult], op=11, idempotent=False, refuses=TestsvcStatus):
    """Try what a correct task never tries, by raw system calls, where there are any."""

    name: Annotated[str, Text(size_max=32, size_min=1)]
    target_pid: Annotated[int, U32()]


class LogdAnswer(Message):
    """The status logd answered with, and how many records it gave."""

    status: Annotated[int, U16()]
    records: Annotated[int, U8()]


class ReadLog(Request[LogdAnswer], op=12, idempotent=False, refuses=TestsvcStatus, moves=True):
    """The request carries a SEND link to logd; ask logd over it for its oldest record."""


class Hung(Message):
    """The hang is over; sent only if nobody ended it."""


class Hang(Request[Hung], op=13, idempotent=False):
    """Do nothing at all for `for_ms`: no request is served, no health probe answered."""

    for_ms: Annotated[int, U32(minimum=1, maximum=HANG_MAX_MS)]


class AskedInit(Message):
    """The statuses init answered with, in the order it was asked; 0 is that it did so."""

    statuses: Annotated[list[Annotated[int, U16()]], List(count_max=ASKED_COUNT_MAX)]


class AskInit(Request[AskedInit], op=14, idempotent=False, refuses=TestsvcStatus):
    """Ask init, over demo.testsvc's own control link, for what it has no right to.

    In this order: its tasks, the policy, a restart of `name`, the end of safe mode, a shutdown;
    and no further than the first that is not DENIED.
    """

    name: Annotated[str, Text(size_max=48, size_min=1)]


class Answered(Message):
    """The status that demo.testsvc was answered with; 0 is that it was done."""

    status: Annotated[int, U16()]


class UseState(Request[Answered], op=15, idempotent=False, refuses=TestsvcStatus):
    """Put `value` under `key` at statefsd, over a link of demo.testsvc's own; not durably."""

    key: Annotated[bytes, Blob(size_max=255)]
    value: Annotated[bytes, Blob(size_max=256)]


class UseKeys(Request[Answered], op=16, idempotent=False, refuses=TestsvcStatus):
    """Get the entry `name` from keystored, over a link of demo.testsvc's own."""

    name: Annotated[bytes, Blob(size_max=64, size_min=1)]


class AskExecd(Request[Answered], op=17, idempotent=False, refuses=TestsvcStatus, moves=True):
    """The request carries a SEND link to execd; ask execd over it for its programs."""


class Silent(Message):
    """Never sent."""


class LastWords(Request[Silent], op=18, idempotent=False, refuses=TestsvcStatus):
    """Write a line with the field `token` into your own log, say LAST_LINE on the console, where a
    proof run kills you for it, and do nothing from then on: no doorbell is rung for the line.

    *Refuses*: SESSION_BROKEN (it has no way to logd).
    """

    token: Annotated[str, Text(size_min=1, size_max=48)]


class UseMetrics(Request[Answered], op=19, idempotent=False, refuses=TestsvcStatus, moves=True):
    """The request carries a SEND link to metricsd; add one to a counter over it."""


TestsvcRequest: TypeAlias = (
    Echo
    | Hold
    | Release
    | Place
    | RawSession
    | UseLink
    | FloodTimed
    | FillLink
    | Die
    | Forge
    | Attack
    | ReadLog
    | Hang
    | AskInit
    | UseState
    | UseKeys
    | AskExecd
    | LastWords
    | UseMetrics
)
PROTOCOL: Final = Protocol(
    "testsvc",
    number=3,
    version=5,
    requests=(
        Echo,
        Hold,
        Release,
        Place,
        RawSession,
        UseLink,
        FloodTimed,
        FillLink,
        Die,
        Forge,
        Attack,
        ReadLog,
        Hang,
        AskInit,
        UseState,
        UseKeys,
        AskExecd,
        LastWords,
        UseMetrics,
    ),
)
