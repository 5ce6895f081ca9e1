# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon as it is started, on a private bus, with a simulated host behind it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bus.simulated import LONG_S, PROJECT, Ended
from tests.forkserver import PIPE, Forked
from tests.scan_memory import found_in
from vmcryptd import __version__
from vmcryptd.bus import transport
from vmcryptd.bus.transport import Connection, RemoteError, object_path

pytestmark = pytest.mark.bus_library

VMCRYPTD = [sys.executable, "-m", "vmcryptd"]
NAME, ROOT = "org.vmcryptd1", "/org/vmcryptd1"
MANAGER, VOLUME, GUEST, JOB = (f"{NAME}.{kind}" for kind in ("Manager", "Volume", "Guest", "Job"))
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
NOBODY = 65534
ALPHA, BETA = "canary-alpha-7d1f", "canary-beta-93ce"


def opened_by(passphrase: str) -> str:
    return f'passphrase_sha256 = "{hashlib.sha256(passphrase.encode()).hexdigest()}"\n'


HOST = f"""
[daemon]
console_prompt = "90s"

[volume.outer]
device = "/dev/vg/outer"
[sim.volume.outer]
{opened_by(ALPHA)}
[volume."cr-in.ner"]
device = "UUID=3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"
after = ["outer"]
discard = true
[sim.volume."cr-in.ner"]
on = ["outer"]
{opened_by(BETA)}
[volume.quiet]
device = "/dev/vg/quiet"
keys = ["file:/etc/quiet"]
unlock = "manual"
[volume.stuck]
device = "/dev/vg/stuck"
unlock = "manual"
[sim.volume.stuck]
open = true
fault = "busy"
[volume.hungry]
device = "/dev/vg/hungry"
keys = ["file:/etc/hungry"]
unlock = "manual"
[sim.volume.hungry]
sources = ["file:/etc/hungry"]
fault = "out-of-memory"
[volume.plain]
device = "/dev/vg/plain"
unlock = "manual"
[sim.volume.plain]
fault = "not-luks"
[volume.away]
device = "/dev/vg/away"
unlock = "manual"
timeout = "10ms"
[sim.volume.away]
present = false

[sim.guest.imap]
disks = ["/dev/mapper/cr-in.ner"]
autostart = true
[sim.guest.broken]
disks = ["/dev/mapper/outer"]
fault = "no such network"
"""


Process = Forked | subprocess.Popen[str]


