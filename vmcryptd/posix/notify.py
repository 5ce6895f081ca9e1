# SPDX-License-Identifier: LGPL-2.1-or-later
"""News of this service for systemd: sd_notify(3)."""

from __future__ import annotations

import contextlib
import os


def notify(message: str) -> None:
    """Send assignments, one a line. Does nothing without systemd; one that cannot be reached is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    import socket

    flags = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, flags) as sender:
        # A leading @ stands for the abstract namespace.
        sender.sendto(message.encode(), address.replace("@", "\0", 1))


def ready() -> None:
    notify("READY=1")


def stopping() -> None:
    notify("STOPPING=1")


def alive() -> None:
    notify("WATCHDOG=1")


def extend_timeout(seconds: float) -> None:
    """A start or stop that goes on may take so much longer from now."""
    notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")


def watchdog_interval_s() -> float | None:
    """How often to say `alive`: half of what systemd allows. None when it does not watch."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2_000_000
    except (KeyError, ValueError):
        return None
