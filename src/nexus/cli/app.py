"""The commands of `nexus`, and how each is written on the command line.

Every command imports what it needs when it runs: `nexus check` loads no kernel, `nexus --help`
loads nothing of ours.
"""

from pathlib import Path
from typing import Annotated

import typer

from nexus import __version__
from nexus.cli.defaults import (
    RELEASE_DAYS,
    ROOT_DAYS,
    TRIES_DEFAULT,
    TRIES_MAX,
    VM_MEMORY,
    WAIT_DEFAULT,
)

HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="nexus",
    help="Start, check, watch and prove systems of Nexus services.",
    epilog="Begin with: nexus new system NAME; nexus up -d system.toml; nexus status",
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
policy_app = typer.Typer(help="The policy of a running system.", rich_markup_mode=None)
safe_app = typer.Typer(help="The safe mode of a running system.", rich_markup_mode=None)
state_app = typer.Typer(help="What a running system keeps.", rich_markup_mode=None)
sim_app = typer.Typer(help="What a simulated machine can show.", rich_markup_mode=None)
new_app = typer.Typer(help="Files to begin with.", rich_markup_mode=None)
keys_app = typer.Typer(help="The device key of a running system.", rich_markup_mode=None)
ota_app = typer.Typer(help="Updates of a running system.", rich_markup_mode=None)
bundle_app = typer.Typer(help="System sets: what a device runs.", rich_markup_mode=None)
bundle_keys_app = typer.Typer(help="Who may sign updates.", rich_markup_mode=None)
vm_app = typer.Typer(help="A machine of our own, in QEMU.", rich_markup_mode=None)
app.add_typer(bundle_app, name="bundle")
bundle_app.add_typer(bundle_keys_app, name="keys")
app.add_typer(keys_app, name="keys")
app.add_typer(new_app, name="new")
app.add_typer(ota_app, name="ota")
app.add_typer(policy_app, name="policy")
app.add_typer(safe_app, name="safe")
app.add_typer(sim_app, name="sim")
app.add_typer(state_app, name="state")
app.add_typer(vm_app, name="vm")

