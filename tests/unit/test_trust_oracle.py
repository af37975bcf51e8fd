"""tuf's own client, ngclient, as an independent judge of what we sign and what we refuse.

It fetches from a folder of the test, keeps its cache in another, and asks the machine's clock:
what holds until 2096 and what ended in 2020 are the same for it and for a device without one.
Every step is a release that somebody brings, in order, to one device and to one client.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from fuzz.trust import DAY, T0, Publisher, envelope
from nexus.trust import TrustStatus, Untrusted
from nexus.trust.metadata import ISSUED
from nexus.trust.update import SNAPSHOT, TARGETS, TIMESTAMP, root_name
from nexus.trust.verify import verify_metadata

METADATA: Final = "https://updates.invalid/metadata/"
SETS: Final = "https://updates.invalid/sets/"
NOT_FOUND: Final = 404
CONTENT: Final = b"a set" * 1000
ENDED: Final = "2020-09-20T00:00:00Z"  # after T0 + 5 days, before T0 + 10

Change = Callable[[Any], object]


class FolderFetcher(FetcherInterface):
    """Serves a folder under any address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._folder / url.removeprefix("https://updates.invalid/")
        if not path.is_file():
            raise DownloadHTTPError(f"no {path.name}", NOT_FOUND)
        return iter([path.read_bytes()])


@dataclass
class Client:
    """ngclient on a device of its own: its cache outlives a refresh."""

    place: Path
    publisher: Publisher
    first: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.publisher.anchor.root
        for name in ("cache", "sets", "served/metadata", "served/sets"):
            (self.place / name).mkdir(parents=True)

    def take(self, files: Mapping[str, bytes], content: bytes) -> bytes:
        """Refresh from these files and download the set; its bytes."""
        served = self.place / "served"
        for path in (served / "metadata").iterdir():
            path.unlink()
        for name, data in files.items():
            _ = (served / "metadata" / name).write_bytes(data)
        updater = Updater(
            str(self.place / "cache"),
            METADATA,
            str(self.place / "sets"),
            SETS,
            FolderFetcher(served),
            bootstrap=self.first,
        )
        updater.refresh()
        (path,) = json.loads(files[TARGETS])["signed"]["targets"]
        _ = (served / "sets" / path).write_bytes(content)
        target = updater.get_targetinfo(path)
        assert target is not None
        return Path(updater.download_target(target)).read_bytes()


class Attack(NamedTuple):
    """What somebody brings to a device that has seen release 10, and how both refuse it."""

    make: Callable[[Publisher, dict[str, bytes]], Mapping[str, bytes]]
    status: TrustStatus
    error: type[Exception]


def _later(publisher: Publisher) -> dict[str, bytes]:
    return publisher.release(11, content=CONTENT)


