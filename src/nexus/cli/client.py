"""A command's connection to a running system: one request at a time through operator's port."""

import itertools
import secrets
import socket
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from threading import Event as Pause
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from nexus.abi import MESSAGE_SIZE_MAX
from nexus.cli.errors import CommandFailed
from nexus.protocols.operator import PORT, PROTOCOL, OperatorStatus, Relay
from nexus.wire import (
    HEADER,
    HEADER_SIZE,
    NONCE_OFFSET,
    PREFIX_SIZE,
    STATUS_OFFSET,
    Codec,
    Protocol,
    RemoteProtocolError,
    ReplyStatus,
    Request,
    encode,
    nonce_of,
    status_of,
)

GRACE: Final = 0.5  # seconds beyond a deadline; operator answers at the deadline, not before it
AGAIN: Final = 0.05  # seconds between two tries while nothing could be sent
AGAIN_MAX: Final = 1.0  # seconds; a person who waits does not notice more tries
NANOS: Final = 1_000_000_000

ReplyT = TypeVar("ReplyT")

WHY: Final = {
    OperatorStatus.NO_SERVICE: "operator's entry in the system file does not use it",
    OperatorStatus.UNREACHABLE: "it is not up, or does not answer",
    OperatorStatus.TIMED_OUT: "it did not answer in time; whether it acted is not known",
    OperatorStatus.CUT_OFF: "it ended before it answered; whether it acted is not known",
    OperatorStatus.BAD_FRAME: "operator does not pass this request on",
    OperatorStatus.BAD_ANSWER: "it answered with something that is no answer",
    OperatorStatus.TOO_LARGE: "its answer is too large to be passed on",
    ReplyStatus.BUSY: "its queue is full",
}
"""What operator's own statuses mean for the one who asked."""


class Unanswered(CommandFailed):
    """There is no answer of the service; `status` says why, by operator's word."""

    def __init__(self, service: str, request: str, status: IntEnum) -> None:
        why = WHY.get(status, "operator refused it")
        super().__init__(f"{service} did not answer {request}: {status.name}, {why}")
        self.status = status


class NoService(Unanswered):
    """The system has no such service."""

    def __init__(self, service: str) -> None:
        CommandFailed.__init__(
            self, f"this system has no {service}: add it to the system file, and to operator's uses"
        )
        self.status = OperatorStatus.NO_SERVICE


class ServiceRefused(CommandFailed):
    """The service said no."""

    def __init__(self, service: str, request: str, status: IntEnum) -> None:
        super().__init__(f"{service} refused {request}: {status.name}")
        self.status = status


class CutOff(CommandFailed):
    """operator ended the connection; whether it had taken the request is not known."""

    def __init__(self, title: str) -> None:
        super().__init__(
            f"operator of {title} ended the connection: other commands hold all its places, "
            "or it is being restarted or ended; try again"
        )


class SystemEnded(CutOff):
    """There is no init any more, so nobody to ask."""

    def __init__(self, title: str) -> None:
        CommandFailed.__init__(
            self, f"{title} has ended, and runs no more: start it again with `nexus up`"
        )


