"""keystored with trap doors: to Put some names is to crash it, with its keys in memory."""

import ctypes
import os

from nexus.abi import Nanos
from nexus.protocols.keystored import Done, Put
from nexus.runtime import Call
from nexus.runtime.program import program_of
from nexus.services.keystored.service import Keystored

BY_ADDRESS, BY_ABORT, BY_EXCEPTION = b"crash by address", b"crash by abort", b"crash by exception"


class CrashingKeystored(Keystored):
    """As Keystored, until it is told to crash."""

    async def _put(self, call: Call, request: Put, until: Nanos) -> Done:
        if request.name in (BY_ADDRESS, BY_ABORT, BY_EXCEPTION):
            seed = await self._vault.device(until)
            assert seed is not None
            if request.name == BY_ADDRESS:
                _ = ctypes.string_at(0)
            elif request.name == BY_ABORT:
                os.abort()
            raise RuntimeError("planted", seed, self._vault)
        return await super()._put(call, request, until)


main = program_of(CrashingKeystored)
