# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads keys for the verbs that change keys, from the terminal or a file, into descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

from vmcryptd.bus.client import Client
from vmcryptd.cli import terminal
from vmcryptd.cli.output import open_key, say
from vmcryptd.cli.verbs import UsageError
from vmcryptd.core.errors import KeyUnusableError, VmcryptdError, WrongKeyError
from vmcryptd.posix.memfd import (
    LockedKey,
    MemfdKey,
    TooLargeError,
    copy_from_caller,
    readers,
    send_start,
)
from vmcryptd.posix.run import run

TRIES = 3
COMPARING_S = 10.0
READ_S = 30.0  # as long as the daemon reads a caller's key


class Fitting(LockedKey):
    """A key that was typed, and the key slot that it opens."""

    slot = -1


@contextlib.asynccontextmanager
async def known(
    client: Client, volume: str, path: str | None, question: str, *, but: int = -1
) -> AsyncIterator[MemfdKey]:
    """A key that opens the volume by any slot except `but`: from a file, or asked for until it fits."""
    if path is not None:
        async with from_file(path) as key:
            yield key
        return
    await client.call("ListKeys", "s", volume)  # a wrong name is reported before a person types
    for left in reversed(range(TRIES)):
        with contextlib.closing(Fitting()) as typed:
            await _ask(client, question, typed)
            try:
                typed.slot = await slot_of(client, volume, typed)
            except WrongKeyError:
                # Checked here, before the person types the rest.
                if not left:
                    raise
                say("that did not fit; try again")
                continue
            if typed.slot == but and left:
                say(f"that is the key of key slot {but} itself; another one has to stay: try that")
                continue
            yield typed
            return


@contextlib.asynccontextmanager
async def untried(client: Client, path: str | None, question: str) -> AsyncIterator[MemfdKey]:
    """A key from a file, or asked for once."""
    if path is not None:
        async with from_file(path) as key:
            yield key
        return
    with contextlib.closing(LockedKey()) as typed:
        await _ask(client, question, typed)
        yield typed


@contextlib.asynccontextmanager
async def new(client: Client, volume: str, path: str | None) -> AsyncIterator[MemfdKey]:
    """A new key: from a file, or typed twice."""
    if path is not None:
        async with from_file(path) as key:
            yield key
        return
    for left in reversed(range(TRIES)):
        with contextlib.closing(LockedKey()) as typed, contextlib.closing(LockedKey()) as again:
            await _ask(client, f"New passphrase for {volume}:", typed)
            await _ask(client, f"New passphrase for {volume}, once more:", again)
            if await _are_equal(typed, again):
                yield typed
                return
        say("these were not the same" + ("; try again" if left else ""))
    raise VmcryptdError("the new passphrase was not typed twice; nothing was done")


async def slot_of(client: Client, volume: str, key: MemfdKey) -> int:
    [slot] = await call(client, "TestKey", "sh", volume, 0, keys=[key])
    return int(slot)


async def call(
    client: Client, member: str, signature: str, *body: Any, keys: list[MemfdKey]
) -> list[Any]:
    with readers(*keys) as fds:
        return await client.call(member, signature, *body, fds=fds)


async def _ask(client: Client, question: str, key: MemfdKey) -> None:
    if not client.interactive:
        raise UsageError("there is no terminal on which to ask for a passphrase; name key files")
    if not await terminal.ask(question, key.fileno()):
        raise VmcryptdError("no passphrase was given; nothing was done")
    if not key.size:
        raise VmcryptdError("nothing was entered; nothing was done")
    key.seal()


@contextlib.asynccontextmanager
async def from_file(path: str) -> AsyncIterator[LockedKey]:
    """A copy, because standard input can be read only once and some verbs need the key several times."""
    fd = open_key(path)
    with contextlib.closing(LockedKey()) as key:
        try:
            async with asyncio.timeout(READ_S):
                await copy_from_caller(fd, key)
        except TooLargeError:
            raise KeyUnusableError(f"{path} is larger than 8 MiB, which no key is") from None
        except TimeoutError:
            raise KeyUnusableError(f"{path} did not end within {READ_S:g} s") from None
        except OSError as error:
            raise KeyUnusableError(f"{path} cannot be read: {error.strerror}") from None
        finally:
            if fd:  # not standard input
                os.close(fd)
        if not key.size:
            raise KeyUnusableError(f"{path} is empty, which no key is")
        key.seal()
        yield key


async def without_newline(key: MemfdKey) -> LockedKey | None:
    """A copy without its last byte, if that is a newline and not the only byte. The caller closes it."""
    if key.size < 2 or not await _ends_with_newline(key):
        return None
    shorter = LockedKey()
    send_start(key, key.size - 1, shorter)
    shorter.seal()
    return shorter


async def _ends_with_newline(key: MemfdKey) -> bool:
    """A child compares, so that no byte of the key comes into Python."""
    with contextlib.closing(MemfdKey()) as newline:
        os.write(newline.fileno(), b"\n")
        with readers(key, newline) as fds:
            paths = [f"/proc/self/fd/{fd}" for fd in fds]
            skip = f"--ignore-initial={key.size - 1}:0"
            done = await run(
                ["cmp", "--silent", skip, "--", *paths], fds=fds, timeout_s=COMPARING_S
            )
    return done.code == 0


async def _are_equal(one: MemfdKey, other: MemfdKey) -> bool:
    with readers(one, other) as fds:
        paths = [f"/proc/self/fd/{fd}" for fd in fds]
        done = await run(["cmp", "--silent", "--", *paths], fds=fds, timeout_s=COMPARING_S)
    return done.code == 0
