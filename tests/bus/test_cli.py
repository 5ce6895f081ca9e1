# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmcryptctl on a daemon with a simulated host behind it: exit statuses, output, questions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.simulated import (
    ALPHA,
    BETA,
    CTL,
    GAMMA,
    LONG_S,
    PROJECT,
    Host,
    Terminal,
    ctl,
    host,
    opened_by,
)
from tests.forkserver import DEVNULL, PIPE, Forked
from vmcryptd import daemon as daemon_module
from vmcryptd.bus.client import Client, translated
from vmcryptd.bus.transport import RemoteError
from vmcryptd.cli import columns, keys, main, output, render, unlock, verbs, without_daemon
from vmcryptd.core.errors import (
    AmbiguousDeviceError,
    BusyError,
    NoSuchVolumeError,
    NotAuthorizedError,
    ShuttingDownError,
    StillWaitingError,
    VmcryptdError,
    WrongKeyError,
    subclasses,
)
from vmcryptd.posix.host_lock import HostLock

__all__ = ["host"]  # a fixture

NOBODY = 65534

# Two volumes that wait once boot was asked for, and a mail server on them.
MAIL = f"""
[volume.cr_a]
device = "/dev/vg/a"
[sim.volume.cr_a]
{opened_by(ALPHA)}
[volume.cr_b]
device = "/dev/vg/b"
[sim.volume.cr_b]
{opened_by(BETA)}
[sim.guest.imap]
disks = ["/dev/mapper/cr_a", "/dev/mapper/cr_b"]
autostart = true
[sim.guest.dns]
running = true
"""
# Opened by itself, without a person, and in use.
MANUAL = f"""
[volume.low]
device = "/dev/vg/low"
keys = ["file:/run/low"]
unlock = "manual"
[sim.volume.low]
sources = ["file:/run/low"]
open = true
[volume.high]
device = "/dev/vg/high"
unlock = "manual"
[sim.volume.high]
on = ["low"]
open = true
[volume.used]
device = "/dev/vg/used"
unlock = "manual"
[sim.volume.used]
open = true
fault = "busy"
[volume.keyless]
device = "/dev/vg/keyless"
keys = ["file:/run/none", "prompt"]
unlock = "manual"
[sim.volume.keyless]
{opened_by(ALPHA)}
"""


@pytest.fixture(autouse=True)
def _no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)


@pytest.fixture
def mail(host: Host) -> Host:
    host.start(MAIL)
    host.boot("waiting")
    return host


@pytest.fixture
def manual(host: Host) -> Host:
    host.start(MANUAL)
    return host


@contextlib.contextmanager
def meanwhile(function: Callable[[], object]) -> Iterator[None]:
    """Do something beside what this test does."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 (raised below)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not errors, errors


# --- reading ---


def test_status_says_first_what_to_do(mail: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status"]) == 0
    assert capsys.readouterr().out == (
        "waiting: 2 volumes wait for a passphrase -- run: vmcryptctl unlock\n"
        "\n"
        "VOLUME  STATE    DEVICE     KEY  NEEDED BY\n"
        "cr_a    waiting  /dev/vg/a  -    imap\n"
        "cr_b    waiting  /dev/vg/b  -    imap\n"
        "\n"
        "GUEST  STATE  STARTS   NEEDS\n"
        "imap   off    at boot  cr_a, cr_b\n"
    )
    assert main.main(["status", "--all"]) == 0
    assert "\ndns    running  -" in capsys.readouterr().out


def test_status_of_names(mail: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "cr_b"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["cr_b    waiting  /dev/vg/b  -    imap"]
    assert main.main(["status", "cr_bb"]) == 2
    assert 'no guest "cr_bb"; did you mean "cr_b"?' in capsys.readouterr().err


def test_files_that_differ_from_what_runs(
    mail: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    verbs_that_say_so = (["status"], ["plan", "boot"], ["check"])

    def said() -> list[bool]:
        found = []
        for verb in verbs_that_say_so:
            main.main(verb)
            captured = capsys.readouterr()
            found.append("changed on disk -- run: vmcryptctl reload" in captured.out + captured.err)
        return found

    assert said() == [False, False, False]
    mail.sim.write_text(MAIL + "# a comment\n")
    mail.until(lambda client: bool(client.host["ConfigChanged"]))
    assert said() == [True, True, True]
    assert main.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config_changed"] is True
    main.main(["check", "--json"])
    assert json.loads(capsys.readouterr().out)["config_changed"] is True
    main.main(["check", "--config", str(tmp_path)])  # what runs has nothing to do with it
    assert "changed on disk" not in capsys.readouterr().err
    assert main.main(["reload"]) == 0
    assert said() == [False, False, False]


def test_status_as_json(mail: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    for number, one in enumerate(status["volumes"]):  # read from the header in the background
        assert one.pop("uuid") in ("", f"00000000-0000-0000-0000-{number:012x}")
    assert status == {
        "state": "waiting",
        "error": "",
        "waiting": ["cr_a", "cr_b"],
        "off": ["imap"],
        "config_changed": False,
        "held_keys": [],
        "volumes": [
            {
                "name": name,
                "state": "waiting",
                "device": f"/dev/vg/{name[-1]}",
                "key_source": "",
                "needed_by": ["imap"],
                "header_backup_due": False,
                "rotation": "",
                "rotation_progress": None,
                "error": "",
            }
            for name in ("cr_a", "cr_b")
        ],
        "guests": [
            {
                "name": "imap",
                "state": "off",
                "needs": ["cr_a", "cr_b"],
                "starts_at_boot": True,
                "error": "",
            },
            {"name": "dns", "state": "running", "needs": [], "starts_at_boot": False, "error": ""},
        ],
    }


def test_plan(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL)
    assert main.main(["plan", "boot"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "boot: 3 steps"
    assert lines[1].startswith("  1. unlock cr_a  ")
    assert lines[3].startswith("  3. start imap   ")
    assert lines[3].endswith("(after 1, 2)")
    assert main.main(["plan", "boot", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["goal"] == "boot"
    assert [(step["action"], step["object"], sorted(step["after"])) for step in plan["steps"]] == [
        ("unlock", "cr_a", []),
        ("unlock", "cr_b", []),
        ("start", "imap", ["unlock:cr_a", "unlock:cr_b"]),
    ]
    assert main.main(["plan", "tea"]) == 2


def test_names_for_completion(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL)
    for what, names in (("volumes", "cr_a\ncr_b\n"), ("guests", "imap\ndns\n")):
        assert main.main(["_names", what]) == 0
        assert capsys.readouterr() == (names, "")


def test_away(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main.main(["status"]) == 5
    text = "vmcryptctl: vmcryptd is not running; `systemctl status vmcryptd` tells why\n"
    assert capsys.readouterr() == ("", text)
    assert main.main(["_names", "volumes"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main.main(["console"]) == 0
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    assert main.main(["status"]) == 5
    assert capsys.readouterr().err.count("\n") == 1


def test_wait(mail: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["wait", "--timeout", "5 msec"]) == 6  # as the configuration writes it
    capsys.readouterr()
    assert main.main(["wait", "--timeout", "50ms"]) == 6
    assert "a passphrase is missing for cr_a, cr_b" in capsys.readouterr().err

    def unlock() -> None:
        mail.unlock("cr_a", ALPHA)
        mail.unlock("cr_b", BETA)

    with meanwhile(unlock):
        assert main.main(["wait"]) == 0


def test_wait_for_what_fails(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL.replace("autostart = true", 'autostart = true\nfault = "no such network"'))
    host.boot("waiting")
    host.unlock("cr_a", ALPHA)
    host.unlock("cr_b", BETA)
    assert main.main(["wait", "--json"]) == 1
    shown = capsys.readouterr()
    [reason] = json.loads(shown.out)["reasons"]
    assert reason.startswith("imap: ")
    assert "no such network" in reason
    assert reason in shown.err


def test_wait_survives_a_restart_of_the_daemon(mail: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    following = threading.Event()
    follow = Client.follow

    async def followed(client: Client) -> None:
        await follow(client)
        following.set()

    def restart() -> None:
        assert following.wait(LONG_S)
        mail.end(signal.SIGKILL)
        mail.start(MAIL.replace("passphrase", "open = true\npassphrase"))
        mail.call("Boot")

    monkeypatch.setattr(Client, "follow", followed)
    with meanwhile(restart):
        assert main.main(["wait", "--timeout", "60s"]) == 0


def test_monitor(manual: Host) -> None:
    with Forked("vmcryptctl", "monitor", "--json", stdout=PIPE) as monitor:
        assert monitor.stdout is not None
        told = threading.Event()

        def change_until_stopped() -> None:
            manual.call("Lock", "s", "high")
            while not told.is_set():
                manual.call("Lock", "s", "low")
                manual.call("Unlock", "s", "low")

        with meanwhile(change_until_stopped):
            try:
                lines = [json.loads(monitor.stdout.readline()) for _ in range(6)]
            finally:
                told.set()
        monitor.stdout.close()
        manual.call("Lock", "s", "low")
        manual.call("Unlock", "s", "low")
        assert monitor.wait(LONG_S) == 0  # the reader went away, which is no error
    assert "volume" in {line["type"] for line in lines}
    states = [line["state"] for line in lines if line["name"] == "low" and "state" in line]
    assert {"locked", "unlocked"} & set(states)


def test_console(mail: Host, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the console until the question has its answer."""
    console = Forked("vmcryptctl", "console")
    mail.unlock("cr_a", ALPHA)
    with pytest.raises(subprocess.TimeoutExpired):
        console.wait(0.5)  # cr_b is still asked for
    mail.unlock("cr_b", BETA)
    assert console.wait(LONG_S) == 0
    host.end()
    # No longer than console_prompt; and not at all if that is 0.
    for longest in ("200ms", "0"):
        host.start(f'[daemon]\nconsole_prompt = "{longest}"\n{MAIL}')
        host.boot("waiting")
        assert main.main(["console"]) == 0
        assert host.states()["cr_a"] == "waiting"
        host.end()


