"""What a guest says of itself, as a judge knows it: notes, between the events of its system."""

from typing import Final

NOTE: Final = "guest"  # key of a note; its value says of which kind it is
NOTE_UP: Final = "up"  # process 1 runs: `t` (ns of the guest's clock), `python`, `kernel`, `cpus`
NOTE_STAGE: Final = "stage"  # of the way up: `t`, `name`
WAITS: Final = "waits"  # the stage of a machine that was started while another one has its disks
GOES_ON: Final = "goes on"  # and the next one, when it is given them
NOTE_PAGES: Final = "pages"  # of registers that services may be given: `pages`
NOTE_WINDOWS: Final = "windows"  # who has which mapped when a `line` came of `pid`: `holders`
