"""Whom a device believes: TUF metadata from an update file, without network and without a clock.

Statuses, the kept state and the update file are here; they import no cryptography, so that
protocols and init may name them. `nexus.trust.verify` (updated and the host tool) and
`nexus.trust.sign` (the host tool) are what knows TUF, and are imported by their own names.
What cannot be detected without a trusted clock is in docs/reference/trust.md.
"""

from nexus.trust.state import Anchor, Target, TrustState, decode_state
from nexus.trust.status import TrustStatus, Untrusted
from nexus.trust.update import (
    UPDATE_HEADER_SIZE,
    Update,
    decode_metadata,
    encode_metadata,
    encode_update,
    metadata_size,
    read_update,
)

__all__ = [
    "UPDATE_HEADER_SIZE",
    "Anchor",
    "Target",
    "TrustState",
    "TrustStatus",
    "Untrusted",
    "Update",
    "decode_metadata",
    "decode_state",
    "encode_metadata",
    "encode_update",
    "metadata_size",
    "read_update",
]