# --- changing ---


def test_the_highest_exit_status_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    errors = BusyError("volume a is in use"), NotAuthorizedError("no"), WrongKeyError("key")
    assert output.report(errors) == 4
    assert capsys.readouterr().err.count("\n") == 3


# All is imported before: a user of no importance may not be able to read this checkout, nor its Python.
STRANGER = f"""
import json, os, sys
import vmcryptd.cli.terminal
from vmcryptd.bus import transport
from vmcryptd.cli.main import main
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_others_are_refused(manual: Host) -> None:
    for verb, code in (("status", 0), ("lock", 4)):
        with Forked("-c", STRANGER, verb, stdin=DEVNULL, stdout=PIPE, stderr=PIPE) as done:
            _, err = done.communicate()
        assert (done.returncode, err.count("\n")) == (code, min(code, 1)), err


def test_start_and_stop(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL.replace("passphrase", "open = true\npassphrase"))
    assert main.main(["start", "imap"]) == 0
    assert host.states()["imap"] == "running"
    assert main.main(["restart", "imap"]) == 0
    assert host.states()["imap"] == "running"
    assert main.main(["restart", "imop", "imap"]) == 2
    assert main.main(["stop", "imap"]) == 0
    assert host.states()["imap"] == "off"
    assert main.main(["start", "imop"]) == 2
    assert "imop" in capsys.readouterr().err


def test_start_asks_where_it_was_typed(host: Host) -> None:
    host.start(MAIL.replace('"/dev/mapper/cr_a", ', ""))
    terminal = Terminal("start", "imap")
    terminal.expect("Passphrase for volume cr_b (/dev/vg/b):")
    terminal.type("\x04")
    terminal.expect("not answered; still locked: cr_b")
    assert terminal.end() == 6
    terminal = Terminal("restart", "imap")
    terminal.expect("Passphrase for volume cr_b")
    terminal.type(f"{BETA}\n")
    assert terminal.end() == 0
    states = host.states()
    assert (states["imap"], states["cr_a"]) == ("running", "locked")


def test_start_without_a_terminal_says_what_it_waits_for(host: Host) -> None:
    host.start(MAIL)
    with Forked("vmcryptctl", "start", "imap", stdin=DEVNULL, stderr=PIPE) as child:
        assert child.stderr is not None
        assert "waiting for a passphrase for cr_" in child.stderr.readline()
        host.unlock("cr_a", ALPHA)
        host.unlock("cr_b", BETA)
        assert child.wait(LONG_S) == 0
    assert host.states()["imap"] == "running"


def test_verbs_without_arguments(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL.replace("passphrase", "open = true\npassphrase"))
    assert main.main(["boot"]) == 0
    host.until(lambda client: client.host["State"] == "ready")
    assert host.states()["imap"] == "running"
    host.sim.write_text(f"{host.sim.read_text()}\n[volume.new]\ndevice = '/dev/vg/new'\n")
    assert main.main(["reload"]) == 0
    assert "new" in host.states()
    assert main.main(["shutdown"]) == 0
    assert set(host.states().values()) == {"off", "locked", "running"}  # dns needs no volume


def test_a_refused_configuration(manual: Host, capsys: pytest.CaptureFixture[str]) -> None:
    manual.sim.write_text("[daemon]\nx = 1\n")
    assert main.main(["reload"]) == 2
    shown = capsys.readouterr().err
    assert "[daemon] x: unknown key" in shown
    assert shown.count("\n") == 1


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostLock:
    """The lock of a host of this test's own."""
    monkeypatch.setattr(without_daemon, "HostLock", lambda: HostLock(tmp_path / "lock"))
    return HostLock(tmp_path / "lock")


