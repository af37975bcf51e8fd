"""A confined service makes every call that would get it out; each is refused by the filter.

The control experiment runs the same attempts unconfined as root: there the filter's errno does
not come, so the arguments were good enough to reach the kernel, and the filter is the reason.
"""

import ctypes
import errno
import os
from collections.abc import Mapping
from typing import Any, Final

import pytest

from nexus.abi import BootImage, Send
from nexus.testing.conformance.steps import ended, start, take
from nexus.testing.rig import Rig, linux_rig
from tests.attack.hostile import call, report, reporting_back, result

pytestmark = pytest.mark.linux

# x86_64 system calls: number and arguments. Nothing here does harm when it is not refused.
ATTEMPTS: Final[dict[str, tuple[Any, ...]]] = {
    "open": (2, b"/etc/passwd", 0),
    "openat": (257, -100, b"/etc/passwd", 0),
    "openat2": (437, -100, b"/etc/passwd", None, 0),
    "open_by_handle_at": (304, -100, None, 0),
    "creat": (85, b"/no-such-directory/x", 0),
    "stat": (4, b"/", None),
    "readlink": (89, b"/proc/self/exe", None, 0),
    "unlink": (87, b"/no-such-file"),
    "mkdir": (83, b"/no-such-directory/x", 0),
    "chdir": (80, b"/"),
    "execve": (59, b"/no-such-file", None, None),
    "execveat": (322, -100, b"/no-such-file", None, None, 0),
    "socket unix": (41, 1, 5, 0),
    "socket unix dgram": (41, 1, 2, 0),
    "socket inet": (41, 2, 1, 0),
    "socket netlink": (41, 16, 3, 0),
    "socketpair dgram": (53, 1, 2, 0, "ints"),
    "socketpair stream": (53, 1, 1, 0, "ints"),
    "socketpair dgram with flags": (53, 1, 2 | 0o2004000, 0, "ints"),
    "bind": (49, -1, None, 0),
    "connect": (42, -1, None, 0),
    "listen": (50, -1, 0),
    "accept4": (288, -1, None, None, 0),
    "sendmmsg": (307, -1, None, 0, 0),
    "recvmmsg": (299, -1, None, 0, 0, None),
    "ptrace seize": (101, 0x4206, "victim", 0, 0),
    "process_vm_readv": (310, "victim", None, 0, None, 0, 0),
    "process_vm_writev": (311, "victim", None, 0, None, 0, 0),
    "pidfd_open": (434, "victim", 0),
    "pidfd_getfd": (438, -1, 0, 0),
    "pidfd_send_signal": (424, -1, 0, None, 0),
    "kcmp": (312, "victim", "victim", 0, 0, 0),
    "kill": (62, "victim", 0),
    "tkill": (200, "victim", 0),
    "tgkill": (234, "victim", "victim", 0),
    "rt_sigqueueinfo": (129, "victim", 0, None),
    "io_uring_setup": (425, 0, None),
    "io_setup": (206, 0, None),
    "add_key": (248, None, None, None, 0, 0),
    "request_key": (249, None, None, None, 0),
    "keyctl": (250, -1, 0, 0, 0, 0),
    "bpf": (321, 999, None, 0),
    "perf_event_open": (298, None, 0, -1, -1, 0),
    "userfaultfd": (323, 0xFFFF),
    "msgget": (68, 0, 0o1000),
    "shmget": (29, 0, 0, 0),
    "semget": (64, 0, 0, 0),
    "mq_open": (240, b"x", 0, 0, None),
    "shmat": (30, -1, None, 0),
    "mount": (165, None, None, None, 0, None),
    "umount2": (166, b"/no-such-directory", 0),
    "pivot_root": (155, b"/no-such-directory", b"/no-such-directory"),
    "chroot": (161, b"/no-such-directory"),
    "unshare": (272, 0),
    "setns": (308, -1, 0),
    "setuid": (105, "uid"),
    "setresuid": (117, -1, -1, -1),
    "setgroups": (116, 0, None),
    "capset": (126, None, None),
    "prctl dumpable": (157, 4, 1, 0, 0, 0),
    "prctl death signal": (157, 1, 9, 0, 0, 0),
    "prctl name": (157, 15, b"init-lite", 0, 0, 0),
    "seccomp": (317, 99, 0, None),
    "prlimit64": (302, 0, 7, None, None),
    "setrlimit": (160, 99, None),
    "setpriority": (141, 0, 0, 0),
    "sched_setscheduler": (144, 0, 0, "zero"),
    "sched_setattr": (314, 0, None, 0),
    "sched_setaffinity": (203, 0, 0, None),
    "init_module": (175, None, 0, b""),
    "finit_module": (313, -1, b"", 0),
    "kexec_load": (246, 0, 99, None, 0),
    "reboot": (169, 0, 0, 0, None),
    "settimeofday": (164, None, None),
    "clock_settime": (227, 0, None),
    "swapon": (167, b"/no-such-file", 0),
    "quotactl": (179, 0, None, 0, None),
    "name_to_handle_at": (303, -100, b"/", None, None, 0),
    "inotify_init1": (294, 0),
    "fanotify_init": (300, 0xFFFF, 0),
    "personality": (135, 0xFFFFFFFF),
    "iopl": (172, 0),
    "dup": (32, 0),
    "dup3": (292, 0, 900, 0),
    "fcntl dup": (72, 0, 0, 700),
    "fcntl setown": (72, 0, 8, 0),
    "fcntl setsig": (72, 0, 10, 0),
    "ioctl tty push": (16, 0, 0x5412, b"x"),
    "landlock_create_ruleset": (444, None, 0, 1),
    "memfd_secret": (447, 0xFFFF),
    "mmap executable": (9, None, 4096, 4, 0x22, -1, 0),
    "mmap writable and executable": (9, None, 4096, 7, 0x22, -1, 0),
    "process_madvise": (440, -1, None, 0, 0, 0),
    "remap_file_pages": (216, None, 0, 0, 0, 0),
    "vmsplice": (278, -1, None, 0, 0),
    "splice": (275, -1, None, -1, None, 0, 0),
    "sendfile": (40, -1, -1, None, 0),
    "pipe2": (293, None, 0),
    "eventfd2": (290, 0, 0xFFFF),
    "signalfd4": (289, -1, None, 0, 0xFFFF),
    "timer_create": (222, 0, None, None),
    "setitimer": (38, 99, None, None),
    "alarm": (37, 0),
    "setsid": (112,),
    "acct": (163, b"/no-such-directory/x"),
}
FORKS: Final[dict[str, tuple[Any, ...]]] = {
    "fork": (57,),
    "vfork by clone": (56, 17, None, None, None, None),
}


