"""`nexus unit`: every directive, and what a system needs that runs by it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nexus.bootctl import EXIT_ENDED, EXIT_STOPPED
from nexus.cli import main, unit
from nexus.cli.unit import slots_unit_text, unit_text
from nexus.kernel.linux import native

MINIMAL = Path(__file__).parents[2] / "systems" / "minimal.toml"
NEEDED = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_NICE",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RESOURCE",
)
SHARED = {  # by both units
    "Type": ["notify"],
    "NotifyAccess": ["main"],
    "ExecReload": ["/bin/kill -HUP $MAINPID"],
    "KillMode": ["mixed"],
    "TimeoutStartSec": ["60"],
    "TimeoutStopSec": ["10"],
    "WatchdogSec": ["10"],
    "Restart": ["on-failure"],
    "RestartSec": ["1"],
    "UMask": ["0077"],
    "TasksMax": ["512"],
    "NoNewPrivileges": ["yes"],
    "LockPersonality": ["yes"],
    "RestrictSUIDSGID": ["yes"],
    "RestrictRealtime": ["no"],
}


def sections(text: str) -> dict[str, dict[str, list[str]]]:
    """A unit file as systemd reads it, keys that may be repeated and all."""
    found: dict[str, dict[str, list[str]]] = {}
    current: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            current = found.setdefault(line.strip("[]"), {})
        elif line:
            key, _, value = line.partition("=")
            current.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("user", [False, True])
def test_the_unit_notifies_is_watched_and_can_be_ended_in_time(user: bool) -> None:
    service = sections(unit_text(MINIMAL, "b", user=user))["Service"]
    assert service["Type"] == ["notify"]
    assert service["NotifyAccess"] == ["main"]
    assert service["Restart"] == ["on-failure"]
    assert int(service["WatchdogSec"][0]) > 0
    assert int(service["TimeoutStopSec"][0]) > 5  # five services, a second each
    assert service["ExecStart"][0].endswith(f"up --exec {MINIMAL} --instance b")
    assert ("CapabilityBoundingSet" in service) is not user
    # init makes namespaces, ids and filters for its services: none of this may be taken from it
    forbidden = {"User", "DynamicUser", "RestrictNamespaces", "SystemCallFilter", "PrivateUsers"}
    assert forbidden.isdisjoint(service)


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    from shutil import which

    text = unit_text(MINIMAL, None, user=False)
    assert set(sections(text)) == {"Unit", "Service", "Install"}
    if which("systemd-analyze") is None:
        return  # then its own reading of the format has to do
    file = tmp_path / "minimal.service"
    _ = file.write_text(text)
    answer = subprocess.run(
        ["systemd-analyze", "verify", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in answer.stderr.splitlines() if "minimal.service" in line]
    assert ours == []


def test_a_path_with_spaces_and_percent_signs_stays_one_word(tmp_path: Path) -> None:
    file = tmp_path / "a b%c$d.toml"
    _ = file.write_bytes(MINIMAL.read_bytes())
    (start,) = sections(unit_text(file, None, user=True))["Service"]["ExecStart"]
    assert start.endswith(f'up --exec "{tmp_path}/a b%%c$$d.toml"')


def test_every_directive_of_the_unit_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "SHARED_DIRS", ())  # wherever this tree is, it counts as its own
    assert sections(unit_text(MINIMAL, None, user=False)) == {
        "Unit": {
            "Description": ["Nexus system minimal"],
            "ConditionPathExists": [str(MINIMAL)],
            "After": ["local-fs.target"],
            "StartLimitIntervalSec": ["300"],
            "StartLimitBurst": ["5"],
        },
        "Service": {
            **SHARED,
            "ExecStart": [f"{sys.executable} -P -m nexus.cli up --exec {MINIMAL}"],
            "RuntimeDirectory": ["nexus"],
            "RuntimeDirectoryMode": ["0700"],
            "RuntimeDirectoryPreserve": ["yes"],
            "StateDirectory": ["nexus"],
            "StateDirectoryMode": ["0700"],
            "LogsDirectory": ["nexus"],
            "LogsDirectoryMode": ["0700"],
            "CapabilityBoundingSet": [" ".join(sorted(NEEDED))],
            "ProtectSystem": ["strict"],
            "ProtectHome": ["read-only"],
            "PrivateTmp": ["yes"],
            "ProtectKernelModules": ["yes"],
            "ProtectKernelLogs": ["yes"],
            "ProtectHostname": ["yes"],
            "SystemCallArchitectures": ["native"],
        },
        "Install": {"WantedBy": ["multi-user.target"]},
    }


def test_every_directive_of_the_unit_for_a_user() -> None:
    assert sections(unit_text(MINIMAL, "b", user=True)) == {
        "Unit": {
            "Description": ["Nexus system minimal@b"],
            "ConditionPathExists": [str(MINIMAL)],
            "StartLimitIntervalSec": ["300"],
            "StartLimitBurst": ["5"],
        },
        "Service": {
            **SHARED,
            "ExecStart": [f"{sys.executable} -P -m nexus.cli up --exec {MINIMAL} --instance b"],
        },
        "Install": {"WantedBy": ["default.target"]},
    }


def test_an_exec_service_may_keep_reading_what_only_root_may_read() -> None:
    """Its number is capability.h's; what is outside of the bounding set no exec gives back."""
    assert native.CAP_DAC_READ_SEARCH == 2
    text = sections(unit_text(MINIMAL, None, user=False))["Service"]["CapabilityBoundingSet"][0]
    assert "CAP_DAC_READ_SEARCH" in text.split()