@pytest.mark.parametrize("verb", ["shutdown", "panic"])
def test_going_down_without_a_daemon(
    verb: str, host: Host, lock: HostLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def down_here(verb: str) -> None:
        assert not lock.try_hold("another")
        assert str(lock.holder()) == f"vmcryptctl {verb} (pid {os.getpid()})"
        done.append(verb)

    monkeypatch.setattr(daemon_module, "down_here", down_here)
    assert main.main([verb]) == 0
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    assert main.main([verb]) == 0
    assert done == [verb, verb]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("vmcryptd.cli.terminal.is_interactive", lambda: False)
    assert main.main([verb]) == 5
    assert done == [verb, verb]


HOLDER = """
import sys, time
from pathlib import Path
from vmcryptd.posix.host_lock import HostLock
lock = HostLock(Path(sys.argv[1]))
assert lock.try_hold(sys.argv[2])
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_holds(lock: HostLock, role: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock._path), role],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        yield process
        process.kill()


def test_shutdown_waits_for_a_daemon_that_is_silent(
    lock: HostLock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at a time would open what the other closes."""
    with another_holds(lock, "vmcryptd") as process:

        def down_here(verb: str) -> None:
            assert process.wait(0) == -signal.SIGKILL
            done.append(verb)

        done: list[str] = []
        monkeypatch.setattr(daemon_module, "down_here", down_here)
        said = without_daemon.say

        def say(text: str) -> None:
            said(text)
            process.kill()  # it lived until the shutdown waited for it

        monkeypatch.setattr(without_daemon, "say", say)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert main.main(["shutdown"]) == 0
        assert done == ["shutdown"]
    assert f"vmcryptd (pid {process.pid}) runs, but does not answer" in capsys.readouterr().err


def test_shutdown_ends_a_daemon_that_nobody_can_reach(
    lock: HostLock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bus is dead, the daemon lives: systemd's watchdog finds nothing wrong with it."""
    done: list[str] = []
    monkeypatch.setattr(daemon_module, "down_here", done.append)
    monkeypatch.setattr(without_daemon, "DAEMON_END_S", 0.0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    with another_holds(lock, "vmcryptd") as process:
        assert main.main(["shutdown"]) == 0
        assert process.wait(10) == -signal.SIGKILL
        assert done == ["shutdown"]
    assert f"vmcryptd (pid {process.pid}) cannot be reached" in capsys.readouterr().err


def test_shutdown_leaves_a_panic_alone(
    lock: HostLock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(daemon_module, "down_here", lambda verb: pytest.fail("beside a panic"))
    monkeypatch.setattr(without_daemon, "DAEMON_END_S", 0.0)
    monkeypatch.setattr(without_daemon, "KILLED_S", 0.0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    with another_holds(lock, "vmcryptctl panic") as process:
        assert main.main(["shutdown"]) == 1
        assert process.poll() is None
        assert f"vmcryptctl panic (pid {process.pid}) holds" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["vmcryptd", "vmcryptctl shutdown"])
def test_panic_ends_whatever_is_in_its_way(
    role: str, lock: HostLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(daemon_module, "down_here", done.append)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with another_holds(lock, role) as process:
        assert main.main(["panic"]) == 0
        assert process.wait(10) == -signal.SIGKILL
    assert done == ["panic"]


def test_a_daemon_that_is_back_is_asked(
    lock: HostLock, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the lock when it is there again."""
    monkeypatch.setattr(daemon_module, "down_here", lambda verb: pytest.fail("beside a daemon"))
    said = without_daemon.say

    def say(text: str) -> None:
        said(text)
        with ThreadPoolExecutor() as aside:
            aside.submit(host.start, MAIL.replace("passphrase", "open = true\npassphrase")).result()

    monkeypatch.setattr(without_daemon, "say", say)
    with another_holds(lock, "vmcryptd"):
        assert main.main(["shutdown"]) == 0
    assert {host.states()[name] for name in ("cr_a", "cr_b")} == {"locked"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_shutdown_with_a_daemon_that_leaves(
    number: int, host: Host, lock: HostLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(daemon_module, "down_here", done.append)
    host.start(
        MAIL.replace("autostart = true", 'autostart = true\nrunning = true\nstop_delay = "10min"')
        .replace("passphrase", "open = true\npassphrase")
    )  # fmt: skip

    def leave() -> None:
        host.until(lambda client: client.guests["imap"]["State"] == "stopping")
        host.end(number)

    with meanwhile(leave):
        assert main.main(["shutdown"]) == 0
    assert done == ["shutdown"]


def test_what_went_wrong_in_a_shutdown_is_not_tried_twice(
    manual: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(daemon_module, "down_here", lambda verb: pytest.fail("twice"))
    assert main.main(["shutdown"]) == 1
    assert "used" in capsys.readouterr().err


def test_a_dead_bus_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "bus"))
        listener.listen()
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
        monkeypatch.setattr("vmcryptd.bus.client.CONNECT_S", 0.2)
        assert main.main(["status"]) == 5
    assert capsys.readouterr().err.count("\n") == 1


PANIC = f"""
[daemon]
key_cache = "infinity"
[volume.fine]
device = "/dev/vg/fine"
[sim.volume.fine]
{opened_by(ALPHA)}
[volume.stuck]
device = "/dev/vg/stuck"
[sim.volume.stuck]
{opened_by(ALPHA)}
fault = "busy"
[volume.waits]
device = "/dev/vg/waits"
[sim.volume.waits]
{opened_by(BETA)}
[volume.fails]
device = "/dev/vg/fails"
keys = ["file:/run/none"]
[sim.guest.up]
disks = ["/dev/mapper/fine"]
autostart = true
[sim.guest.broken]
disks = ["/dev/mapper/stuck"]
autostart = true
fault = "no such network"
[sim.guest.off]
disks = ["/dev/mapper/waits", "/dev/mapper/fails"]
autostart = true
"""


def test_panic_says_what_it_did_and_leaves_nothing_stale(host: Host) -> None:
    host.start(PANIC)
    host.boot("waiting")
    with contextlib.suppress(StillWaitingError):
        host.call("UnlockAllWithKey", "h", 0, key=ALPHA)
    host.until(
        lambda client: (
            client.guests["up"]["State"] == "running"
            and bool(client.guests["broken"]["LastError"])
            and bool(client.volumes["fails"]["LastError"])
            and client.host["State"] == "waiting"
        )
    )
    shown = ctl("panic")
    assert shown.code == 1
    assert set(shown.out.splitlines()) == {
        "guest up: killed",
        "volume fine: closed",
        "volume stuck: not closed; its key is wiped, and I/O to it blocks",
        "1 key dropped from memory",
    }
    assert shown.err.startswith("vmcryptctl: volume stuck: it cannot be closed (")
    log = host.journal.read_text()
    for line in (
        "panic: keys dropped from memory: 1",
        "panic: guest up is killed",
        "panic: volume fine is closed",
        "panic: volume stuck: it cannot be closed (",
    ):
        assert line in log
    status = json.loads(ctl("status", "--json").out)
    assert (status["state"], status["waiting"], status["held_keys"]) == ("locked", [], [])
    errors = {one["name"]: one["error"] for one in (*status["volumes"], *status["guests"])}
    assert errors.pop("stuck").startswith("volume stuck: it cannot be closed (")
    assert set(errors.values()) == {""}
    states = host.states()
    assert (states["fails"], states["waits"], states["stuck"]) == ("locked", "locked", "suspended")


def test_panic_when_nothing_is_open(host: Host) -> None:
    host.start(MAIL)
    assert ctl("panic") == (0, "nothing was open\n", "")


def test_what_failed_before_shutdown_is_not_shown_after_it(host: Host) -> None:
    host.start(MAIL.replace("autostart = true", 'autostart = true\nfault = "no such network"'))
    host.boot("waiting")
    host.unlock("cr_a", ALPHA)
    host.unlock("cr_b", BETA)
    host.until(lambda client: client.host["State"] == "degraded")
    assert ctl("shutdown").code == 0
    assert ctl("status", "--failed").out == "nothing has failed\n"
    assert json.loads(ctl("status", "--json").out)["state"] == "locked"


# --- locking ---


def test_lock_goes_from_the_top_down(manual: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["lock", "low", "high", "used"]) == 1
    assert "used" in capsys.readouterr().err
    states = manual.states()
    assert (states["low"], states["high"], states["used"]) == (
        "missing",
        "missing",
        "unlocked",
    ) or (states["low"], states["high"], states["used"]) == ("locked", "locked", "unlocked")
    assert main.main(["lock"]) == 1
    assert "a simulated process" in capsys.readouterr().err


# --- unlocking ---


def test_unlock_with_key_file(mail: Host, tmp_path: Path, capsys: Any) -> None:
    key = tmp_path / "key"
    key.write_text(ALPHA)
    assert main.main(["unlock", "--key-file", str(key)]) == 6  # cr_b is left
    assert main.main(["unlock", "cr_b", "--key-file", str(key)]) == 3
    key.write_text(BETA)
    assert main.main(["unlock", "cr_a", "--key-file", str(key), "cr_b"]) == 0
    assert mail.states()["cr_b"] == "unlocked"
    assert main.main(["unlock", "--key-file", str(tmp_path / "none")]) == 2
    capsys.readouterr()
    assert main.main(["unlock", "cr_x", "--key-file", str(key)]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("names", [[], ["cr_a"], ["cr_a", "cr_b"]])
def test_unlock_with_a_key_on_standard_input(host: Host, names: list[str]) -> None:
    host.start(MAIL.replace(opened_by(BETA), opened_by(ALPHA)))
    host.boot("waiting")
    assert ctl("unlock", "--key-file", "-", *names, typed=ALPHA).code == 0
    states = host.states()
    assert all(states[name] == "unlocked" for name in names or ["cr_a", "cr_b"])


def test_neither_a_disk_nor_its_copy_is_opened(host: Host, capsys: Any) -> None:
    """`status` says at once why, and `unlock` that it failed."""
    tag = "UUID=3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"
    copied = MAIL.replace('"/dev/vg/a"', f'"{tag}"', 1)
    host.start(copied.replace("[sim.volume.cr_a]", "[sim.volume.cr_a]\ncopied = true"))
    both = f"volume cr_a: {tag} is on /dev/copy-cr_a and /dev/sim-cr_a"
    main.main(["status", "--json"])
    [volume] = [v for v in json.loads(capsys.readouterr().out)["volumes"] if v["name"] == "cr_a"]
    assert (volume["state"], both in volume["error"]) == ("failed", True)
    failed = ctl("unlock", "--key-file", "-", "cr_a", typed=ALPHA)
    assert (failed.code, both in failed.err) == (1, True)
    with pytest.raises(AmbiguousDeviceError, match=both):  # as the error's name on the bus says
        host.call("Unlock", "s", "cr_a")


def test_unlock_without_a_terminal_leaves_asking_to_agents(mail: Host) -> None:
    with Forked("vmcryptctl", "unlock", "cr_a", stdin=DEVNULL, stderr=PIPE) as child:
        assert child.stderr is not None
        assert "waiting for a passphrase for cr_a" in child.stderr.readline()
        mail.unlock("cr_a", ALPHA)
        assert child.wait(LONG_S) == 0
        assert "open now: cr_a" in child.stderr.read()


def test_unlock_asks_once_and_again_for_the_rest(mail: Host) -> None:
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for volumes cr_a, cr_b:")
    terminal.type(f"{ALPHA}\n")
    terminal.expect("That fitted cr_a. Passphrase for volume cr_b (/dev/vg/b):")
    terminal.type("xxx\n")
    terminal.expect("That did not fit. Passphrase for volume cr_b")
    terminal.type(f"{BETA}\n")
    terminal.expect("open now: cr_a, cr_b")
    assert terminal.end() == 0
    assert mail.states()["cr_b"] == "unlocked"


def test_unlock_of_several_names_uses_one_answer_for_all(host: Host) -> None:
    host.start(MAIL.replace(opened_by(BETA), opened_by(ALPHA)))
    host.boot("waiting")
    terminal = Terminal("unlock", "cr_a", "cr_b")
    terminal.expect("Passphrase for volumes cr_a, cr_b:")
    terminal.type(f"{ALPHA}\n")
    terminal.expect("open now: cr_a, cr_b")
    assert terminal.end() == 0


def test_unlock_gives_up_after_three_wrong_keys(mail: Host) -> None:
    terminal = Terminal("unlock", "cr_b")
    for wrong in ("x", "", "z"):
        terminal.expect("Passphrase for volume cr_b (/dev/vg/b):")
        terminal.type(f"{wrong}\n")
    terminal.expect("the key fits no key slot")
    assert terminal.end() == 3
    assert mail.states()["cr_b"] == "waiting"


def test_unlock_tries_the_other_sources_before_it_asks(manual: Host) -> None:
    terminal = Terminal("unlock", "keyless")
    terminal.expect("Passphrase for volume keyless (/dev/vg/keyless):")
    terminal.type(f"{ALPHA}\n")
    assert terminal.end() == 0
    assert manual.states()["keyless"] == "unlocked"


def test_unlock_with_nothing_waiting_begins_the_boot_set(host: Host) -> None:
    host.start(MAIL)
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for volumes cr_a, cr_b:")
    terminal.type(f"{ALPHA}\n")
    terminal.expect("Passphrase for volume cr_b")
    terminal.type(f"{BETA}\n")
    terminal.expect("open now: cr_a, cr_b")
    assert terminal.end() == 0
    terminal = Terminal("unlock", "cr_a")
    terminal.expect("volume cr_a is open already")
    assert terminal.end() == 0
    terminal = Terminal("unlock")
    terminal.expect("nothing is waiting for a key")
    assert terminal.end() == 0


def test_the_question_ends_when_another_person_answers(mail: Host) -> None:
    terminal = Terminal("unlock", "cr_a")
    terminal.expect("Passphrase for volume cr_a")
    terminal.type("half a passphr")
    mail.unlock("cr_a", ALPHA)
    terminal.expect("cr_a opened meanwhile; the question is withdrawn")
    assert terminal.end() == 0


def test_unlock_of_a_name_does_not_ask_for_the_others(mail: Host) -> None:
    terminal = Terminal("unlock", "cr_a")
    terminal.expect("Passphrase for volume cr_a (/dev/vg/a):")
    terminal.type(f"{ALPHA}\n")
    assert terminal.end() == 0
    assert "open now: cr_a" in terminal.seen
    assert "cr_b" not in terminal.seen
    assert mail.states()["cr_b"] == "waiting"


def test_what_is_given_up_is_not_taken_for_open(mail: Host) -> None:
    terminal = Terminal("unlock", "cr_a")
    terminal.expect("Passphrase for volume cr_a")
    terminal.type("half a passphr")
    mail.call("Lock", "s", "cr_a")
    terminal.expect("cr_a given up meanwhile; the question is withdrawn")
    terminal.expect("volume cr_a is not open")
    assert terminal.end() == 6


def test_one_question_names_three_of_many(host: Host) -> None:
    host.start("[sim]\nvolumes = 40\nguests = 40\n")
    host.boot("waiting")
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for volumes v0, v1, v10 and 37 more:")
    terminal.type("\x04")
    terminal.expect("still locked: v0, v1, v10 and 37 more")
    assert terminal.end() == 6


UNATTENDED = f"""
[volume.alone]
device = "/dev/vg/alone"
keys = ["file:/run/alone", "prompt"]
[sim.volume.alone]
sources = ["file:/run/alone"]
[volume.asking]
device = "/dev/vg/asking"
keys = ["file:/run/none", "prompt"]
[sim.volume.asking]
{opened_by(ALPHA)}
[volume.above]
device = "/dev/vg/above"
keys = ["file:/run/above"]
after = ["asking"]
[sim.volume.above]
sources = ["file:/run/above"]
on = ["asking"]
[volume.keyless]
device = "/dev/vg/keyless"
keys = ["file:/run/none"]
unlock = "manual"
[sim.guest.web]
disks = ["/dev/mapper/asking"]
autostart = true
"""


def test_no_ask_asks_nobody(host: Host) -> None:
    host.start(UNATTENDED)
    assert ctl("unlock", "--no-ask", "alone").code == 0
    assert host.states()["alone"] == "unlocked"
    for name in ("asking", "above"):
        refused = ctl("unlock", "--no-ask", name)
        assert refused.code == 6
        assert "asking" in refused.err
        assert host.states()["asking"] == "locked"
    assert ctl("unlock", "--no-ask", "keyless").code == 1  # it has no passphrase
    terminal = Terminal("unlock", "--no-ask")
    assert terminal.end() == 6
    assert "Passphrase" not in terminal.seen
    # It is not the question of this caller when boot asks.
    host.boot("waiting")
    assert ctl("unlock", "--no-ask", "asking").code == 6
    assert host.states()["asking"] == "waiting"
    host.unlock("asking", ALPHA)
    assert ctl("unlock", "--no-ask").code == 0


def test_unlock_within_a_time(mail: Host) -> None:
    refused = ctl("unlock", "--timeout", "100ms", "cr_a")
    assert refused.code == 6
    assert "not open within 100ms; still locked: cr_a" in refused.err
    terminal = Terminal("unlock", "--timeout", "2s")
    terminal.expect("Passphrase for volumes cr_a, cr_b:")
    terminal.expect("not open within 2s; still locked: cr_a, cr_b")
    assert terminal.end() == 6
    assert ctl("unlock", "--timeout", "soon").code == 2


def test_a_pipe_that_nobody_reads(mail: Host) -> None:
    hint = '"--key-file -" takes the key from there'
    for option in ("--no-ask", "--timeout=100ms"):
        refused = ctl("unlock", option, "cr_a", typed=f"{ALPHA}\n")
        assert refused.code == 6
        assert f"vmcryptctl: standard input is not read: {hint}\n" in refused.err
        assert hint not in ctl("unlock", option, "cr_a").err
    assert hint not in ctl("unlock", "--key-file", "-", "cr_a", typed=BETA).err


def test_a_key_that_fits_only_without_its_newline(mail: Host, tmp_path: Path) -> None:
    sentence = "volume cr_b: the key fits without the newline at its end"
    for names in (["cr_b"], ["cr_a", "cr_b"], []):
        refused = ctl("unlock", "--key-file", "-", *names, typed=f"{BETA}\n")
        assert refused.code == 3
        assert sentence in refused.err
    assert "newline" not in ctl("unlock", "--key-file", "-", "cr_b", typed=f"{GAMMA}\n").err
    assert "newline" not in ctl("unlock", "--key-file", "-", "cr_b", typed="\n").err
    assert "newline" not in ctl("unlock", "--key-file", "-", "cr_b", typed=f"{BETA}x").err
    (tmp_path / "key").write_text(f"{BETA}\n")
    assert sentence in ctl("unlock", "--key-file", str(tmp_path / "key"), "cr_b").err
    assert mail.states()["cr_b"] == "waiting"


MANY = f"""
[volume.right]
device = "/dev/vg/right"
unlock = "manual"
[sim.volume.right]
{opened_by(ALPHA)}
[volume.other]
device = "/dev/vg/other"
unlock = "manual"
[sim.volume.other]
{opened_by(BETA)}
[volume.gone]
device = "/dev/vg/gone"
unlock = "manual"
timeout = "10ms"
[sim.volume.gone]
present = false
[volume.asked]
device = "/dev/vg/asked"
[sim.volume.asked]
{opened_by(BETA)}
[sim.guest.web]
disks = ["/dev/mapper/asked"]
autostart = true
"""


def test_one_key_for_several_volumes(host: Host, tmp_path: Path) -> None:
    """0: all open; 3: the rest failed by the wrong key, and by nothing else; else 1."""
    host.start(MANY)
    key = tmp_path / "key"
    key.write_text(ALPHA)
    shown = ctl("unlock", "--key-file", str(key), "other", "right", "gone")
    assert shown.code == 1
    lines = shown.err.splitlines()
    assert len(lines) == 2
    assert "volume other: the key fits no key slot" in lines[0]
    assert "volume gone" in lines[1]
    assert host.states()["right"] == "unlocked"
    assert ctl("unlock", "--key-file", str(key), "other", "asked").code == 3
    assert ctl("unlock", "--key-file", str(key), "right").code == 0
    key.write_text(BETA)
    host.boot("waiting")
    assert ctl("unlock", "--key-file", str(key), "other", "asked", "right").code == 0


def test_what_failed_otherwise_and_is_still_asked_for(host: Host, tmp_path: Path) -> None:
    host.start(MAIL)
    key = tmp_path / "key"
    key.write_text(ALPHA)
    host.boot("waiting")
    assert ctl("unlock", "--key-file", str(key)).code == 6  # cr_b
    host.call("Lock", "s", "cr_b")
    host.until(lambda client: client.volumes["cr_b"]["State"] != "waiting")
    assert ctl("unlock", "--key-file", str(key), "cr_a", "cr_b").code == 3


def test_a_volume_by_its_paths(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(
        f"{MAIL}\n[volume.tagged]\ndevice = 'UUID=3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11'\nunlock = 'manual'\n"
    )
    assert main.main(["status", "/dev/vg/b", "/dev/mapper/cr_a", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in shown["volumes"]] == ["cr_a", "cr_b"]
    for path in ("/dev/vg/../vg/b", "/dev/disk/by-uuid/3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"):
        assert main.main(["status", path]) == 0
    assert main.main(["status", "UUID=3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"]) == 0
    assert "tagged" in capsys.readouterr().out
    assert ctl("unlock", "--key-file", "-", "/dev/vg/a", typed=ALPHA).code == 0
    assert host.states()["cr_a"] == "unlocked"
    assert main.main(["lock", "/dev/vg/a"]) == 0
    assert main.main(["key", "list", "/dev/mapper/cr_b"]) == 0
    assert main.main(["unlock", "/dev/vg/none"]) == 2
    assert 'there is no volume "/dev/vg/none"' in capsys.readouterr().err


@pytest.mark.parametrize(("keys", "code"), [("\x03", 130), ("\x04", 6)])
def test_interrupted(mail: Host, keys: str, code: int) -> None:
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for volumes cr_a, cr_b:")
    terminal.type(keys)
    assert terminal.end() == code
    assert "Traceback" not in terminal.seen


# --- the parts ---


@pytest.mark.parametrize(
    ("failures", "asked", "code"),
    [
        ({}, "", 0),
        ({"a": WrongKeyError, "b": WrongKeyError}, "b", 3),
        ({"a": WrongKeyError, "b": StillWaitingError}, "b", 6),
        ({"a": WrongKeyError, "b": StillWaitingError}, "low", 6),
        ({"a": WrongKeyError, "b": StillWaitingError}, "other", 1),
        ({"b": StillWaitingError}, "other", 1),
        ({"a": NotAuthorizedError, "b": NotAuthorizedError}, "b", 1),
        ({"b": NotAuthorizedError}, "b", 1),
        ({"a": NoSuchVolumeError, "b": NoSuchVolumeError}, "", 1),
        ({"a": ShuttingDownError, "b": ShuttingDownError}, "", 1),
        ({"a": BusyError, "b": WrongKeyError}, "b", 1),
    ],
)
def test_the_exit_status_of_one_key_for_several(
    failures: dict[str, type[VmcryptdError]], asked: str, code: int
) -> None:
    """The volume "low" lies beneath "b"; "other" is not among those that were named."""
    volumes = {
        name: {"State": "waiting" if name == asked else "locked", "NeededBy": needed_by}
        for name, needed_by in {"a": [], "b": [], "low": ["b"], "other": []}.items()
    }
    client: Any = SimpleNamespace(volumes=volumes)
    errors = {name: error("why") for name, error in failures.items()}
    assert unlock.exit_status(client, ["a", "b"], errors) == code


@pytest.mark.parametrize(
    "error", [WrongKeyError, NotAuthorizedError, NoSuchVolumeError, ShuttingDownError, BusyError]
)
def test_the_exit_status_of_a_single_call(error: type[VmcryptdError]) -> None:
    client: Any = SimpleNamespace(volumes={})
    assert unlock.exit_status(client, ["a"], {"a": error("why")}) == error.exit_code
    assert unlock.exit_status(client, [], {"": error("why")}) == error.exit_code


def test_every_error_of_ours_keeps_its_exit_status() -> None:
    for name, cls in subclasses().items():
        error = translated(RemoteError(name, "text"))
        assert type(error).exit_code == cls.exit_code
        assert str(error) == "text"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("org.vmcryptd1.Error.FromTheFuture", 1),
        ("org.freedesktop.DBus.Error.ServiceUnknown", 5),
        ("org.freedesktop.DBus.Error.NameHasNoOwner", 5),
        ("org.freedesktop.DBus.Error.NoReply", 5),
        ("org.freedesktop.DBus.Error.Disconnected", 5),
        ("org.freedesktop.DBus.Error.Spawn.ChildExited", 5),
        ("org.freedesktop.systemd1.ShuttingDown", 5),
        ("org.freedesktop.DBus.Error.AccessDenied", 4),
        ("org.freedesktop.DBus.Error.UnknownMethod", 1),
        ("com.example.Whatever", 1),
    ],
)
def test_errors_of_others(name: str, code: int) -> None:
    assert translated(RemoteError(name, "text")).exit_code == code


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["unlok"], 'there is no verb "unlok"; did you mean "unlock"?'),
        (["stat"], 'did you mean "status"?'),
        (["--verson"], 'there is no option "--verson"'),
        (["--json"], "which verb?"),
        (["--json", "boot"], "unrecognized arguments: --json"),
        (["help", "unlok"], 'did you mean "unlock"?'),
        (["key"], '"key" what? One of: list, '),
        (["key", "lst"], 'there is no verb "key lst"; did you mean "key list"?'),
        (["key", "rm"], "use `vmcryptctl key remove`: wipe a key slot"),
        (["key", "del"], "use `vmcryptctl key remove`: wipe a key slot"),
        (["key", "ls", "cr_a"], "use `vmcryptctl key list`"),
        (["keystore", "create"], "use `vmcryptctl keystore init`"),
        (["keys"], 'did you mean "key"?'),
        (["open"], 'there is no verb "open"; use `vmcryptctl unlock`: open volumes'),
        (["Close"], "use `vmcryptctl lock`: close volumes"),
        (["ls"], "use `vmcryptctl status`"),
        (["up"], "use `vmcryptctl boot`"),
        (["down"], "use `vmcryptctl shutdown`: stop the guests"),
        (["key", "list"], "VOLUME"),
        (["start"], "GUEST"),
        (["plan"], "GOAL"),
        (["status", "--jsn"], "--jsn"),
        (["wait", "--timeout", "soon"], '--timeout: expected a duration such as "90s"'),
        (["wait", "--timeout", "1e300"], "--timeout: expected a duration"),
        (["wait", "--timeout", "99999999999999d"], "at most 100 years"),
        (["boot", "now"], "now"),
    ],
)
def test_usage_errors(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 2
    shown = capsys.readouterr()
    assert hint in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("verb", [verb.name for verb in verbs.VISIBLE if verb.ends])
def test_a_slip_of_the_finger_is_no_way_to_what_stops_or_destroys(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    *group, word = verb.split()
    for at in range(len(word)):
        slips = {word[:at] + word[at + 1 :], word[:at] + "x" + word[at:], word[: at + 1]}
        for slip in slips - {word} - set(verbs.SYNONYMS):
            name = " ".join([*group, slip]).rstrip()
            if name in verbs.BY_NAME or name in verbs.GROUPS:
                continue
            assert main.main(name.split()) == 2
            shown = capsys.readouterr().err
            suggested = shown.partition("did you mean ")[2].strip('"?\n')
            assert not suggested or not verbs.BY_NAME[suggested].ends, shown


def test_synonyms_lead_to_verbs() -> None:
    assert set(verbs.SYNONYMS.values()) <= set(verbs.BY_NAME)
    assert not set(verbs.SYNONYMS) & {*verbs.BY_NAME, *verbs.GROUPS}


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for asked, plain in (
        ("help unlock", "unlock -h"),
        ("help key add", "key add -h"),
        ("help key", "key -h"),
    ):
        assert main.main(asked.split()) == 0
        shown = capsys.readouterr().out
        assert main.main(plain.split()) == 0
        assert capsys.readouterr().out == shown
    assert main.main(["help"]) == 0


def test_examples_are_apart_from_what_they_do() -> None:
    for verb in verbs.VISIBLE:
        text = verbs.parser(verb).format_help()
        for command, what in verb.examples:
            assert re.search(
                rf"^  {re.escape(command)}{'  +' if what else ''}{re.escape(what)}$",
                text,
                re.MULTILINE,
            )


def test_json_before_the_verb(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL)
    assert main.main(["--json", "status", "cr_a"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["volumes"]] == ["cr_a"]
    assert main.main(["--json", "key", "list", "cr_a"]) == 0
    assert json.loads(capsys.readouterr().out)["volume"] == "cr_a"


@pytest.mark.parametrize(
    "verb",
    [
        "status",
        "status --json",
        "--help",
        "unlock --help",
        "help key",
        "plan boot",
        "boot",
        "monitor",
    ],
)
def test_standard_output_that_takes_nothing(verb: str, host: Host) -> None:
    host.start(MAIL)
    for redirection, text in (
        (">/dev/full", "No space left on device"),
        (">&-", "Bad file descriptor"),
    ):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {redirection}', "sh", *CTL, *verb.split()],
            cwd=PROJECT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == f"vmcryptctl: standard output cannot be written: {text}\n"


def test_a_reader_that_has_gone_is_no_error(host: Host) -> None:
    host.start(MAIL)
    reader, writer = os.pipe()
    os.close(reader)
    with Forked("vmcryptctl", "status", stdout=writer, stderr=PIPE) as done:
        os.close(writer)
        assert done.communicate() == ("", "")
    assert done.returncode == 0


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&- <&-"])
def test_shutdown_goes_on_without_output(redirection: str, host: Host) -> None:
    """What is closed is not taken for the bus, and what cannot be shown does not stop the work."""
    host.start(
        MAIL.replace("autostart", "running = true\nautostart").replace(
            "passphrase", "open = true\npassphrase"
        )
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *CTL, "shutdown"],
        cwd=PROJECT, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert host.states() == {"cr_a": "locked", "cr_b": "locked", "imap": "off", "dns": "running"}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb in verbs.VISIBLE:
        assert f"  {verb.name} " in shown
        assert main.main([*verb.name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert all(command in text for command, _ in verb.examples)
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert main.main([]) == 2
    assert main.main(["--version"]) == 0


def test_every_verb_is_carried_out() -> None:
    assert main.RUN.keys() == {verb.name for verb in verbs.VERBS}
    assert set(keys.RUN) == {verb.name for verb in verbs.VERBS if " " in verb.name}
    assert {
        verb.name for verb in verbs.VERBS if any("--json" in a.name for a in verb.arguments)
    } == {
        "status",
        "plan",
        "check",
        "wait",
        "monitor",
        "key list",
        "key test",
    }


def volume(**values: Any) -> dict[str, Any]:
    return {
        "Name": "cr_imap_encr",
        "Device": "/dev/disk/by-id/virtio-0123456789abcdef-part3",
        "Uuid": "",
        "State": "failed",
        "KeySource": "prompt",
        "NeededBy": [f"guest-number-{number}" for number in range(6)],
        "LastError": "",
        **values,
    }


@pytest.mark.parametrize("wide", [20, 40, 60, 80, 132])
def test_names_are_whole_at_every_width(wide: int) -> None:
    long = "cr_" + "a-long-name-of-a-volume_" * 3
    error = "the header of cr_imap_encr is damaged: " + "a sentence that goes on and on " * 4
    volumes = [volume(LastError=error), volume(Name="b", State="unlocked"), volume(Name=long)]
    guests = [
        {"Name": f"{long}_guest", "State": "off", "Needs": [long, "b"], "StartsAtBoot": True, "LastError": ""}
    ]  # fmt: skip
    lines = render.Page(width=wide).status({"State": "degraded", "Waiting": []}, volumes, guests)
    words = " ".join(lines).replace(",", " ").split()
    for name in ("cr_imap_encr", "b", long, f"{long}_guest", *volumes[0]["NeededBy"]):
        assert name in words
    if wide >= 40:
        overlong = [line for line in lines if len(line) > wide and long not in line]
        assert not overlong


def test_a_table_fits_a_serial_console() -> None:
    volumes = [volume(), volume(Name="b")]
    host = {"State": "degraded", "Waiting": []}
    lines = render.Page(width=80).status(host, volumes, [])
    assert all(len(line) <= 80 for line in lines), lines
    text = "\n".join(lines)
    assert "degraded: not all of the boot set is up (failed: cr_imap_encr, b)" in text
    assert "part3" in text
    assert "by-id" not in text  # the device gave way
    assert "DEVICE" not in "\n".join(render.Page(width=40).status(host, volumes, []))
    assert "DEVICE" in "\n".join(render.Page().status(host, volumes, []))


def test_wide_characters_align() -> None:
    names = ["plain", "メール", "Cafe\u0301-Gast", "한국어"]
    guests = [
        {"Name": name, "State": "running", "Needs": [], "StartsAtBoot": True, "LastError": ""}
        for name in names
    ]
    for page in (render.Page(width=80), render.Page()):
        lines = page.guests(guests)[1:]
        assert {columns.width(line.partition("running")[0]) for line in lines[1:]} == {11}
        assert lines[0].index("STATE") == 11


@given(st.text(), st.integers(0, 100))
def test_shortening_and_wrapping(text: str, room: int) -> None:
    text = render.printable(text)
    assert columns.width(columns.shortened(text, room + 12)) <= room + 12
    assert " ".join(columns.wrapped(text, room, 4)).split() == text.split()


def test_failures_come_first() -> None:
    volumes = [
        volume(Name="open", State="unlocked"),
        volume(Name="coming", State="unlocking"),
        volume(Name="waits", State="waiting", LastError="file:/k gave no key"),
        volume(Name="broken", State="failed", LastError="the disk is gone"),
    ]
    lines = render.Page().volumes(volumes)
    first = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert first == ["VOLUME", "broken", "waits", "coming", "open"]
    assert [one["Name"] for one in volumes if render.has_failed(one)] == ["broken"]


def test_status_of_what_has_failed(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL.replace("autostart = true", 'autostart = true\nfault = "no such network"'))
    assert main.main(["status", "--failed"]) == 0
    assert capsys.readouterr().out == "nothing has failed\n"
    host.boot("waiting")
    host.unlock("cr_a", ALPHA)
    host.unlock("cr_b", BETA)
    host.until(lambda client: client.host["State"] == "degraded")
    assert main.main(["status", "--failed"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("GUEST")
    assert "no such network" in shown
    assert "cr_a    " not in shown
    assert main.main(["status", "--failed", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert ([one["name"] for one in status["guests"]], status["volumes"]) == (["imap"], [])


FORTY = "[sim]\nvolumes = 40\nguests = 40\n" + "".join(
    f"[volume.v{number}]\ndevice = '/dev/vg/v{number}'\n[sim.volume.v{number}]\ndelay = '0.2s'\n{opened_by(ALPHA)}"
    for number in range(40)
)


def test_forty_volumes(host: Host, tmp_path: Path) -> None:
    """The first line stays one; a bar shows how far it is, on the terminal and on the console."""
    host.start(FORTY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LONG_S)
        host.boot("waiting")
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        console = Forked("vmcryptctl", "console", env=environment)
        told = [systemd.recv(4096).decode()]
        terminal = Terminal("unlock", columns=60)
        terminal.expect("Passphrase for volumes v0, v1, v10 and 37 more:")
        terminal.type(f"{ALPHA}\n")
        terminal.expect("of 40 open")
        terminal.expect("open now: v0, v1, v10 and 37 more")
        assert terminal.end() == 0
        while not told[-1].startswith("STATUS=40 of 40 open"):
            told.append(systemd.recv(4096).decode())
    assert console.wait(LONG_S) == 0
    assert "STATUS=0 of 40 open, waiting for the passphrase of v0, v1, v10 and 37 more" in told
    assert any(re.match(r"STATUS=([1-9]|[123]\d) of 40 open", text) for text in told)


def test_colour_and_escapes() -> None:
    page = render.Page(width=80, colour=True)
    assert page.state("failed") == "\033[31mfailed\033[0m"
    assert render.Page(width=80).state("failed") == "failed"
    text = "\n".join(page.volumes([volume(LastError="\033]0;boo\007")]))
    assert "\033]" not in text
    assert "?]0;boo?" in text


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ({"State": "waiting", "Waiting": ["a"]}, "1 volume waits for a passphrase"),
        ({"State": "ready", "Waiting": []}, "open"),
        ({"State": "locked", "Waiting": []}, "run: vmcryptctl boot"),
        ({"State": "unlocking", "Waiting": []}, "monitor"),
        ({"State": "stopping", "Waiting": []}, "stopped"),
    ],
)
def test_the_first_line(host: dict[str, Any], text: str) -> None:
    assert text in render.overall(host, [volume()], [])


@pytest.mark.parametrize(
    ("key", "text", "members"),
    [
        (
            {"source": "prompt", "volumes": "a b", "until": ""},
            "an answer is held until it was tried on a, b",
            ["a", "b"],
        ),
        (
            {"source": "key", "volumes": "", "until": "infinity"},
            "a key that was handed in is held until everything is locked (key_cache)",
            [],
        ),
        (
            {"source": "prompt", "volumes": "", "until": "2026-01-02T03:04:05Z"},
            "an answer is held until 2026-01-02T03:04:05Z at most (key_cache)",
            [],
        ),
    ],
)
def test_keys_that_are_held(key: dict[str, str], text: str, members: list[str]) -> None:
    host = {"State": "ready", "Waiting": [], "HeldKeys": [key]}
    assert render.Page().status(host, [volume()], [])[1] == text
    found = render.status_members(host, [], [])["held_keys"]
    assert found == [{"source": key["source"], "volumes": members, "until": key["until"]}]
    assert render.change("host", "", "changed", {"HeldKeys": [key]}) == f"host: {text}"
    assert render.change("host", "", "changed", {"HeldKeys": []}) == "host: no key is held"


def test_a_changed_configuration_in_the_monitor() -> None:
    for changed, text in (
        (True, render.CHANGED_ON_DISK),
        (False, "the configuration is as on disk"),
    ):
        values = {"State": "ready", "ConfigChanged": changed}
        assert render.change("host", "", "changed", values) == f"host: ready; {text}"


def test_the_first_line_without_volumes() -> None:
    host = {"State": "ready", "Waiting": []}
    assert render.overall(host, [], []) == "no volume is configured -- see vmcryptd.toml(5)"


def test_it_starts_fast() -> None:
    heavy = {
        "json",
        "difflib",
        "pydantic",
        "libvirt",
        "systemd",
        "logging.config",
        "shutil",
        "ctypes",
    }
    heavy |= {
        "vmcryptd.bus.objects",
        "vmcryptd.config.schema",
        "vmcryptd.core.model",
        "vmcryptd.posix.run",
    }
    code = (
        "import sys; import dbus_next.aio; before = set(sys.modules); "
        "from vmcryptd.cli import verbs; import vmcryptd.cli.main; verbs.parse(['status']); "
        "print(*(set(sys.modules) - before))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert not heavy & set(loaded)
