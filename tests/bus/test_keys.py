# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys of volumes, over the bus and on the command line, on a daemon with a simulated host behind it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
from typing import Any

import pytest

from tests.bus import simulated
from tests.bus.simulated import Ended, Terminal
from tests.bus.test_service import Daemon, handed_in, opened_by, start, with_daemon
from tests.scan_memory import found_in
from vmcryptd.cli import main
from vmcryptd.core.errors import UnreachableError

__all__ = ["start"]  # a fixture

ALPHA, BETA, GAMMA = "canary-alpha-7d1f", "canary-beta-93ce", "canary-gamma-0b55"


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups of headers")


def sha256(passphrase: str) -> str:
    return opened_by(passphrase).split('"')[1]


HOST = f"""
[volume.mail]
device = "/dev/vg/mail"
keys = ["file:/run/keys/mail.key", "prompt"]
[sim.volume.mail]
{opened_by(ALPHA)}
slots = [{{passphrase_sha256 = "{sha256(BETA)}"}}]
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
        "header_backup_due_since": "", "is_half_rotated": False,
        "sources": ["file:/run/keys/mail.key", "prompt"], "tokens": [],
    }  # fmt: skip
    assert [slot["slot"] for slot in slots] == [0, 1]
    assert slots[0] == {
        "slot": 0, "opened_by": "passphrase", "kdf": "argon2id", "memory_kib": 65536, "threads": 4,
        "iterations": 4, "priority": 1, "caveat": "", "fitted_by": [],
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


async def ctl(*argv: str, typed: str | None = None) -> Ended:
    return await asyncio.to_thread(functools.partial(simulated.ctl, *argv, typed=typed))


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


# --- changing ---


@with_daemon(HOST)
async def test_a_key_is_added_changed_and_removed(daemon: Daemon) -> None:
    before = daemon.descriptors()
    assert await call(daemon, "AddKey", "shh", "mail", 0, 1, keys=[BETA, GAMMA]) == 2
    assert await call(daemon, "TestKey", "sh", "mail", 0, keys=[GAMMA]) == 2
    await call(daemon, "RemoveKey", "sxh", "mail", 1, 0, keys=[GAMMA])
    assert await refused(daemon, "TestKey", "sh", "mail", 0, keys=[BETA]) == "WrongKey"
    assert await call(daemon, "ChangeKey", "shh", "mail", 0, 1, keys=[ALPHA, BETA]) == 1
    assert await refused(daemon, "TestKey", "sh", "mail", 0, keys=[ALPHA]) == "WrongKey"
    assert [
        one["slot"] for one in json.loads(await daemon.call("ListKeys", "s", "mail"))["slots"]
    ] == [1, 2]
    await daemon.unlock("mail", GAMMA)
    assert daemon.descriptors() == before


@with_daemon(HOST)
async def test_the_last_way_in_stays(daemon: Daemon) -> None:
    assert await refused(daemon, "RemoveKey", "sxh", "one", 0, 0, keys=[ALPHA]) == "LastKey"
    assert await refused(daemon, "RemoveKey", "sxh", "one", 3, 0, keys=[ALPHA]) == "NoSuchKeySlot"
    # Its own key is no proof that there is another one.
    assert await refused(daemon, "RemoveKey", "sxh", "mail", 0, 0, keys=[ALPHA]) == "WrongKey"
    for member in ("AddKey", "ChangeKey"):
        assert await refused(daemon, member, "shh", "one", 0, 1, keys=[BETA, GAMMA]) == "WrongKey"
        assert await refused(daemon, member, "shh", "one", 0, 1, keys=[ALPHA, ""]) == "KeyUnusable"
        assert (
            await refused(daemon, member, "shh", "no", 0, 1, keys=[ALPHA, BETA]) == "NoSuchVolume"
        )
    assert not (await daemon.volume("one"))["HeaderBackupDue"]
    assert await call(daemon, "TestKey", "sh", "one", 0, keys=[ALPHA]) == 0


@only_root
@with_daemon(HOST)
async def test_a_backup_is_due_until_it_is_made(daemon: Daemon) -> None:
    await call(daemon, "AddKey", "shh", "one", 0, 1, keys=[ALPHA, BETA])
    assert (await daemon.volume("one"))["HeaderBackupDue"] is True
    assert (await daemon.volume("mail"))["HeaderBackupDue"] is False
    assert json.loads(await daemon.call("ListKeys", "s", "one"))["header_backup_due_since"]
    shown = await ctl("status", "one")
    assert "no backup of it was made since -- run: vmcryptctl header backup one FILE" in shown.out
    status = json.loads((await ctl("status", "--json")).out)
    due = {volume["name"]: volume["header_backup_due"] for volume in status["volumes"]}
    assert due == {"mail": False, "one": True, "plain": False}
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    assert await daemon.refused("BackupHeader", "sh", "one", 0, fds=[full]) == "StorageFailed"
    os.close(full)
    assert (await daemon.volume("one"))["HeaderBackupDue"] is True
    path = daemon.sim.with_name("header")
    shown = await ctl("header", "backup", "one", str(path))
    assert (shown.code, shown.out) == (0, f"{path} is a backup of the header of one\n")
    assert "keep it offline or encrypted" in shown.err
    assert path.read_text() == "the simulated header of one\n"
    assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o600, os.geteuid())
    assert (await daemon.volume("one"))["HeaderBackupDue"] is False


@only_root
@with_daemon(HOST)
async def test_a_backup_overwrites_nothing_and_leaves_nothing(daemon: Daemon) -> None:
    path = daemon.sim.with_name("header")
    path.write_text("precious")
    link = daemon.sim.with_name("link")
    link.symlink_to(daemon.sim.with_name("target"))
    for there in (path, link):
        assert (await ctl("header", "backup", "one", str(there))).code == 2
    assert path.read_text() == "precious"
    assert not link.exists()
    path.unlink()
    assert (await ctl("header", "backup", "nobody", str(path))).code == 2
    assert not path.exists()
    assert (await ctl("header", "backup", "one", "header")).code == 2
    assert (await ctl("header", "backup", "one", "/nowhere/header")).code == 2


@with_daemon(HOST)
async def test_keys_from_files(daemon: Daemon) -> None:
    old, new = daemon.sim.with_name("old"), daemon.sim.with_name("new")
    old.write_text(ALPHA)
    new.write_text(GAMMA)
    files = ["--key-file", str(old), "--new-key-file"]
    shown = await ctl("key", "add", "one", *files, str(new))
    assert (shown.code, shown.out) == (0, "the new key opens one, too: key slot 1\n")
    assert "vmcryptctl header backup one FILE" in shown.err
    shown = await ctl("key", "remove", "one", "0", "--key-file", str(new))
    assert (shown.code, shown.out) == (0, "key slot 0 of one is gone\n")
    assert "destroy older ones" in shown.err
    assert (await ctl("key", "remove", "one", "1", "--key-file", str(new))).code == 1
    assert (await ctl("key", "remove", "one", "one", "--key-file", str(new))).code == 2
    assert (await ctl("key", "change", "one", *files, "-", typed=BETA)).code == 3
    shown = await ctl("key", "change", "mail", *files, "-", typed=GAMMA)
    assert (shown.code, shown.out) == (
        0,
        "the new key opens mail, the old one does not any more: key slot 2\n",
    )
    shown = await ctl("key", "add", "one", "--key-file", "-", "--new-key-file", "-", typed=BETA)
    assert shown.code == 2


@with_daemon(HOST)
async def test_a_change_on_a_terminal(daemon: Daemon) -> None:
    def dialogue() -> int:
        terminal = Terminal("key", "change", "mail")
        terminal.expect("Passphrase of mail that is to go:")
        terminal.type(f"{ALPHA}\n")
        terminal.expect("New passphrase for mail:")
        terminal.type(f"{GAMMA}\n")
        terminal.expect("New passphrase for mail, once more:")
        terminal.type("canary-typo\n")
        terminal.expect("these were not the same; try again")
        for question in ("New passphrase for mail:", "once more:"):
            terminal.expect(question)
            terminal.type(f"{GAMMA}\n")
        terminal.expect("the old one does not any more: key slot 2")
        return terminal.end()

    assert await asyncio.to_thread(dialogue) == 0
    assert await call(daemon, "TestKey", "sh", "mail", 0, keys=[GAMMA]) == 2
    assert await refused(daemon, "TestKey", "sh", "mail", 0, keys=[ALPHA]) == "WrongKey"


@with_daemon(HOST)
async def test_a_removal_on_a_terminal(daemon: Daemon) -> None:
    def dialogue() -> int:
        terminal = Terminal("key", "remove", "mail", "1")
        terminal.expect("Passphrase of mail that stays, to remove key slot 1:")
        terminal.type(f"{BETA}\n")
        terminal.expect("that is the key of key slot 1 itself; another one has to stay")
        terminal.expect("Passphrase of mail")
        terminal.type(f"{ALPHA}\n")
        terminal.expect("key slot 1 of mail is gone")
        return terminal.end()

    assert await asyncio.to_thread(dialogue) == 0


@with_daemon(HOST)
async def test_a_question_that_is_declined_changes_nothing(daemon: Daemon) -> None:
    def dialogue() -> int:
        terminal = Terminal("key", "add", "mail")
        terminal.expect("Passphrase that opens mail now:")
        terminal.type(f"{ALPHA}\n")
        terminal.expect("New passphrase for mail:")
        terminal.type("\x04")
        terminal.expect("nothing was done")
        return terminal.end()

    assert await asyncio.to_thread(dialogue) == 1
    assert not (await daemon.volume("mail"))["HeaderBackupDue"]


def test_keys_are_not_in_the_memory_of_the_daemon(start: Any, run: Any) -> None:
    async def test() -> None:
        async with start(HOST, alone=True) as daemon:
            await call(daemon, "AddKey", "shh", "one", 0, 1, keys=[ALPHA, BETA])
            await call(daemon, "ChangeKey", "shh", "one", 0, 1, keys=[BETA, GAMMA])
            await call(daemon, "RemoveKey", "sxh", "one", 0, 0, keys=[GAMMA])
            assert found_in(daemon.process.pid, b"org.vmcryptd1")
            assert found_in(daemon.process.pid, b"canary-") == []

    run(test())


# --- keystores ---

STORE = (
    HOST
    + f"""
