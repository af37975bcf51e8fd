"""`nexus bundle keys` and `nexus bundle sign` from their words to what a device makes of it."""

import json
import stat
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

from fuzz.sets import about, small
from fuzz.trust import BytesSource
from nexus.cli.command import main
from nexus.drivers import finished
from nexus.sets import write
from nexus.trust import (
    Anchor,
    Target,
    TrustState,
    TrustStatus,
    Untrusted,
    encode_update,
    read_update,
)
from nexus.trust.update import SNAPSHOT, TARGETS, TIMESTAMP, root_name
from nexus.trust.verify import resume, verify_metadata

SET: Final = write(about(7), small())
WORDS: Final = b"correct horse\nwhatever\n"


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """A folder for keys that are for development."""
    return tmp_path / "ring"


def made(ring: Path, *more: str) -> int:
    return main(["bundle", "keys", "new", str(ring), "--development", *more])


def signed(ring: Path, output: Path, *more: str, content: bytes = SET) -> int:
    file = output.with_suffix(".nxs")
    _ = file.write_bytes(content)
    return main(["bundle", "sign", str(file), "--keys", str(ring), "-o", str(output), *more])


def state_of(ring: Path) -> TrustState:
    """What a device knows that was provisioned with the first root."""
    root = (ring / "metadata" / root_name(1)).read_bytes()
    return resume(Anchor(root), None, version_floor=0)


def taken(state: TrustState, update: Path, *, release: bool = False) -> tuple[TrustState, Target]:
    """What a device makes of an update file."""
    data = update.read_bytes()
    found = finished(read_update(BytesSource(data)))
    moved, target = verify_metadata(state, found.metadata, release=release)
    content = data[found.set_offset :]
    assert (len(content), sha256(content).digest()) == (target.length, target.sha256)
    return moved, target