File = Annotated[Path, typer.Argument(help="The system file (TOML).", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_WHICH = "The running system, NAME or NAME@INSTANCE; not needed when only one runs."
Name = Annotated[str | None, typer.Option("--name", "-n", envvar="NEXUS_SYSTEM", help=_WHICH)]
LongName = Annotated[  # for `logs`, whose -n is a number, as that of tail
    str | None, typer.Option("--name", envvar="NEXUS_SYSTEM", help=_WHICH)
]
Reboot = Annotated[bool, typer.Option("--reboot", help="Restart the system at once.")]
Instance = Annotated[
    str | None,
    typer.Option("--instance", help="A name for one of several instances side by side."),
]


def _examples(*lines: str) -> str:
    """An epilog that keeps its lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _version(asked: bool) -> None:
    if asked:
        print(f"nexus {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command(
    epilog=_examples(
        "nexus check system.toml", "nexus check system.toml --digest", "nexus check --schema"
    )
)
def check(
    file: Annotated[
        Path | None, typer.Argument(help="The system file (TOML).", show_default=False)
    ] = None,
    digest: Annotated[bool, typer.Option("--digest", help="Print the plan's digest only.")] = False,
    json: Json = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of system files.")
    ] = False,
) -> None:
    """Check a system file and show the plan that follows from it."""
    from nexus.cli.errors import UsageError

    if digest + json + schema > 1:
        raise UsageError("choose one of --digest, --json and --schema")
    if schema:
        from nexus.cli.output import say
        from nexus.init.system import schema_text

        say(schema_text().removesuffix("\n"))
        return
    if file is None:
        raise UsageError("name the system file to check, as in `nexus check system.toml`")
    from nexus.cli.check import check as act

    act(file, digest=digest, as_json=json)


@app.command(
    epilog=_examples(
        "nexus up system.toml                      # in the foreground, Ctrl-C ends it",
        "nexus up -d system.toml                   # return when every service is ready",
        "nexus up -d system.toml --instance b      # a second one side by side",
        "nexus up -d --slots pump                  # what its active slot holds",
    )
)
def up(
    file: Annotated[
        Path | None,
        typer.Argument(help="The system file (TOML); with --slots a name.", show_default=False),
    ] = None,
    slots: Annotated[
        bool, typer.Option("--slots", help="Boot a provisioned system out of its slots, see ota.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run in the background; return when ready.")
    ] = False,
    instance: Instance = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0.1, max=3600, help="Seconds to get ready in, with -d.")
    ] = WAIT_DEFAULT,
    exec_: Annotated[
        bool,
        typer.Option("--exec", help="Become the system's init: for service managers, see unit."),
    ] = False,
    json: Json = False,
) -> None:
    """Start a system."""
    from nexus.cli.errors import UsageError
    from nexus.cli.up import up as act
    from nexus.cli.up import up_slots

    if detach and exec_:
        raise UsageError("choose one of --detach and --exec")
    if slots:
        code = up_slots(
            None if file is None else str(file),
            instance=instance,
            detach=detach,
            exec_=exec_,
            wait=wait,
            as_json=json,
        )
        raise typer.Exit(code)
    if file is None:
        raise UsageError("name the system file to start, as in `nexus up system.toml`")
    code = act(file, instance=instance, detach=detach, exec_=exec_, wait=wait, as_json=json)
    raise typer.Exit(code)


@app.command(epilog=_examples("nexus down", "nexus down --name pump@b --timeout 5"))
def down(
    name: Name = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0.1, max=3600, help="Seconds it may take to end."),
    ] = None,
    json: Json = False,
) -> None:
    """End a running system in order."""
    from nexus.cli.ask import asked
    from nexus.cli.down import down as act

    act(asked(name).running, timeout, as_json=json)


@app.command(epilog=_examples("nexus status", "nexus status --json", "nexus status --all"))
def status(
    name: Name = None,
    all_: Annotated[bool, typer.Option("--all", help="Which systems run here.")] = False,
    json: Json = False,
) -> None:
    """Show a running system: a row per service."""
    from nexus.cli.ask import asked
    from nexus.cli.status import status as act
    from nexus.cli.status import systems

    if all_:
        systems(as_json=json)
    else:
        act(asked(name), as_json=json)


@app.command(
    epilog=_examples(
        "nexus call timed whoami pid=0 service=x",
        "nexus call timed register deadline=+250ms",
        "nexus call logd get-stats --json",
    )
)
def call(
    service: Annotated[str, typer.Argument(help="The service to ask.", show_default=False)],
    request: Annotated[str, typer.Argument(help="The request's name.", show_default=False)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value for each field: 250ms is a span, +250ms a time from now on, "
            "hex:00ff bytes, JSON for lists.",
            show_default=False,
        ),
    ] = None,
    name: Name = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.01, max=60, help="Seconds to wait for the answer.")
    ] = 5.0,
    json: Json = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say which trace it is, for `nexus trace`.")
    ] = False,
) -> None:
    """Ask a service of a running system one thing, as operator."""
    from nexus.cli.ask import asked
    from nexus.cli.call import call as act

    code = act(
        asked(name), service, request, arguments or [], timeout, as_json=json, verbose=verbose
    )
    raise typer.Exit(code)


@app.command(
    epilog=_examples(
        "nexus logs -f -n 100",
        "nexus logs --level warn --service timed",
        "nexus logs --field decision=deny --since 10m --json",
        "nexus logs --boot -1 --level error",
    )
)
def logs(
    name: LongName = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new records until Ctrl-C.")
    ] = False,
    last: Annotated[
        int,
        typer.Option("--last", "-n", "-l", min=0, max=100_000, help="How many records to show."),
    ] = 50,
    level: Annotated[
        str, typer.Option("--level", help="This level and more important ones.")
    ] = "trace",
    service: Annotated[
        str | None, typer.Option("--service", "-s", help="Only records of this service.")
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", help="Only records with this KEY=VALUE.")
    ] = None,
    pid: Annotated[int, typer.Option("--pid", min=0, help="Only records of this process.")] = 0,
    text: Annotated[str, typer.Option("--text", help="Only records with this in their text.")] = "",
    trace: Annotated[str, typer.Option("--trace", help="Only records of this trace.")] = "",
    since: Annotated[
        str, typer.Option("--since", help="From then on: 10m, 12:30, 2026-02-03T12:30.")
    ] = "",
    until: Annotated[str, typer.Option("--until", help="Before then, written as --since.")] = "",
    boot: Annotated[
        int | None,
        typer.Option("--boot", "-b", help="Of an earlier boot: its number, or -1 for the last."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Show the journal of a running system, or what is left of an earlier boot's."""
    from nexus.cli.ask import asked
    from nexus.cli.logs import Filter
    from nexus.cli.logs import logs as act

    wanted = Filter(
        level=level,
        service=service,
        field=field,
        pid=pid,
        text=text,
        trace=trace,
        since=since,
        until=until,
        boot=boot,
    )
    act(asked(name), wanted, last=last, follow=follow, as_json=json)


@app.command(
    epilog=_examples(
        "nexus trace                               # what happened last",
        "nexus trace --last 5 --service timed",
        "nexus trace 4bf92f3577b34da6 --logs",
        "nexus trace 4bf92f3577b34da6 --chrome trace.json",
    )
)
def trace(
    trace_id: Annotated[
        str, typer.Argument(metavar="[ID]", help="The trace, or how its id begins.")
    ] = "",
    name: LongName = None,
    last: Annotated[
        int, typer.Option("--last", "-n", "-l", min=1, max=1_000, help="How many traces to show.")
    ] = 1,
    service: Annotated[
        str | None, typer.Option("--service", "-s", help="Only traces with a span of this service.")
    ] = None,
    logs: Annotated[
        bool, typer.Option("--logs", help="Show the log lines of the trace between its spans.")
    ] = False,
    chrome: Annotated[
        Path | None,
        typer.Option("--chrome", help="Write a file that Perfetto opens.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a command set off in which services, as a tree."""
    from nexus.cli.ask import asked
    from nexus.cli.trace import Wanted
    from nexus.cli.trace import trace as act

    wanted = Wanted(trace=trace_id, last=last, service=service, with_logs=logs)
    act(asked(name), wanted, chrome=chrome, as_json=json)


@app.command(
    epilog=_examples(
        "nexus explain operator timed",
        "nexus explain operator logd log.read --file system.toml",
        "nexus explain operator timed Register",
    )
)
def explain(
    client: Annotated[str, typer.Argument(help="Who wants to.", show_default=False)],
    server: Annotated[str, typer.Argument(help="Whom it wants to reach.", show_default=False)],
    right: Annotated[
        str | None,
        typer.Argument(
            help="The right it needs there, or the request it would send.", show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="The system file; the running system's if not given."),
    ] = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Say why one service may or may not reach another. Exit code 1: it may not."""
    from nexus.cli.explain import explain as act

    raise typer.Exit(act(_file(file, name), client, server, right, as_json=json))


@app.command(
    epilog=_examples(
        "nexus why                  # of the last update: why it was kept, left or refused",
        "nexus why pump",
        "nexus why pump --report 12",
        "nexus why pump --json",
    )
)
def why(
    service: Annotated[
        str | None,
        typer.Argument(help="The service to tell of; the last update.", show_default=False),
    ] = None,
    report: Annotated[
        int | None, typer.Option("--report", min=1, help="The crash report to tell; the last.")
    ] = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Say what happened to a service or an update, the evidence, and what was done about it."""
    from nexus.cli.ask import asked
    from nexus.cli.errors import UsageError

    if service is None:
        if report is not None:
            raise UsageError("a report is that of a service: name it, as in `nexus why pump`")
        from nexus.cli.why_update import why as tell

        tell(asked(name), as_json=json)
        return
    from nexus.cli.why import why as act

    act(asked(name), service, report, as_json=json)


@app.command(
    epilog=_examples("nexus run report-maker -- --month 7", "nexus run report-maker -d --restart")
)
def run(
    program: Annotated[
        str, typer.Argument(help='A service with start = "demand".', show_default=False)
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its arguments.", show_default=False)
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", help="A variable, KEY=VALUE; repeat it.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start it again when it crashes.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it was started.")
    ] = False,
    name: Name = None,
    json: Json = False,
) -> None:
    """Have execd start a program, and wait for its end. The exit code is the program's."""
    from nexus.cli.ask import asked
    from nexus.cli.run import run as act

    code = act(
        asked(name),
        program,
        arguments or [],
        env or [],
        restart=restart,
        detach=detach,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command(epilog=_examples("nexus doctor", "nexus doctor --json"))
def doctor(json: Json = False) -> None:
    """Say which guarantees hold on this machine, for this user, and how they degrade."""
    from nexus.cli.doctor import doctor as act

    act(as_json=json)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def prove(context: typer.Context) -> None:
    """Climb the proof ladder on a ground (`nexus prove --help`)."""
    from nexus.proof.command import main as act

    raise typer.Exit(act(context.args))


@app.command(
    epilog=_examples(
        "nexus metrics", "nexus metrics log_ --service timed", "nexus metrics hits --history short"
    )
)
def metrics(
    prefix: Annotated[
        str, typer.Argument(help="What the names of the series begin with.", show_default=False)
    ] = "",
    service: Annotated[
        str | None, typer.Option("--service", "-s", help="Only the series of this service.")
    ] = None,
    history: Annotated[
        str | None,
        typer.Option("--history", help="Their windows too, short or long ones."),
    ] = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Print counters, gauges and histograms of a running system, read at this moment."""
    from nexus.cli.ask import asked
    from nexus.cli.metrics import metrics as act

    act(asked(name), prefix, service=service, history=history, as_json=json)


@app.command(epilog=_examples("nexus reload", "nexus reload --json"))
def reload(name: Name = None, json: Json = False) -> None:
    """Read the system file again and give running services their changed settings."""
    from nexus.cli.ask import asked
    from nexus.cli.reload import reload as act

    raise typer.Exit(act(asked(name), as_json=json))


@app.command(epilog=_examples("nexus restart timed"))
def restart(
    service: Annotated[str, typer.Argument(help="The service to restart.", show_default=False)],
    name: Name = None,
    json: Json = False,
) -> None:
    """Kill the running instance of a service; init starts the next one."""
    from nexus.cli.ask import asked
    from nexus.cli.control import restart as act

    act(asked(name), service, as_json=json)


@app.command(
    epilog=_examples("nexus bugreport", "nexus bugreport --file system.toml -o report.tar.gz")
)
def bugreport(
    name: Name = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="A system file, when no system runs.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it.")
    ] = None,
    json: Json = False,
) -> None:
    """Collect what somebody else needs to see, without secrets, in one tar.gz."""
    import os

    from nexus.cli.ask import asked
    from nexus.cli.bugreport import bugreport as act
    from nexus.cli.places import all_running

    runs = name is not None or bool(all_running(os.environ, os.getuid()))
    act(asked(name) if runs and file is None else None, file, output, as_json=json)


@app.command(
    epilog=_examples(
        "nexus unit system.toml > /etc/systemd/system/pump.service",
        "nexus unit --user system.toml > ~/.config/systemd/user/pump.service",
        "nexus unit --slots pump > /etc/systemd/system/pump.service",
    )
)
def unit(
    file: Annotated[
        Path,
        typer.Argument(help="The system file (TOML); with --slots a name.", show_default=False),
    ],
    instance: Instance = None,
    user: Annotated[
        bool, typer.Option("--user", help="For the user's own systemd, not the machine's.")
    ] = False,
    slots: Annotated[
        bool, typer.Option("--slots", help="Of a provisioned system, booted out of its slots.")
    ] = False,
    json: Json = False,
) -> None:
    """Print a systemd unit that runs a system."""
    from nexus.cli.unit import slots_unit
    from nexus.cli.unit import unit as act

    if slots:
        slots_unit(str(file), instance, user=user, as_json=json)
        return
    act(file, instance, user=user, as_json=json)


@policy_app.command(
    "reload", epilog=_examples("nexus policy reload", "nexus policy reload new.toml")
)
def policy_reload(
    file: Annotated[
        Path | None,
        typer.Argument(help="A system file; the running system's own if not given."),
    ] = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Put the policy of a system file in force, with the policy files it names."""
    from nexus.cli.ask import asked
    from nexus.cli.control import reload_policy

    reload_policy(asked(name), file, as_json=json)


@safe_app.command("leave", epilog=_examples("nexus safe leave"))
def safe_leave(name: Name = None, json: Json = False) -> None:
    """Forget the crashes and start what safe mode left out."""
    from nexus.cli.ask import asked
    from nexus.cli.control import leave_safe_mode

    leave_safe_mode(asked(name), as_json=json)


@sim_app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def powercut(context: typer.Context) -> None:
    """Cut the power at every write: `nexus sim powercut state` of statefsd's engine, `nexus sim
    powercut ota` of an update (`--help` of each tells more)."""
    from nexus.cli.errors import UsageError

    subject, *arguments = context.args or [""]
    if subject in ("-h", "--help"):
        subject, arguments = "state", ["--help"]
    elif subject not in ("state", "ota"):
        raise UsageError(
            "say whose power is cut: `nexus sim powercut state` or `nexus sim powercut ota`"
        )
    from nexus.cli.output import answering

    if subject == "ota":
        from nexus.proof.powercut_ota import main as act
    else:
        from nexus.proof.powercut import main as act

    try:
        with answering():
            code = act(arguments)
    except SystemExit as ended:  # argparse's help, and its word on wrong usage
        code = ended.code if isinstance(ended.code, int) else 1
    raise typer.Exit(code)


Key = Annotated[str, typer.Argument(help="The key, as in /state/plant/limit.", show_default=False)]
RequestId = Annotated[
    int,
    typer.Option(
        "--request-id",
        min=0,
        max=(1 << 64) - 1,
        help="A number of your own: the same request is applied once, however often it is sent.",
    ),
]


@state_app.command(
    "get", epilog=_examples("nexus state get /state/plant/limit", "nexus state get KEY -o file")
)
def state_get(
    key: Key,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the value to this file.")
    ] = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Print the value of a key, byte by byte."""
    from nexus.cli.ask import asked
    from nexus.cli.state import get as act

    act(asked(name), key, output, as_json=json)


@state_app.command(
    "put",
    epilog=_examples(
        "nexus state put /state/plant/limit 70",
        "nexus state put /state/plant/map --file map.bin",
        "nexus state put /state/plant/limit 70 --request-id 1729   # once, however often sent",
    ),
)
def state_put(
    key: Key,
    value: Annotated[
        str | None, typer.Argument(help="The value, as text.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Take the value from this file, - for stdin.")
    ] = None,
    accepted: Annotated[
        bool,
        typer.Option("--accepted", help="Do not wait for the disk: a power cut may undo it."),
    ] = False,
    request_id: RequestId = 0,
    name: Name = None,
    json: Json = False,
) -> None:
    """Set a key. When this returns, the value survives a power cut."""
    from nexus.cli.ask import asked
    from nexus.cli.state import put as act

    act(
        asked(name),
        key,
        value,
        file,
        durable=not accepted,
        request_id=request_id,
        as_json=json,
    )


@state_app.command("ls", epilog=_examples("nexus state ls", "nexus state ls /state/plant/"))
def state_ls(
    prefix: Annotated[
        str, typer.Argument(help="Whole segments, and a slash at the end.")
    ] = "/state/",
    name: Name = None,
    json: Json = False,
) -> None:
    """List the keys that operator may see."""
    from nexus.cli.ask import asked
    from nexus.cli.state import ls as act

    act(asked(name), prefix, as_json=json)


@state_app.command("rm", epilog=_examples("nexus state rm /state/plant/limit"))
def state_rm(key: Key, request_id: RequestId = 0, name: Name = None, json: Json = False) -> None:
    """Drop a key, for good."""
    from nexus.cli.ask import asked
    from nexus.cli.state import remove as act

    act(asked(name), key, request_id=request_id, as_json=json)


@state_app.command(
    "check", epilog=_examples("nexus state check", "nexus state check disk.img --json")
)
def state_check(
    image: Annotated[
        Path | None,
        typer.Argument(
            help="The image of a disk, which is only read; the running system's store if not given."
        ),
    ] = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Say how a store is. Exit code 1: damaged, or no store."""
    if image is not None:
        from nexus.cli.image import check as look

        raise typer.Exit(look(image, as_json=json))
    from nexus.cli.ask import asked
    from nexus.cli.state import check as act

    raise typer.Exit(act(asked(name), as_json=json))


@keys_app.command("show", epilog=_examples("nexus keys show", "nexus keys show --json"))
def keys_show(name: Name = None, json: Json = False) -> None:
    """Print the device id, the public key, and what keeps the wrapping key."""
    from nexus.cli.ask import asked
    from nexus.cli.keys import show

    show(asked(name), as_json=json)


@keys_app.command(
    "sign",
    epilog=_examples(
        "nexus keys sign order.txt",
        "nexus keys sign order.txt -o order.sig",
        "sha256sum < image.bin | nexus keys sign - --json",
    ),
)
def keys_sign(
    file: Annotated[
        Path,
        typer.Argument(help="What to sign, up to 4096 bytes; - for stdin.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the 64 bytes to this file.")
    ] = None,
    name: Name = None,
    json: Json = False,
) -> None:
    """Sign the bytes of a file with the device key (Ed25519)."""
    from nexus.cli.ask import asked
    from nexus.cli.keys import sign

    sign(asked(name), file, output, as_json=json)


@keys_app.command("rotate", epilog=_examples("nexus keys rotate"))
def keys_rotate(name: Name = None, json: Json = False) -> None:
    """Seal everything with a new wrapping key; the device key stays what it is."""
    from nexus.cli.ask import asked
    from nexus.cli.keys import rotate

    rotate(asked(name), as_json=json)


@ota_app.command(
    "stage", epilog=_examples("nexus ota stage update.nxu", "nexus ota stage update.nxu --json")
)
def ota_stage(
    file: Annotated[Path, typer.Argument(help="The update (.nxu).", show_default=False)],
    name: Name = None,
    json: Json = False,
) -> None:
    """Bring a signed update to the standby slot and verify it there; a cut off one goes on."""
    from nexus.cli.ask import asked
    from nexus.cli.ota import stage as act

    act(asked(name), file, as_json=json)


@ota_app.command(
    "provision",
    epilog=_examples(
        "nexus ota provision pump.nxu --root signing/metadata/1.root.json",
        "nexus ota provision pump.nxu --root 1.root.json --state /srv/image/state",
    ),
)
def ota_provision(
    file: Annotated[Path, typer.Argument(help="The first update (.nxu).", show_default=False)],
    root: Annotated[
        Path,
        typer.Option("--root", help="Whom the device shall trust (root.json).", show_default=False),
    ],
    again: Annotated[
        bool, typer.Option("--again", help="Also a device that is provisioned already.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="The device's state directory; where `nexus up` has it."),
    ] = None,
    instance: Instance = None,
    json: Json = False,
) -> None:
    """Make a new device: its first set in slot a, its trust anchor, its boot record."""
    from nexus.cli.ota_provision import provision as act

    act(
        file,
        root,
        instance=instance,
        state=state,
        again=again,
        as_json=json,
    )


@ota_app.command(
    "switch",
    epilog=_examples(
        "nexus ota switch                 # at the next start",
        "nexus ota switch --reboot        # at once",
        "nexus ota switch 3fa9c1 --tries 1",
    ),
)
def ota_switch(
    digest: Annotated[
        str | None,
        typer.Argument(help="The beginning of the staged set's digest.", show_default=False),
    ] = None,
    tries: Annotated[
        int,
        typer.Option("--tries", min=1, max=TRIES_MAX, help="Boots it may take to become healthy."),
    ] = TRIES_DEFAULT,
    reboot: Reboot = False,
    name: Name = None,
    json: Json = False,
) -> None:
    """Have the staged set tried; the set that runs now is kept, to go back to."""
    from nexus.cli.ask import asked
    from nexus.cli.ota import switch as act

    act(asked(name), digest, tries, reboot=reboot, as_json=json)


@ota_app.command("status", epilog=_examples("nexus ota status", "nexus ota status --json"))
def ota_status(name: Name = None, json: Json = False) -> None:
    """Print what the slots hold, what runs, and how far a transfer is."""
    from nexus.cli.ask import asked
    from nexus.cli.ota import status as act

    act(asked(name), as_json=json)


@ota_app.command("commit", epilog=_examples("nexus ota commit"))
def ota_commit(name: Name = None, json: Json = False) -> None:
    """Keep the set on trial by your word; a healthy one is committed without it."""
    from nexus.cli.ask import asked
    from nexus.cli.ota import commit as act

    act(asked(name), as_json=json)


@ota_app.command("rollback", epilog=_examples("nexus ota rollback", "nexus ota rollback --reboot"))
def ota_rollback(reboot: Reboot = False, name: Name = None, json: Json = False) -> None:
    """End a trial, take a switch back, or go back to the set before."""
    from nexus.cli.ask import asked
    from nexus.cli.ota import rollback as act

    act(asked(name), reboot=reboot, as_json=json)


SetFile = Annotated[
    Path, typer.Argument(help="The set, or an update with one in it.", show_default=False)
]


@bundle_app.command(
    "build",
    epilog=_examples(
        "nexus bundle build system.toml -o pump.nxs --version 3 --name 1.2.0",
        "nexus bundle build system.toml -o pump.nxs --version 3 --name 1.2.0 "
        "--schema /state/pump/=2 --needs pyserial",
    ),
)
def bundle_build(
    file: File,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Write the set here.", show_default=False)
    ],
    version: Annotated[
        int,
        typer.Option(
            "--version",
            min=1,
            max=2**63 - 1,
            help="What devices compare; a higher one is newer.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str, typer.Option("--name", help="What people call the version.", show_default=False)
    ],
    health: Annotated[
        float | None,
        typer.Option(
            "--health",
            min=1,
            max=3600,
            help="Seconds a first boot has to prove well; 60 if not given.",
        ),
    ] = None,
    schema: Annotated[
        list[str] | None,
        typer.Option("--schema", help="Version of the data of an area, AREA=VERSION; repeat it."),
    ] = None,
    needs: Annotated[
        list[str] | None,
        typer.Option("--needs", help="A distribution your own programs import; repeat it."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a set of a system: the same bytes for the same content."""
    from nexus.cli.bundle import make

    make(
        file,
        output,
        version=version,
        name=name,
        health=health,
        schemas=schema or [],
        needs=needs or [],
        as_json=json,
    )


@bundle_app.command(
    "inspect",
    epilog=_examples(
        "nexus bundle inspect pump.nxs --files", "nexus bundle inspect pump.nxs --sbom"
    ),
)
def bundle_inspect(
    file: SetFile,
    files: Annotated[bool, typer.Option("--files", help="List the files too.")] = False,
    sbom: Annotated[
        bool, typer.Option("--sbom", help="Print the bill of materials (CycloneDX).")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a set says of itself. Exit code 1: refused."""
    from nexus.cli.bundle import inspect

    raise typer.Exit(inspect(file, files=files, sbom=sbom, as_json=json))


@bundle_app.command(
    "verify",
    epilog=_examples("nexus bundle verify pump.nxs", "nexus bundle verify pump.nxs --json"),
)
def bundle_verify(file: SetFile, json: Json = False) -> None:
    """Look at every byte of a set. Exit code 1: refused; who made it is not asked here."""
    from nexus.cli.bundle import check

    raise typer.Exit(check(file, as_json=json))


Ring = Annotated[
    Path,
    typer.Argument(help="The folder of keys and signed metadata.", show_default=False),
]
Passphrase = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="Its first line opens the keys, - for stdin."),
]
RootDays = Annotated[int, typer.Option("--days", min=1, help="How long the root holds.")]


@bundle_app.command(
    "sign",
    epilog=_examples(
        "nexus bundle sign pump.nxs --keys signing -o pump.nxu --passphrase-file words",
        "nexus bundle sign pump.nxs --keys signing -o pump.nxu --floor 3   # and nothing below 3",
    ),
)
def bundle_sign(
    file: Annotated[Path, typer.Argument(help="The set (.nxs).", show_default=False)],
    keys: Annotated[Path, typer.Option("--keys", help="The folder of keys.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Write the update here.", show_default=False)
    ],
    floor: Annotated[
        int,
        typer.Option("--floor", min=0, help="Once it is committed, no lower version is taken."),
    ] = 0,
    days: Annotated[
        int, typer.Option("--days", min=1, help="How long the release holds.")
    ] = RELEASE_DAYS,
    passphrase_file: Passphrase = None,
    json: Json = False,
) -> None:
    """Sign a set as the latest release: the update (.nxu) that devices take."""
    from nexus.cli.bundle_sign import sign as act

    act(file, keys, output, floor=floor, days=days, passphrase=passphrase_file, as_json=json)


@bundle_keys_app.command(
    "new",
    epilog=_examples(
        "nexus bundle keys new signing --development",
        "nexus bundle keys new signing --roots 3 --threshold 2 --passphrase-file words",
    ),
)
def bundle_keys_new(
    folder: Ring,
    development: Annotated[
        bool,
        typer.Option("--development", help="Mark them: a release build refuses what they sign."),
    ] = False,
    roots: Annotated[int, typer.Option("--roots", min=1, max=16, help="Keys of root.")] = 1,
    threshold: Annotated[
        int, typer.Option("--threshold", min=1, help="How many of them sign a root.")
    ] = 1,
    days: RootDays = ROOT_DAYS,
    passphrase_file: Passphrase = None,
    json: Json = False,
) -> None:
    """Make the keys of every role, and the root that devices are provisioned with."""
    from nexus.cli.bundle_keys import new as act

    act(
        folder,
        development=development,
        roots=roots,
        threshold=threshold,
        days=days,
        passphrase=passphrase_file,
        as_json=json,
    )


@bundle_keys_app.command(
    "show",
    epilog=_examples("nexus bundle keys show signing", "nexus bundle keys show signing --json"),
)
def bundle_keys_show(folder: Ring, json: Json = False) -> None:
    """Say who may sign, until when, and which root lacks signatures."""
    from nexus.cli.bundle_keys import show as act

    act(folder, as_json=json)


@bundle_keys_app.command(
    "rotate",
    epilog=_examples(
        "nexus bundle keys rotate signing timestamp --passphrase-file words",
        "nexus bundle keys rotate signing root --keys 3 --threshold 2 --root-key stick/root-1.pem",
    ),
)
def bundle_keys_rotate(
    folder: Ring,
    role: Annotated[
        str,
        typer.Argument(help="root, targets, snapshot or timestamp.", show_default=False),
    ],
    keys: Annotated[int, typer.Option("--keys", min=1, max=16, help="New keys of it.")] = 1,
    threshold: Annotated[
        int, typer.Option("--threshold", min=1, help="How many of them have to sign.")
    ] = 1,
    days: RootDays = ROOT_DAYS,
    root_key: Annotated[
        list[Path] | None,
        typer.Option("--root-key", help="A key of root that is kept elsewhere; repeat it."),
    ] = None,
    passphrase_file: Passphrase = None,
    json: Json = False,
) -> None:
    """Give a role new keys, and take the old ones away, with the next update."""
    from nexus.cli.bundle_keys import rotate as act

    act(
        folder,
        role,
        keys=keys,
        threshold=threshold,
        days=days,
        root_keys=root_key or [],
        passphrase=passphrase_file,
        as_json=json,
    )


@bundle_keys_app.command(
    "approve", epilog=_examples("nexus bundle keys approve signing stick/root-2.pem")
)
def bundle_keys_approve(
    folder: Ring,
    root_key: Annotated[
        list[Path], typer.Argument(help="Keys of root, old or new.", show_default=False)
    ],
    passphrase_file: Passphrase = None,
    json: Json = False,
) -> None:
    """Add signatures to a root that lacks some; with enough of them it is in force."""
    from nexus.cli.bundle_keys import approve as act

    act(folder, root_key, passphrase=passphrase_file, as_json=json)


@new_app.command(
    "system", epilog=_examples("nexus new system pump", "nexus new system pump --into /srv/pump")
)
def new_system(
    name: Annotated[str, typer.Argument(help="The system's name.", show_default=False)],
    into: Annotated[
        Path | None, typer.Option("--into", help="The folder; NAME here if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a system file with a policy service, a journal, timers and an operator."""
    from nexus.cli.check import describe
    from nexus.cli.new import new_system as act
    from nexus.cli.output import say, say_json
    from nexus.init.plan import load_plan

    made = act(name, Path(name) if into is None else into)
    plan = load_plan(made[0])
    if json:
        say_json({"files": [str(path) for path in made], "digest": plan.digest})
        return
    say(f"{made[0]}: {describe(plan)[0].partition(': ')[2]}")
    say(f"start it with: nexus up -d {made[0]}")


@new_app.command("service", epilog=_examples("nexus new service water-valve"))
def new_service(
    name: Annotated[str, typer.Argument(help="The service's name.", show_default=False)],
    into: Annotated[
        Path | None, typer.Option("--into", help="The folder; NAME here if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a service of your own: protocol, class, system file with its policy, and a test."""
    from nexus.cli.errors import CommandFailed
    from nexus.cli.output import say, say_json
    from nexus.cli.scaffold import ScaffoldError, scaffold

    try:
        made = scaffold(name, Path(name) if into is None else into)
    except ScaffoldError as error:
        raise CommandFailed(str(error)) from error
    if json:
        say_json({"files": [str(path) for path in made]})
        return
    for path in made:
        say(str(path))


def _file(file: Path | None, name: str | None) -> Path:
    """The file that is named, or the running system's."""
    if file is not None:
        return file
    from nexus.cli.ask import asked

    return Path(asked(name).running.file)


_MACHINES = "Which machine, as in aarch64; NEXUS_VM_MACHINE, or the default one."
MachineName = Annotated[
    str | None, typer.Option("--machine", "-m", help=_MACHINES, show_default=False)
]
Memory = Annotated[int, typer.Option("--memory", min=128, max=65_536, help="MiB it has.")]
Cpus = Annotated[int, typer.Option("--smp", min=1, max=8, help="CPUs it has.")]


@vm_app.command(
    "build",
    epilog=_examples("nexus vm build", "nexus vm build --contents", "nexus vm build --refresh"),
)
def vm_build(
    machine: MachineName = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask for newer packages first.")
    ] = False,
    contents: Annotated[bool, typer.Option("--contents", help="List what is in it.")] = False,
    json: Json = False,
) -> None:
    """Build the image of a guest. Exit code 3: it cannot be built here."""
    from nexus.cli.vm import build

    raise typer.Exit(build(machine, refresh=refresh, contents=contents, as_json=json))


@vm_app.command(
    "run", epilog=_examples("nexus vm run system.toml", "nexus vm run system.toml -s disks")
)
def vm_run(
    file: File,
    state: Annotated[
        Path | None,
        typer.Option("--state", "-s", help="Where its disks are kept.", show_default=False),
    ] = None,
    machine: MachineName = None,
    memory: Memory = VM_MEMORY,
    smp: Cpus = 1,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, max=86_400, help="Seconds it may run; 0: no end.")
    ] = 0,
) -> None:
    """Boot a system in a guest; Ctrl-C ends it in order. Exit code 3: nothing was run."""
    from nexus.cli.vm import run

    raise typer.Exit(run(file, state, machine, memory=memory, cpus=smp, timeout=timeout))


@vm_app.command("doctor", epilog=_examples("nexus vm doctor", "nexus vm doctor --json"))
def vm_doctor(machine: MachineName = None, json: Json = False) -> None:
    """Say which guarantees hold in a guest, where init is process 1. Exit code 3: nothing ran."""
    from nexus.cli.vm import doctor

    raise typer.Exit(doctor(machine, as_json=json))


@vm_app.command("shell", epilog=_examples("nexus vm shell"))
def vm_shell(machine: MachineName = None, memory: Memory = VM_MEMORY, smp: Cpus = 1) -> None:
    """Python's prompt as process 1 of a guest, to look around."""
    from nexus.cli.vm import shell

    raise typer.Exit(shell(machine, memory=memory, cpus=smp))
