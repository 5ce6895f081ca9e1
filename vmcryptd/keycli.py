# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl key`: asks for keys, and hands them to the daemon as descriptors."""

from __future__ import annotations

import contextlib
import json
import os
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Protocol

from vmcryptd import terminal
from vmcryptd.adapters.memfd import MemfdKey
from vmcryptd.adapters.run import run
from vmcryptd.client import Client, connect, is_root
from vmcryptd.errors import EXIT_OK, NotAuthorizedError, VmcryptdError, WrongKeyError
from vmcryptd.talk import changing, open_key, page, print_json, say
from vmcryptd.verbs import UsageError

TRIES = 3
COMPARING_S = 10.0


class _Key(Protocol):
    """Typed, or a file that the caller named; never in Python."""

    def reader(self) -> int:
        """A new descriptor of it, to be closed by who called."""


class _File:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def reader(self) -> int:
        return os.dup(self._fd)


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
        async with _known(client, volume, arguments.key_file, question) as key:
            slot = key.slot if isinstance(key, _Fitting) else await _slot_of(client, volume, key)
    if arguments.json:
        print_json({"volume": volume, "slot": slot})
    else:
        print(f"it opens key slot {slot} of {volume}")
    return EXIT_OK


async def _add(arguments: Namespace) -> int:
    volume = arguments.VOLUME
    _check_standard_input(arguments)
    async with changing() as client:
        question = f"Passphrase that opens {volume} now:"
        async with (
            _known(client, volume, arguments.key_file, question) as key,
            _new(client, volume, arguments.new_key_file) as new_key,
        ):
            [slot] = await _call(client, "AddKey", "shh", volume, 0, 1, keys=[key, new_key])
    print(f"the new key opens {volume}, too: key slot {slot}")
    _remind(volume)
    return EXIT_OK


async def _change(arguments: Namespace) -> int:
    volume = arguments.VOLUME
    _check_standard_input(arguments)
    async with changing() as client:
        question = f"Passphrase of {volume} that is to go:"
        async with (
            _known(client, volume, arguments.key_file, question) as key,
            _new(client, volume, arguments.new_key_file) as new_key,
        ):
            [slot] = await _call(client, "ChangeKey", "shh", volume, 0, 1, keys=[key, new_key])
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
        async with _known(client, volume, arguments.key_file, question, but=slot) as key:
            await _call(client, "RemoveKey", "sxh", volume, slot, 0, keys=[key])
    print(f"key slot {slot} of {volume} is gone")
    _remind(volume, has_gone=True)
    return EXIT_OK


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
        f"keep it offline or encrypted: with it, whoever knows a passphrase of now opens {volume} for "
        "ever, also after that was changed or removed. The same goes for older backups: destroy them"
    )
    return EXIT_OK


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[int]:
    """A file of root's own that was not there before, and is not when this fails."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} is there already; nothing is overwritten: name another") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}") from None
    try:
        os.fchown(fd, 0, 0)
        _sync_directory(path)  # before the backup counts as made
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _remind(volume: str, *, has_gone: bool = False) -> None:
    old = "; destroy older ones: with these the old key opens it for ever" if has_gone else ""
    say(f"make a new backup of its header: vmcryptctl header backup {volume} FILE{old}")


def _check_standard_input(arguments: Namespace) -> None:
    if arguments.key_file == arguments.new_key_file == "-":
        raise UsageError('standard input holds one key only: "-" for one of the two')


# --- keys ---


class _Fitting(MemfdKey):
    """A key that was typed, and the key slot that it opens."""

    slot = -1


@contextlib.asynccontextmanager
async def _known(
    client: Client, volume: str, path: str | None, question: str, *, but: int = -1
) -> AsyncIterator[_Key]:
    """A key that opens the volume: from a file, or one that is asked for until it fits, not `but` that slot."""
    if path is not None:
        with _opened(path) as file:
            yield file
        return
    await client.call("ListKeys", "s", volume)  # a name that is wrong shows before anybody types
    for left in reversed(range(TRIES)):
        with contextlib.closing(_Fitting()) as key:
            await _ask(client, question, key)
            try:
                key.slot = await _slot_of(client, volume, key)
            except WrongKeyError:
                # Here rather than after all that is still to be typed.
                if not left:
                    raise
                say("that did not fit; try again")
                continue
            if key.slot == but and left:
                say(f"that is the key of key slot {but} itself; another one has to stay: try that")
                continue
            yield key
            return


@contextlib.asynccontextmanager
async def _new(client: Client, volume: str, path: str | None) -> AsyncIterator[_Key]:
    """A key that is to open the volume: from a file, or one that was typed twice."""
    if path is not None:
        with _opened(path) as file:
            yield file
        return
    for left in reversed(range(TRIES)):
        with contextlib.closing(MemfdKey()) as key, contextlib.closing(MemfdKey()) as again:
            await _ask(client, f"New passphrase for {volume}:", key)
            await _ask(client, f"New passphrase for {volume}, once more:", again)
            if await _are_equal(key, again):
                yield key
                return
        say("these were not the same" + ("; try again" if left else ""))
    raise VmcryptdError("the new passphrase was not typed twice; nothing was done")


async def _are_equal(one: MemfdKey, other: MemfdKey) -> bool:
    fds = one.reader(), other.reader()
    try:
        paths = [f"/proc/self/fd/{fd}" for fd in fds]
        done = await run(["cmp", "--silent", "--", *paths], fds=fds, timeout_s=COMPARING_S)
    finally:
        for fd in fds:
            os.close(fd)
    return done.code == 0


async def _ask(client: Client, question: str, key: MemfdKey) -> None:
    if not client.interactive:
        raise UsageError("there is no terminal on which to ask for a passphrase; give --key-file")
    if not await terminal.ask(question, key.fileno()):
        raise VmcryptdError("no passphrase was given; nothing was done")
    if not key.size:
        raise VmcryptdError("nothing was entered; nothing was done")
    key.seal()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[_File]:
    fd = open_key(path)
    try:
        yield _File(fd)
    finally:
        if fd:  # not standard input
            os.close(fd)


async def _slot_of(client: Client, volume: str, key: _Key) -> int:
    [slot] = await _call(client, "TestKey", "sh", volume, 0, keys=[key])
    return int(slot)


async def _call(
    client: Client, member: str, signature: str, *body: Any, keys: list[_Key]
) -> list[Any]:
    with contextlib.ExitStack() as opened:
        fds = []
        for key in keys:
            fds.append(key.reader())
            opened.callback(os.close, fds[-1])
        return await client.call(member, signature, *body, fds=fds)


RUN: dict[str, Callable[[Namespace], Coroutine[Any, Any, int]]] = {
    "key list": _list,
    "key test": _test,
    "key add": _add,
    "key change": _change,
    "key remove": _remove,
    "header backup": _backup,
}
