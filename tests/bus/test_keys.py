# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys of volumes, over the bus and on the command line, on a daemon with a simulated host behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from typing import Any, NamedTuple

from tests.bus.test_cli import Terminal, needs_ask_password
from tests.bus.test_service import PROJECT, Daemon, handed_in, opened_by, start, with_daemon

__all__ = ["start"]  # a fixture

ALPHA, BETA, GAMMA = "canary-alpha-7d1f", "canary-beta-93ce", "canary-gamma-0b55"


def sha256(passphrase: str) -> str:
    return opened_by(passphrase).split('"')[1]


HOST = f"""
[volume.mail]
device = "/dev/vg/mail"
keys = ["file:/run/keys/mail.key", "prompt"]
[sim.volume.mail]
{opened_by(ALPHA)}
more_sha256 = ["{sha256(BETA)}"]
[volume.one]
device = "/dev/vg/one"
[sim.volume.one]
{opened_by(ALPHA)}
[volume.plain]
device = "/dev/vg/plain"
[sim.volume.plain]
fault = "not-luks"
"""


async def call(daemon: Daemon, member: str, signature: str, *body: Any, keys: list[str]) -> Any:
    """Call a method, with what was typed as its descriptors."""
    with contextlib.ExitStack() as opened:
        fds = [opened.enter_context(handed_in(key.encode())) for key in keys]
        return await daemon.call(member, signature, *body, fds=fds)


async def refused(daemon: Daemon, member: str, signature: str, *body: Any, keys: list[str]) -> str:
    with contextlib.ExitStack() as opened:
        fds = [opened.enter_context(handed_in(key.encode())) for key in keys]
        return await daemon.refused(member, signature, *body, fds=fds)


# --- over the bus ---


@with_daemon(HOST)
async def test_what_is_listed(daemon: Daemon) -> None:
    listed = json.loads(await daemon.call("ListKeys", "s", "mail"))
    slots = listed.pop("slots")
    assert listed == {
        "volume": "mail", "uuid": "00000000-0000-0000-0000-000000000000", "version": 2,
        "sources": ["file:/run/keys/mail.key", "prompt"], "tokens": [],
    }  # fmt: skip
    assert [slot["slot"] for slot in slots] == [0, 1]
    assert slots[0] == {
        "slot": 0, "opened_by": "passphrase", "kdf": "argon2id", "memory_kib": 65536, "threads": 4,
        "iterations": 4, "priority": 1,
    }  # fmt: skip
    assert await daemon.refused("ListKeys", "s", "male") == "NoSuchVolume"
    assert await daemon.refused("ListKeys", "s", "plain") == "NotLuks"


@with_daemon(HOST)
async def test_which_slot_a_key_opens(daemon: Daemon) -> None:
    before = daemon.descriptors()
    for key, slot in ((ALPHA, 0), (BETA, 1)):
        assert await call(daemon, "TestKey", "sh", "mail", 0, keys=[key]) == slot
    assert await refused(daemon, "TestKey", "sh", "mail", 0, keys=["canary-wrong"]) == "WrongKey"
    assert await refused(daemon, "TestKey", "sh", "mail", 0, keys=[""]) == "KeyUnusable"
    assert await refused(daemon, "TestKey", "sh", "male", 0, keys=[ALPHA]) == "NoSuchVolume"
    assert (await daemon.volume("mail"))["State"] == "locked"
    assert daemon.descriptors() == before


# --- on the command line ---


class Ctl(NamedTuple):
    """How vmcryptctl ended."""

    code: int
    out: str
    err: str


async def ctl(*argv: str, typed: str | None = None) -> Ctl:
    code = "import sys; from vmcryptd.cli import main; sys.exit(main())"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code, *argv],
        cwd=PROJECT, input=typed, stdin=None if typed is not None else subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "canary" not in done.stdout + done.stderr
    return Ctl(done.returncode, done.stdout, done.stderr)


@with_daemon(HOST)
async def test_key_list(daemon: Daemon) -> None:
    shown = await ctl("key", "list", "mail")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == (
        "SLOT  OPENED BY   ONE TRY COSTS               PRIORITY  TOKENS\n"
        "0     passphrase  argon2id, 64 MiB, 4 rounds  normal    -\n"
        "1     passphrase  argon2id, 64 MiB, 4 rounds  normal    -\n"
        "\n"
        "key sources of mail: file:/run/keys/mail.key, prompt\n"
    )
    shown = await ctl("key", "list", "mail", "--json")
    assert [slot["slot"] for slot in json.loads(shown.out)["slots"]] == [0, 1]
    assert (await ctl("key", "list", "male")).code == 2
    assert (await ctl("key", "list", "plain")).code == 1


@with_daemon(HOST)
async def test_key_test(daemon: Daemon) -> None:
    file = daemon.sim.with_name("key")
    file.write_text(BETA)
    shown = await ctl("key", "test", "mail", "--key-file", str(file))
    assert shown == (0, "it opens key slot 1 of mail\n", "")
    shown = await ctl("key", "test", "mail", "--key-file", "-", "--json", typed=ALPHA)
    assert json.loads(shown.out) == {"volume": "mail", "slot": 0}
    assert (await ctl("key", "test", "one", "--key-file", str(file))).code == 3
    shown = await ctl("key", "test", "one")
    assert shown.code == 2
    assert "there is no terminal" in shown.err


@needs_ask_password
@with_daemon(HOST)
async def test_a_key_is_asked_for_until_it_fits(daemon: Daemon) -> None:
    def dialogue() -> int:
        terminal = Terminal("key", "test", "mail")
        terminal.expect("Passphrase of mail to test:")
        terminal.type("canary-wrong\n")
        terminal.expect("that did not fit; try again")
        terminal.expect("Passphrase of mail to test:")
        terminal.type(f"{BETA}\n")
        terminal.expect("it opens key slot 1 of mail")
        return terminal.end()

    assert await asyncio.to_thread(dialogue) == 0
