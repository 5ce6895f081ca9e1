# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small files are read within bounds, and replaced whole or not at all; the log's lines are one line each."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vmcryptd.cli.output import print_json
from vmcryptd.core.text import escaped, octal_unescaped
from vmcryptd.posix.files import read_bounded, write_atomically
from vmcryptd.posix.journal import JournalLines, Lines
from vmcryptd.posix.notify import extend_timeout, notify
from vmcryptd.posix.pidfd import exit_of


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["state.json"])


def test_the_directory_is_synced_after_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "state.json", b"new")
    assert synced == [f"{tmp_path / 'state.new'}", f"{tmp_path}"]


def test_what_lies_in_the_way_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.new")
    os.mkfifo(tmp_path / "state.json")
    write_atomically(tmp_path / "state.json", b"new")
    assert read_bounded(tmp_path / "state.json") == b"new"


def test_only_so_much_of_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ValueError, match="it is no regular file"):
            read_bounded(path)
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    with pytest.raises(ValueError, match="it is larger than 1 MiB"):
        read_bounded(tmp_path / "large", 1 << 20)


HOSTILE = "imap\n<0>volume cr_imap is closed\x1b[2J\udcff\u202e"
SAID = r"imap\n<0>volume cr_imap is closed\x1b[2J\udcff\u202e"


@pytest.mark.parametrize(("formatter", "start"), [(JournalLines(), "<4>"), (Lines(), "WARNING: ")])
def test_no_name_ends_a_line_of_the_log(formatter: logging.Formatter, start: str) -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "guest %s", (HOSTILE,), None)
    assert formatter.format(record) == f"{start}guest {SAID}"


def test_a_traceback_has_its_lines() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "a fault", (), sys.exc_info())
    first, second, *_, last = JournalLines().format(record).splitlines()
    assert (first, second) == ("<3>a fault", "<3>| Traceback (most recent call last):")
    assert last == r"<3>| <0>volume cr_imap is closed\x1b[2J\udcff\u202e"


def test_json_has_no_more_than_text_for_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"name": f"Gerät {HOSTILE}\x7f\x9b2J\U000e0001"}
    print_json(value)
    said = capsys.readouterr().out
    assert json.loads(said) == value
    assert "Gerät" in said
    assert all(char.isprintable() or char == "\n" for char in said)
    assert said.count("\n") == 3


def test_escapes() -> None:
    assert escaped("ein Gerät\t1", 100) == r"ein Gerät\t1"
    assert octal_unescaped(r"/srv/my\040disk\134\012Gerät") == "/srv/my disk\\\nGerät"


def test_notification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        extend_timeout(1.5)
        assert systemd.recv(100) == b"EXTEND_TIMEOUT_USEC=1500000"
    notify("READY=1")  # the socket is closed
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{tmp_path}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{tmp_path}")
        notify("READY=1")
        assert systemd.recv(100) == b"READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


def test_the_end_of_a_process() -> None:
    async def test() -> None:
        before = len(os.listdir("/proc/self/fd"))
        child = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220 (a test)
        exited, unwanted = exit_of(child.pid), exit_of(child.pid)
        unwanted.cancel()
        await asyncio.sleep(0)
        child.kill()
        await exited
        assert child.wait() == -9
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(ProcessLookupError):
            exit_of(child.pid)

    asyncio.run(test())
