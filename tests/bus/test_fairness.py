# SPDX-License-Identifier: LGPL-2.1-or-later
"""One user does what it can to keep the others waiting: the daemon as it is started, and real users."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bus.test_service import (
    HOST,
    MANAGER,
    NAME,
    NOBODY,
    OBJECT_MANAGER,
    PROJECT,
    PROPERTIES,
    ROOT,
    Start,
    start,
)  # fmt: skip
from vmcryptd.bus import transport
from vmcryptd.bus.admission import MAX_UNREAD
from vmcryptd.bus.objects import MAX_PENDING

__all__ = ["start"]

pytestmark = [
    pytest.mark.bus_library,
    pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user on the bus"),
]
FLOODER = str(Path(__file__).with_name("flooder.py"))
EVERYTHING = (ROOT, OBJECT_MANAGER, "GetManagedObjects")
DAEMON = 1  # dbus-daemon lets in who is in passwd


class Flood:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def answers(self) -> int:
        """How many the flooder has got so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"?\n")
        return int(await self._process.stdout.readline())


@asynccontextmanager
async def flood(
    address: str, *message: str, mode: str = "reads", connections: int = 8, uid: int = NOBODY
) -> AsyncIterator[Flood]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, FLOODER, mode, address, str(uid), str(connections), *message,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield Flood(process)
        assert process.returncode is None
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize(
    "message",
    [(ROOT, MANAGER, "Plan", "boot"), EVERYTHING, (ROOT, MANAGER, "Nothing"),
     (ROOT, MANAGER, "ListKeys", "outer"), (ROOT, MANAGER, "Unlock", "outer")],
    ids=lambda message: message[2],
)  # fmt: skip
def test_a_flood_keeps_nobody_else_waiting(
    start: Start, run: Any, bus_address: str, message: tuple[str, ...]
) -> None:
    async def test() -> None:
        async with start(HOST) as daemon, flood(bus_address, *message) as attack:
            before = await attack.answers()
            for _ in range(10):
                assert await daemon.get("State") == "locked"
                # The name of a new connection's user has to be asked of the same bus.
                root = await transport.connect(bus_address)
                assert await daemon.call("Plan", "s", "shutdown")
                await root.disconnect()
            # In the order of arrival each of the 20 calls would have come after almost 1000 of these.
            assert await attack.answers() - before < 20 * 120

    run(test())


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where the daemons that are started after this tell that they are alive, ten times a second."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        yield listener


def test_the_daemon_is_alive_in_a_flood(
    systemd: socket.socket, start: Start, run: Any, bus_address: str
) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with (
            start(HOST),
            flood(bus_address, ROOT, MANAGER, "Plan", "boot", connections=32) as attack,
        ):
            before, beats = await attack.answers(), 0
            while beats < 10:  # it would never come to this while the flood lasts
                beats += b"WATCHDOG=1" in await loop.sock_recv(systemd, 1000)
            while await attack.answers() == before:
                pass  # the flooder has its share, too

    run(test())


def test_answers_that_are_not_read_do_not_fill_the_bus(
    start: Start, run: Any, bus_address: str
) -> None:
    """The bus keeps them on our account, and takes nothing more from us when that is used up."""

    async def test() -> None:
        async with (
            start(HOST) as daemon,
            flood(bus_address, *EVERYTHING, mode="deaf", connections=4) as attack,
        ):

            async def unread() -> int:
                """Bytes that the bus has from the daemon and could not hand on."""
                [stats] = await daemon.connection.call(
                    transport.DRIVER, transport.DRIVER_PATH, transport.DRIVER + ".Debug.Stats",
                    "GetConnectionStats", "s", [NAME], timeout_s=60,
                )  # fmt: skip
                size: int = stats["IncomingBytes"]
                return size

            while await unread() < MAX_UNREAD // 2:  # its sockets hold some, too
                await attack.answers()  # it calls on, and reads none
            for _ in range(20):
                await attack.answers()
                for _ in range(10):
                    assert await daemon.get("State") == "locked"
            assert await unread() < 2 * MAX_UNREAD

    run(test())


def test_one_user_cannot_use_up_what_polkit_may_be_asked(
    start: Start, run: Any, bus_address: str
) -> None:
    """dbus-daemon allows the daemon 128 calls without an answer: two connections used them up."""

    async def test() -> None:
        polkit = await transport.connect(bus_address)
        asked: asyncio.Queue[transport.Call] = asyncio.Queue()
        polkit.on_call = asked.put_nowait
        await polkit.request_name("org.freedesktop.PolicyKit1")
        unlock = (ROOT, MANAGER, "Unlock", "outer")
        async with start(HOST), flood(bus_address, *unlock, connections=4):
            first = [await asked.get() for _ in range(MAX_PENDING)]
            names = {call.body[0][1]["name"] for call in first}
            async with flood(bus_address, *unlock, connections=1, uid=DAEMON):
                other = await asked.get()
                assert other.body[0][1]["name"] not in names
        await polkit.disconnect()

    run(test())


def test_arguments_of_key_sources_are_for_root(start: Start, run: Any, bus_address: str) -> None:
    token = "t0p-s3cret"
    text = f"""
[volume.cloud]
device = "/dev/vg/cloud"
keys = ["exec:/usr/bin/fetch --token={token}", "file:/etc/{token}"]
[sim.volume.cloud]
sources = ["file:/etc/{token}"]
[volume.gone]
device = "/dev/vg/gone"
keys = ["file:/etc/{token}/gone"]
[sim.volume.gone]
sources = []
"""

    async def test() -> None:
        async with start(text) as daemon:
            changes: list[transport.Signal] = []
            await daemon.connection.match(changes.append, sender=NAME)
            job = await daemon.call("Boot")
            assert job.startswith(f"{ROOT}/job/")
            await daemon.refused("UnlockAll")
            assert token in (await daemon.volume("gone"))["LastError"]
            assert token in await daemon.call("ListKeys", "s", "cloud")
            asking = await asyncio.create_subprocess_exec(
                sys.executable, "-c", NOSY, bus_address, str(NOBODY), cwd=PROJECT,
                stdout=subprocess.PIPE,
            )  # fmt: skip
            said, _ = await asking.communicate()
            shown = said.decode() + str(changes)
            assert '"sources": ["exec", "file"]' in shown
            assert "'KeySource': 'file'" in shown
            assert "volume gone: none of its key sources opened it: file: " in shown
            assert token not in shown

    run(test())


# Prints all that a user without rights can get to see.
NOSY = f"""
import asyncio, os, sys
from vmcryptd.bus import transport
uid = int(sys.argv[2])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
async def main():
    connection = await transport.connect(sys.argv[1])
    for interface, member, *arguments in (
        ("{OBJECT_MANAGER}", "GetManagedObjects"), ("{PROPERTIES}", "GetAll", "{MANAGER}"),
        ("{MANAGER}", "ListKeys", "cloud"), ("{MANAGER}", "Plan", "boot"),
        ("{MANAGER}", "Unlock", "cloud"),
    ):
        try:
            print(*await connection.call(
                "{NAME}", "{ROOT}", interface, member, "s" * len(arguments), arguments, timeout_s=60))
        except transport.RemoteError as error:
            print(error)
    await connection.disconnect()
asyncio.run(main())
"""
