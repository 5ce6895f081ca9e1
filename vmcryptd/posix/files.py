# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads small files with a size limit, and writes them atomically."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

LARGEST = 16 << 20  # bytes


def read_bounded(path: str | Path, most: int = LARGEST) -> bytes:
    """A regular file's content. Raises OSError; ValueError if it is another kind of file, or too large."""
    # O_NONBLOCK: a FIFO must not hang; it is refused below.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no regular file")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(most + 1)
    finally:
        os.close(fd)
    if len(content) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    return content


def write_atomically(path: str | Path, content: bytes, mode: int = 0o644) -> None:
    """Replace the file's content, on its disk when this returns. Raises OSError, and then the old content stays.

    Readers see the old or the new content, also after a crash. It is first written as NAME.new.
    """
    path = Path(path)
    temporary = path.with_suffix(".new")
    _write(temporary, content, mode)
    try:
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def write_new(path: str | Path, content: bytes, mode: int = 0o644) -> None:
    """Make a file with this content and mode, regardless of the umask, on its disk when this returns.

    Raises OSError, and then nothing is made; FileExistsError where something has the name. It is written as .NAME.new.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    _write(temporary, content, mode)
    try:
        os.chmod(temporary, mode)
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    sync_directory(path.parent)


def _write(temporary: Path, content: bytes, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # left by a killed process, or a file that would hang
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(temporary, flags, mode)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync_directory(path: str | Path) -> None:
    """Make new, renamed and removed files in it survive a crash. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
