"""A machine of our own: what is booted in QEMU, how, and what runs there as process 1."""
