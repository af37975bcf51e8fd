"""A look around in a guest: Python's prompt as process 1, with nothing running beside it."""

import tempfile
from pathlib import Path
from typing import Final

from nexus.vm import qemu
from nexus.vm.image import SITE, Image
from nexus.vm.initramfs import Tree

INIT: Final = f"""\
#!/usr/bin/python3 -IS
import sys
sys.path.append("/{SITE}")
from nexus.vm.calls import Power, power
from nexus.vm.guest import set_up
try:
    set_up()
    import code, os
    from pathlib import Path
    code.interact(f"Python {{sys.version.split()[0]}} as process {{os.getpid()}} on Linux "
                  f"{{os.uname().release}}; Ctrl-D turns the machine off.", exitmsg="")
finally:
    os.sync()
    power(Power.OFF)
"""


def shell(image: Image, memory: int, cpus: int) -> int:
    """Start a guest on this terminal; QEMU's exit code when it is off. Raises NotHad."""
    tree = Tree()
    tree.file("init", INIT.encode(), 0o755)
    with tempfile.TemporaryDirectory(prefix="nexus-vm-") as name:
        initrd = Path(name, "initrd")
        image.write_initrd(initrd, tree)
        setup = qemu.Setup(
            machine=image.machine,
            kernel=image.kernel,
            initrd=initrd,
            memory=memory,
            cpus=cpus,
        )
        return qemu.show(setup)