[volume.keys]
device = "/dev/vg/keys"
content = "filesystem"
mount = "/run/keys"
lock = "boot"
unlock = "manual"
[sim.volume.keys]
{opened_by(GAMMA)}
[volume.above]
device = "/dev/vg/above"
keys = ["file:/run/keys/above.key"]
unlock = "manual"
[sim.volume.above]
{opened_by(ALPHA)}
"""
)


@with_daemon(STORE)
async def test_a_key_in_a_keystore(daemon: Daemon) -> None:
    arguments = "AddKeystoreKey", "ssh", "mail"
    assert await refused(daemon, *arguments, "keys", 0, keys=[ALPHA]) == "DependencyFailed"
    assert await refused(daemon, *arguments, "one", 0, keys=[ALPHA]) == "StorageFailed"
    assert await refused(daemon, *arguments, "no", 0, keys=[ALPHA]) == "NoSuchVolume"
    await daemon.unlock("keys", GAMMA)
    assert await refused(daemon, *arguments, "keys", 0, keys=["canary-no"]) == "WrongKey"
    await daemon.call("Lock", "s", "keys")
    assert await refused(daemon, *arguments, "keys", 0, keys=[ALPHA]) == "DependencyFailed"
    await daemon.unlock("keys", GAMMA)
    source = await call(daemon, *arguments, "keys", 0, keys=[ALPHA])
    assert source == "file:/run/keys/mail.key"
    slots = json.loads(await daemon.call("ListKeys", "s", "mail"))["slots"]
    assert [slot["opened_by"] for slot in slots] == ["passphrase", "passphrase", "random key"]
    assert await refused(daemon, *arguments, "keys", 0, keys=[ALPHA]) == "StorageFailed"  # has one
    # Its own key would be locked in with it.
    assert (
        await refused(daemon, "AddKeystoreKey", "ssh", "keys", "keys", 0, keys=[GAMMA])
        == "StorageFailed"
    )
    await daemon.call("Unlock", "s", "mail")
    assert (await daemon.volume("mail"))["KeySource"] == "file"


@with_daemon(STORE)
async def test_which_source_fitted_which_key_slot(daemon: Daemon) -> None:
    async def fitted() -> dict[int, list[str]]:
        slots = json.loads(await daemon.call("ListKeys", "s", "mail"))["slots"]
        return {slot["slot"]: slot["fitted_by"] for slot in slots}

    await daemon.unlock("keys", GAMMA)
    await call(daemon, "AddKeystoreKey", "ssh", "mail", "keys", 0, keys=[ALPHA])
    # It was tried when it was made.
    assert await fitted() == {0: [], 1: [], 2: ["file:/run/keys/mail.key"]}
    shown = (await ctl("key", "list", "mail")).out.splitlines()
    assert shown[3].startswith("2     random key")
    assert shown[4] == "    fitted last time by file:/run/keys/mail.key"
    # What fitted without being configured is none of the sources.
    await daemon.unlock("mail", BETA)
    assert (await fitted())[1] == []
    await call(daemon, "RemoveKey", "sxh", "mail", 2, 0, keys=[ALPHA])
    await call(daemon, "AddKey", "shh", "mail", 0, 1, keys=[ALPHA, GAMMA])
    assert await fitted() == {0: [], 1: [], 2: []}


@with_daemon(STORE)
async def test_a_keystore_opens_what_it_has_a_key_of_and_closes(daemon: Daemon) -> None:
    await daemon.unlock("keys", GAMMA)
    await call(daemon, "AddKeystoreKey", "ssh", "above", "keys", 0, keys=[ALPHA])
    await daemon.call("Lock", "s", "keys")
    opening = asyncio.ensure_future(daemon.call("Unlock", "s", "above"))
    await daemon.state("waiting")
    assert await daemon.get("Waiting") == ["keys"]  # one question, not two
    await daemon.unlock("keys", GAMMA)
    await opening
    assert (await daemon.volume("above"))["KeySource"] == "file"

    async def closed() -> bool:
        return bool((await daemon.volume("keys"))["State"] == "locked")

    async with asyncio.timeout(30):
        await daemon.until(closed)
    assert (await daemon.volume("above"))["State"] == "unlocked"
    await daemon.call("Lock", "s", "above")
    # The keystore is lost. The other key slot works as ever.
    await daemon.unlock("above", ALPHA)


@with_daemon(STORE)
async def test_who_opens_a_volume_is_asked_for_its_keystore(daemon: Daemon) -> None:
    await daemon.unlock("keys", GAMMA)
    await call(daemon, "AddKeystoreKey", "ssh", "above", "keys", 0, keys=[ALPHA])
    await daemon.call("Lock", "s", "keys")
    assert (await daemon.volume("keys"))["NeededBy"] == ["mail", "above"]

    def typed() -> int:
        terminal = Terminal("unlock", "above")
        terminal.expect("Passphrase for volume keys (/dev/vg/keys):")
        terminal.type(f"{GAMMA}\n")
        terminal.expect("open now: above")
        return terminal.end()

    assert await asyncio.to_thread(typed) == 0
    assert (await daemon.volume("above"))["KeySource"] == "file"


@with_daemon(STORE)
async def test_what_is_to_be_configured_is_printed(daemon: Daemon) -> None:
    await daemon.unlock("keys", GAMMA)
    from_stdin = ["--key-file", "-", "--keystore", "keys"]
    before = daemon.sim.read_text()
    shown = await ctl("key", "add", "one", *from_stdin, typed=ALPHA)
    assert shown.code == 0
    assert '\n    keys = ["file:/run/keys/one.key", "prompt"]\n' in shown.out
    shown = await ctl("key", "add", "above", *from_stdin, typed=ALPHA)
    assert (shown.code, shown.out) == (0, "above is opened from the keystore keys from now on\n")
    assert daemon.sim.read_text() == before
    shown = await ctl("key", "add", "mail", *from_stdin, "--new-key-file", "/x", typed=ALPHA)
    assert shown.code == 2
    await daemon.call("Lock", "s", "keys")
    shown = await ctl("key", "add", "mail", *from_stdin, typed=ALPHA)
    assert shown.code == 1
    assert "`vmcryptctl unlock keys` first" in shown.err


LOST = STORE.replace('unlock = "manual"\n', "").replace(
    'keys = ["file:/run/keys/above.key"]', 'keys = ["file:/run/keys/above.key", "prompt"]'
)


@with_daemon(
    LOST.replace('device = "/dev/vg/keys"', 'device = "/dev/vg/keys"\ntimeout = "10ms"').replace(
        "[sim.volume.keys]", "[sim.volume.keys]\npresent = false"
    )
)
async def test_a_keystore_whose_disk_is_lost(daemon: Daemon) -> None:
    """What it had keys of is asked for at boot, and opened by its other key slots."""
    await daemon.call("Boot")

    async def asked() -> bool:
        return "above" in await daemon.get("Waiting")

    async with asyncio.timeout(60):
        await daemon.until(asked)
    assert (await daemon.volume("keys"))["State"] == "missing"
    await daemon.unlock("above", ALPHA)
    assert (await daemon.volume("above"))["State"] == "unlocked"
    await daemon.call("Lock", "s", "above")
    opening = asyncio.ensure_future(daemon.call("Unlock", "s", "above"))
    await daemon.until(asked)
    await daemon.unlock("above", ALPHA)
    await opening  # it is open, so this has not failed


@with_daemon(LOST)
async def test_a_keystore_whose_passphrase_is_lost(daemon: Daemon) -> None:
    await daemon.unlock("above", ALPHA)
    assert (await daemon.volume("above"))["State"] == "unlocked"
    assert (await daemon.volume("keys"))["State"] != "unlocked"
    assert await refused(daemon, "UnlockWithKey", "sh", "mail", 0, keys=["canary-no"]) == "WrongKey"
    await daemon.call("Lock", "s", "above")
    # While it is waited for at boot, the volume's own passphrase does, and then it is not waited for any more.
    await daemon.call("Boot")
    await daemon.state("waiting")
    assert await refused(daemon, "UnlockAllWithKey", "h", 0, keys=["canary-no"]) == "WrongKey"
    # `plain` stays locked, because it is no LUKS device.
    assert await refused(daemon, "UnlockAllWithKey", "h", 0, keys=[ALPHA]) == "StillWaiting"
    assert (await daemon.volume("above"))["KeySource"] == "key"
    assert await daemon.get("Waiting") == []
    await daemon.call("Lock", "s", "above")
    # Given up, it lets the others be asked for.
    await daemon.call("Boot")
    await daemon.state("waiting")
    await daemon.call("Lock", "s", "keys")

    async def asked() -> bool:
        return "above" in await daemon.get("Waiting")

    async with asyncio.timeout(60):
        await daemon.until(asked)
    await daemon.unlock("above", ALPHA)


@pytest.mark.parametrize(
    "verb", ["key add one --new-key-file", "key change one --new-key-file", "key remove one 0"]
)
def test_a_daemon_that_goes_away_while_it_changes_keys(
    verb: str, start: Any, run: Any, tmp_path: Any, monkeypatch: Any, capfd: Any
) -> None:
    """Nobody is left to tell how far it came."""
    keys = tmp_path / "key"
    keys.write_text(ALPHA)

    async def call(client: Any, member: str, *arguments: Any, **more: Any) -> None:
        raise UnreachableError("vmcryptd is not running")

    async def test() -> None:
        async with start(HOST):
            argv = [*verb.split(), *([str(keys)] if "--new" in verb else [])]
            argv += ["--key-file", str(keys)]
            assert await asyncio.to_thread(main.main, argv) == 5

    monkeypatch.setattr("vmcryptd.cli.keys.call", call)
    run(test())
    said = capfd.readouterr().err
    assert "vmcryptd is not running; if it broke off in between" in said
    assert "`vmcryptctl key test one`" in said
