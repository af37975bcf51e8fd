"""What init says: lines on the console, each with the evidence for it as JSON."""

import json
from typing import Any

from nexus.abi import EVIDENCE_SIZE_MAX, AbiError, ConsoleWrite, Status


class Console:
    """The console; `lost` counts the lines it had no room for."""

    def __init__(self) -> None:
        self.lost = 0

    async def say(self, line: str, **evidence: Any) -> None:
        """A line on the console, its evidence next to it, cut to what the console takes."""
        try:
            await ConsoleWrite(line, evidence_of(evidence))
        except AbiError as error:
            if error.status is not Status.QUEUE_FULL:
                raise
            self.lost += 1


def evidence_of(fields: dict[str, Any]) -> bytes:
    """Evidence as JSON; if that is too long, the number of entries of each list and table.

    Then `counted` names the fields whose number stands for their content.
    """
    whole = _json(fields)
    if len(whole) <= EVIDENCE_SIZE_MAX:
        return whole
    counted = [name for name, value in fields.items() if isinstance(value, list | dict)]
    counts = _json({**fields, **{name: len(fields[name]) for name in counted}, "counted": counted})
    assert len(counts) <= EVIDENCE_SIZE_MAX, "what is neither list nor table is init's own"
    return counts


def _json(evidence: dict[str, Any]) -> bytes:
    return json.dumps(evidence, separators=(",", ":")).encode()
