"""A golden update of every format version: it is taken, and what is written now is what it is.

Each file names its version, the device's root, what the device keeps afterwards, and the update.
To write the one of a new version: `python -m tests.unit.test_trust_golden`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from fuzz.trust import BytesSource, Publisher
from nexus.drivers import finished
from nexus.trust import Anchor, decode_state, encode_update, limits, read_update
from nexus.trust.status import TrustStatus
from nexus.trust.update import UPDATE_VERSION
from nexus.trust.verify import resume, verify_metadata

FOLDER: Final = Path(__file__).parent.parent / "golden"
GOLDEN: Final = sorted(FOLDER.glob("update-*.hex"))
PAGE: Final = Path(__file__).parents[2] / "docs" / "reference" / "trust.md"
CONTENT: Final = b"a set"


def made() -> tuple[bytes, bytes]:
    """A root, and an update for a device that has it: new keys of root, and a floor."""
    publisher = Publisher("golden", roots=(2, 3))
    _ = publisher.release(1)
    _ = publisher.rotate("root", 2, 3)
    return publisher.anchor.root, encode_update(publisher.release(2, floor=1)) + CONTENT


def lines(root: bytes, state: bytes, update: bytes) -> Iterator[str]:
    """The file."""
    yield f"version {UPDATE_VERSION}"
    for name, data in (("root", root), ("state", state), ("update", update)):
        for at in range(0, len(data), 48):
            yield f"{name} {at} {data[at : at + 48].hex()}"


def read(path: Path) -> tuple[int, dict[str, bytes]]:
    """Its version, and its parts by name."""
    words = [line.split(" ") for line in path.read_text("ascii").splitlines()]
    parts: dict[str, bytes] = {}
    for name, _, text in words[1:]:
        parts[name] = parts.get(name, b"") + bytes.fromhex(text)
    return int(words[0][1]), parts


def taken(root: bytes, update: bytes) -> bytes:
    """What a device that has this root keeps of the update."""
    found = finished(read_update(BytesSource(update)))
    state = resume(Anchor(root), None, version_floor=0)
    moved, target = verify_metadata(state, found.metadata, release=True)
    assert (target.name, target.version, target.floor) == ("1.2", 2, 1)
    assert update[found.set_offset :] == CONTENT
    return moved.encode()


def test_every_format_version_has_its_golden_update() -> None:
    assert [read(path)[0] for path in GOLDEN] == list(range(1, UPDATE_VERSION + 1))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_update_is_taken(path: Path) -> None:
    _, parts = read(path)

    assert taken(parts["root"], parts["update"]) == parts["state"]
    assert decode_state(parts["state"]).targets == 2


def test_what_is_signed_now_is_what_this_version_signs() -> None:
    root, update = made()

    path = FOLDER / f"update-{UPDATE_VERSION}.hex"

    assert list(lines(root, taken(root, update), update)) == path.read_text("ascii").splitlines(), (
        "the format has changed: raise UPDATE_VERSION, keep the old update, describe both"
    )


def test_the_page_has_every_status_and_every_limit() -> None:
    page = PAGE.read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|$", page, re.MULTILINE))

    assert [name for name in rows if not name.endswith("_MAX")] == [
        status.name for status in TrustStatus
    ]
    for name, text in rows.items():
        if name.endswith("_MAX"):
            number, _, rest = text.partition(" ")
            unit = 1024 if rest.startswith("KiB") else 1
            assert getattr(limits, name) == int(number) * unit, name


if __name__ == "__main__":
    golden_root, golden_update = made()
    text = "\n".join(lines(golden_root, taken(golden_root, golden_update), golden_update))
    _ = (FOLDER / f"update-{UPDATE_VERSION}.hex").write_text(f"{text}\n")
