# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl keystore init`: asks for the new passphrase, and lets the daemon make the keystore."""

from __future__ import annotations

import asyncio
import os
import re
from argparse import Namespace
from typing import Any

from vmcryptd.bus.client import Client
from vmcryptd.bus.transport import Typed
from vmcryptd.cli import key_input
from vmcryptd.cli.output import changing, say, show_progress
from vmcryptd.cli.verbs import UsageError
from vmcryptd.core.errors import EXIT_OK, UnreachableError
from vmcryptd.core.keystores import wanted

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


async def init(arguments: Namespace) -> int:
    name, options = arguments.NAME, _options(arguments)
    place = wanted(name, options, "").place  # before a person types
    async with changing() as client:
        await client.follow()
        await _check(client, name, options)
        async with key_input.new(client, name, arguments.key_file) as key:
            [path] = await key_input.call(
                client, "CreateKeystore", "sha{sv}", name, 0, _typed(options), keys=[key]
            )
        await _made(client, name, path)
    print(f"keystore {name} is made: {place}, configured in conf.d/{name}.toml")
    say(
        f"next: vmcryptctl unlock {name}, then vmcryptctl key add VOLUME --keystore {name}, "
        f"then vmcryptctl lock {name}; and a backup: vmcryptctl header backup {name} FILE"
    )
    return EXIT_OK


def _options(arguments: Namespace) -> dict[str, Any]:
    """The options of the bus method. Raises UsageError."""
    options = {
        option: value
        for option in ("file", "device", "mount")
        if (value := getattr(arguments, option)) is not None
    }
    if arguments.size is not None:
        match = re.fullmatch(r"(\d{1,12})([KMG]?)", arguments.size)
        if match is None:
            raise UsageError(f'"{arguments.size}" is no size such as 32M, of at least 20M')
        options["size"] = int(match[1]) * _UNITS[match[2]]
    return options


def _typed(options: dict[str, Any]) -> dict[str, Typed]:
    kinds = {str: "s", bool: "b", int: "x"}
    return {name: Typed(kinds[type(value)], value) for name, value in options.items()}


async def _check(client: Client, name: str, options: dict[str, Any]) -> None:
    """Make all checks before a person types. Raises VmcryptdError."""
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        checked = _typed({**options, "dry-run": True})
        await client.call("CreateKeystore", "sha{sv}", name, 0, checked, fds=[nothing])
    finally:
        os.close(nothing)


async def _made(client: Client, name: str, job: str) -> None:
    """Wait for the end of the job, and show its progress. Raises the job's error."""
    showing = asyncio.ensure_future(show_progress(client, f"create-keystore:{name}", lambda: None))
    try:
        await client.job_ended(job)
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}; keystore {name} was not finished, and vmcryptd takes it back when it starts again"
        ) from None
    finally:
        showing.cancel()
        await asyncio.wait({showing})
