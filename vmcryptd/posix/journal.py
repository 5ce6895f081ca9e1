# SPDX-License-Identifier: LGPL-2.1-or-later
"""Formats the log for the journal or a terminal on standard error: one line for each message."""

from __future__ import annotations

import logging
import os
import sys

from vmcryptd.core.text import escaped

LONGEST = 16 * 1024  # characters; journald cuts lines at 48 KiB


class Lines(logging.Formatter):
    """Control characters escaped: names and answers from outside cannot end a line or forge one."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [escaped(record.getMessage(), LONGEST)]
        if record.exc_info:
            traceback = self.formatException(record.exc_info)
            lines += [escaped(line, LONGEST) for line in traceback.splitlines()]
        return "\n".join(f"{self.prefix(record)}{line}" for line in lines)

    def prefix(self, record: logging.LogRecord) -> str:
        return f"{record.levelname}: "


class JournalLines(Lines):
    """Prefixes the level for the journal: sd-daemon(3)."""

    def prefix(self, record: logging.LogRecord) -> str:
        level = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)
        return f"<{level}>"


def log_to_journal(level: int = logging.INFO) -> None:
    """Log to standard error, with levels if that is the journal.

    python-systemd's handler logs nothing more, and importing it takes a tenth of a start.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JournalLines() if _stderr_is_journal() else Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _stderr_is_journal() -> bool:
    # systemd.exec(5), $JOURNAL_STREAM: compared, because children with redirected output inherit the variable.
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
