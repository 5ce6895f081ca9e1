# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmcryptctl against a daemon of cardboard on a private bus: exit statuses, output, questions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmcryptd import daemon as daemon_module
from vmcryptd.bus import transport
from vmcryptd.bus.client import translated
from vmcryptd.bus.objects import Handle, Interface, ObjectPath, Objects, exported, take_fd
from vmcryptd.bus.transport import RemoteError, object_path
from vmcryptd.cli import keys, main, render, verbs
from vmcryptd.core.errors import (
    BusyError,
    ConfigError,
    GoalError,
    KeyUnavailableError,
    NoSuchGuestError,
    NotAuthorizedError,
    ShuttingDownError,
    StillWaitingError,
    VmcryptdError,
    WrongKeyError,
    subclasses,
)

PROJECT = Path(__file__).resolve().parents[2]
NAME = "org.vmcryptd1"
ROOT = "/org/vmcryptd1"
ECHOING = termios.ECHO | termios.ICANON
CONFIG = """<busconfig><type>system</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/>
<allow receive_sender="*"/></policy></busconfig>
"""


# --- the daemon of cardboard ---


class Volume(Interface, name="org.vmcryptd1.Volume"):
    Name: str
    Device: str
    Uuid: str
    State: str
    KeySource: str
    Discard: bool
    NeededBy: list[str]
    LastError: str


class Guest(Interface, name="org.vmcryptd1.Guest"):
    Name: str
    State: str
    Needs: list[str]
    StartsAtBoot: bool
    LastError: str


class Job(Interface, name="org.vmcryptd1.Job"):
    Goal: str
    State: str
    LastError: str


class Manager(Interface, name="org.vmcryptd1.Manager"):
    State: str
    Waiting: list[str]
    Version: str
    ConsoleNeeded: bool
    ConsolePromptUSec: int
    HeldKeys: list[dict[str, str]]

    def __init__(self, fake: Fake) -> None:
        super().__init__(
            State="locked",
            Waiting=[],
            Version="1",
            ConsoleNeeded=False,
            ConsolePromptUSec=0,
            HeldKeys=[],
        )
        self._fake = fake

    @exported(action=None)
    async def Unlock(self, volume: str) -> None:
        await self._fake.unlock([volume])

    @exported(action=None)
    async def UnlockAll(self) -> None:
        await self._fake.unlock(list(self._fake.volumes))

    @exported(action=None)
    async def UnlockWithKey(self, volume: str, key: Handle) -> None:
        await self._fake.unlock_with_key([volume], take_fd(key))

    @exported(action=None)
    async def UnlockAllWithKey(self, key: Handle) -> None:
        await self._fake.unlock_with_key(list(self._fake.volumes), take_fd(key))

    @exported(action=None)
    async def Lock(self, volume: str) -> None:
        await self._fake.simple("Lock", volume)

    @exported(action=None)
    async def LockAll(self) -> None:
        await self._fake.simple("LockAll")

    @exported(action=None)
    async def StartGuest(self, guest: str) -> None:
        await self._fake.simple("StartGuest", guest)

    @exported(action=None)
    async def StopGuest(self, guest: str) -> None:
        await self._fake.simple("StopGuest", guest)

    @exported(action=None)
    async def Boot(self) -> ObjectPath:
        await self._fake.simple("Boot")
        return ObjectPath("/org/vmcryptd1/job/1")

    @exported(action=None)
    async def Shutdown(self) -> None:
        await self._fake.simple("Shutdown")

    @exported(action=None)
    async def Panic(self) -> None:
        await self._fake.simple("Panic")

    @exported(action=None)
    async def Reload(self) -> None:
        await self._fake.simple("Reload")

    @exported(action=None)
    def Plan(self, goal: str) -> str:
        if goal != "boot":
            raise GoalError(f'"{goal}" is no goal')
        return json.dumps(PLAN)


PLAN = {
    "goal": "boot",
    "steps": [
        {"action": "unlock", "object": "cr_a", "after": [], "reason": "boot set"},
        {"action": "start", "object": "imap", "after": ["unlock:cr_a"], "reason": "autostart"},
    ],
}


class Nobody:
    """Everybody may do everything."""

    async def check(self, sender: str, action: str, *, interactive: bool) -> None: ...


