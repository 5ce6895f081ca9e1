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
from vmcryptd.client import Client, connect
from vmcryptd.errors import EXIT_OK, VmcryptdError, WrongKeyError
from vmcryptd.talk import changing, open_key, page, print_json, say
from vmcryptd.verbs import UsageError

TRIES = 3


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


# --- keys ---


class _Fitting(MemfdKey):
    """A key that was typed, and the key slot that it opens."""

    slot = -1


@contextlib.asynccontextmanager
async def _known(
    client: Client, volume: str, path: str | None, question: str
) -> AsyncIterator[_Key]:
    """A key that opens the volume: from a file, or one that is asked for until it fits."""
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
            yield key
            return


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
}
