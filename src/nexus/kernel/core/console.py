"""What a console line and the evidence next to it may be."""

import json
import math
from collections.abc import Mapping
from typing import NoReturn

from nexus.abi import CONSOLE_LINE_SIZE_MAX, EVIDENCE_SIZE_MAX, AbiError, Status


def check_console(line: str, evidence: bytes) -> Mapping[str, object]:
    """Check a console write and return the evidence as an object, empty if there is none.

    Refuses: InvalidArgument (over a limit, a line break or control character, not UTF-8,
    evidence that is not one JSON object of finite numbers).
    """
    try:
        size = len(line.encode("utf-8"))
    except UnicodeEncodeError:
        raise _refusal("the line is not UTF-8") from None
    if size > CONSOLE_LINE_SIZE_MAX:
        raise _refusal(f"a line of {size} bytes")
    if any(_breaks(character) for character in line):
        raise _refusal("a control character in the line")
    if len(evidence) > EVIDENCE_SIZE_MAX:
        raise _refusal(f"evidence of {len(evidence)} bytes")
    return parse_evidence(evidence) if evidence else {}


def parse_evidence(evidence: bytes) -> Mapping[str, object]:
    """The object that evidence bytes hold. Refuses: InvalidArgument."""
    try:
        parsed = json.loads(evidence.decode("utf-8"), parse_constant=_not_json, parse_float=_finite)
    except (ValueError, RecursionError):
        raise _refusal("evidence is not JSON") from None
    if not isinstance(parsed, dict):
        raise _refusal("evidence is not a JSON object")
    return parsed


def _breaks(character: str) -> bool:
    # C0, DEL and C1 controls, and the two separators of Unicode that end a line.
    code = ord(character)
    return code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029)


def _not_json(text: str) -> NoReturn:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _refusal(detail: str) -> AbiError:
    return AbiError(Status.INVALID_ARGUMENT, detail)
