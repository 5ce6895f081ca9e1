# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks on the caller's terminal: passphrases by systemd-ask-password, polkit's passwords by pkttyagent.

The answers go from the child into a pipe or a memfd, never through Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import termios
from collections.abc import AsyncIterator, Iterator

from vmcryptd.core.errors import VmcryptdError
from vmcryptd.posix.pidfd import exit_of
from vmcryptd.posix.run import spawn_on_terminal

ASK = ("/usr/bin/systemd-ask-password", "/bin/systemd-ask-password")
AGENT = ("/usr/bin/pkttyagent",)
AGENT_S = 5.0  # for polkit's agent to be registered


class NoTerminalError(VmcryptdError):
    """No person can be asked here."""


def is_interactive() -> bool:
    """Whether a person can be asked on standard input."""
    return os.isatty(0)


async def ask(message: str, into: int) -> bool:
    """Ask once; the answer is written into a descriptor. False when the person declined.

    A cancelled task ends the question. Characters typed by then are discarded, so that the shell does not get
    them (systemd#43497).
    """
    argv = ["systemd-ask-password", "-n", "--timeout=0", "--id=vmcryptctl", "--", message]
    with _terminal_restored():
        child = spawn_on_terminal(ASK, argv, {1: into})
        if child is None:
            raise NoTerminalError("systemd-ask-password is not installed, so asking is impossible")
        return await _ended(child) == 0


def waiting_bytes(pipe: int) -> int:
    """The number of unread bytes in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4), sys.byteorder)


@contextlib.asynccontextmanager
async def polkit_agent() -> AsyncIterator[None]:
    """While this is open, polkit can ask for a password on this terminal, as with systemctl."""
    child = None
    if os.geteuid() != 0 and is_interactive():
        reader, writer = os.pipe2(os.O_CLOEXEC)
        # Any free number in the child; 0 to 2 are the terminal.
        argv = ["pkttyagent", "--notify-fd=3", "--fallback", f"--process={os.getpid()}"]
        try:
            child = spawn_on_terminal(AGENT, argv, {3: writer})
        finally:
            os.close(writer)
        try:
            if child is not None:
                await _closed(reader)
        finally:
            os.close(reader)
    try:
        yield
    finally:
        if child is not None:
            await _end(child)


async def _ended(child: int) -> int:
    """Wait for a child, and end it when the task is cancelled. Returns its exit code."""
    exited = exit_of(child)
    try:
        await exited
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        raise
    finally:
        code = _reaped(child)
    return code


def _reaped(child: int) -> int:
    """Reap a child that has ended or was signalled, so this does not block for long."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


async def _end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
    await _ended(child)


async def _closed(reader: int) -> None:
    """Wait until the other end of a pipe is closed, for some seconds."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    loop.add_reader(reader, closed.set)
    try:
        async with asyncio.timeout(AGENT_S):
            await closed.wait()
    except TimeoutError:
        pass  # polkit finds no agent, and refuses
    finally:
        loop.remove_reader(reader)


@contextlib.contextmanager
def _terminal_restored() -> Iterator[None]:
    """Restore the terminal: systemd-ask-password leaves echo off when a signal ends it."""
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        fd = os.dup(0)
    try:
        try:
            before = termios.tcgetattr(fd)
        except termios.error:
            raise NoTerminalError(
                "standard input is no terminal, so asking is impossible"
            ) from None
        try:
            yield
        except BaseException:
            termios.tcflush(fd, termios.TCIFLUSH)
            with contextlib.suppress(OSError):
                os.write(fd, b"\r\n")
            raise
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
    finally:
        os.close(fd)
