"""What a console line and the evidence next to it may be."""

import json
import math
import re
from collections.abc import Mapping
from typing import Final, NoReturn

from nexus.abi import CONSOLE_LINE_SIZE_MAX, EVIDENCE_SIZE_MAX, AbiError, Status

# Objects and arrays inside each other. Evidence is flat in practice; whoever reads or writes JSON
# by recursion, in whatever stack it stands, must get through.
EVIDENCE_DEPTH_MAX: Final = 16

# Line and paragraph separator, and the controls of UAX #9 (Unicode 15) that change the order in
# which other characters are shown: with them a line looks like another one.
LINE_TURNS: Final = frozenset((0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))

_JSON_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BRACKET: Final = re.compile(rb"[\[\]{}]")


def check_console(line: str, evidence: bytes) -> Mapping[str, object]:
    """Check a console write and return the evidence as an object, empty if there is none.

    Refuses: InvalidArgument (over a limit, a line break, a control character or one that turns
    the direction of text, not UTF-8, evidence that is not one JSON object of finite numbers, or
    nested deeper than EVIDENCE_DEPTH_MAX).
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
    if _depth(evidence) > EVIDENCE_DEPTH_MAX:
        raise _refusal(f"evidence nested deeper than {EVIDENCE_DEPTH_MAX}")
    try:
        parsed = json.loads(evidence.decode("utf-8"), parse_constant=_not_json, parse_float=_finite)
    except (ValueError, RecursionError):
        raise _refusal("evidence is not JSON") from None
    if not isinstance(parsed, dict):
        raise _refusal("evidence is not a JSON object")
    return parsed


def _depth(evidence: bytes) -> int:
    # Counted before anything recurses. Of bytes that are no JSON any number will do.
    opened = evidence.count(b"[") + evidence.count(b"{")
    if opened <= EVIDENCE_DEPTH_MAX:
        return opened
    depth = deepest = 0
    for bracket in _BRACKET.findall(_JSON_STRING.sub(b"", evidence)):
        if bracket in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def _breaks(character: str) -> bool:
    # C0, DEL and C1 controls, and what breaks or turns a line of Unicode.
    code = ord(character)
    return code < 0x20 or 0x7F <= code < 0xA0 or code in LINE_TURNS


def _not_json(text: str) -> NoReturn:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _refusal(detail: str) -> AbiError:
    return AbiError(Status.INVALID_ARGUMENT, detail)
