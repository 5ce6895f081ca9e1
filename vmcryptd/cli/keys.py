# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl key`: asks for keys, and sends them to the daemon as descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from vmcryptd.bus.client import Client, connect, is_root
from vmcryptd.cli.key_input import TRIES, Fitting, call, known, new, slot_of, untried
from vmcryptd.cli.output import changing, check_names, page, print_json, say, show_progress
from vmcryptd.cli.verbs import UsageError
from vmcryptd.core.errors import (
    EXIT_OK,
    BusyError,
    NotAuthorizedError,
    ShuttingDownError,
    UnreachableError,
    WrongKeyError,
)
from vmcryptd.posix.files import sync_directory
from vmcryptd.posix.memfd import MemfdKey, readers


async def _list(arguments: Namespace) -> int:
    async with connect() as client:
        [text] = await client.call("ListKeys", "s", arguments.VOLUME)
    keys = json.loads(text)
    if arguments.json:
        print_json(keys)
    else:
        print("\n".join(page().keys(keys)))
    return EXIT_OK


async def _test(arguments: Namespace) -> int:
    volume = arguments.VOLUME
    async with changing() as client:
        question = f"Passphrase of {volume} to test:"
        async with known(client, volume, arguments.key_file, question) as key:
            slot = key.slot if isinstance(key, Fitting) else await slot_of(client, volume, key)
    if arguments.json:
        print_json({"volume": volume, "slot": slot})
    else:
        print(f"it opens key slot {slot} of {volume}")
    return EXIT_OK


async def _add(arguments: Namespace) -> int:
    volume = arguments.VOLUME
    _check_standard_input(arguments)
    if arguments.keystore is not None:
        return await _add_from_keystore(arguments)
    async with changing() as client:
        question = f"Passphrase that opens {volume} now:"
        async with (
            known(client, volume, arguments.key_file, question) as key,
            new(client, volume, arguments.new_key_file) as new_key,
        ):
            [slot] = await _changed(client, "AddKey", "shh", volume, 0, 1, keys=[key, new_key])
    print(f"the new key opens {volume}, too: key slot {slot}")
    _remind(volume)
    return EXIT_OK


async def _add_from_keystore(arguments: Namespace) -> int:
    volume, keystore = arguments.VOLUME, arguments.keystore
    if arguments.new_key_file is not None:
        raise UsageError("--keystore makes the new key itself; --new-key-file is for your own")
    async with changing() as client:
        question = f"Passphrase that opens {volume} now:"
        async with known(client, volume, arguments.key_file, question) as key:
            [source] = await _changed(
                client, "AddKeystoreKey", "ssh", volume, keystore, 0, keys=[key]
            )
        [text] = await client.call("ListKeys", "s", volume)
    sources = json.loads(text)["sources"]
    if source in sources:
        print(f"{volume} is opened from the keystore {keystore} from now on")
    else:
        # The administrator's configuration has comments and an order of its own: it is never rewritten.
        keys = json.dumps([source, *sources], ensure_ascii=False)
        print(f"the keystore {keystore} holds a key of {volume} now. To have it used, write")
        print(f"\n    keys = {keys}\n")
        print(
            f"into the table of {volume} in the configuration, in the place of its `keys` if there are any, "
            "then run: vmcryptctl reload"
        )
    _remind(volume)
    return EXIT_OK


async def _keystore_init(arguments: Namespace) -> int:
    from vmcryptd.cli import keystore

    return await keystore.init(arguments)


async def _change(arguments: Namespace) -> int:
    volume = arguments.VOLUME
    _check_standard_input(arguments)
    async with changing() as client:
        question = f"Passphrase of {volume} that is to go:"
        async with (
            known(client, volume, arguments.key_file, question) as key,
            new(client, volume, arguments.new_key_file) as new_key,
        ):
            [slot] = await _changed(client, "ChangeKey", "shh", volume, 0, 1, keys=[key, new_key])
    print(f"the new key opens {volume}, the old one does not any more: key slot {slot}")
    _remind(volume, has_gone=True)
    return EXIT_OK


async def _remove(arguments: Namespace) -> int:
    volume = arguments.VOLUME
    if not arguments.SLOT.isdecimal():
        raise UsageError(f'"{arguments.SLOT}" is no number of a key slot; `key list` shows them')
    slot = int(arguments.SLOT)
    async with changing() as client:
        question = f"Passphrase of {volume} that stays, to remove key slot {slot}:"
        async with known(client, volume, arguments.key_file, question, but=slot) as key:
            await _changed(client, "RemoveKey", "sxh", volume, slot, 0, keys=[key])
    print(f"key slot {slot} of {volume} is gone")
    _remind(volume, has_gone=True)
    return EXIT_OK