class Fake:
    """Runs in a thread; its state is changed from the test by `do`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.volumes: dict[str, Volume] = {}
        self.guests: dict[str, Guest] = {}
        self.keys: dict[str, bytes] = {}
        self.asks: set[str] = set()  # whose sources are a person only
        self.calls: list[tuple[str, ...]] = []
        self.received: list[bytes] = []
        self.errors: dict[tuple[str, ...], VmcryptdError] = {}
        self.frees: dict[tuple[str, ...], tuple[str, ...]] = {}  # a call → what works after it
        self.moved = asyncio.Event()
        self.hold: set[str] = set()  # methods that do not answer
        self.wait_for(self.start())

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def do(self, function: Callable[[], object]) -> None:
        async def inside() -> None:
            function()

        self.wait_for(inside())

    async def start(self) -> None:
        self.connection = await transport.connect()
        self.objects = Objects(self.connection, ROOT, Nobody())
        self.manager = Manager(self)
        self.objects.export(ROOT, self.manager)
        for kind, table in (("volume", self.volumes), ("guest", self.guests)):
            for name, one in table.items():
                self.objects.export(object_path(kind, name), one)
        await self.objects.serve(NAME)

    async def vanish(self) -> None:
        await self.connection.disconnect()

    async def end(self) -> None:
        await self.vanish()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def stop(self) -> None:
        self.wait_for(self.end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def add_volume(self, name: str, state: str = "locked", key: bytes = b"", **values: Any) -> None:
        properties: dict[str, Any] = {
            "Name": name,
            "Device": f"/dev/vg/{name}",
            "Uuid": "",
            "State": state,
            "KeySource": "",
            "Discard": False,
            "NeededBy": [],
            "LastError": "",
            **values,
        }
        self.keys[name] = key
        self.asks.add(name)

        def export() -> None:
            self.volumes[name] = Volume(**properties)
            self.objects.export(object_path("volume", name), self.volumes[name])
            self.show()

        self.do(export)

    def add_guest(self, name: str, state: str = "off", **values: Any) -> None:
        properties: dict[str, Any] = {
            "Name": name,
            "State": state,
            "Needs": [],
            "StartsAtBoot": False,
            "LastError": "",
            **values,
        }

        def export() -> None:
            self.guests[name] = Guest(**properties)
            self.objects.export(object_path("guest", name), self.guests[name])

        self.do(export)

    def set_state(self, name: str, state: str) -> None:
        self.volumes[name].changed(State=state)
        self.show()
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    def show(self) -> None:
        states = {name: str(one.values["State"]) for name, one in self.volumes.items()}
        waiting = sorted(name for name, state in states.items() if state == "waiting")
        is_open = states and all(state == "unlocked" for state in states.values())
        state = "waiting" if waiting else "ready" if is_open else "locked"
        self.manager.changed(State=state, Waiting=waiting)

    def is_open(self, name: str) -> bool:
        return self.volumes[name].values["State"] == "unlocked"

    async def simple(self, *call: str) -> None:
        self.calls.append(call)
        if call[0] in self.hold:
            await asyncio.sleep(60)
        if error := self.errors.get(call):
            raise error
        self.errors.pop(self.frees.get(call, ()), None)

    async def unlock(self, names: list[str]) -> None:
        self.calls.append(("Unlock", *names))
        for name in names:
            if self.is_open(name):
                continue
            if name not in self.asks:
                self.set_state(name, "failed")
                raise KeyUnavailableError(f"no key source of {name} has a key")
            self.set_state(name, "waiting")
        while not all(self.is_open(name) for name in names):
            await self.moved.wait()

    async def unlock_with_key(self, names: list[str], fd: int) -> None:
        self.calls.append(("WithKey", *names))
        with os.fdopen(fd, "rb") as file:
            key = await asyncio.to_thread(file.read)
        self.received.append(key)
        closed = [name for name in names if not self.is_open(name)]
        for name in closed:
            if self.keys[name] == key:
                self.set_state(name, "unlocked")
        left = [name for name in closed if not self.is_open(name)]
        if left == closed and closed:
            raise WrongKeyError(f"the key fits no key slot of {closed[0]}")
        if left:
            raise StillWaitingError(f"still locked: {', '.join(left)}")


@pytest.fixture(scope="module")
def bus_address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="vmcryptd-cli-") as folder:
        config = Path(folder, "bus.conf")
        config.write_text(CONFIG.format(socket=Path(folder, "socket")))
        with subprocess.Popen(
            ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as daemon:
            assert daemon.stdout is not None
            yield daemon.stdout.readline().strip()
            daemon.terminate()


@pytest.fixture(autouse=True)
def _private_bus(bus_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus_address)
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)


@pytest.fixture
def fake(_private_bus: None) -> Iterator[Fake]:
    fake = Fake()
    yield fake
    fake.stop()


@pytest.fixture
def mail(fake: Fake) -> Fake:
    """Two volumes that wait, and a mail server on them."""
    fake.add_volume("cr_a", "waiting", b"aaa", NeededBy=["imap"], Device="/dev/vg/a")
    fake.add_volume("cr_b", "waiting", b"bbb", NeededBy=["imap"], Device="/dev/vg/b")
    fake.add_guest("imap", Needs=["cr_a", "cr_b"], StartsAtBoot=True)
    fake.add_guest("dns", "running")
    return fake


class Terminal:
    """vmcryptctl on a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        code = "import sys; from vmcryptd.cli.main import main; sys.exit(main())"
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(PROJECT)
            os.environ["TERM"] = "dumb"
            # As a login shell leaves it; what is started in the background ignores it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(sys.executable, [sys.executable, "-c", code, *argv])
        self.seen = ""

    def expect(self, text: str, timeout_s: float = 20) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            assert self.read(0.2), f"it ended without {text!r}: {self.seen!r}"
        self.seen = self.seen.partition(text)[2]

    def read(self, timeout_s: float) -> bool:
        """False at the end."""
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return True
        try:
            block = os.read(self.fd, 4096)
        except OSError:
            return False
        # systemd-ask-password rubs its hints out.
        self.seen += re.sub(r"[\x08*]+|\(press TAB for no echo\) ?", "", block.decode())
        return bool(block)

    def type(self, text: str) -> None:
        # The question is shown a moment before it can be answered.
        while termios.tcgetattr(self.fd)[3] & ECHOING:
            time.sleep(0.01)
        os.write(self.fd, text.encode())

    def end(self) -> int:
        while self.read(20):
            pass
        _, status = os.waitpid(self.pid, 0)
        # What the shell that comes next would find.
        assert termios.tcgetattr(self.fd)[3] & (termios.ECHO | termios.ICANON) == ECHOING
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


