"""System sets: what a device runs, as one file that is verified before anything of it is used.

`write` makes one, `read_manifest`, `verify` and `unpack` read one; both are functions of bytes. Who
may have made it is nexus.trust's to say, where it is kept nexus.bootctl's.
"""

from nexus.sets.errors import SetRefused, SetStatus
from nexus.sets.manifest import (
    CHUNK_SIZE,
    MANIFEST_SIZE_MAX,
    UNPACKED_SIZE_MAX,
    Base,
    Chunk,
    File,
    Manifest,
    decode_manifest,
    encode_manifest,
    unmet,
)
from nexus.sets.reader import (
    SET_SIZE_MAX,
    BytesSource,
    CallSource,
    Known,
    PartSource,
    Pass,
    Sink,
    Source,
    Verified,
    plain,
    read_file,
    read_manifest,
    unpack,
    verify,
)
from nexus.sets.writer import About, Content, write

__all__ = [
    "CHUNK_SIZE",
    "MANIFEST_SIZE_MAX",
    "SET_SIZE_MAX",
    "UNPACKED_SIZE_MAX",
    "About",
    "Base",
    "BytesSource",
    "CallSource",
    "Chunk",
    "Content",
    "File",
    "Known",
    "Manifest",
    "PartSource",
    "Pass",
    "SetRefused",
    "SetStatus",
    "Sink",
    "Source",
    "Verified",
    "decode_manifest",
    "encode_manifest",
    "plain",
    "read_file",
    "read_manifest",
    "unmet",
    "unpack",
    "verify",
    "write",
]
