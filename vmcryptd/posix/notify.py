# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sends the service's state to systemd: sd_notify(3)."""

from __future__ import annotations

import contextlib
import os


def notify(message: str) -> None:
    """Send assignments, one a line. Does nothing without systemd; an unreachable systemd is no error."""
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
    """Extend a running start or stop to so long from now."""
    notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")


def watchdog_interval_s() -> float | None:
    """The interval of watchdog messages: half of systemd's limit. None without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2_000_000
    except (KeyError, ValueError):
        return None
