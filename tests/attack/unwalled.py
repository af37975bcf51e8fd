"""Steps of the hardening taken away from a new interpreter, or looked for in it, before it takes
its own."""

import socket

from nexus.kernel.linux.harden import Hardening


def without(*steps: str) -> None:
    """Let steps do nothing, whatever they are called with."""
    for step in steps:
        assert callable(getattr(Hardening, step)), step
        setattr(Hardening, step, lambda *_: None)


def refused(*steps: str) -> None:
    """Let steps fail, as on a machine that cannot take them."""

    def refuse(*_: object) -> None:
        raise OSError("not on this machine")

    for step in steps:
        assert callable(getattr(Hardening, step)), step
        setattr(Hardening, step, refuse)


def expect_filter() -> None:
    """Fail where the first stage has left no filter: without one anybody gets such a socket."""
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
    except PermissionError:
        return
    raise LookupError("no filter yet")