needs_ask_password = pytest.mark.skipif(
    not os.path.exists("/usr/bin/systemd-ask-password"), reason="no systemd-ask-password"
)


# --- reading ---


def test_status_says_first_what_to_do(mail: Fake, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_status_of_names(mail: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "cr_b"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["cr_b    waiting  /dev/vg/b  -    imap"]
    assert main.main(["status", "cr_bb"]) == 2
    assert 'no guest "cr_bb"; did you mean "cr_b"?' in capsys.readouterr().err


def test_status_as_json(mail: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status == {
        "state": "waiting",
        "waiting": ["cr_a", "cr_b"],
        "held_keys": [],
        "volumes": [
            {
                "name": name,
                "state": "waiting",
                "device": f"/dev/vg/{name[-1]}",
                "uuid": "",
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


def test_plan(mail: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "boot"]) == 0
    assert capsys.readouterr().out == (
        "boot: 2 steps\n  1. unlock cr_a  boot set\n  2. start imap   autostart (after 1)\n"
    )
    assert main.main(["plan", "boot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PLAN
    assert main.main(["plan", "tea"]) == 2


def test_names_for_completion(mail: Fake, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_wait(mail: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["wait", "--timeout", "5 msec"]) == 6  # as the configuration writes it
    capsys.readouterr()
    assert main.main(["wait", "--timeout", "50ms"]) == 6
    assert "a passphrase is missing for cr_a, cr_b" in capsys.readouterr().err

    def all_open() -> None:
        for name in mail.volumes:
            mail.set_state(name, "unlocked")

    mail.loop.call_soon_threadsafe(mail.loop.call_later, 0.2, all_open)
    assert main.main(["wait"]) == 0

    def degraded() -> None:
        mail.volumes["cr_a"].changed(State="failed", LastError="the disk is gone")
        mail.manager.changed(State="degraded")

    mail.do(degraded)
    assert main.main(["wait", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["reasons"] == ["cr_a: the disk is gone"]
    assert "cr_a: the disk is gone" in shown.err


def test_wait_survives_a_restart_of_the_daemon(mail: Fake) -> None:
    async def restart() -> None:
        await asyncio.sleep(0.2)
        await mail.vanish()
        await asyncio.sleep(0.2)
        for volume in mail.volumes.values():
            volume.changed(State="unlocked")
        await mail.start()
        mail.show()

    asyncio.run_coroutine_threadsafe(restart(), mail.loop)
    assert main.main(["wait", "--timeout", "20s"]) == 0


def test_monitor(mail: Fake) -> None:
    code = "import sys; from vmcryptd.cli.main import main; sys.exit(main(['monitor', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as monitor:
        assert monitor.stdout is not None
        changing = threading.Event()

        def change_until_told() -> None:
            while not changing.wait(0.1):
                mail.do(lambda: mail.set_state("cr_a", "unlocking"))
                mail.do(lambda: mail.set_state("cr_a", "waiting"))

        thread = threading.Thread(target=change_until_told)
        thread.start()
        try:
            lines = [json.loads(monitor.stdout.readline()) for _ in range(6)]
        finally:
            changing.set()
            thread.join()
        monitor.stdout.close()
        mail.do(lambda: mail.set_state("cr_a", "unlocking"))
        mail.do(lambda: mail.set_state("cr_a", "waiting"))
        assert monitor.wait(20) == 0  # the reader went away, which is no error
    assert {"volume", "host"} == {line["type"] for line in lines}
    states = [line["state"] for line in lines if line["type"] == "volume"]
    assert set(states) == {"unlocking", "waiting"}


def test_console(fake: Fake) -> None:
    started = time.monotonic()
    assert main.main(["console"]) == 0  # "0": not at all

    def boot() -> None:
        fake.objects.export(f"{ROOT}/job/1", Job(Goal="boot", State="running", LastError=""))
        fake.manager.changed(ConsolePromptUSec=60_000_000, ConsoleNeeded=True)

    fake.do(boot)

    def answered() -> None:
        fake.manager.changed(ConsoleNeeded=False)
        fake.objects.unexport(f"{ROOT}/job/1")

    fake.loop.call_soon_threadsafe(fake.loop.call_later, 0.3, answered)
    assert main.main(["console"]) == 0
    assert time.monotonic() - started > 0.3
    fake.do(lambda: fake.manager.changed(ConsolePromptUSec=200_000, ConsoleNeeded=True))
    fake.do(boot)
    fake.do(lambda: fake.manager.changed(ConsolePromptUSec=200_000))
    assert main.main(["console"]) == 0
    assert time.monotonic() - started < 10


# --- changing ---


def test_several_names_are_all_tried(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.errors["Lock", "a"] = BusyError("a is in use by guest imap")
    fake.errors["Lock", "b"] = NotAuthorizedError("no")
    assert main.main(["lock", "a", "b", "c"]) == 4
    # What is in use is tried again: it may have been by one of the others.
    assert fake.calls == [("Lock", "a"), ("Lock", "b"), ("Lock", "c"), ("Lock", "a")]
    assert "a is in use by guest imap" in capsys.readouterr().err
    fake.errors["StartGuest", "x"] = NoSuchGuestError('there is no guest "x"')
    assert main.main(["start", "x"]) == 2
    assert main.main(["lock"]) == 0
    assert fake.calls[-1] == ("LockAll",)


@pytest.mark.parametrize("verb", ["boot", "panic", "reload", "shutdown"])
def test_verbs_without_arguments(verb: str, fake: Fake) -> None:
    assert main.main([verb]) == 0
    assert fake.calls == [(verb.capitalize(),)]


def test_a_refused_configuration(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.errors["Reload",] = ConfigError("vmcryptd.toml: [daemon] x: unknown key")
    assert main.main(["reload"]) == 2
    assert capsys.readouterr().err == "vmcryptctl: vmcryptd.toml: [daemon] x: unknown key\n"


def test_shutdown_without_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(daemon_module, "shutdown_here", lambda: done.append("here"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main.main(["shutdown"]) == 0
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    assert main.main(["shutdown"]) == 0
    assert done == ["here", "here"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("vmcryptd.cli.terminal.is_interactive", lambda: False)
    assert main.main(["shutdown"]) == 5


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_shutdown_with_a_daemon_that_leaves(
    how: str, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(daemon_module, "shutdown_here", lambda: done.append("here"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    if how == "stops":
        fake.errors["Shutdown",] = ShuttingDownError("vmcryptd is stopping")
    else:
        fake.hold.add("Shutdown")

        async def die() -> None:
            while ("Shutdown",) not in fake.calls:
                await asyncio.sleep(0.01)
            await fake.vanish()

        asyncio.run_coroutine_threadsafe(die(), fake.loop)
    assert main.main(["shutdown"]) == 0
    assert done == ["here"]


def test_what_went_wrong_in_a_shutdown_is_not_tried_twice(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "shutdown_here", lambda: pytest.fail("twice"))
    fake.errors["Shutdown",] = BusyError("cr_a is in use")
    assert main.main(["shutdown"]) == 1


def test_a_dead_bus_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "bus"))
        listener.listen()
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
        monkeypatch.setattr("vmcryptd.bus.client.CONNECT_S", 0.2)
        assert main.main(["status"]) == 5
    assert capsys.readouterr().err.count("\n") == 1


# --- locking ---


def test_lock_goes_from_the_top_down(mail: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    low, high, used = (("Lock", name) for name in ("cr_low", "cr_high", "cr_used"))
    mail.errors[low] = BusyError("cr_low is in use by volume cr_high")
    mail.errors[used] = BusyError("cr_used is in use by tail")
    mail.frees[high] = low
    assert main.main(["lock", "cr_low", "cr_high", "cr_used"]) == 1
    assert mail.calls[-6:] == [low, high, used, low, used, used]
    assert capsys.readouterr().err == "vmcryptctl: cr_used is in use by tail\n"
    assert main.main(["lock", "cr_low"]) == 0
    assert main.main(["lock"]) == 0
    assert mail.calls[-1] == ("LockAll",)


# --- unlocking ---


def test_unlock_with_key_file(mail: Fake, tmp_path: Path, capsys: Any) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"aaa")
    assert main.main(["unlock", "--key-file", str(key)]) == 6  # cr_b is left
    assert main.main(["unlock", "cr_b", "--key-file", str(key)]) == 3
    key.write_bytes(b"bbb")
    assert main.main(["unlock", "cr_a", "--key-file", str(key), "cr_b"]) == 0
    assert mail.received[-2:] == [b"bbb", b"bbb"]
    assert main.main(["unlock", "--key-file", str(tmp_path / "none")]) == 2
    capsys.readouterr()
    assert main.main(["unlock", "cr_x", "--key-file", str(key)]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("names", [[], ["cr_a"], ["cr_a", "cr_b"]])
def test_unlock_with_a_key_on_standard_input(mail: Fake, names: list[str]) -> None:
    mail.keys["cr_b"] = b"aaa"
    code = "import sys; from vmcryptd.cli.main import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "unlock", "--key-file", "-", *names]
    done = subprocess.run(argv, cwd=PROJECT, input=b"aaa", check=False)
    assert done.returncode == 0
    assert set(mail.received) == {b"aaa"}


def test_unlock_without_a_terminal_leaves_asking_to_agents(mail: Fake) -> None:
    code = "import sys; from vmcryptd.cli.main import main; sys.exit(main(['unlock', 'cr_a']))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stderr is not None
        assert "waiting for a passphrase for cr_a" in child.stderr.readline()
        mail.do(lambda: mail.set_state("cr_a", "unlocked"))
        assert child.wait(20) == 0
        assert "open now: cr_a" in child.stderr.read()
    assert mail.calls == [("Unlock", "cr_a")]


@needs_ask_password
def test_unlock_asks_once_and_again_for_the_rest(mail: Fake) -> None:
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for cr_a, cr_b:")
    terminal.type("aaa\n")
    terminal.expect("That fitted cr_a. Passphrase for cr_b (/dev/vg/b):")
    terminal.type("xxx\n")
    terminal.expect("That did not fit. Passphrase for cr_b")
    terminal.type("bbb\n")
    terminal.expect("open now: cr_a, cr_b")
    assert terminal.end() == 0
    assert mail.received == [b"aaa", b"xxx", b"bbb"]


@needs_ask_password
def test_unlock_of_several_names_uses_one_answer_for_all(mail: Fake) -> None:
    mail.keys["cr_b"] = b"aaa"
    terminal = Terminal("unlock", "cr_a", "cr_b")
    terminal.expect("Passphrase for cr_a, cr_b:")
    terminal.type("aaa\n")
    terminal.expect("open now: cr_a, cr_b")
    assert terminal.end() == 0
    assert mail.received == [b"aaa", b"aaa"]


@needs_ask_password
def test_unlock_gives_up_after_three_wrong_keys(mail: Fake) -> None:
    terminal = Terminal("unlock", "cr_b")
    for wrong in ("x", "", "z"):
        terminal.expect("Passphrase for cr_b (/dev/vg/b):")
        terminal.type(f"{wrong}\n")
    terminal.expect("fits no key slot of cr_b")
    assert terminal.end() == 3
    assert mail.received == [b"x", b"z"]


@needs_ask_password
def test_unlock_tries_the_other_sources_before_it_asks(fake: Fake) -> None:
    fake.add_volume("cr_k", "locked", b"kkk")
    fake.asks.clear()
    terminal = Terminal("unlock", "cr_k")
    terminal.expect("no key source of cr_k has a key. Passphrase for cr_k")
    terminal.type("kkk\n")
    assert terminal.end() == 0
    assert fake.calls == [("Unlock", "cr_k"), ("WithKey", "cr_k")]


@needs_ask_password
def test_one_question_for_what_comes_to_wait_a_little_later(mail: Fake) -> None:
    mail.do(lambda: mail.set_state("cr_b", "unlocking"))
    mail.loop.call_soon_threadsafe(
        mail.loop.call_later, 0.4, lambda: mail.set_state("cr_b", "waiting")
    )
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for cr_a, cr_b:")
    terminal.type("\x04")
    assert terminal.end() == 6


@needs_ask_password
def test_unlock_with_nothing_waiting_begins_the_boot_set(fake: Fake) -> None:
    fake.add_volume("cr_k", "locked", b"kkk")
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for cr_k")
    terminal.type("kkk\n")
    terminal.expect("open now: cr_k")
    assert terminal.end() == 0
    terminal = Terminal("unlock", "cr_k")
    terminal.expect("cr_k is open already")
    assert terminal.end() == 0
    terminal = Terminal("unlock")
    terminal.expect("nothing is waiting for a key")
    assert terminal.end() == 0


@needs_ask_password
def test_the_question_ends_when_somebody_else_answers(mail: Fake) -> None:
    terminal = Terminal("unlock", "cr_a")
    terminal.expect("Passphrase for cr_a")
    terminal.type("half a passphr")
    mail.do(lambda: mail.set_state("cr_a", "unlocking"))
    mail.do(lambda: mail.set_state("cr_a", "unlocked"))
    terminal.expect("cr_a opened meanwhile; the question is withdrawn")
    assert terminal.end() == 0
    assert mail.received == []


@needs_ask_password
@pytest.mark.parametrize(("keys", "code"), [("\x03", 130), ("\x04", 6)])
def test_interrupted(mail: Fake, keys: str, code: int) -> None:
    terminal = Terminal("unlock")
    terminal.expect("Passphrase for cr_a, cr_b:")
    terminal.type(keys)
    assert terminal.end() == code
    assert "Traceback" not in terminal.seen


# --- the parts ---


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
        (["--verson"], 'there is no option "--verson"'),
        (["key"], '"key" what? One of: list, '),
        (["key", "lst"], 'there is no verb "key lst"; did you mean "key list"?'),
        (["keys"], 'did you mean "key"?'),
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


def test_a_table_fits_a_serial_console() -> None:
    error = "the header of cr_imap_encr is damaged: " + "a sentence that goes on and on " * 4
    lines = render.Page(width=80).status(
        {"State": "degraded", "Waiting": []}, [volume(LastError=error), volume(Name="b")], []
    )
    assert all(len(line) <= 80 for line in lines), lines
    text = "\n".join(lines)
    assert "degraded: not all of the boot set is up (failed: cr_imap_encr)" in text
    assert "by-id" not in text or "..." in text  # the device gave way
    for number in range(6):
        assert f"guest-number-{number}" in text


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
