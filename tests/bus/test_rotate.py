# SPDX-License-Identifier: LGPL-2.1-or-later
"""A new volume key, over the bus and on the command line, on a daemon with a simulated host behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from tests.bus.simulated import Terminal
from tests.bus.test_keys import ALPHA, BETA, call, ctl, refused
from tests.bus.test_service import (
    JOB,
    OBJECT_MANAGER,
    Daemon,
    opened_by,
    start,
    with_daemon,
)
from tests.scan_memory import found_in

__all__ = ["start"]  # a fixture

HOST = f"""
[volume.mail]
device = "/dev/vg/mail"
[sim.volume.mail]
open = true
rotates_in = "infinity"
{opened_by(ALPHA)}
[volume.one]
device = "/dev/vg/one"
[sim.volume.one]
open = true
rotates_in = "0.3s"
{opened_by(ALPHA)}
[volume.two]
device = "/dev/vg/two"
[sim.volume.two]
open = true
rotates_in = "0.3s"
{opened_by(ALPHA)}
[[sim.volume.two.slots]]
{opened_by(BETA)}
[volume.half]
device = "/dev/vg/half"
[sim.volume.half]
open = true
half_rotated = true
rotates_in = "0.3s"
{opened_by(ALPHA)}
"""


async def jobs(daemon: Daemon) -> dict[str, float]:
    objects = await daemon.call("GetManagedObjects", interface=OBJECT_MANAGER)
    shown = [interfaces[JOB] for interfaces in objects.values() if JOB in interfaces]
    return {job["Goal"]: job["Progress"] for job in shown}


@contextlib.asynccontextmanager
async def rotating(daemon: Daemon) -> AsyncIterator[asyncio.Future[Any]]:
    """While the volume mail is being rotated; gives the call of who asked for it."""
    arguments = "RotateKey", "shb", "mail", 0, False
    asked = asyncio.ensure_future(refused(daemon, *arguments, keys=[ALPHA]))
    await begun(daemon)
    yield asked
    await daemon.call("StopRotation", "s", "mail")
    assert await asked == "Cancelled"


async def begun(daemon: Daemon) -> None:
    async def is_begun() -> bool:
        return await jobs(daemon) == {"rotate:mail": 0.25}

    async with asyncio.timeout(60):
        await daemon.until(is_begun)


@with_daemon(HOST)
async def test_a_second_one_is_refused_before_anybody_types(daemon: Daemon) -> None:
    async with rotating(daemon):
        shown = await ctl("key", "rotate", "mail")
        assert (shown.code, "is being rotated already" in shown.err) == (1, True), shown.err


@with_daemon(HOST)
async def test_it_is_shown_while_it_lasts(daemon: Daemon) -> None:
    before = daemon.descriptors()
    async with rotating(daemon):
        assert (await daemon.volume("mail"))["Rotation"] == "running"
        assert (await daemon.volume("one"))["Rotation"] == ""
        shown = await ctl("status", "mail")
        assert "its volume key is being rotated: 25 %\n" in shown.out
        assert "no backup of it" not in shown.out  # none can be made now
        volumes = json.loads((await ctl("status", "--json")).out)["volumes"]
        assert {one["name"]: (one["rotation"], one["rotation_progress"]) for one in volumes} == {
            "mail": ("running", 0.25), "one": ("", None), "two": ("", None), "half": ("", None),
        }  # fmt: skip
        assert await daemon.get("HeldKeys") == []
        assert daemon.descriptors() == before  # the key is not held either
        for member, signature, body in (
            ("RotateKey", "shb", ("mail", 0, False)),
            ("TestKey", "sh", ("mail", 0)),
        ):
            assert await refused(daemon, member, signature, *body, keys=[ALPHA]) == "Busy"
    assert await jobs(daemon) == {}
    assert (await daemon.volume("mail"))["Rotation"] == "unfinished"
    shown = await ctl("status", "mail")
    assert "is half rotated -- it goes on with: vmcryptctl key rotate mail\n" in shown.out
    assert (
        "it is finished by: vmcryptctl key rotate mail\n" in (await ctl("key", "list", "mail")).out
    )
    # An unfinished one hinders nothing.
    await daemon.call("Lock", "s", "mail")
    await daemon.unlock("mail", ALPHA)
    assert (await daemon.volume("mail"))["State"] == "unlocked"


@with_daemon(HOST, alone=True)
async def test_to_its_end(daemon: Daemon) -> None:
    rotate = "RotateKey", "shb"
    assert await refused(daemon, *rotate, "no", 0, False, keys=[ALPHA]) == "NoSuchVolume"
    assert await refused(daemon, *rotate, "one", 0, False, keys=[BETA]) == "WrongKey"
    assert await refused(daemon, *rotate, "two", 0, False, keys=[ALPHA]) == "OtherKeys"
    assert await refused(daemon, *rotate, "one", 0, False, keys=[""]) == "KeyUnusable"
    await call(daemon, *rotate, "one", 0, False, keys=[ALPHA])
    await call(daemon, *rotate, "two", 0, True, keys=[ALPHA])
    await call(daemon, *rotate, "half", 0, False, keys=[ALPHA])
    for name in ("one", "two", "half"):
        shown = await daemon.volume(name)
        assert (shown["Rotation"], shown["HeaderBackupDue"]) == ("", True)
    assert await refused(daemon, "TestKey", "sh", "two", 0, keys=[BETA]) == "WrongKey"
    assert await call(daemon, "TestKey", "sh", "two", 0, keys=[ALPHA]) == 2
    await daemon.call("Lock", "s", "one")
    assert await refused(daemon, *rotate, "one", 0, False, keys=[ALPHA]) == "Busy"
    assert found_in(daemon.process.pid, b"org.vmcryptd1")
    assert found_in(daemon.process.pid, b"canary-") == []


@with_daemon(HOST)
async def test_on_the_command_line(daemon: Daemon) -> None:
    shown = await ctl("key", "rotate", "one", "--key-file", "-", typed=ALPHA)
    assert (shown.code, shown.out) == (0, "all data of one is under a new volume key\n")
    assert "vmcryptctl header backup one FILE; destroy older ones" in shown.err
    shown = await ctl("key", "rotate", "two", "--key-file", "-", typed=BETA)
    assert (shown.code, shown.out) == (1, "")
    assert "key slot 0 (passphrase)" in shown.err
    assert "--drop-others two" in shown.err
    shown = await ctl("key", "rotate", "two", "--drop-others", "--key-file", "-", typed=BETA)
    assert shown.code == 0
    assert (await ctl("key", "rotate", "one", "--key-file", "-", typed=BETA)).code == 3
    assert (await ctl("key", "rotate", "no", "--key-file", "-", typed=ALPHA)).code == 2
    assert (await ctl("key", "rotate", "one")).code == 2  # no person can be asked
    assert (await ctl("key", "rotate", "--stop", "one")).code == 0  # there is nothing to be done
    assert (await ctl("key", "rotate", "--stop", "no")).code == 2


@with_daemon(HOST)
async def test_who_waits_learns_that_it_was_stopped(daemon: Daemon) -> None:
    waiting = asyncio.create_task(ctl("key", "rotate", "mail", "--key-file", "-", typed=ALPHA))
    await begun(daemon)
    assert (await ctl("key", "rotate", "--stop", "mail")).code == 0
    shown = await waiting
    assert (shown.code, shown.out) == (1, "")
    assert "`vmcryptctl key rotate mail` goes on" in shown.err
    assert "goes on by itself" not in shown.err


@with_daemon(HOST)
async def test_on_a_terminal(daemon: Daemon) -> None:
    def dialogue() -> int:
        terminal = Terminal("key", "rotate", "mail")
        terminal.expect("Passphrase of mail that is to stay:")
        terminal.type("canary-wrong\n")
        terminal.expect("that did not fit; try again")
        terminal.expect("Passphrase of mail that is to stay:")
        terminal.type(f"{ALPHA}\n")
        terminal.expect("###")
        terminal.expect("---]  25 %")
        os.write(terminal.fd, b"\x03")
        terminal.expect("the rotation goes on by itself: `vmcryptctl status mail` shows how far")
        return terminal.end()

    assert await asyncio.to_thread(dialogue) == 130
    assert await jobs(daemon) == {"rotate:mail": 0.25}
    await daemon.call("StopRotation", "s", "mail")