async def _rotate(arguments: Namespace) -> int:
    volume = arguments.VOLUME
    async with changing() as client:
        if arguments.stop:
            await client.call("StopRotation", "s", volume)
            return EXIT_OK
        await client.follow()
        check_names(client, [volume])  # before a person types
        # Not read from the header: the disk is busy.
        if client.volumes[volume].get("Rotation") == "running":
            raise BusyError(
                f"volume {volume}: its volume key is being rotated already; "
                f"`vmcryptctl status {volume}` shows how far it is"
            )
        for left in reversed(range(1 if arguments.key_file else TRIES)):
            question = f"Passphrase of {volume} that is to stay:"
            async with untried(client, arguments.key_file, question) as key:
                try:
                    await _rotated(client, volume, key, arguments.drop_others)
                    break
                except WrongKeyError:
                    if not left:
                        raise
                    say("that did not fit; try again")
    print(f"all data of {volume} is under a new volume key")
    say(
        f"make a backup of its header now: vmcryptctl header backup {volume} FILE; destroy older ones: they are of no "
        "use any more, because the data is no longer under their volume key"
    )
    return EXIT_OK


async def _rotated(client: Client, volume: str, key: MemfdKey, drop_others: bool) -> None:
    """Show the progress until the end."""
    with contextlib.ExitStack() as held:
        held.callback(key.close)
        fds = held.enter_context(readers(key))
        rotating = asyncio.ensure_future(
            client.call("RotateKey", "shb", volume, 0, drop_others, fds=fds)
        )
        # A rotation can take hours without the key.
        showing = asyncio.ensure_future(show_progress(client, f"rotate:{volume}", held.close))
        try:
            await asyncio.wait({rotating})
            rotating.result()
        except (asyncio.CancelledError, UnreachableError, ShuttingDownError) as error:
            if key.is_closed or isinstance(error, asyncio.CancelledError):
                say(
                    f"the rotation goes on by itself: `vmcryptctl status {volume}` shows how far it is, "
                    f"`vmcryptctl key rotate --stop {volume}` stops it"
                )
            raise
        finally:
            rotating.cancel()
            showing.cancel()
            await asyncio.wait({showing})


async def _backup(arguments: Namespace) -> int:
    volume, path = arguments.VOLUME, arguments.FILE
    if not path.startswith("/"):
        raise UsageError(f"{path} is no absolute path; give one")
    if not is_root():
        raise NotAuthorizedError("a backup of a header has to belong to root; run this as root")
    async with changing() as client:
        with _new_file(path) as file:
            await client.call("BackupHeader", "sh", volume, 0, fds=[file])
    print(f"{path} is a backup of the header of {volume}")
    say(
        f"keep it offline or encrypted: with it, anyone who knows a present passphrase opens {volume} for "
        "ever, also after that was changed or removed. The same goes for older backups: destroy them"
    )
    return EXIT_OK


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[int]:
    """A new file for root only, which is removed on failure."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} is there already; nothing is overwritten: name another") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}") from None
    try:
        os.fchown(fd, 0, 0)
        sync_directory(os.path.dirname(path))  # before the backup counts as made
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


async def _changed(
    client: Client, member: str, signature: str, volume: str, *body: Any, keys: list[MemfdKey]
) -> list[Any]:
    """Call a method that changes the keys of a volume."""
    try:
        return await call(client, member, signature, volume, *body, keys=keys)
    except UnreachableError as error:
        # An interruption at any point loses no key: engine/key_management.py.
        raise UnreachableError(
            f"{error}; if it broke off in between, the keys of {volume} may have changed or not: "
            f"`vmcryptctl key list {volume}` shows, and `vmcryptctl key test {volume}` tells which key opens it"
        ) from None


def _remind(volume: str, *, has_gone: bool = False) -> None:
    old = "; destroy older ones: with these the old key opens it for ever" if has_gone else ""
    say(f"make a new backup of its header: vmcryptctl header backup {volume} FILE{old}")


def _check_standard_input(arguments: Namespace) -> None:
    if arguments.key_file == arguments.new_key_file == "-":
        raise UsageError('standard input holds one key only: "-" for one of the two')


RUN: dict[str, Callable[[Namespace], Coroutine[Any, Any, int]]] = {
    "key list": _list,
    "key test": _test,
    "key add": _add,
    "key change": _change,
    "key remove": _remove,
    "key rotate": _rotate,
    "keystore init": _keystore_init,
    "header backup": _backup,
}
