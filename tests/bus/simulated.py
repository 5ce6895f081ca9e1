# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon with a simulated host behind it, and vmcryptctl on a terminal, for tests that are no coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.forkserver import DEVNULL, PIPE, Forked
from vmcryptd.bus.client import Client, connect

PROJECT = Path(__file__).resolve().parents[2]
ALPHA, BETA, GAMMA = "canary-alpha-7d1f", "canary-beta-93ce", "canary-gamma-0b55"
CTL = [sys.executable, "-c", "import sys; from vmcryptd.cli.main import main; sys.exit(main())"]
ECHOING = termios.ECHO | termios.ICANON
LONG_S = 120  # nothing here takes so long; a test that would hang fails instead


def opened_by(passphrase: str) -> str:
    return f'passphrase_sha256 = "{hashlib.sha256(passphrase.encode()).hexdigest()}"\n'


class Host:
    """One daemon at a time on the test's bus; none may leave a traceback or a passphrase in its log."""

    def __init__(self, folder: Path) -> None:
        self.sim = folder / "sim.toml"
        self.journal = folder / "journal"
        self.journal.touch()
        self.daemon: Forked | None = None

    def start(self, text: str | None = None) -> None:
        """Comes back when it can be called."""
        if text is not None:
            self.sim.write_text(text)
        with self.journal.open("ab") as stderr:
            self.daemon = Forked("vmcryptd", "--sim", str(self.sim), stderr=stderr)
        asyncio.run(self._owned())

    async def _owned(self) -> None:
        async with asyncio.timeout(LONG_S), connect() as client:
            while not await client.is_running():
                assert self.daemon is not None
                assert self.daemon.poll() is None, self.journal.read_text()
                await asyncio.sleep(0.02)
            await client.ping()  # it owns its name before it reads its configuration

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(number)
            self.daemon.wait(LONG_S)
            self.daemon = None

    def call(self, member: str, signature: str = "", *body: Any, key: str | None = None) -> Any:
        """Call the manager's method as another client would; `key` is handed in for its descriptor."""

        async def called() -> Any:
            with contextlib.ExitStack() as opened:
                fds = [] if key is None else [opened.enter_context(handed_in(key))]
                async with asyncio.timeout(LONG_S), connect() as client:
                    return await client.call(member, signature, *body, fds=fds)

        return asyncio.run(called())

    def unlock(self, name: str, passphrase: str) -> None:
        self.call("UnlockWithKey", "sh", name, 0, key=passphrase)

    def until(self, predicate: Callable[[Client], bool]) -> None:
        """Wait until the daemon shows that it is so."""

        async def reached() -> None:
            async with connect() as client:
                await client.follow()
                assert await client.until(lambda: predicate(client), LONG_S), client.volumes

        asyncio.run(reached())

    def boot(self, state: str) -> None:
        self.call("Boot")
        self.until(lambda client: client.host["State"] == state)

    def states(self) -> dict[str, str]:
        """Of volumes and guests, by name."""
        found: dict[str, str] = {}

        async def load() -> None:
            async with connect() as client:
                await client.load()
                for name, values in (client.volumes | client.guests).items():
                    found[name] = values["State"]

        asyncio.run(load())
        return found


@contextlib.contextmanager
def handed_in(text: str) -> Iterator[int]:
    reader, writer = os.pipe()
    try:
        os.write(writer, text.encode())
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """To be started by the test."""
    host = Host(tmp_path)
    try:
        yield host
    finally:
        host.end()
    log = host.journal.read_text()
    assert "Traceback" not in log
    assert "canary" not in log


class Ended(NamedTuple):
    """How vmcryptctl ended."""

    code: int
    out: str
    err: str


def ctl(*argv: str, typed: str | None = None) -> Ended:
    """In a process of its own, without a terminal."""
    stdin = DEVNULL if typed is None else PIPE
    with Forked("vmcryptctl", *argv, stdin=stdin, stdout=PIPE, stderr=PIPE) as child:
        out, err = child.communicate(typed or "", LONG_S)
    assert "Traceback" not in err
    assert "canary" not in out + err
    return Ended(child.wait(), out, err)


class Terminal:
    """vmcryptctl on a terminal of its own."""

    def __init__(self, *argv: str, columns: int = 80, term: str = "dumb") -> None:
        self.fd, theirs = os.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {**os.environ, "TERM": term}
        self.child = Forked(
            "vmcryptctl", *argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, terminal=True
        )
        os.close(theirs)
        self.seen = ""

    def expect(self, text: str) -> None:
        end = time.monotonic() + LONG_S
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            assert self.read(0.2), f"it ended without {text!r}: {self.seen!r}"
        self.seen = self.seen.partition(text)[2]

    def read(self, timeout_s: float) -> bool:
        """False at the end."""
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return True
        try:
            block = os.read(self.fd, 4096)
        except OSError:
            return False
        # systemd-ask-password rubs its hints out.
        shown = re.sub(r"[\x08*]+|\(press TAB for no echo\) ?", "", block.decode(errors="replace"))
        self.seen += shown
        return bool(block)

    def type(self, text: str) -> None:
        # The question is shown a moment before it can be answered.
        while termios.tcgetattr(self.fd)[3] & ECHOING:
            time.sleep(0.01)
        os.write(self.fd, text.encode())

    def end(self) -> int:
        while self.read(LONG_S):
            pass
        code = self.child.wait(LONG_S)
        # What the shell that comes next would find.
        assert termios.tcgetattr(self.fd)[3] & ECHOING == ECHOING
        os.close(self.fd)
        return code
