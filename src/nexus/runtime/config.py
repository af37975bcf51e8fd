"""What init tells a service when it starts it: BootImage.argument, decoded."""

from typing import Any, TypeVar

import msgspec

from nexus.abi import BootImage
from nexus.protocols.init import BOOT_ID_SIZE

TRACE_SEED_SIZE = 16  # bytes; as much as a trace id

SettingsT = TypeVar("SettingsT")


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The service's entry in the system file, as far as the service itself needs it.

    `uses` are the services it may ask for; of these it never waits for `posts`, which the plan
    declares with `sync = false` so that no cycle of waiting can be; `settings` are its own values;
    `trace_seed` makes its trace and span ids. `boot` is the number of this boot, 0 for the first
    and for every boot of a system that keeps nothing; `boot_id` is random, and says which boot it
    is. `starts` are the services that it may have started, with the digests of their programs;
    `streams` are its stream ports and their roles, the last of BootImage.ports in that order;
    `names` are those of all services, for a program that tells of others to people.
    `log_ring` and `metrics_page` are the bytes of its ring for lines and of its page of series.
    `slot` is the slot that was booted, `set_version` and `set_digest` are those of the system set
    in it; empty and 0 for a system that was booted out of no slot.
    """

    uses: list[str]
    posts: list[str]
    settings: dict[str, Any]
    trace_seed: bytes
    boot: int = 0
    boot_id: bytes = bytes(BOOT_ID_SIZE)
    starts: dict[str, str] = {}
    streams: dict[str, str] = {}
    names: list[str] = []
    log_ring: int = 64 * 1024
    metrics_page: int = 32 * 1024
    slot: str = ""
    set_version: int = 0
    set_digest: str = ""

    @classmethod
    def of(cls, boot: BootImage) -> "ServiceConfig":
        """The configuration in the boot image; msgspec.ValidationError is a bug of init's."""
        return msgspec.msgpack.decode(boot.argument, type=cls)

    def encoded(self) -> bytes:
        """The bytes for BootImage.argument."""
        return msgspec.msgpack.encode(self)

    def settings_as(self, kind: type[SettingsT]) -> SettingsT:
        """The settings as the service's own struct; unknown and missing keys are errors."""
        return msgspec.convert(self.settings, type=kind)
