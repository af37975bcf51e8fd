"""`nexus bundle keys`: who may sign updates, and how a device learns that it is somebody else.

Nothing here is a device's: its own key is keystored's, and `nexus keys` is about that one.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from nexus.cli.errors import CommandFailed, UsageError
from nexus.cli.keyring import (
    Keyring,
    read_key,
    read_passphrase,
    replace_file,
    signing,
    telling,
    term,
)
from nexus.cli.output import say, say_json, say_table
from nexus.trust.limits import KEYS_MAX, ROOT_SIZE_MAX
from nexus.trust.sign import (
    ROLES,
    RoleKeys,
    describe,
    first_root,
    more_signatures,
    next_root,
    root_missing,
)

ROOT: Final = "root"
ONLINE: Final = tuple(role for role in ROLES if role != ROOT)
"""The roles that sign each release; root signs only when keys change."""


def new(
    folder: Path,
    *,
    development: bool,
    roots: int,
    threshold: int,
    days: int,
    passphrase: Path | None,
    as_json: bool,
) -> None:
    """Make keys for every role and a first root. Raises UsageError and CommandFailed."""
    if not 1 <= threshold <= roots:
        raise UsageError(f"{threshold} signatures cannot come from {roots} keys of root")
    if passphrase is None and not development:
        raise UsageError(
            "keys that devices are released with are kept encrypted: name a file with a "
            "passphrase, or say --development"
        )
    words = read_passphrase(passphrase)
    ring = Keyring(folder)
    ring.make()
    signers = [ring.new_key(ROOT, words) for _ in range(roots)]
    roles = {ROOT: RoleKeys([each.public_key for each in signers], threshold)}
    for role in ONLINE:
        roles[role] = RoleKeys([ring.new_key(role, words).public_key], 1)
    with signing():
        files = first_root(roles, signers, term(days), development=development)
    ring.write(files)
    (name,) = files
    if as_json:
        say_json({"root": str(ring.metadata / name), **_document(files)})
        return
    say(f"{ring.metadata / name}: the root that devices are provisioned with")
    say(f"{ring.keys}: the keys; keep those of root somewhere else, and a copy of each")
    if development:
        say("these keys are for development: a release build refuses what they sign")


def show(folder: Path, *, as_json: bool) -> None:
    """Say who may sign, until when, and what is pending."""
    ring = Keyring(folder)
    files = ring.files()
    pending = _pending(ring)
    with signing():
        document = _document(files)
        missing = {name: root_missing(files, name, data) for name, data in pending.items()}
    if as_json:
        say_json({**document, "pending": missing})
        return
    kind = "for development" if document["development"] else "for release"
    say(f"{folder}: root {document['version']}, {kind}")
    rows = [
        (role["role"], f"{role['threshold']} of {len(role['keys'])}", _keys(role["keys"]))
        for role in document["roles"]
    ]
    say_table(("role", "signatures", "keys"), rows)
    for file in document["files"]:
        say(f"{file['name']}: version {file['version']}, until {_day(file['expires'])}")
    for name, what in missing.items():
        say(f"pending: {what or name + ' is complete'}")


def rotate(
    folder: Path,
    role: str,
    *,
    keys: int,
    threshold: int,
    days: int,
    root_keys: Sequence[Path],
    passphrase: Path | None,
    as_json: bool,
) -> None:
    """Give a role new keys in place of all it has, by a root that the old and the new keys sign."""
    if role not in ROLES:
        raise UsageError(f"there is no role {role!r}: the roles are {', '.join(ROLES)}")
    if not 1 <= threshold <= keys <= KEYS_MAX:
        raise UsageError(f"{threshold} signatures cannot come from {keys} keys")
    ring = Keyring(folder)
    files = ring.files()
    if _pending(ring):
        raise CommandFailed(
            f"a root is pending in {ring.pending}: `nexus bundle keys approve` signs it, "
            "and to begin again, remove it"
        )
    words = read_passphrase(passphrase)
    with signing():
        before = describe(files)
    if not before.is_development and words is None:
        raise UsageError("keys for release are kept encrypted: name a file with a passphrase")
    old = [*ring.signers(words, [ROOT]), *(read_key(path, words) for path in root_keys)]
    known = before.keys_of(ROOT)
    signers = [each for each in old if each.public_key.keyid in known]
    fresh = [ring.new_key(role, words) for _ in range(keys)]
    given = {role: RoleKeys([each.public_key for each in fresh], threshold)}
    if role == ROOT:
        signers += fresh
    with signing():
        name, data = next_root(files, given, signers, term(days))
    _settle(ring, files, name, data, as_json=as_json)


def approve(
    folder: Path, root_keys: Sequence[Path], *, passphrase: Path | None, as_json: bool
) -> None:
    """Sign the pending root with keys that were not at hand before."""
    ring = Keyring(folder)
    files = ring.files()
    pending = _pending(ring)
    if not pending:
        raise CommandFailed(f"no root is pending in {ring.pending}")
    ((name, data),) = pending.items()
    words = read_passphrase(passphrase)
    with signing():
        signed = more_signatures(data, files, [read_key(path, words) for path in root_keys])
    _settle(ring, files, name, signed, as_json=as_json)


def _settle(
    ring: Keyring, files: dict[str, bytes], name: str, data: bytes, *, as_json: bool
) -> None:
    """Put a root in force if it has its signatures, and else among what is pending."""
    with signing():
        missing = root_missing(files, name, data)
    waiting = ring.pending / name
    if missing:
        with telling(f"cannot make {ring.pending}"):
            ring.pending.mkdir(exist_ok=True)
        replace_file(waiting, data)
    else:
        ring.write({name: data})
        with telling(f"cannot remove {waiting}"):
            waiting.unlink(missing_ok=True)
    path = waiting if missing else ring.metadata / name
    if as_json:
        say_json({"root": str(path), "missing": missing})
    elif missing:
        say(f"{path}: {missing}; `nexus bundle keys approve` adds one")
    else:
        say(f"{path}: in force; the next update brings it to the devices")
        say("sign a release now: what was signed by keys that are gone is refused from here on")


def _pending(ring: Keyring) -> dict[str, bytes]:
    """The root that lacks signatures: one at most, for it has to follow on the last one."""
    found = {}
    with telling(f"cannot read {ring.pending}"):
        paths = sorted(ring.pending.glob("[0-9]*.json")) if ring.pending.is_dir() else []
        if len(paths) > 1:
            raise CommandFailed(f"{ring.pending} has {len(paths)} roots; remove what is wrong")
        for path in paths:
            with path.open("rb") as opened:
                found[path.name] = opened.read(ROOT_SIZE_MAX)
    return found


def _document(files: dict[str, bytes]) -> dict[str, Any]:
    said = describe(files)
    return {
        "version": said.version,
        "development": said.is_development,
        "roles": [
            {"role": each.title, "threshold": each.threshold, "keys": list(each.keys)}
            for each in said.roles
        ],
        "files": [
            {"name": name, "version": version, "expires": expires}
            for name, version, expires in said.files
        ],
    }


def _keys(keyids: Sequence[str]) -> str:
    return " ".join(keyid[:8] for keyid in keyids)


def _day(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%d}"
