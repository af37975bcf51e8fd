"""`nexus bundle sign`: a set becomes an update, one file that a device believes or refuses."""

import os
from hashlib import sha256
from pathlib import Path
from typing import Final

from nexus.cli.bundle_keys import ONLINE
from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.files import open_input
from nexus.cli.keyring import Keyring, read_passphrase, signing, sync_folder, telling, term
from nexus.cli.output import say, say_json
from nexus.drivers import finished
from nexus.sets import CallSource, SetRefused, Verified, verify
from nexus.trust import Anchor, Target, encode_update
from nexus.trust.sign import describe, newest, release
from nexus.trust.update import root_name
from nexus.trust.verify import resume, verify_metadata

PIECE_SIZE: Final = 1 << 20  # bytes copied at a time


def sign(
    file: Path,
    folder: Path,
    output: Path,
    *,
    floor: int,
    days: int,
    passphrase: Path | None,
    as_json: bool,
) -> None:
    """Sign a set as the latest release and write the update. Raises UsageError, CommandFailed.

    Before anything is written, the metadata are verified as a new device would.
    """
    ring = Keyring(folder)
    files = ring.files()
    words = read_passphrase(passphrase)
    descriptor = open_input(file)
    try:
        verified = _verified(file, descriptor)
        manifest = verified.manifest
        if floor > manifest.version:
            raise UsageError(
                f"a floor of {floor} would shut out the set itself: its version is "
                f"{manifest.version}"
            )
        target = Target(
            name=manifest.name,
            length=verified.size,
            sha256=verified.sha256,
            version=manifest.version,
            floor=floor,
        )
        with signing():
            released = release(files, target, ring.signers(words, ONLINE), term(days))
            carried = newest(released)
            _as_a_device(carried)
            head = encode_update(carried)
        ring.write({name: data for name, data in released.items() if files.get(name) != data})
        size = _write_update(output, head, descriptor, target)
    finally:
        os.close(descriptor)
    with signing():
        said = describe(released)
    if as_json:
        say_json(
            {
                "update": str(output),
                "size": size,
                "name": target.name,
                "version": target.version,
                "floor": target.floor,
                "sha256": target.sha256.hex(),
                "root": said.version,
                "development": said.is_development,
            }
        )
        return
    kind = "for development" if said.is_development else "for release"
    say(f"{output}: set {target.name} (version {target.version}), {size} bytes, signed {kind}")


def _verified(file: Path, descriptor: int) -> Verified:
    try:
        return finished(
            verify(
                CallSource(
                    lambda at, size: os.pread(descriptor, size, at), os.fstat(descriptor).st_size
                )
            )
        )
    except SetRefused as refused:
        raise CommandFailed(f"{file} is no set that a device would take: {refused}") from refused
    except OSError as error:
        raise CommandFailed(f"cannot read {file}: {error.strerror or error}") from error


def _as_a_device(files: dict[str, bytes]) -> None:
    """Raises Untrusted if a device that has the oldest root of these would refuse the update."""
    oldest = min((name for name in files if name.endswith(".root.json")), key=_number)
    state = resume(Anchor(files[oldest]), None, version_floor=0)
    _ = verify_metadata(state, files, release=False)


def _number(name: str) -> int:
    number = int(name.partition(".")[0])
    assert name == root_name(number), "release has checked the names"
    return number


def _write_update(output: Path, head: bytes, descriptor: int, target: Target) -> int:
    """Write the update whole or not at all; its size."""
    fresh = output.with_name(f".{output.name}.new")
    digest = sha256()
    with telling(f"cannot write {output}"):
        try:
            with fresh.open("wb") as opened:
                _ = opened.write(head)
                for offset in range(0, target.length, PIECE_SIZE):
                    piece = os.pread(descriptor, min(PIECE_SIZE, target.length - offset), offset)
                    digest.update(piece)
                    _ = opened.write(piece)
                opened.flush()
                os.fsync(opened.fileno())
            if digest.digest() != target.sha256:
                raise CommandFailed("the set changed while it was signed: sign it again")
            _ = fresh.replace(output)
            sync_folder(output.absolute().parent)
        finally:
            fresh.unlink(missing_ok=True)
    return len(head) + target.length
