"""`nexus bundle`: system sets, made and looked at on the machine of who releases them."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from nexus.bundle import HEALTH_DEFAULT, NotInstalled, Release, WrongContent, build, package_folder
from nexus.cli.errors import EXIT_FAILED, EXIT_OK, CommandFailed, UsageError
from nexus.cli.files import open_input, write_output
from nexus.cli.output import say, say_json, say_table
from nexus.drivers import finished
from nexus.sets import (
    MANIFEST_SIZE_MAX,
    BytesSource,
    CallSource,
    File,
    Manifest,
    PartSource,
    SetRefused,
    Source,
    Verified,
    read_file,
    read_manifest,
    verify,
)
from nexus.trust.status import Untrusted
from nexus.trust.update import UPDATE_MAGIC, read_update

NANOS: Final = 1_000_000_000
_SCHEMA: Final = re.compile(r"(?P<area>/state/[^=]*)=(?P<version>[0-9]{1,10})")


def make(
    file: Path,
    output: Path,
    *,
    version: int,
    name: str,
    health: float | None,
    schemas: Sequence[str],
    needs: Sequence[str],
    as_json: bool,
) -> None:
    """Build a set. Raises SystemFileError, UsageError and CommandFailed."""
    release = Release(
        version=version,
        name=name,
        health=HEALTH_DEFAULT if health is None else round(health * NANOS),
        schemas=dict(_schema(text) for text in schemas),
    )
    try:
        data = build(file, release, package=package_folder(), needs=tuple(needs))
    except (WrongContent, NotInstalled) as error:
        raise UsageError(str(error)) from error
    except SetRefused as refused:
        raise UsageError(f"this is no set that a device would take: {refused}") from refused
    write_output(output, data)
    verified = finished(verify(BytesSource(data)))
    if as_json:
        say_json({"file": str(output), **_document(verified.manifest), **_measured(verified)})
        return
    say(f"{output}: {_title(verified.manifest)}")
    say(f"{verified.size} bytes, sha256 {verified.sha256.hex()}")


def inspect(file: Path, *, files: bool, sbom: bool, as_json: bool) -> int:
    """Say what a set says of itself; only its manifest is compared."""
    with _opened(file) as source:
        try:
            manifest = finished(read_manifest(source))
            bill = _bill(source, manifest) if sbom else None
        except SetRefused as refused:
            return _refused(file, refused, as_json=as_json)
    if sbom:
        say_json(bill)
    elif as_json:
        say_json({"file": str(file), **_document(manifest)})
    else:
        _print(manifest, files=files)
    return EXIT_OK


def check(file: Path, *, as_json: bool) -> int:
    """Look at every byte of a set; EXIT_FAILED if it is refused."""
    with _opened(file) as source:
        try:
            verified = finished(verify(source))
        except SetRefused as refused:
            return _refused(file, refused, as_json=as_json)
    if as_json:
        say_json(
            {"file": str(file), "whole": True, **_document(verified.manifest)} | _measured(verified)
        )
        return EXIT_OK
    say(f"{file}: {_title(verified.manifest)}: whole")
    say(f"{verified.size} bytes, sha256 {verified.sha256.hex()}")
    return EXIT_OK


def _schema(text: str) -> tuple[str, int]:
    match = _SCHEMA.fullmatch(text)
    if match is None:
        raise UsageError(f"expected an area and its version as in /state/app/=2, found {text!r}")
    return match["area"], int(match["version"])


@contextmanager
def _opened(file: Path) -> Iterator[Source]:
    """A set, or the set in an update file, whose signatures are not looked at here."""
    descriptor = open_input(file)
    size = os.fstat(descriptor).st_size
    source = CallSource(lambda at, size: os.pread(descriptor, size, at), size)
    try:
        if finished(source.read_at(0, len(UPDATE_MAGIC))) == UPDATE_MAGIC:
            update = finished(read_update(source))
            yield PartSource(source, update.set_offset, update.set_size)
        else:
            yield source
    except Untrusted as untrusted:
        raise CommandFailed(f"{file}: {untrusted}") from untrusted
    except OSError as error:
        raise CommandFailed(f"cannot read {file}: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


def _bill(source: Source, manifest: Manifest) -> Any:
    try:
        return json.loads(finished(read_file(source, manifest, manifest.sbom, MANIFEST_SIZE_MAX)))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CommandFailed(f"the bill of materials is no JSON: {error}") from error


def _refused(file: Path, refused: SetRefused, *, as_json: bool) -> int:
    if as_json:
        say_json(
            {
                "file": str(file),
                "whole": False,
                "status": refused.status.name,
                "reason": refused.detail,
            }
        )
    else:
        say(f"{file}: refused: {refused}")
    return EXIT_FAILED


def _title(manifest: Manifest) -> str:
    return f"{manifest.name} (version {manifest.version}), {len(manifest.files)} files"


def _measured(verified: Verified) -> dict[str, Any]:
    return {"size": verified.size, "sha256": verified.sha256.hex()}


def _document(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "name": manifest.name,
        "system": manifest.system,
        "sbom": manifest.sbom,
        "health_ns": manifest.health,
        "python": manifest.base.python,
        "distributions": manifest.base.distributions,
        "services": {name: digest.hex() for name, digest in manifest.services.items()},
        "schemas": manifest.schemas,
        "files": [
            {"path": file.path, "size": file.size, "executable": file.executable}
            for file in manifest.files
        ],
        "unpacked": manifest.unpacked_size,
        "stored": manifest.stored_size,
    }


def _print(manifest: Manifest, *, files: bool) -> None:
    say(_title(manifest))
    say(f"system {manifest.system}, bill of materials {manifest.sbom}")
    say(f"{manifest.unpacked_size} bytes, stored in {manifest.stored_size}")
    say(f"a trial boot has {manifest.health / NANOS:g} s to prove well")
    needs = ", ".join(f"{name} {of}" for name, of in manifest.base.distributions.items())
    say(f"needs python {manifest.base.python}, {needs}")
    say("")
    say_table(("SERVICE", "PROGRAM"), _digests(manifest))
    if manifest.schemas:
        say("")
        say_table(("AREA", "SCHEMA"), [(at, str(of)) for at, of in manifest.schemas.items()])
    if files:
        say("")
        say_table(("FILE", "SIZE", "MODE", "CHUNKS"), [_row(file) for file in manifest.files])


def _digests(manifest: Manifest) -> list[tuple[str, str]]:
    return [(name, digest.hex()[:16]) for name, digest in manifest.services.items()]


def _row(file: File) -> tuple[str, str, str, str]:
    mode = "x" if file.executable else "-"
    return file.path, str(file.size), mode, str(len(file.chunks))