def test_a_signed_set_is_an_update_that_a_device_takes(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update = tmp_path / "pump.nxu"

    assert made(ring) == 0
    assert "a release build refuses what they sign" in capsys.readouterr().out
    assert signed(ring, update, "--floor", "5", "--json") == 0
    told = json.loads(capsys.readouterr().out)

    _, target = taken(state_of(ring), update)
    assert (target.name, target.version, target.floor) == ("1.2.0", 7, 5)
    assert told == {
        "update": str(update),
        "size": update.stat().st_size,
        "name": "1.2.0",
        "version": 7,
        "floor": 5,
        "sha256": sha256(SET).hexdigest(),
        "root": 1,
        "development": True,
    }


def test_each_release_is_a_version_further(ring: Path, tmp_path: Path) -> None:
    assert made(ring) == 0
    first, second = tmp_path / "1.nxu", tmp_path / "2.nxu"

    assert signed(ring, first) == 0
    assert signed(ring, second) == 0

    before, _ = taken(state_of(ring), first)
    after, _ = taken(before, second)
    assert (after.timestamp, after.snapshot, after.targets) == (2, 2, 2)


def test_the_same_moment_and_set_give_the_same_bytes(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert made(ring) == 0
    kept = {path.name: path.read_bytes() for path in (ring / "metadata").iterdir()}
    updates = []
    for name in ("1.nxu", "2.nxu"):
        for path in (ring / "metadata").iterdir():
            path.unlink()
        for each, data in kept.items():
            _ = (ring / "metadata" / each).write_bytes(data)
        assert signed(ring, tmp_path / name) == 0
        updates.append((tmp_path / name).read_bytes())

    assert updates[0] == updates[1]
    state, _ = taken(state_of(ring), tmp_path / "1.nxu")
    assert state.time_floor == 1_700_000_000


def test_keys_are_secret_and_metadata_are_not(ring: Path) -> None:
    assert made(ring, "--roots", "3", "--threshold", "2") == 0

    keys = sorted((ring / "keys").iterdir())
    assert [path.name for path in keys] == [
        "root-1.pem",
        "root-2.pem",
        "root-3.pem",
        "snapshot-1.pem",
        "targets-1.pem",
        "timestamp-1.pem",
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((ring / "keys").stat().st_mode) == 0o700
    public = (ring / "metadata" / root_name(1)).read_bytes()
    assert b"PRIVATE" not in public


def test_a_key_that_others_may_read_is_not_used(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(ring) == 0
    key = ring / "keys" / "targets-1.pem"
    key.chmod(0o640)

    assert signed(ring, tmp_path / "x.nxu") == 2

    assert f"others may read the key {key}: `chmod 600 {key}`" in capsys.readouterr().err
    assert not (tmp_path / "x.nxu").exists()


def test_keys_for_release_are_encrypted(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, update = tmp_path / "words", tmp_path / "x.nxu"
    _ = words.write_bytes(WORDS)
    other = tmp_path / "other"
    _ = other.write_bytes(b"incorrect horse\n")

    assert main(["bundle", "keys", "new", str(ring)]) == 2
    assert "kept encrypted" in capsys.readouterr().err
    assert not ring.exists()
    assert main(["bundle", "keys", "new", str(ring), "--passphrase-file", str(words)]) == 0
    for path in (ring / "keys").iterdir():
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")

    assert signed(ring, update) == 2
    assert "there is no passphrase" in capsys.readouterr().err
    assert signed(ring, update, "--passphrase-file", str(other)) == 2
    assert "the passphrase is not its own" in capsys.readouterr().err
    assert signed(ring, update, "--passphrase-file", str(words)) == 0
    _, target = taken(state_of(ring), update, release=True)
    assert target.version == 7


def test_new_keys_for_release_are_encrypted_too(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words"
    _ = words.write_bytes(WORDS)
    assert main(["bundle", "keys", "new", str(ring), "--passphrase-file", str(words)]) == 0
    (ring / "keys" / "root-1.pem").unlink()  # it is somewhere else, as it should be
    before = sorted((ring / "keys").iterdir())

    assert main(["bundle", "keys", "rotate", str(ring), "timestamp"]) == 2

    assert "kept encrypted" in capsys.readouterr().err
    assert sorted((ring / "keys").iterdir()) == before


def test_a_root_that_follows_on_one_for_development_is_one_too(ring: Path, tmp_path: Path) -> None:
    assert made(ring) == 0
    assert main(["bundle", "keys", "rotate", str(ring), "timestamp"]) == 0
    update = tmp_path / "x.nxu"
    assert signed(ring, update) == 0
    second = Anchor((ring / "metadata" / root_name(2)).read_bytes())

    state = resume(second, None, version_floor=0)

    assert taken(state, update)[1].version == 7
    with pytest.raises(Untrusted) as refused:
        _ = taken(state, update, release=True)
    assert refused.value.status is TrustStatus.DEVELOPMENT_KEY


def test_a_folder_of_keys_is_made_once(ring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made(ring) == 0
    before = {path.name: path.read_bytes() for path in (ring / "keys").iterdir()}

    assert made(ring) == 1

    assert "File exists" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (ring / "keys").iterdir()} == before


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_new_keys_reach_the_devices_with_the_next_update(
    role: str, ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "1.nxu", tmp_path / "2.nxu"
    assert made(ring, "--roots", "2", "--threshold", "2") == 0
    assert signed(ring, first) == 0
    seen, _ = taken(state_of(ring), first)

    assert (
        main(["bundle", "keys", "rotate", str(ring), role, "--keys", "2", "--threshold", "2"]) == 0
    )
    assert "in force; the next update brings it to the devices" in capsys.readouterr().out
    assert signed(ring, second) == 0

    after, _ = taken(seen, second)
    assert after.root == (ring / "metadata" / root_name(2)).read_bytes()
    assert main(["bundle", "keys", "show", str(ring), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))
    assert shown["version"] == 2
    roles = {each["role"]: each for each in shown["roles"]}
    assert roles[role]["threshold"] == len(roles[role]["keys"]) == 2
    assert {each["name"] for each in shown["files"]} == {
        root_name(2),
        TARGETS,
        SNAPSHOT,
        TIMESTAMP,
    }


def test_a_root_waits_for_the_holders_of_its_keys(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(ring, "--roots", "3", "--threshold", "2") == 0
    away = [ring / "keys" / f"root-{number}.pem" for number in (2, 3)]
    elsewhere = [path.rename(tmp_path / path.name) for path in away]

    assert main(["bundle", "keys", "rotate", str(ring), "timestamp"]) == 0
    assert "2.root.json has 1 of 2 signatures" in capsys.readouterr().out
    assert not (ring / "metadata" / root_name(2)).exists()
    assert main(["bundle", "keys", "rotate", str(ring), "timestamp"]) == 1
    assert "a root is pending" in capsys.readouterr().err
    assert main(["bundle", "keys", "show", str(ring)]) == 0
    assert "pending: 2.root.json has 1 of 2 signatures" in capsys.readouterr().out

    foreign = ring / "keys" / "targets-1.pem"
    assert main(["bundle", "keys", "approve", str(ring), str(foreign)]) == 1
    assert "is none of root" in capsys.readouterr().err
    assert main(["bundle", "keys", "approve", str(ring), str(elsewhere[1])]) == 0

    assert "in force" in capsys.readouterr().out
    assert not list((ring / "pending").iterdir())
    update = tmp_path / "x.nxu"
    assert signed(ring, update) == 0
    assert taken(state_of(ring), update)[0].root == (ring / "metadata" / root_name(2)).read_bytes()
    assert main(["bundle", "keys", "approve", str(ring), str(elsewhere[0])]) == 1
    assert "no root is pending" in capsys.readouterr().err


def test_a_pending_root_that_somebody_overtook_replaces_nothing(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(ring, "--roots", "2", "--threshold", "2") == 0
    away = (ring / "keys" / "root-2.pem").rename(tmp_path / "root-2.pem")
    assert main(["bundle", "keys", "rotate", str(ring), "timestamp"]) == 0
    aside = (ring / "pending" / root_name(2)).rename(tmp_path / root_name(2))
    assert main(["bundle", "keys", "rotate", str(ring), "snapshot", "--root-key", str(away)]) == 0
    in_force = (ring / "metadata" / root_name(2)).read_bytes()
    _ = aside.rename(ring / "pending" / root_name(2))
    _ = capsys.readouterr()

    assert main(["bundle", "keys", "approve", str(ring), str(away)]) == 1

    assert "2.root.json does not follow on root 2" in capsys.readouterr().err
    assert (ring / "metadata" / root_name(2)).read_bytes() == in_force


def test_a_root_key_that_is_kept_elsewhere_is_named(ring: Path, tmp_path: Path) -> None:
    assert made(ring) == 0
    elsewhere = (ring / "keys" / "root-1.pem").rename(tmp_path / "root-1.pem")

    words = ["bundle", "keys", "rotate", str(ring), "targets", "--root-key", str(elsewhere)]

    assert main(words) == 0
    assert (ring / "metadata" / root_name(2)).exists()


def test_a_set_that_no_device_would_take_is_not_signed(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(ring) == 0
    before = sorted(path.name for path in (ring / "metadata").iterdir())
    update = tmp_path / "x.nxu"

    assert signed(ring, update, content=SET[:-1]) == 1
    assert "is no set that a device would take: truncated" in capsys.readouterr().err
    assert signed(ring, update, "--floor", "8") == 2
    assert "a floor of 8 would shut out the set itself" in capsys.readouterr().err

    assert not update.exists()
    assert sorted(path.name for path in (ring / "metadata").iterdir()) == before


def test_a_set_that_changes_while_it_is_signed_makes_no_update(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made(ring) == 0
    update = tmp_path / "x.nxu"
    changed = bytearray(SET)
    changed[-1] ^= 1

    def later(files: Mapping[str, bytes]) -> bytes:
        _ = update.with_suffix(".nxs").write_bytes(changed)
        return encode_update(files)

    monkeypatch.setattr("nexus.cli.bundle_sign.encode_update", later)

    assert signed(ring, update) == 1

    assert "the set changed while it was signed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path != ring] == ["x.nxs"]


def test_a_role_without_its_key_signs_nothing(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(ring) == 0
    (ring / "keys" / "snapshot-1.pem").unlink()

    assert signed(ring, tmp_path / "x.nxu") == 1

    assert "snapshot takes 1 keys of its own; 0 are here" in capsys.readouterr().err
    assert not (tmp_path / "x.nxu").exists()


def test_a_clock_that_went_back_is_noticed(
    ring: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert made(ring) == 0
    assert signed(ring, tmp_path / "1.nxu") == 0
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1699999999")

    assert signed(ring, tmp_path / "2.nxu") == 1

    assert "set the clock" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["new", "x", "--roots", "1", "--threshold", "2", "--development"], "cannot come from 1"),
        (["rotate", "ring", "mirrors"], "there is no role 'mirrors'"),
        (["rotate", "ring", "root", "--keys", "1", "--threshold", "2"], "cannot come from 1 keys"),
        (["show", "nowhere"], "has no metadata"),
    ],
)
def test_what_makes_no_sense_is_said(
    words: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert made(Path("ring")) == 0

    assert main(["bundle", "keys", *words]) == 2

    assert expected in capsys.readouterr().err


def test_metadata_that_somebody_damaged_are_not_signed_on(
    ring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(ring) == 0
    root = ring / "metadata" / root_name(1)
    _ = root.write_bytes(root.read_bytes().replace(b'"version":1', b'"version":2'))

    assert signed(ring, tmp_path / "x.nxu") == 1

    assert "no device would take this" in capsys.readouterr().err
