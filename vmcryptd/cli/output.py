# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prints messages to stderr and data to stdout, draws progress, and connects with polkit's agent."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from vmcryptd.bus.client import Client, connect
from vmcryptd.cli.render import WIDTH, Page, bar, opening, printable, progress
from vmcryptd.cli.verbs import UsageError, near
from vmcryptd.core.errors import EXIT_OK, NoSuchVolumeError, VmcryptdError

# Errors of writes to a full or closed file.
UNWRITABLE = {
    errno.EBADF,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.ENXIO,
    errno.EPIPE,
}


def say(text: str) -> None:
    """Print a message to stderr. If that is closed, the exit status must suffice."""
    with contextlib.suppress(OSError):
        print(f"vmcryptctl: {printable(text)}", file=sys.stderr, flush=True)


def discard_output() -> None:
    """Discard the buffer of standard output, so that flushing it does not fail again when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)


def print_json(value: object, *, indent: int | None = 2) -> None:
    import json

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # JSON allows more in a string than a terminal should get; only new lines stand outside of one.
    if not text.replace("\n", "").isprintable():
        text = "".join(
            char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text
        )
    print(text, flush=True)


def page() -> Page:
    if not sys.stdout.isatty():
        return Page()
    try:
        width = os.get_terminal_size(1).columns
    except OSError:
        width = 0
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
    return Page(width=width or 80, colour=not plain)  # a serial line knows no size


def check_names(client: Client, names: Iterable[str]) -> None:
    """Raises NoSuchVolumeError before a person is asked. The client must `follow`."""
    for name in names:
        if name not in client.volumes:
            hint = near(name, list(client.volumes)) or (
                "" if client.volumes else "; none is configured"
            )
            raise NoSuchVolumeError(f'there is no volume "{name}"{hint}')


@contextlib.asynccontextmanager
async def changing() -> AsyncIterator[Client]:
    """A connection for which polkit can ask the caller for a password."""
    from vmcryptd.cli import terminal

    interactive = terminal.is_interactive()
    async with terminal.polkit_agent(), connect(interactive=interactive) as client:
        yield client


async def show_progress(client: Client, goal: str, begun: Callable[[], None]) -> None:
    """Call `begun` at a job's first progress, and draw its progress on a terminal until cancelled."""

    def done() -> float | None:
        return progress(goal, client.jobs.values())

    await client.until(lambda: done() is not None)
    begun()
    if sys.stderr.isatty():
        await _draw(client, lambda width: None if (now := done()) is None else bar(now, width))


@contextlib.asynccontextmanager
async def show_opening(client: Client, names: Sequence[str]) -> AsyncIterator[None]:
    """Inside the block, draw on a terminal how many volumes are open: of the named ones, or of all being opened."""

    def line(width: int) -> str | None:
        known = client.volumes
        volumes = [known[name] for name in names if name in known] if names else known.values()
        opened, count = opening(volumes)
        if not any(values["State"] == "unlocking" for values in volumes) or count < 2:
            return None
        return bar(opened / count, width, f"{opened} of {count} open")

    if not sys.stderr.isatty():
        yield
        return
    drawing = asyncio.ensure_future(_draw(client, line))
    try:
        yield
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)


async def _draw(client: Client, line: Callable[[int], str | None]) -> None:
    """Keep one line of the terminal up to date until cancelled, then clear it."""
    try:
        width = os.get_terminal_size(2).columns or WIDTH
    except OSError:
        width = WIDTH
    shown = ""
    try:
        while True:
            if (new := line(width - 1)) is not None and new != shown:
                shown = new
                print(f"\r{shown}", end="", file=sys.stderr, flush=True)
            before = new
            await client.until(lambda: line(width - 1) != before)  # noqa: B023 (asked for before it changes)
    finally:
        if shown:
            print(f"\r{' ' * len(shown)}\r", end="", file=sys.stderr, flush=True)


def open_key(path: str) -> int:
    if path == "-":
        if os.isatty(0):
            raise UsageError(
                '"--key-file -" reads standard input, which is the terminal; without it you are asked'
            )
        return 0
    try:
        # The daemon refuses directories and devices: it knows what can be read to the end.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}") from None


def report(errors: Iterable[VmcryptdError]) -> int:
    """Print each failure, and return the highest exit status."""
    errors = list(errors)
    for error in errors:
        say(str(error))
    return max((error.exit_code for error in errors), default=EXIT_OK)
