"""gauge: reads the serial port with asyncio, answers who asks for the pressure."""

import asyncio
import logging
import os
import time
from typing import Final

from nexus.abi import Nanos
from nexus.log.handler import LogHandler
from nexus.runtime import Call
from nexus.runtime.program import OrdinaryContext
from serial_gauge.lines import LINE_SIZE_MAX, pascal_of
from serial_gauge.protocol import PROTOCOL, READING_AGE_MAX, GaugeStatus, Pressure, Read

READ_SIZE: Final = 4096  # bytes taken at once; the terminal driver holds as many


class Gauge:
    """Serves serial_gauge.protocol from what `listen` reads."""

    def __init__(self) -> None:
        self._last: tuple[int, Nanos] | None = None  # Pascal, when
        self._malformed = 0
        self._rest = b""  # of a line that is not yet whole

    def handle(self, call: Call, _request: Read) -> Pressure:
        """The last reading, if it is fresh."""
        if self._last is None or call.now - self._last[1] > READING_AGE_MAX:
            raise call.refuse(GaugeStatus.SILENT)
        return Pressure(*self._last, self._malformed)

    async def listen(self, descriptor: int) -> None:
        """Take lines from the port until it ends.

        The port is watched with add_reader: connect_read_pipe asks the file system about it,
        and there is no file system here.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(descriptor, self._on_readable, descriptor, ended)
        try:
            await ended
        finally:
            _ = loop.remove_reader(descriptor)

    def _on_readable(self, descriptor: int, ended: "asyncio.Future[None]") -> None:
        data = os.read(descriptor, READ_SIZE)
        if not data:
            if not ended.done():
                ended.set_exception(ConnectionError("the serial port ended"))
            return
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-LINE_SIZE_MAX:]
        now = Nanos(time.monotonic_ns())  # the kernel's clock, as `call.now`
        for line in lines:
            self._take_line(line, now)

    def _take_line(self, line: bytes, now: Nanos) -> None:
        pascal = pascal_of(line)
        if pascal is None:
            self._malformed += 1
        else:
            self._last = pascal, now


async def main(context: OrdinaryContext) -> int:
    """Listen and serve until init says Stop. What ends the listening ends the program: init
    starts another, and says why."""
    logging.getLogger().addHandler(LogHandler(context.log))  # what asyncio has to say
    gauge = Gauge()
    async with asyncio.TaskGroup() as group:
        listening = group.create_task(gauge.listen(context.descriptor("serial")))
        code = await context.serve(gauge, PROTOCOL)
        _ = listening.cancel()
    return code
