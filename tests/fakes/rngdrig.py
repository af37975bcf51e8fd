"""A system with rngd, policyd and logd, and what a client does in it."""

from typing import Final

from nexus.ipc import Refused
from nexus.protocols.rngd import Entropy, GetEntropy, GetSource, RngdStatus, Source
from nexus.wire import ReplyStatus
from tests.fakes.initrig import SECOND
from tests.fakes.policyrig import Hands

SYSTEM: Final = """
[system]
name = "entropy"
total_size = "8MiB"
owner_size = "512KiB"
ends_with = "driver"

[device.noise]
kind = "entropy"

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]
uses = { logd = { depth = 64, sync = false } }

[service.logd]
program = "logd"
stage = "core"
capabilities = ["policy.delegate"]
uses = { policyd = {} }

[service.logd.settings]
core = "policyd"

[service.rngd]
program = "rngd"
capabilities = ["policy.delegate", "device.mmio.rng"]
hardware = ["noise"]
uses = { policyd = {}, logd = { sync = false } }
restart = { backoff = "50ms" }

[service.rngd.settings]
told = "driver"

[service.second]
program = "guard"
capabilities = ["rng.entropy"]
uses = { rngd = {} }
health = { deadline = "20s", every = "0s" }

[service.driver]
program = "driver"
capabilities = ["proof.control", "system.observe", "system.control", "log.read", "rng.entropy"]
uses = { policyd = {}, logd = {}, rngd = {} }
health = { deadline = "20s", every = "0s" }
"""


async def draw(hands: Hands, size: int) -> str:
    """The bytes as hexadecimal digits, or the name of the refusal."""
    outcome = await hands.client("rngd").call(GetEntropy(size), await hands.ahead(2 * SECOND))
    if isinstance(outcome, Entropy):
        assert len(outcome.data) == size
        return outcome.data.hex()
    assert isinstance(outcome, Refused), outcome
    assert isinstance(outcome.status, RngdStatus | ReplyStatus)
    return outcome.status.name


async def source(hands: Hands) -> Source:
    told = await hands.call("rngd", GetSource())
    assert isinstance(told, Source)
    return told
