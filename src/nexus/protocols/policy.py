"""The policy as init keeps it and policyd reads it: who holds which right, and where it says so.

Made from the policy files by `nexus.init.policy`, carried as a sealed VMO (GetPolicy, SetPolicy)
in MessagePack. A right is a name such as `proof.control`, which may be bound to what it is for:
`statefs.write:/state/keys/`. What is not listed is denied.
"""

from hashlib import sha256
from typing import Annotated, Final

import msgspec

POLICY_SIZE_MAX: Final = 64 * 1024  # bytes of MessagePack; 44 services use a tenth
RIGHT_SIZE_MAX: Final = 48  # characters of a right's name (core.md 6.1)
RIGHTS_MAX: Final = 64  # rights of one service
SUBJECTS_MAX: Final = 64  # services of a system, and a few names that policy files may prepare
FILE_SIZE_MAX: Final = 256  # characters of a file's name
RIGHT_PATTERN: Final = r"^[a-z][a-z0-9]*([.-][a-z0-9]+)*\Z"
TARGET_SIZE_MAX: Final = 64  # characters of what the action is done to (core.md 6.4)
TARGET_PATTERN: Final = r"^([!-~]([ -~]*[!-~])?)?\Z"
BOUND: Final = ":"  # stands between a right and what it is bound to
FOLDER: Final = "/"  # ends a bound target of which everything below is meant

DELEGATE: Final = "policy.delegate"  # may ask on behalf of somebody else
AUTHORITY: Final = "policy.authority"  # may take the policy from init, and give it a new one
RELOAD: Final = "policy.reload"  # may give policyd a new policy
ROUTE_RIGHT: Final = "ipc.core"  # ROUTE needs it of the requester
EXEC_RIGHT: Final = "proc.spawn"  # EXEC needs it of the requester

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=RIGHT_SIZE_MAX)]


class Right(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A right as a policy file gives it: its name, the file, the line, and what it is bound to.

    `target` is empty for a right to everything. One that ends in FOLDER stands for every target
    that begins with it, any other for itself alone.
    """

    name: Annotated[
        str, msgspec.Meta(min_length=1, max_length=RIGHT_SIZE_MAX, pattern=RIGHT_PATTERN)
    ]
    file: Annotated[str, msgspec.Meta(max_length=FILE_SIZE_MAX)]
    line: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
    target: Annotated[str, msgspec.Meta(max_length=TARGET_SIZE_MAX, pattern=TARGET_PATTERN)] = ""

    @property
    def text(self) -> str:
        """The right as it is written."""
        return f"{self.name}{BOUND}{self.target}" if self.target else self.name

    def covers(self, target: str) -> bool:
        """Whether it is a right to do that to `target`."""
        if not self.target or target == self.target:
            return True
        return self.target.endswith(FOLDER) and target.startswith(self.target)


def parse_right(text: str, file: str, line: int) -> Right:
    """The right that is written so."""
    name, _, target = text.partition(BOUND)
    return Right(name, file, line, target)


Rights = Annotated[list[Right], msgspec.Meta(max_length=RIGHTS_MAX)]


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Deny by default. `services` are the names init issues identities for, in the plan's order.

    `allow` lists the rights of each subject; `routes` says which further right a ROUTE to a
    target needs besides ROUTE_RIGHT.
    """

    services: Annotated[list[Name], msgspec.Meta(max_length=SUBJECTS_MAX)]
    allow: Annotated[dict[Name, Rights], msgspec.Meta(max_length=SUBJECTS_MAX)]
    routes: Annotated[dict[Name, Name], msgspec.Meta(max_length=SUBJECTS_MAX)] = {}

    def right(self, subject: str, name: str, target: str = "") -> Right | None:
        """The entry that gives `subject` the right to do that to `target`, or None: denied.

        Without a target only a right that is not bound is one.
        """
        rights = self.allow.get(subject, ())
        return next((each for each in rights if each.name == name and each.covers(target)), None)

    def encoded(self) -> bytes:
        """The bytes that travel; the same policy gives the same bytes."""
        return msgspec.msgpack.encode(self, order="deterministic")

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the encoded policy."""
        return sha256(self.encoded()).hexdigest()


def decode_policy(data: bytes) -> Policy:
    """The policy in `data`. Raises msgspec.DecodeError for anything else."""
    if len(data) > POLICY_SIZE_MAX:
        raise msgspec.DecodeError(f"{len(data)} bytes, a policy has {POLICY_SIZE_MAX} at most")
    try:
        return msgspec.msgpack.decode(data, type=Policy)
    except UnicodeDecodeError as error:  # msgspec passes this one on as it is
        raise msgspec.DecodeError(f"text that is no UTF-8: {error}") from error