class OperatorClient:
    """Speaks nexus.protocols.operator over the socket in `runtime`. Raises CommandFailed.

    `runs` says whether the system has an init now; it is asked when operator says nothing. `has`
    says whether the system has a service; it is asked when operator uses none of that name.
    """

    def __init__(
        self,
        runtime: Path,
        title: str,
        runs: Callable[[], bool],
        has: Callable[[str], bool] = lambda _service: True,
    ) -> None:
        self._title = title
        self._runs = runs
        self._has = has
        self._nonces = itertools.count(1)
        self._trace = secrets.token_bytes(16)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = runtime / f"{PORT}.sock"
        try:
            self._socket.settimeout(GRACE)
            self._socket.connect(str(path))
        except FileNotFoundError as error:
            self._socket.close()
            self._check_runs(0)
            raise CommandFailed(
                f"{title} has no operator ({path} is not there): "
                'add a service with program = "operator" and ports = ["operator"] to its file'
            ) from error
        except PermissionError as error:
            self._socket.close()
            raise CommandFailed(
                f"{path} is not yours: run this as the user who started {title}, or as root"
            ) from error
        except OSError as error:
            self._socket.close()
            self._check_runs(0)
            raise CommandFailed(
                f"operator of {title} does not listen at {path} ({error.strerror or error}): "
                "see `nexus status`, it may be restarting"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    @property
    def trace(self) -> str:
        """The id of the trace that everything asked here belongs to (`nexus trace`)."""
        return self._trace.hex()

    def ask(self, request: Request[ReplyT], seconds: float) -> ReplyT:
        """operator's own answer. Raises Unanswered with its status."""
        return self._repeated(lambda until: self._ask_once(request, until), seconds)

    def relay(
        self, service: str, protocol: Protocol, request: Request[ReplyT], seconds: float
    ) -> ReplyT:
        """The answer of `service`. Raises ServiceRefused and Unanswered."""
        codec = protocol.codecs[type(request)]
        name = type(request).__name__

        def once(until: int) -> ReplyT:
            frame = self._frame(codec, request, until)
            try:
                relayed = self._ask_once(Relay(service, bytes(frame)), until)
            except Unanswered as error:
                if error.status is OperatorStatus.NO_SERVICE and not self._has(service):
                    raise NoService(service) from None
                raise Unanswered(service, name, error.status) from None
            reply: ReplyT = self._read(service, name, codec, frame, relayed.frame)
            return reply

        return self._repeated(once, seconds)

    def _repeated(self, once: Callable[[int], ReplyT], seconds: float) -> ReplyT:
        """Ask again while nothing could be sent, until the time is over."""
        until = time.monotonic_ns() + int(seconds * NANOS)
        pause = Pause()
        again = AGAIN
        while True:
            try:
                return once(until)
            except Unanswered as error:
                unsent = error.status in (OperatorStatus.UNREACHABLE, ReplyStatus.BUSY)
                if not unsent or time.monotonic_ns() + int(again * NANOS) >= until:
                    raise
            _ = pause.wait(again)
            again = min(2 * again, AGAIN_MAX)  # each try is a line of operator's audit

    def _ask_once(self, request: Request[ReplyT], until: int) -> ReplyT:
        codec = PROTOCOL.codecs[type(request)]
        frame = self._frame(codec, request, until)
        try:
            self._socket.settimeout(max(until - time.monotonic_ns(), 0) / NANOS + GRACE)
            _ = self._socket.send(frame)
            data = self._socket.recv(MESSAGE_SIZE_MAX)
        except TimeoutError as error:
            raise CommandFailed(
                f"operator of {self._title} does not answer: end the system with `nexus down`, "
                "or look at its console.log"
            ) from error
        except OSError as error:
            self._check_runs(GRACE)
            raise CutOff(self._title) from error
        if not data:
            self._check_runs(GRACE)
            raise CutOff(self._title)
        reply: ReplyT = self._read(
            "operator", type(request).__name__, codec, frame, data, error=Unanswered
        )
        return reply

    def _check_runs(self, within: float) -> None:
        """Raises SystemEnded if init is gone in so many seconds: services end just before it."""
        pause = Pause()
        until = time.monotonic_ns() + int(within * NANOS)
        while self._runs():
            if time.monotonic_ns() >= until:
                return
            _ = pause.wait(AGAIN)
        raise SystemEnded(self._title)

    def _frame(self, codec: Codec, request: Any, until: int) -> bytes:
        head = HEADER.pack(
            *HEADER.unpack(codec.prefix.ljust(HEADER_SIZE, b"\0"))[:6],
            next(self._nonces),
            until,
            self._trace,
            secrets.token_bytes(8),
        )
        return head + encode(request)

    def _read(
        self,
        who: str,
        request: str,
        codec: Codec,
        asked: bytes,
        data: bytes,
        *,
        error: type[Unanswered] | type[ServiceRefused] = ServiceRefused,
    ) -> Any:
        """The reply in a frame; a declared refusal is raised as `error`."""
        head = data[:STATUS_OFFSET] == codec.reply_prefix[:STATUS_OFFSET]
        if len(data) < HEADER_SIZE or not head or nonce_of(data) != nonce_of(asked):
            raise CommandFailed(f"{who} answered {request} with something that is no answer to it")
        status = codec.statuses.get(status_of(data))
        if status is None:
            raise CommandFailed(
                f"{who} refused {request} with status {status_of(data)}, "
                "which its protocol does not know here: "
                "the system runs another version of it"
            )
        if status is not ReplyStatus.OK:
            raise error(who, request, status)
        try:
            return codec.decode_reply(data[HEADER_SIZE:])
        except RemoteProtocolError as wrong:
            raise CommandFailed(
                f"the answer of {who} to {request} cannot be read ({wrong}): "
                "the system runs another version of its protocol"
            ) from wrong


assert PREFIX_SIZE == NONCE_OFFSET