class Daemon:
    """A running vmcryptd, and one connection to it."""

    def __init__(self, process: Process, connection: Connection, sim: Path) -> None:
        self.process = process
        self.connection = connection
        self.sim = sim

    async def call(
        self, member: str, signature: str = "", *body: Any, fds: Sequence[int] = (),
        path: str = ROOT, interface: str = MANAGER,
    ) -> Any:  # fmt: skip
        answer = await self.connection.call(
            NAME, path, interface, member, signature, body, timeout_s=20, fds=fds
        )
        return answer[0] if answer else None

    async def get(self, name: str, path: str = ROOT, interface: str = MANAGER) -> Any:
        return await self.call("Get", "ss", interface, name, path=path, interface=PROPERTIES)

    async def volume(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.call(
            "GetAll", "s", VOLUME, path=object_path("volume", name), interface=PROPERTIES
        )
        return found

    async def guest(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.call(
            "GetAll", "s", GUEST, path=object_path("guest", name), interface=PROPERTIES
        )
        return found

    async def unlock(self, name: str, passphrase: str) -> None:
        with handed_in(passphrase.encode()) as fd:
            await self.call("UnlockWithKey", "sh", name, 0, fds=[fd])

    async def refused(self, member: str, *arguments: Any, **more: Any) -> str:
        """The name of the error, without what all of ours begin with."""
        with pytest.raises(RemoteError) as caught:
            await self.call(member, *arguments, **more)
        assert "Traceback" not in caught.value.text
        assert caught.value.text
        return caught.value.name.removeprefix("org.vmcryptd1.Error.")

    async def until(self, predicate: Callable[[], Awaitable[Any]]) -> None:
        while not await predicate():
            await asyncio.sleep(0.005)

    async def state(self, wanted: str) -> None:
        async def reached() -> bool:
            return bool(await self.get("State") == wanted)

        async with asyncio.timeout(120):
            await self.until(reached)

    def descriptors(self) -> int:
        # Without the one for the configuration's files, which the daemon opens at some time after it is ready.
        found = 0
        for entry in os.scandir(f"/proc/{self.process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found += "inotify" not in os.readlink(entry.path)
        return found

    def memory_kib(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("it has no memory")


@contextmanager
def handed_in(content: bytes) -> Iterator[int]:
    reader, writer = os.pipe()
    try:
        os.write(writer, content)
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


Start = Callable[..., Any]


@pytest.fixture
def start(bus_address: str, tmp_path: Path) -> Iterator[Start]:
    """Starts daemons; none of them may leave a traceback or a passphrase in its log."""
    processes: list[Process] = []
    journal = tmp_path / "journal"

    def spawn(text: str, *, alone: bool) -> Path:
        sim = tmp_path / "sim.toml"
        sim.write_text(text)
        with journal.open("ab") as stderr:
            argv = "--sim", str(sim), "--bus", bus_address
            processes.append(
                subprocess.Popen([*VMCRYPTD, *argv], cwd=PROJECT, stderr=stderr, text=True)
                if alone
                else Forked("vmcryptd", *argv, stderr=stderr)
            )
        return sim

    @asynccontextmanager
    async def started(text: str = HOST, *, alone: bool = False) -> AsyncIterator[Daemon]:
        """`alone`: with no memory but its own, for tests that look at it."""
        connection = await transport.connect(bus_address)
        owned = asyncio.Event()
        end = await connection.match(
            lambda signal: owned.set() if signal.body[2] else None,
            sender=transport.DRIVER, member="NameOwnerChanged", arg0=NAME,
        )  # fmt: skip
        sim = spawn(text, alone=alone)
        async with asyncio.timeout(120):
            while not owned.is_set():
                assert processes[-1].poll() is None, journal.read_text()
                await asyncio.sleep(0.01)
        end()
        # It owns its name before it reads its configuration; an answer comes after that.
        peer = (NAME, ROOT, "org.freedesktop.DBus.Peer", "Ping")
        await connection.call(*peer, timeout_s=120)
        try:
            yield Daemon(processes[-1], connection, sim)
        finally:
            await connection.disconnect()

    try:
        yield started
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(10)
    log = journal.read_text() if journal.exists() else ""
    assert "Traceback" not in log
    assert "canary" not in log


def ended(*argv: str) -> Ended:
    """A daemon that ends by itself."""
    with Forked("vmcryptd", *argv, stderr=PIPE) as process:
        out, err = process.communicate(timeout=LONG_S)
    assert "Traceback" not in err
    return Ended(process.wait(), out, err)


Test = Callable[[Daemon], Awaitable[None]]


def with_daemon(
    text: str, *, alone: bool = False
) -> Callable[[Test], Callable[[Start, Any], None]]:
    def decorate(test: Test) -> Callable[[Start, Any], None]:
        def tested(start: Start, run: Any) -> None:
            async def scene() -> None:
                async with start(text, alone=alone) as daemon:
                    await test(daemon)

            run(scene())

        functools.update_wrapper(tested, test)
        del tested.__wrapped__  # type: ignore[attr-defined]
        return tested

    return decorate


# --- the interface ---

SURFACE = {
    ROOT: {
        MANAGER: {
            "Unlock": "s→", "UnlockUnattended": "s→", "UnlockWithKey": "sh→", "UnlockAll": "→",
            "UnlockAllWithKey": "h→",
            "Lock": "s→", "LockAll": "→", "StartGuest": "s→", "StopGuest": "s→", "Boot": "→o",
            "Shutdown": "→", "Panic": "→", "Plan": "s→s", "Reload": "→",
            "ListKeys": "s→s", "TestKey": "sh→x", "AddKey": "shh→x", "RemoveKey": "sxh→",
            "ChangeKey": "shh→x", "BackupHeader": "sh→", "AddKeystoreKey": "ssh→s",
            "RotateKey": "shb→", "StopRotation": "s→", "CreateKeystore": "sha{sv}→o",
            "State": "s", "Waiting": "as", "Off": "as", "LastError": "s", "Version": "s",
            "ConsoleNeeded": "b", "ConsolePromptUSec": "x", "HeldKeys": "aa{ss}",
            "ConfigChanged": "b",
        },
        OBJECT_MANAGER: {"GetManagedObjects": "→a{oa{sa{sv}}}"},
    },
    object_path("volume", "outer"): {
        VOLUME: {
            "Name": "s", "Device": "s", "Uuid": "s", "State": "s", "KeySource": "s",
            "Discard": "b", "NeededBy": "as", "HeaderBackupDue": "b", "Rotation": "s", "LastError": "s",
        },
    },
    object_path("guest", "imap"): {
        GUEST: {"Name": "s", "State": "s", "Needs": "as", "StartsAtBoot": "b", "LastError": "s"},
    },
    f"{ROOT}/job/1": {JOB: {"Goal": "s", "State": "s", "Progress": "d", "LastError": "s", "ErrorName": "s"}},
}  # fmt: skip


@with_daemon(HOST)
async def test_the_interface_is_what_it_was(daemon: Daemon) -> None:
    assert await daemon.call("Boot") == f"{ROOT}/job/1"
    for path, interfaces in SURFACE.items():
        text = await daemon.call(
            "Introspect", path=path, interface="org.freedesktop.DBus.Introspectable"
        )
        found: dict[str, dict[str, str]] = {}
        for interface in ET.fromstring(text).iter("interface"):
            members = found.setdefault(interface.attrib["name"], {})
            for method in interface.iter("method"):
                kinds: dict[str, str] = {"in": "", "out": ""}
                for argument in method.iter("arg"):
                    kinds[argument.attrib["direction"]] += argument.attrib["type"]
                members[method.attrib["name"]] = f"{kinds['in']}→{kinds['out']}"
            for prop in interface.iter("property"):
                members[prop.attrib["name"]] = prop.attrib["type"]
                assert prop.attrib["access"] == "read"
        for name, members in interfaces.items():
            assert found[name] == members


@with_daemon(
    f"""
[daemon]
key_cache = "infinity"
[volume.a]
device = "/dev/a"
[sim.volume.a]
{opened_by(ALPHA)}
"""
)
async def test_keys_that_are_held(daemon: Daemon) -> None:
    with handed_in(ALPHA.encode()) as fd:
        await daemon.call("UnlockAllWithKey", "h", 0, fds=[fd])
    held = [{"source": "key", "volumes": "", "until": "infinity"}]
    assert await daemon.get("HeldKeys") == held
    await daemon.call("LockAll")
    assert await daemon.get("HeldKeys") == []


@with_daemon(HOST)
async def test_properties(daemon: Daemon) -> None:
    assert await daemon.call("GetAll", "s", MANAGER, interface=PROPERTIES) == {
        "State": "locked", "Waiting": [], "Off": ["imap"], "LastError": "", "Version": __version__,
        "ConsoleNeeded": False, "ConsolePromptUSec": 90_000_000, "HeldKeys": [], "ConfigChanged": False,
    }  # fmt: skip
    assert await daemon.volume("outer") == {
        "Name": "outer", "Device": "/dev/vg/outer", "Uuid": "", "State": "locked", "KeySource": "",
        "Discard": False, "NeededBy": ["cr-in.ner", "broken"], "HeaderBackupDue": False, "Rotation": "",
        "LastError": "",
    }  # fmt: skip
    assert await daemon.guest("imap") == {
        "Name": "imap", "State": "off", "Needs": ["cr-in.ner"], "StartsAtBoot": True, "LastError": "",
    }  # fmt: skip
    assert (await daemon.volume("stuck"))["State"] == "unlocked"
    await daemon.unlock("outer", ALPHA)
    after = await daemon.volume("outer")
    assert (after["State"], after["KeySource"]) == ("unlocked", "key")
    assert after["Uuid"]


# --- the verbs ---


@with_daemon(HOST)
async def test_from_boot_to_shutdown(daemon: Daemon) -> None:
    job = await daemon.call("Boot")
    assert await daemon.get("Goal", path=job, interface=JOB) == "boot"
    await daemon.state("waiting")
    assert await daemon.get("Waiting") == ["outer"]
    assert await daemon.get("ConsoleNeeded") is True
    await daemon.unlock("outer", ALPHA)
    with handed_in(BETA.encode()) as fd:
        await daemon.call("UnlockAllWithKey", "h", 0, fds=[fd])
    await daemon.state("ready")
    assert (await daemon.guest("imap"))["State"] == "running"
    assert (await daemon.volume("cr-in.ner"))["KeySource"] == "key"
    with pytest.raises(RemoteError):
        await daemon.get("Goal", path=job, interface=JOB)
    assert await daemon.refused("Lock", "s", "outer") == "Busy"
    await daemon.call("StopGuest", "s", "imap")
    await daemon.call("StartGuest", "s", "imap")
    assert await daemon.refused("Shutdown") == "Busy"  # one of them is stuck
    assert {(await daemon.volume(name))["State"] for name in ("outer", "cr-in.ner")} == {"locked"}
    assert (await daemon.guest("imap"))["State"] == "off"


@with_daemon(HOST)
async def test_callers_without_a_key_wait_for_who_has_one(daemon: Daemon) -> None:
    waiting = [asyncio.ensure_future(daemon.call("Unlock", "s", "outer")) for _ in range(3)]
    waiting.append(asyncio.ensure_future(daemon.call("UnlockAll")))
    await daemon.state("waiting")
    await daemon.unlock("outer", ALPHA)
    await daemon.unlock("cr-in.ner", BETA)
    await asyncio.gather(*waiting)


@with_daemon(HOST)
async def test_panic(daemon: Daemon) -> None:
    await daemon.unlock("outer", ALPHA)
    waiting = asyncio.ensure_future(daemon.refused("UnlockAll"))
    await daemon.state("waiting")
    assert await daemon.refused("Panic") == "Busy"
    assert await waiting == "Cancelled"
    assert (await daemon.volume("stuck"))["State"] == "suspended"
    assert (await daemon.volume("outer"))["State"] == "locked"


@with_daemon(HOST.replace('fault = "busy"', ""))
async def test_lock(daemon: Daemon) -> None:
    await daemon.unlock("outer", ALPHA)
    await daemon.call("Lock", "s", "outer")
    await daemon.call("Lock", "s", "outer")
    await daemon.unlock("outer", ALPHA)
    await daemon.call("LockAll")
    assert (await daemon.volume("outer"))["State"] == "locked"
    await daemon.call("Panic")
    await daemon.call("Shutdown")


@with_daemon(HOST)
async def test_plans(daemon: Daemon) -> None:
    plan = json.loads(await daemon.call("Plan", "s", "boot"))
    assert plan["goal"] == "boot"
    assert [(step["action"], step["object"], step["after"]) for step in plan["steps"]] == [
        ("unlock", "outer", []),
        ("unlock", "cr-in.ner", ["unlock:outer"]),
        ("start", "imap", ["unlock:cr-in.ner"]),
    ]
    assert all(set(step) == {"action", "object", "after", "reason"} for step in plan["steps"])
    for goal in ("shutdown", "unlock:outer", "lock:outer", "start:imap"):
        assert json.loads(await daemon.call("Plan", "s", goal))["goal"] == goal
    assert await daemon.refused("Plan", "s", "nonsense") == "InvalidGoal"
    assert await daemon.refused("Plan", "s", "unlock:x") == "NoSuchVolume"
    assert await daemon.refused("Plan", "s", "start:x") == "NoSuchGuest"
    assert await daemon.get("State") == "locked"


# --- what can go wrong ---


@with_daemon(HOST)
async def test_each_failure_has_its_name(daemon: Daemon) -> None:
    for member in ("Unlock", "Lock"):
        assert await daemon.refused(member, "s", "outr") == "NoSuchVolume"
    for member in ("StartGuest", "StopGuest"):
        assert await daemon.refused(member, "s", "imab") == "NoSuchGuest"
    assert await daemon.refused("Unlock", "s", "quiet") == "KeyUnavailable"
    assert await daemon.refused("Unlock", "s", "plain") == "NotLuks"
    assert await daemon.refused("Unlock", "s", "away") == "DeviceMissing"
    assert await daemon.refused("Unlock", "s", "hungry") == "OutOfMemory"
    assert await daemon.refused("Lock", "s", "stuck") == "Busy"
    assert (await daemon.volume("away"))["State"] == "missing"
    assert (await daemon.volume("plain"))["State"] == "failed"
    assert "no sound LUKS header" in (await daemon.volume("plain"))["LastError"]
    await daemon.unlock("outer", ALPHA)
    assert await daemon.refused("StartGuest", "s", "broken") == "GuestFailed"
    with handed_in(b"wrong") as fd:
        assert await daemon.refused("UnlockWithKey", "sh", "cr-in.ner", 0, fds=[fd]) == "WrongKey"
    with handed_in(b"wrong") as fd:
        assert await daemon.refused("UnlockAllWithKey", "h", 0, fds=[fd]) == "WrongKey"
    with handed_in(b"wrong") as fd:
        assert await daemon.refused("UnlockWithKey", "sh", "x", 0, fds=[fd]) == "NoSuchVolume"


@with_daemon(
    HOST
    + """
[sim.guest.web]
disks = ["/dev/vg/web"]
[sim.guest.web2]
disks = []
"""
)
async def test_guests_without_a_volume_of_ours_are_left_alone(daemon: Daemon) -> None:
    for member in ("StartGuest", "StopGuest"):
        for guest in ("web", "web2"):
            with pytest.raises(RemoteError) as caught:
                await daemon.call(member, "s", guest)
            assert caught.value.name == "org.vmcryptd1.Error.NoVolume"
            assert caught.value.text.startswith(f"guest {guest}: it needs no configured volume")
            assert (await daemon.guest(guest))["State"] == "off"


@with_daemon(HOST)
async def test_what_callers_send_forges_no_line(daemon: Daemon) -> None:
    for text in ("x\nvmcryptd: all is well", "\x1b[2Jx", "\u202egnp"):
        for member in ("Unlock", "StartGuest", "Plan", "ListKeys"):
            with pytest.raises(RemoteError) as caught:
                await daemon.call(member, "s", text)
            assert caught.value.text.isprintable()


@with_daemon(HOST + "[sim]\nlibvirt = false\n")
async def test_without_libvirt(daemon: Daemon) -> None:
    assert await daemon.refused("StartGuest", "s", "imap") == "NoSuchGuest"


@with_daemon(HOST)
async def test_descriptors_of_every_kind(daemon: Daemon) -> None:
    before = daemon.descriptors()

    async def refused(fd: int) -> str:
        return await daemon.refused("UnlockWithKey", "sh", "outer", 0, fds=[fd])

    with daemon.sim.with_name("key").open("w+b") as file:
        assert await refused(file.fileno()) == "KeyUnusable"  # empty
        file.truncate(8 * 1024 * 1024 + 1)
        assert await refused(file.fileno()) == "KeyUnusable"
        file.truncate(0)
        file.seek(0)
        file.write(ALPHA.encode() + b"\n")
        file.seek(0)
        assert await refused(file.fileno()) == "WrongKey"  # the newline is part of it
    directory = os.open("/", os.O_RDONLY)
    assert await refused(directory) == "KeyUnusable"
    os.close(directory)
    zero = os.open("/dev/zero", os.O_RDONLY)
    assert await refused(zero) == "KeyUnusable"
    os.close(zero)
    with handed_in(b"") as fd:
        assert await refused(fd) == "KeyUnusable"
    # A call that never ends delays no other.
    reader, writer = os.pipe()
    master, slave = pty.openpty()
    hanging = [asyncio.ensure_future(daemon.call("UnlockWithKey", "sh", "outer", 0, fds=[fd]))
               for fd in (reader, slave)]  # fmt: skip
    path = daemon.sim.with_name("key")
    path.write_text(ALPHA)
    with path.open("rb") as source:
        await daemon.call("UnlockWithKey", "sh", "outer", 0, fds=[source.fileno()])
    for fd in (writer, reader, master, slave):
        os.close(fd)
    results = await asyncio.gather(*hanging, return_exceptions=True)
    assert all(isinstance(result, RemoteError) for result in results)

    async def closed() -> bool:
        return daemon.descriptors() == before

    await daemon.until(closed)


@with_daemon(HOST)
async def test_arguments_that_do_not_fit(daemon: Daemon) -> None:
    standard = "org.freedesktop.DBus.Error."
    assert await daemon.refused("Unlock", "u", 3) == standard + "InvalidArgs"
    assert await daemon.refused("Unlock") == standard + "InvalidArgs"
    assert await daemon.refused("UnlockWithKey", "sh", "outer", 5) == standard + "InvalidArgs"
    assert await daemon.refused("Explode") == standard + "UnknownMethod"
    assert await daemon.refused("Unlock", "s", "x", path="/nowhere") == standard + "UnknownObject"
    assert (
        await daemon.refused(
            "Set", "ssv", MANAGER, "State", transport.Typed("s", "x"), interface=PROPERTIES
        )
        == standard + "PropertyReadOnly"
    )


@with_daemon(HOST, alone=True)
async def test_a_flood_of_malformed_calls_leaves_nothing_behind(daemon: Daemon) -> None:
    """Each with a descriptor: one for an unknown name, one of a wrong type, one without a receiver."""
    peer = "org.freedesktop.DBus.Peer"
    with handed_in(b"x") as fd:

        async def flood(count: int) -> None:
            for _ in range(count // 40):
                calls: list[Awaitable[Any]] = []
                for _ in range(10):
                    calls += [
                        daemon.call("UnlockWithKey", "sh", "nowhere", 0, fds=[fd]),
                        daemon.call("UnlockWithKey", "hs", 0, "outer", fds=[fd]),
                        daemon.call("Explode", "h", 0, fds=[fd]),
                        daemon.call("Ping", "", interface=peer, fds=[fd]),
                    ]
                await asyncio.gather(*calls, return_exceptions=True)

        await flood(800)
        descriptors, memory = daemon.descriptors(), daemon.memory_kib()
        await flood(2400)
        assert daemon.descriptors() == descriptors
        assert daemon.memory_kib() - memory < 3000
    assert await daemon.get("State") == "locked"


# --- followers ---


async def follow(daemon: Daemon) -> dict[str, dict[str, dict[str, Any]]]:
    """What a client knows that listens to signals only; from an empty beginning on."""
    known: dict[str, dict[str, dict[str, Any]]] = {}

    def added(signal: transport.Signal) -> None:
        known[signal.body[0]] = signal.body[1]

    def removed(signal: transport.Signal) -> None:
        del known[signal.body[0]]

    def changed(signal: transport.Signal) -> None:
        if signal.path in known:
            known[signal.path][signal.body[0]].update(signal.body[1])

    await daemon.connection.match(added, sender=NAME, member="InterfacesAdded")
    await daemon.connection.match(removed, sender=NAME, member="InterfacesRemoved")
    await daemon.connection.match(changed, sender=NAME, member="PropertiesChanged")
    known |= await daemon.call("GetManagedObjects", interface=OBJECT_MANAGER)
    return known


@with_daemon(HOST)
async def test_who_follows_the_signals_knows_it_all(daemon: Daemon) -> None:
    known = await follow(daemon)
    assert set(known) == {
        *(object_path("volume", n)
          for n in ("outer", "cr-in.ner", "quiet", "stuck", "hungry", "plain", "away")),
        object_path("guest", "imap"), object_path("guest", "broken"),
    }  # fmt: skip
    seen = []

    async def same() -> None:
        current = await daemon.call("GetManagedObjects", interface=OBJECT_MANAGER)
        assert known == current
        seen.append(json.dumps(current, sort_keys=True))

    await daemon.call("Boot")
    await daemon.state("waiting")
    await same()
    await daemon.unlock("outer", ALPHA)
    await same()
    await daemon.refused("StartGuest", "s", "broken")
    await same()
    await daemon.unlock("cr-in.ner", BETA)
    await daemon.state("ready")
    await same()
    daemon.sim.write_text(
        HOST.replace("[volume.quiet]", "[volume.loud]").replace("/dev/vg/quiet", "/x")
    )
    await daemon.call("Reload")
    await same()
    await daemon.refused("Shutdown")
    await same()
    assert len(set(seen)) == len(seen)
    assert object_path("volume", "loud") in known


@with_daemon(HOST)
async def test_a_bad_configuration_is_refused_and_the_old_one_kept(daemon: Daemon) -> None:
    objects = await daemon.call("GetManagedObjects", interface=OBJECT_MANAGER)
    circle = HOST.replace('device = "/dev/vg/outer"', 'device = "/x"\nafter = ["cr-in.ner"]')
    for text in (
        HOST + "[volume.x]\ndevise = 3\n",
        "[",
        circle,
        HOST + '[sim.volume.quiet]\ndelay = "x"\n',
    ):
        daemon.sim.write_text(text)
        with pytest.raises(RemoteError) as caught:
            await daemon.call("Reload")
        assert caught.value.name == "org.vmcryptd1.Error.Config"
        assert str(daemon.sim) in caught.value.text or "circle" in caught.value.text
        assert await daemon.call("GetManagedObjects", interface=OBJECT_MANAGER) == objects
    daemon.sim.write_text("")
    await daemon.call("Reload")
    assert await daemon.call("Plan", "s", "boot") == '{"goal": "boot", "steps": []}'


@with_daemon(HOST)
async def test_files_that_differ_from_what_runs_are_shown(daemon: Daemon) -> None:
    async def shown(expected: bool) -> None:
        async def is_so() -> bool:
            return bool(await daemon.get("ConfigChanged")) is expected

        await daemon.until(is_so)

    await shown(False)
    daemon.sim.write_text(HOST + "# a comment\n")
    await shown(True)
    daemon.sim.write_text(HOST)
    await shown(False)
    daemon.sim.write_text("[")
    await shown(True)
    with pytest.raises(RemoteError):
        await daemon.call("Reload")
    assert await daemon.get("ConfigChanged") is True
    daemon.sim.unlink()
    daemon.sim.write_text(HOST + "# another comment\n")
    await daemon.call("Reload")
    assert await daemon.get("ConfigChanged") is False
    daemon.sim.unlink()
    await shown(True)


# --- who may ---

CHANGING = (
    ("Unlock", "s", ("quiet",)), ("UnlockUnattended", "s", ("quiet",)),
    ("UnlockWithKey", "sh", ("outer", 0)), ("UnlockAll", "", ()), ("UnlockAllWithKey", "h", (0,)),
    ("Lock", "s", ("stuck",)), ("LockAll", "", ()),
    ("StartGuest", "s", ("imap",)), ("StopGuest", "s", ("imap",)), ("Boot", "", ()),
    ("Shutdown", "", ()), ("Panic", "", ()), ("Reload", "", ()), ("TestKey", "sh", ("outer", 0)),
    ("AddKey", "shh", ("outer", 0, 1)), ("RemoveKey", "sxh", ("outer", 0, 0)),
    ("ChangeKey", "shh", ("outer", 0, 1)), ("BackupHeader", "sh", ("outer", 0)),
    ("RotateKey", "shb", ("outer", 0, False)), ("StopRotation", "s", ("outer",)),
    ("AddKeystoreKey", "ssh", ("outer", "quiet", 0)),
)  # fmt: skip


def as_nobody(address: str) -> dict[str, Any]:
    """Become an unprivileged caller; what it gets to see: the answer or error to each call."""

    async def ask() -> dict[str, Any]:
        connection = await transport.connect(address)
        found: dict[str, Any] = {}

        async def one(
            key: str, path: str, interface: str, member: str, signature: str, body: Any
        ) -> None:
            with handed_in(ALPHA.encode()) as fd:
                try:
                    found[key] = await connection.call(
                        NAME, path, interface, member, signature, body, timeout_s=10,
                        fds=[fd] * signature.count("h"),
                    )  # fmt: skip
                except RemoteError as error:
                    found[key] = f"{error.name}: {error.text}"

        for member, signature, body in CHANGING:
            await one(member, ROOT, MANAGER, member, signature, body)
        await one("State", ROOT, PROPERTIES, "Get", "ss", [MANAGER, "State"])
        await one("Plan", ROOT, MANAGER, "Plan", "s", ["boot"])
        await one("Objects", ROOT, OBJECT_MANAGER, "GetManagedObjects", "", [])
        await connection.disconnect()
        return found

    # All is imported by now: a user of no importance may not be able to read this checkout.
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return asyncio.run(ask())


STRANGER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("test_service", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["test_service"] = module
spec.loader.exec_module(module)
print(json.dumps(module.as_nobody(sys.argv[2])))
"""


async def stranger(address: str) -> dict[str, Any]:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", STRANGER, __file__, address],
        cwd=PROJECT, stdout=subprocess.PIPE, timeout=LONG_S, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user on the bus")
def test_who_is_not_authorised_may_look_but_not_touch(
    start: Start, run: Any, bus_address: str
) -> None:
    async def test() -> None:
        async with start(HOST) as daemon:
            before = await daemon.call("GetManagedObjects", interface=OBJECT_MANAGER)
            changes: list[transport.Signal] = []
            await daemon.connection.match(changes.append, sender=NAME)
            descriptors = daemon.descriptors()
            found = await stranger(bus_address)
            for member, _, _ in CHANGING:
                assert found[member].startswith("org.vmcryptd1.Error.NotAuthorized: "), member
            assert found["State"] == ["locked"]
            assert json.loads(found["Plan"][0])["goal"] == "boot"
            assert found["Objects"] == [before]
            # Nothing began to happen for it: no key was tried, no job was there.
            assert await daemon.call("GetManagedObjects", interface=OBJECT_MANAGER) == before
            assert changes == []
            assert daemon.descriptors() == descriptors

    run(test())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user on the bus")
def test_polkit_decides_by_action(start: Start, run: Any, bus_address: str) -> None:
    async def test() -> None:
        asked: list[tuple[str, int]] = []
        messages: list[tuple[str, str | None]] = []
        polkit = await transport.connect(bus_address)

        def decide(call: transport.Call) -> None:
            asked.append((call.body[1], call.body[3]))
            messages.append((call.body[2]["polkit.message"], call.body[2].get("volume")))
            polkit.reply(call, "(bba{ss})", [[call.body[1] == f"{NAME}.lock", False, {}]])

        polkit.on_call = decide
        await polkit.request_name("org.freedesktop.PolicyKit1")
        async with start(HOST) as daemon:
            found = await stranger(bus_address)
            allowed = {member for member, _, _ in CHANGING
                       if "NotAuthorized" not in str(found[member])}  # fmt: skip
            # Boot and Shutdown start and stop guests: the right to volumes is not enough for them.
            assert allowed == {"Lock", "LockAll"}
            assert asked == [
                (f"{NAME}.{action}", 0)
                for action in (*["unlock"] * 5, "lock", "lock", "guests",
                               "guests", "unlock", "lock", "guests", "panic", "reload", *["keys"] * 8)
            ]  # fmt: skip
            texts = [text for text, _ in messages]
            assert all(text.startswith("Authentication is required to ") for text in texts)
            assert ("Authentication is required to unlock volume $(volume)", "quiet") in messages
            assert await daemon.get("State") == "locked"
        await polkit.disconnect()

    run(test())


# --- the process ---


@with_daemon(HOST)
async def test_a_polite_end_answers_everybody(daemon: Daemon) -> None:
    waiting = [asyncio.ensure_future(daemon.refused("Unlock", "s", "outer")) for _ in range(5)]
    await daemon.state("waiting")
    daemon.process.send_signal(signal.SIGTERM)
    assert await asyncio.gather(*waiting) == ["ShuttingDown"] * 5
    assert await asyncio.to_thread(daemon.process.wait, 10) == 0


def test_a_killed_daemon_comes_again(start: Start, run: Any) -> None:
    async def test() -> None:
        async with start(HOST) as daemon:
            waiting = asyncio.ensure_future(daemon.call("Unlock", "s", "outer"))
            await daemon.state("waiting")
            daemon.process.kill()
            await asyncio.to_thread(daemon.process.wait, 10)
            with pytest.raises(RemoteError, match="NoReply"):
                await waiting
            async with start(HOST) as again:
                await again.unlock("outer", ALPHA)

    run(test())


def test_a_second_daemon_touches_nothing(start: Start, run: Any, bus_address: str) -> None:
    async def test() -> None:
        async with start(HOST) as daemon:
            for sim in (daemon.sim, daemon.sim.with_name("not-there")):
                # It does not even read its configuration, which the engine is built from.
                second = await asyncio.to_thread(ended, "--sim", str(sim), "--bus", bus_address)
                assert second.code == 1
                assert "the bus name org.vmcryptd1 is taken" in second.err
            assert await daemon.get("State") == "locked"

    run(test())


@pytest.mark.parametrize(
    ("text", "said"),
    [("[", "not valid TOML"), ("[deamon]", "did you mean"), (None, "cannot be read")],
)
def test_a_bad_configuration_is_reported_at_the_start(
    text: str | None, said: str, tmp_path: Path, bus_address: str
) -> None:
    sim = tmp_path / "sim.toml"
    if text is not None:
        sim.write_text(text)
    done = ended("--sim", str(sim), "--bus", bus_address)
    assert done.code == 2
    assert said in done.err


def test_each_mistake_is_a_line_of_the_journal(tmp_path: Path, bus_address: str) -> None:
    sim = tmp_path / "sim.toml"
    sim.write_text('[deamon]\n[volume.a]\ndevise = "/dev/a"\n')
    done = ended("--sim", str(sim), "--bus", bus_address)
    assert done.code == 2
    assert [line for line in done.err.splitlines() if "did you mean" in line] == [
        (
            f'ERROR: {sim}: [deamon]: unknown table (did you mean "daemon"?); '
            "expected [daemon], [volume.NAME] or [guest.NAME]"
        ),
        f'ERROR: {sim}: [volume.a] devise: unknown key (did you mean "device"?)',
    ]
    assert "`vmcryptctl check` says what to write" in done.err


def test_passphrases_are_not_in_the_memory_of_the_daemon(start: Start, run: Any) -> None:
    async def test() -> None:
        async with start(HOST, alone=True) as daemon:
            for _ in range(3):
                await daemon.unlock("outer", ALPHA)
                await daemon.call("Lock", "s", "outer")
            with handed_in(b"canary-wrong-1a2b") as fd:
                assert (
                    await daemon.refused("UnlockWithKey", "sh", "outer", 0, fds=[fd]) == "WrongKey"
                )
            assert found_in(daemon.process.pid, b"org.vmcryptd1")
            assert found_in(daemon.process.pid, b"canary-") == []

    run(test())
