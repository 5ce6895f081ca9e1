# SPDX-License-Identifier: LGPL-2.1-or-later
"""Formats the log for the journal or a terminal on standard error: one line for each message."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterable
from typing import TextIO

from vmcryptd.core.text import escaped

LONGEST = 16 * 1024  # characters; journald cuts lines at 48 KiB
SOCKET = "/run/systemd/journal/socket"


class Lines(logging.Formatter):
    """Control characters escaped: names and answers from outside cannot end a line or forge one."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [escaped(record.getMessage(), LONGEST)]
        if record.exc_info:
            traceback = self.formatException(record.exc_info)
            # Marked: an error's text may hold a line that looks like one of ours.
            lines += [f"| {escaped(line, LONGEST)}" for line in traceback.splitlines()]
        return "\n".join(f"{self.prefix(record)}{line}" for line in lines)

    def prefix(self, record: logging.LogRecord) -> str:
        return f"{record.levelname}: "


class JournalLines(Lines):
    """Prefixes the level for the journal: sd-daemon(3)."""

    def prefix(self, record: logging.LogRecord) -> str:
        return f"<{_priority(record)}>"


def _priority(record: logging.LogRecord) -> int:
    """As syslog(3) counts."""
    return {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)


class JournalHandler(logging.StreamHandler[TextIO]):
    """The journal's own socket, for the fields of a record; all records take it, so that they stay in order.

    A record that the journal does not take becomes a line of standard error: a lost field is better than a lost
    sentence. So does a traceback, which has lines of its own.
    """

    def __init__(self, address: str = SOCKET) -> None:
        super().__init__()
        self.setFormatter(JournalLines())
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)  # a slow journal holds up nothing

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or not self._is_sent(record, getattr(record, "fields", ())):
            super().emit(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _is_sent(self, record: logging.LogRecord, fields: Iterable[tuple[str, str]]) -> bool:
        entry = entry_of(
            ("MESSAGE", record.getMessage()),
            ("PRIORITY", str(_priority(record))),
            ("SYSLOG_IDENTIFIER", os.path.basename(sys.argv[0])),
            *fields,
        )
        try:
            self._socket.sendto(entry, self._address)
        except OSError:
            return False
        return True


def entry_of(*fields: tuple[str, str]) -> bytes:
    """One entry as the journal's socket takes it (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/)."""
    # Escaped, no value has a newline: the form for binary values is never needed.
    lines = (f"{name}={escaped(value, LONGEST)}\n" for name, value in fields)
    return "".join(lines).encode(errors="backslashreplace")


def log_to_journal(level: int = logging.INFO) -> None:
    """Log to standard error; if that is the journal, with levels and fields.

    python-systemd's handler logs nothing more, and importing it takes a tenth of a start.
    """
    handler: logging.Handler
    if _stderr_is_journal():
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _stderr_is_journal() -> bool:
    # systemd.exec(5), $JOURNAL_STREAM: compared, because children with redirected output inherit the variable.
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