def _by_strangers(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    stranger = Publisher("stranger")
    _ = stranger.release(9)
    _ = stranger.release(10)
    return stranger.release(11)


def _flipped(name: str) -> Callable[[Publisher, dict[str, bytes]], Mapping[str, bytes]]:
    def make(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
        files = _later(publisher)
        changed = files[name].replace(b'"version":3', b'"version":9')
        assert len(changed) == len(files[name])
        assert changed != files[name]
        return {**files, name: changed}

    return make


def _too_few(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    files = _later(publisher)
    publisher.signers["targets"] = publisher.signers["targets"][:1]
    return publisher.changed(files, TARGETS, lambda _: None)


def _mixed(name: str) -> Callable[[Publisher, dict[str, bytes]], Mapping[str, bytes]]:
    def make(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
        return {**_later(publisher), name: seen[name]}

    return make


def _replayed(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    return publisher.changed(seen, TIMESTAMP, lambda signed: signed.update(version=1))


def _rolled_back(name: str) -> Callable[[Publisher, dict[str, bytes]], Mapping[str, bytes]]:
    def make(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
        files = _later(publisher)
        return publisher.changed(files, name, lambda signed: signed.update(version=1))

    return make


def _ended(name: str) -> Callable[[Publisher, dict[str, bytes]], Mapping[str, bytes]]:
    def make(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
        files = _later(publisher)

        def end(signed: Any) -> None:
            signed["expires"] = ENDED
            signed[ISSUED] = T0 + 5 * DAY

        return publisher.changed(files, name, end)

    return make


def _ended_root(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    root = publisher.rotate("timestamp")
    files = _later(publisher)

    def end(signed: Any) -> None:
        signed["expires"] = ENDED
        signed[ISSUED] = T0 + 5 * DAY

    return publisher.changed(files, root, end)


def _root_by_strangers(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    stranger = Publisher("stranger")
    name = publisher.rotate("timestamp")
    files = _later(publisher)
    signed = json.loads(files[name])["signed"]
    return {**files, name: envelope(signed, stranger.signers["root"])}


def _root_by_itself(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    name = publisher.rotate("root", 2, 2)
    files = _later(publisher)
    signed = json.loads(files[name])["signed"]
    return {**files, name: envelope(signed, publisher.signers["root"])}


def _root_without_its_own_keys(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    before = publisher.signers["root"]
    name = publisher.rotate("root", 2, 2)
    files = _later(publisher)
    signed = json.loads(files[name])["signed"]
    return {**files, name: envelope(signed, before)}


def _root_by_too_few(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    name = publisher.rotate("timestamp")
    files = _later(publisher)
    signed = json.loads(files[name])["signed"]
    return {**files, name: envelope(signed, publisher.signers["root"][:1])}


def _old_keys(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    old = publisher.signers["timestamp"]
    _ = publisher.rotate("timestamp")
    files = _later(publisher)
    publisher.signers["timestamp"] = old
    return publisher.changed(files, TIMESTAMP, lambda _: None)


def _twice(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    files = _later(publisher)
    document = json.loads(files[TIMESTAMP])
    document["signatures"] *= 2
    return {**files, TIMESTAMP: json.dumps(document).encode()}


def _cut(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    files = _later(publisher)
    return {**files, TIMESTAMP: files[TIMESTAMP][:-20]}


def _no_json(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    return {**_later(publisher), TIMESTAMP: b"{]}"}


def _no_version(publisher: Publisher, seen: dict[str, bytes]) -> Mapping[str, bytes]:
    return publisher.changed(_later(publisher), TARGETS, lambda signed: signed.pop("version"))


UNSIGNED: Final = UnsignedMetadataError
ATTACKS: Final[dict[str, Attack]] = {
    "another publisher": Attack(_by_strangers, TrustStatus.WRONG_KEY, UNSIGNED),
    "changed timestamp": Attack(_flipped(TIMESTAMP), TrustStatus.BAD_SIGNATURE, UNSIGNED),
    # ngclient compares digests before signatures: the files were changed after they were named
    "changed snapshot": Attack(
        _flipped(SNAPSHOT), TrustStatus.BAD_SIGNATURE, LengthOrHashMismatchError
    ),
    "changed targets": Attack(
        _flipped(TARGETS), TrustStatus.BAD_SIGNATURE, LengthOrHashMismatchError
    ),
    "too few signatures": Attack(_too_few, TrustStatus.THRESHOLD, UNSIGNED),
    "an old snapshot": Attack(_mixed(SNAPSHOT), TrustStatus.MIXED, LengthOrHashMismatchError),
    "old targets": Attack(_mixed(TARGETS), TrustStatus.MIXED, LengthOrHashMismatchError),
    "an older release": Attack(_replayed, TrustStatus.REPLAYED, BadVersionNumberError),
    "an older snapshot inside": Attack(
        _rolled_back(SNAPSHOT), TrustStatus.ROLLED_BACK, BadVersionNumberError
    ),
    "older targets inside": Attack(
        _rolled_back(TARGETS), TrustStatus.ROLLED_BACK, BadVersionNumberError
    ),
    "an ended timestamp": Attack(_ended(TIMESTAMP), TrustStatus.EXPIRED, ExpiredMetadataError),
    "an ended snapshot": Attack(_ended(SNAPSHOT), TrustStatus.EXPIRED, ExpiredMetadataError),
    "ended targets": Attack(_ended(TARGETS), TrustStatus.EXPIRED, ExpiredMetadataError),
    "an ended root": Attack(_ended_root, TrustStatus.EXPIRED, ExpiredMetadataError),
    "a root by strangers": Attack(_root_by_strangers, TrustStatus.WRONG_KEY, UNSIGNED),
    "a root by itself": Attack(_root_by_itself, TrustStatus.WRONG_KEY, UNSIGNED),
    "a root by the old keys": Attack(_root_without_its_own_keys, TrustStatus.WRONG_KEY, UNSIGNED),
    "a root by too few": Attack(_root_by_too_few, TrustStatus.THRESHOLD, UNSIGNED),
    "keys that are gone": Attack(_old_keys, TrustStatus.WRONG_KEY, UNSIGNED),
    "one signature twice": Attack(_twice, TrustStatus.DUPLICATE, RepositoryError),
    "an end that is missing": Attack(_cut, TrustStatus.TRUNCATED, RepositoryError),
    "no JSON": Attack(_no_json, TrustStatus.MALFORMED, RepositoryError),
    "no version": Attack(_no_version, TrustStatus.MALFORMED, RepositoryError),
}


def _publisher() -> Publisher:
    return Publisher(roots=(2, 3), targets=(2, 2))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_ngclient_refuses_what_we_refuse(attack: Attack, tmp_path: Path) -> None:
    publisher = _publisher()
    client = Client(tmp_path, publisher)
    _ = publisher.release(9, content=CONTENT)
    seen = publisher.release(10, content=CONTENT)
    state, _ = verify_metadata(publisher.new_state(), seen, release=True)
    assert client.take(seen, CONTENT) == CONTENT

    brought = attack.make(publisher, seen)

    with pytest.raises(Untrusted) as ours:
        _ = verify_metadata(state, brought, release=True)
    assert ours.value.status is attack.status
    with pytest.raises(attack.error):
        _ = client.take(brought, CONTENT)


def test_ngclient_takes_what_we_sign(tmp_path: Path) -> None:
    publisher = _publisher()
    client = Client(tmp_path, publisher)
    state = publisher.new_state()
    steps: tuple[tuple[str, int, int] | None, ...] = (
        None,
        None,
        ("root", 2, 3),
        ("targets", 2, 3),
        ("timestamp", 1, 1),
        ("root", 1, 1),
        ("snapshot", 1, 1),
        None,
    )
    for version, change in enumerate(steps, 1):
        if change is not None:
            _ = publisher.rotate(*change)
        content = CONTENT + bytes([version])
        files = publisher.release(version, content=content)

        state, target = verify_metadata(state, files, release=True)

        assert client.take(files, content) == content
        assert target.version == version
        assert target.length == len(content)
        assert (tmp_path / "cache" / TIMESTAMP).read_bytes() == files[TIMESTAMP]
        assert (tmp_path / "cache" / "root.json").read_bytes() == state.root
    assert state.root == publisher.files[root_name(6)]


def test_ngclient_takes_a_release_again_as_we_do(tmp_path: Path) -> None:
    publisher = _publisher()
    client = Client(tmp_path, publisher)
    files = publisher.release(1, content=CONTENT)
    state, _ = verify_metadata(publisher.new_state(), files, release=True)

    assert client.take(files, CONTENT) == CONTENT
    assert client.take(files, CONTENT) == CONTENT
    assert verify_metadata(state, files, release=True)[0] == state


def test_ngclient_forgets_what_a_stolen_key_counted_up_as_we_do(tmp_path: Path) -> None:
    publisher = _publisher()
    client = Client(tmp_path, publisher)
    stolen = publisher.release(1, content=CONTENT)
    for name in (SNAPSHOT, TIMESTAMP):
        stolen = publisher.changed(stolen, name, lambda signed: signed.update(version=1 << 40))
    state, _ = verify_metadata(publisher.new_state(), stolen, release=True)
    assert client.take(stolen, CONTENT) == CONTENT
    _ = publisher.rotate("snapshot")
    _ = publisher.rotate("timestamp")

    files = publisher.release(2, content=CONTENT)

    assert client.take(files, CONTENT) == CONTENT
    assert verify_metadata(state, files, release=True)[0].timestamp == 2


def _nothing(_: Any) -> None: ...


STRICTER: Final[dict[str, tuple[TrustStatus, Change]]] = {
    "a set below the version floor": (TrustStatus.BELOW_FLOOR, _nothing),
    "no moment": (TrustStatus.MALFORMED, lambda signed: signed.pop(ISSUED)),
    "two sets": (
        TrustStatus.TOO_MANY,
        lambda signed: signed["targets"].update({"z.nxs": next(iter(signed["targets"].values()))}),
    ),
}


@pytest.mark.parametrize(("status", "change"), STRICTER.values(), ids=STRICTER)
def test_what_we_alone_refuse_is_said(status: TrustStatus, change: Change, tmp_path: Path) -> None:
    """docs/reference/trust.md lists these: TUF has no such rule, and we need it."""
    publisher = _publisher()
    client = Client(tmp_path, publisher)
    files = publisher.changed(publisher.release(3, content=CONTENT), TARGETS, change)
    served = {**files, TARGETS: files[TARGETS]}

    with pytest.raises(Untrusted) as ours:
        _ = verify_metadata(publisher.new_state(4), served, release=True)

    assert ours.value.status is status
    if status is not TrustStatus.TOO_MANY:  # `take` asks for the one set
        assert client.take(served, CONTENT) == CONTENT


def test_keys_for_development_are_a_rule_of_ours(tmp_path: Path) -> None:
    publisher = Publisher(development=True)
    client = Client(tmp_path, publisher)
    files = publisher.release(1, content=CONTENT)

    assert client.take(files, CONTENT) == CONTENT
    with pytest.raises(Untrusted) as ours:
        _ = verify_metadata(publisher.new_state(), files, release=True)
    assert ours.value.status is TrustStatus.DEVELOPMENT_KEY


def test_ngclient_finds_a_set_that_is_not_the_signed_one(tmp_path: Path) -> None:
    publisher = _publisher()
    client = Client(tmp_path, publisher)
    files = publisher.release(1, content=CONTENT)
    _, target = verify_metadata(publisher.new_state(), files, release=True)
    other = CONTENT[:-1] + b"!"
    assert len(other) == target.length

    with pytest.raises(LengthOrHashMismatchError):
        _ = client.take(files, other)
