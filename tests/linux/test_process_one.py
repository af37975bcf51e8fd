"""init as process 1, in a pid namespace: Linux gives it the children of the dead."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nexus

pytestmark = [
    pytest.mark.linux,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a pid namespace"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare"),
]

SYSTEM = """
import os, sys, time
from nexus.abi import INIT_NAME, Nanos, Program, SleepUntil
from nexus.kernel.linux import LinuxKernel

def orphan(seconds):
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            time.sleep(seconds)
        os._exit(0)
    os.waitpid(middle, 0)

async def root(boot):
    await SleepUntil(Nanos(boot.now + 600_000_000))

assert os.getpid() == 1
for seconds in (0.1, 0.2, 30):
    orphan(seconds)
kernel = LinuxKernel({}, recorder=lambda event: None)
program = Program(name=INIT_NAME, main=root, digest="0" * 64)
ended = kernel.run(program, b"", until=Nanos(kernel.now + 10_000_000_000))
with open("/proc/self/task/1/children") as file:
    print(ended.code, kernel.orphans, len(file.read().split()))
"""


def test_process_one_reaps_the_orphans_that_end_and_leaves_those_that_live() -> None:
    source = str(Path(nexus.__file__).parents[1])
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]

    done = subprocess.run(
        [*command, sys.executable, "-c", SYSTEM],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.returncode) == ("0 2 1\n", 0), done.stderr
