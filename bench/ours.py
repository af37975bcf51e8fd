"""Our own variants: the programs of bench.programs on each of the two kernels."""

import time
from collections.abc import Callable, Mapping
from typing import Final

from bench.measure import Placement, Sample
from bench.programs import (
    CLIENT,
    SERVER,
    Main,
    Root,
    bare_client,
    bare_server,
    observed_server,
    pipelined_client,
    program,
    run_deadline,
    typed_client,
    typed_server,
)
from nexus.abi import INIT_NAME, Event, Nanos, Program

RUN_NS: Final = 60_000_000_000  # ns on top of the measuring time; a run that takes it hangs
SIM_SEED: Final = 1


def _ignore(_: Event) -> None:
    """The recorder of a benchmark keeps nothing: evidence is the prover's business."""


def _table(server: Main, client: Main) -> Mapping[str, Program]:
    return {SERVER: program(SERVER, server), CLIENT: program(CLIENT, client)}


def _on_linux(
    server: Main, client: Main, placement: Placement, seconds: float, *, harden: bool = True
) -> Sample:
    """Two real processes, confined as in production unless `harden` is False."""

    from nexus.kernel.linux import LinuxKernel

    root = Root(placement, seconds)
    kernel = LinuxKernel(
        _table(server, client),
        recorder=_ignore,
        cpus=tuple(sorted({placement.client, placement.server})),
        harden=harden,
    )
    until = Nanos(time.monotonic_ns() + RUN_NS + int(seconds * 1e9))
    ended = kernel.run(program(INIT_NAME, root.main), b"", until=until)
    assert ended.code == 0, f"root ended with {ended}"
    assert root.sample is not None
    return root.sample


def _on_sim(server: Main, client: Main, placement: Placement, seconds: float) -> Sample:
    """Both tasks in this process, on one core, in virtual time."""
    from bench.measure import pin
    from nexus.kernel.sim import SimKernel

    pin(placement.client)
    root = Root(None, seconds)
    kernel = SimKernel(_table(server, client), seed=SIM_SEED, recorder=_ignore)
    until = Nanos(run_deadline(kernel.now, seconds) + RUN_NS)
    ended = kernel.run(program(INIT_NAME, root.main), b"", until=until)
    assert ended.code == 0, "\n".join((f"root ended with {ended}", *kernel.crashes))
    assert root.sample is not None
    return root.sample


def bare(placement: Placement, seconds: float) -> Sample:
    """abi.Call against abi.ReplyRecv: identity and accounting of the kernel, nothing above."""
    return _on_linux(bare_server, bare_client, placement, seconds)


def sim_bare(placement: Placement, seconds: float) -> Sample:
    """The same in the simulated kernel."""
    return _on_sim(bare_server, bare_client, placement, seconds)


def typed(placement: Placement, seconds: float) -> Sample:
    """client.call against the runtime's server, everything on."""
    return _on_linux(typed_server, typed_client, placement, seconds)


def typed_observed(placement: Placement, seconds: float) -> Sample:
    """As typed, by a server that records each request as a span, counts and observes."""
    return _on_linux(observed_server, typed_client, placement, seconds)


def bare_unconfined(placement: Placement, seconds: float) -> Sample:
    """As bare, with neither filter nor Landlock: what the sandbox costs per call."""
    return _on_linux(bare_server, bare_client, placement, seconds, harden=False)


def typed_unconfined(placement: Placement, seconds: float) -> Sample:
    """As typed, with neither filter nor Landlock."""
    return _on_linux(typed_server, typed_client, placement, seconds, harden=False)


def pipelined(placement: Placement, seconds: float) -> Sample:
    """client.call_many of 64 requests, one packet each way."""
    return _on_linux(typed_server, pipelined_client, placement, seconds)


def sim_typed(placement: Placement, seconds: float) -> Sample:
    """client.call against the runtime's server in the simulated kernel."""
    return _on_sim(typed_server, typed_client, placement, seconds)


OURS: Final[dict[str, Callable[[Placement, float], Sample]]] = {
    "bare": bare,
    "typed": typed,
    "typed_observed": typed_observed,
    "bare_unconfined": bare_unconfined,
    "typed_unconfined": typed_unconfined,
    "pipelined": pipelined,
    "sim_bare": sim_bare,
    "sim_typed": sim_typed,
}
