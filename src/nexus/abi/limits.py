"""Every limit of the ABI, with unit and reason. Docs and tests quote them from here."""

from typing import Final

PAGE_SIZE: Final = 4096  # bytes; VMO lengths are rounded up to it
SLOTS_MAX: Final = 96  # capabilities per task; small on purpose (core.md 2.1)
TASKS_MAX: Final = 256  # live tasks; one row each, a device runs dozens
MESSAGE_SIZE_MAX: Final = 8192 + 48  # bytes; an 8192-byte body behind the 48-byte frame header
MESSAGE_KIND_RESERVED: Final = 0xF0  # first bytes from here on are the kernel's own frames
LINK_DEPTH_DEFAULT: Final = 8  # messages; the reference system's typical queue
LINK_DEPTH_MAX: Final = 256  # messages; larger only hides a slow receiver
LINK_SIZE_MAX: Final = 16 * 1024  # bytes; the largest share one link may take
CONTROL_LINK_SIZE: Final = 4 * 1024  # bytes; share of a link to or from init
OWNER_SIZE_DEFAULT: Final = 256 * 1024  # bytes of link shares one owner may reserve
TOTAL_SIZE_DEFAULT: Final = 1024 * 1024  # bytes of link shares of the whole system
ENDPOINTS_PER_OWNER_MAX: Final = 96  # live at a time
ENDPOINTS_TOTAL_MAX: Final = 384  # live at a time
HEAP_SIZE: Final = 1792 * 1024  # bytes; budget of the simulated kernel's objects (core.md 1.5)
# bytes of a task's private memory beside its program and its objects; generous, not measured:
# Python asks Linux for 1 MiB at a time, and a traceback needs room too.
MEMORY_SIZE_DEFAULT: Final = 64 * 1024 * 1024
MEMORY_SIZE_MAX: Final = 4 * 1024 * 1024 * 1024
CPU_SHARE_MAX: Final = 400  # percent of one CPU; the four that a system may have
BUDGET_SIZE_DEFAULT: Final = 1792 * 1024  # bytes of objects (VMOs, endpoints, links) per task
VMO_SIZE_MAX: Final = 1024 * 1024  # bytes; a bulk transfer, not a data set
ENTROPY_SIZE_MAX: Final = 256  # bytes; getrandom(2) never short-reads at or below 256
CONSOLE_LINE_SIZE_MAX: Final = 512  # bytes of UTF-8; a marker or a statement, not a log
EVIDENCE_SIZE_MAX: Final = 4096  # bytes of JSON next to a console line
AUDIT_LINES_MAX: Final = 64  # QoS audit lines kept for init; one proof run makes about ten
BOOT_MEMORY_SIZE_MAX: Final = 4096  # bytes; init's memory of crashes, a page
NOTIFY_SIZE_MAX: Final = 256  # bytes of one sd_notify message
PORT_PEERS_MAX: Final = 8  # connections of one port; people and scripts, not services
PORTS_MAX: Final = 2  # ports of one task; the operator has one
STREAM_PORTS_MAX: Final = 4  # stream ports of one task; exportd has two and one that dials
STREAM_QUEUE_SIZE: Final = 64 * 1024  # bytes on their way to a peer that reads slowly
STREAM_LINGER: Final = 5_000_000_000  # ns; how long the end of a stream waits for a slow reader
UID_UNKNOWN: Final = 0xFFFF_FFFF  # (uid_t)-1, which chown(2) reserves: no user has it
THREADS_MAX: Final = 64  # threads one service may be granted
HARDWARE_MAX: Final = 8  # devices of one service; a driver has one
DMA_PAGES: Final = 32  # pages a device may read and write; one transfer and its queue
BLOCK_SIZE: Final = 512  # bytes; virtio-blk counts in them whatever the disk's own blocks are
BLOCK_TRANSFER_MAX: Final = 1024 * 1024  # bytes of one block trap
SECRET_SIZE_MAX: Final = 4095  # bytes; a page, which is the most of a Linux key, less a mark
SERVICE_NAME_SIZE_MAX: Final = 48  # bytes of ASCII; the reference system's routing limit

assert MESSAGE_SIZE_MAX <= LINK_SIZE_MAX, "a link holds at least one largest message"
assert LINK_SIZE_MAX <= OWNER_SIZE_DEFAULT <= TOTAL_SIZE_DEFAULT
assert ENDPOINTS_PER_OWNER_MAX <= ENDPOINTS_TOTAL_MAX
assert ENDPOINTS_PER_OWNER_MAX <= SLOTS_MAX, "each endpoint of a task takes a slot"
assert BLOCK_TRANSFER_MAX % BLOCK_SIZE == 0
assert CONSOLE_LINE_SIZE_MAX + EVIDENCE_SIZE_MAX < MESSAGE_SIZE_MAX
