"""execd's values in the system file."""

import msgspec

from nexus.protocols.execd import REPORT_SIZE_MAX
from nexus.runtime.program import SettingsFault

COUNT_MAX = 256  # reports; all of them are in execd's memory too


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The values of the entry in the system file.

    At most `reports` reports of together `reports_size` bytes are kept; the oldest give way. `told`
    is the program whose first start is told on the console, "" for nobody's.
    """

    reports: int = 64
    reports_size: int = 256 * 1024
    told: str = ""


def check_settings(settings: Settings) -> Settings:
    """The settings, if they can be kept. Raises SettingsFault."""
    if not 1 <= settings.reports <= COUNT_MAX:
        raise SettingsFault(f"expected 1 to {COUNT_MAX} for reports, found {settings.reports}")
    if settings.reports_size < REPORT_SIZE_MAX:
        raise SettingsFault(
            f"expected at least {REPORT_SIZE_MAX} for reports_size, found {settings.reports_size}"
        )
    return settings
