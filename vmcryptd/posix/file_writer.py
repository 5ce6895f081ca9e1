# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes small files beside the event loop: a disk that is slow, or does not answer, holds up nothing."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import NamedTuple

from vmcryptd.posix.files import read_bounded, write_atomically

log = logging.getLogger(__name__)


class _Content(NamedTuple):
    data: bytes
    mode: int


class FileWriter:
    """Writes in a thread, in the order in which contents were handed in; of each file the latest counts."""

    def __init__(self) -> None:
        self._due: dict[Path, _Content] = {}
        self._state = threading.Condition()
        self._is_writing = False

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Replace the file's content soon, as `files.write_atomically`. Failures are only logged."""
        with self._state:
            self._due.pop(path, None)  # what is written last was handed in last
            self._due[path] = _Content(data, mode)
            if not self._is_writing:
                self._is_writing = True
                # One for each burst, and a daemon: its end is waited for by `wait` alone.
                threading.Thread(target=self._work, name="vmcryptd-files", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is written. Blocks. False if that takes longer."""
        with self._state:
            return self._state.wait_for(lambda: not self._is_writing, timeout_s)

    def _work(self) -> None:
        while True:
            with self._state:
                if not self._due:
                    self._is_writing = False
                    self._state.notify_all()
                    return
                path = next(iter(self._due))
                content = self._due.pop(path)
            try:
                store(path, content.data, content.mode)
            except Exception:  # the thread must go on with the other files
                log.exception("%s cannot be written", path)


def store(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace the file's content now, unless it is that already. Failures are only logged.

    A full or read-only disk must not stop the work: only the next start knows less.
    """
    try:
        if _is_stored(path, data):
            return
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomically(path, data, mode)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)


def _is_stored(path: Path, data: bytes) -> bool:
    try:
        return read_bounded(path) == data
    except (OSError, ValueError):
        return False