def _attempts(_boot: BootImage, told: Mapping[str, Any]) -> dict[str, int]:
    words = {
        "victim": told["victim"],
        "uid": os.getuid(),
        "zero": bytes(8),
        "ints": (ctypes.c_int * 2)(),
    }
    outcome = {}
    for name, (number, *arguments) in ATTEMPTS.items():
        given = [words.get(a, a) if isinstance(a, str) else a for a in arguments]
        outcome[name] = call(number, *given)
    for name, forking in FORKS.items():
        returned, error = result(*forking)
        if returned == 0:
            os._exit(0)
        if returned > 0:
            os.waitpid(returned, 0)
        outcome[name] = error
    outcome["clone3"] = call(435, None, 0)
    return outcome


def _outcome(rig: Rig) -> dict[str, int]:
    async def victim(boot: BootImage) -> None:
        await take(boot.endpoint)

    async def root(boot: BootImage) -> Any:
        prey = await start(boot, "prey")
        spawned = await start(boot, "hostile")
        await Send(spawned.slot, b'{"victim": %d}' % prey.pid)
        outcome = await report(boot, spawned.link)
        await ended(spawned)
        await Send(prey.slot, b"end")
        assert (await ended(prey)).signal == 0, "the victim is unharmed"
        return outcome

    outcome: dict[str, int] = rig.run(
        root, programs={"hostile": reporting_back(_attempts), "prey": victim}
    )
    return outcome


def test_no_call_leads_out_of_a_service(linux: Rig) -> None:
    outcome = _outcome(linux)

    assert outcome.pop("clone3") == errno.ENOSYS
    allowed = {name: errno.errorcode.get(e, e) for name, e in outcome.items() if e != errno.EPERM}
    assert allowed == {}


def test_the_attempts_would_have_succeeded_without_the_filter() -> None:
    if os.getuid():
        pytest.skip("an ordinary user is refused most of these anyway")
    outcome = _outcome(linux_rig(harden=False))

    refused = {name for name, error in outcome.items() if error == errno.EPERM}
    # Refused by Linux itself whoever asks, or switched off by a sysctl on some machines.
    assert refused <= {"perf_event_open", "bpf", "io_uring_setup", "kexec_load", "fcntl setown"}
    succeeded = {name for name, error in outcome.items() if error == 0}
    assert {
        "open", "openat", "socket unix dgram", "socketpair dgram", "ptrace seize", "pidfd_open",
        "kill", "fork", "prctl dumpable", "dup", "mmap executable",
    } <= succeeded  # fmt: skip