def declared(tmp_path: Path, state: str, runtime: str, log: str) -> Path:
    file = tmp_path / "own.toml"
    _ = file.write_text(
        f'[system]\nname = "own"\nstate_dir = "{state}"\nruntime_dir = "{runtime}"\n'
        f'log_dir = "{log}"\n[service.timed]\nprogram = "timed"\n'
    )
    return file


def test_directories_of_the_system_file_are_made_and_may_be_written(tmp_path: Path) -> None:
    """ProtectSystem=strict leaves nothing else to write in; an exception has to be there."""
    file = declared(tmp_path, "/srv/a b", "/srv/r", "/srv/100%$l")
    service = sections(unit_text(file, "b", user=False))["Service"]
    assert service["ReadWritePaths"] == ['"/srv/a b@b" /srv/r@b /srv/100%%$l@b']
    assert service["ExecStartPre"] == [
        '+/bin/mkdir -m 0700 -p -- "/srv/a b@b"',
        "+/bin/mkdir -m 0700 -p -- /srv/r@b",
        "+/bin/mkdir -m 0700 -p -- /srv/100%%$$l@b",
    ]
    assert service["RuntimeDirectory"] == ["nexus"], "the lock and the record are there"
    assert {"StateDirectory", "LogsDirectory"}.isdisjoint(service)
    assert "ReadWritePaths" not in sections(unit_text(file, "b", user=True))["Service"]


@pytest.mark.parametrize("place", ["/tmp/x", "/var/tmp/x"])
def test_what_lies_in_tmp_is_not_hidden_from_the_system(place: str, tmp_path: Path) -> None:
    file = declared(tmp_path, "/srv/s", "/srv/r", place)
    assert "PrivateTmp" not in sections(unit_text(file, None, user=False))["Service"]


def test_the_unit_is_had_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unit", "--json", "--user", "--instance", "b", str(MINIMAL)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "system": "minimal@b",
        "file": str(MINIMAL),
        "user": True,
        "unit": unit_text(MINIMAL, "b", user=True),
    }


@pytest.mark.parametrize("user", [False, True])
def test_a_system_out_of_its_slots_is_started_again_by_its_manager(user: bool) -> None:
    made = sections(slots_unit_text("pump", "b", user=user))
    service = made["Service"]

    assert service["ExecStart"] == [
        f"{sys.executable} -P -m nexus.cli up --exec --slots pump --instance b"
    ]
    assert service["RestartPreventExitStatus"] == [f"{EXIT_ENDED} {EXIT_STOPPED}"]
    assert service["SuccessExitStatus"] == [str(EXIT_STOPPED)]
    assert made["Unit"]["StartLimitBurst"] == ["20"]
    changed = {"TimeoutStartSec": ["180"], "TimeoutStopSec": ["30"], "Restart": ["always"]}
    assert {key: service[key] for key in SHARED} == {**SHARED, **changed}
    if user:
        assert "ConditionPathExists" not in made["Unit"]
    else:
        assert made["Unit"]["ConditionPathExists"] == ["/var/lib/nexus/pump@b/boot.img"]
        assert service["StateDirectory"] == ["nexus"]
        assert service["ProtectSystem"] == ["strict"]


def test_the_command_prints_the_unit_of_slots(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unit", "--slots", "pump"]) == 0
    assert capsys.readouterr().out == slots_unit_text("pump", None, user=False)
