"""What the host and the guest of a virtual machine have agreed on; both sides import it.

The image has the base system; the job of one boot lies over it, an archive of its own behind the
image's. The guest tells the host everything over one virtio-serial port, a JSON line each: the
events of the booted system as nexus.proof.sink writes them, the count of lost ones, and between
them notes of the guest itself, objects whose first key is NOTE of nexus.proof.notes. The last of
them says that the machine goes off on purpose, and with which exit code: without it a boot has no
good end, whatever QEMU's exit code says.
"""

from typing import Final

JOB: Final = "/job.json"
"""A nexus.proof.runner.Job. `system` is a path in the guest; where the state is, the guest says."""
PLAIN: Final = "plain"
"""A key beside those of the job: true for a boot of no proof, in which nothing is planted."""

DOCTOR: Final = "doctor"
"""Another one: true for a boot that starts no system, but tries what holds and tells it."""

AHEAD: Final = "ahead"
"""A field of the job: true for a machine that was started while another one has its disks. It waits
for GO_WORD before it looks at one."""
GO_WORD: Final = "go"

MODULES: Final = "/lib_modules"
"""Kernel modules, unpacked (NAME.ko)."""
MODULES_ORDER: Final = f"{MODULES}/order"
"""Their names, one per line, each behind those it needs."""

WATCHDOG: Final = "watchdog"
"""A third: after how many seconds without a sign of life of init the machine's watchdog bites."""
WATCHDOG_DEFAULT: Final = 60  # seconds

EVIDENCE_PORT: Final = "nexus.evidence"  # name of the virtserialport: events and notes
STOP_WORD: Final = "stop"  # a line from the host over that port: SIGTERM, end in order
INTERRUPT_WORD: Final = "interrupt"  # SIGINT: the same
RELOAD_WORD: Final = "reload"  # SIGHUP: read the policy files again
SCRAPE_WORD: Final = "scrape"  # another, with a socket's name and the boot's number: read a page
PERSIST: Final = "persist"  # serial of the disk for what lasts: a small ext4
PERSIST_STATE: Final = "state"  # the state directory, in its root
SERIAL_SIZE_MAX: Final = 20  # bytes of a virtio disk's serial; longer names are refused

SLOT_AT: Final = "/run/slot"
"""The tree of the slot that is booted, for whoever may run it to read: the state directory, in
which it lies, is init's alone."""

DISK_SUFFIX: Final = ".img"
"""Any other disk has the name of a device of the plan as its serial, as far as it goes; on the host
it is the file NAME.img of the run's state directory."""

NOTE_CRASH: Final = "crash"  # process 1 failed: `t`, `text` (a traceback)
NOTE_OFF: Final = "off"  # it goes off, or starts again, on purpose: `t`, `code` (of the boot)
NOTE_DOCTOR: Final = "doctor"  # what holds here: `guarantees`, `kernel`, as JSON of it

EXIT_GUEST: Final = 106  # exit code of a boot whose process 1 failed before or after the system ran
