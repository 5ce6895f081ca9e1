# SPDX-License-Identifier: LGPL-2.1-or-later
"""Talks to systemd, and runs the administrator's commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from vmcryptd.core.errors import VmcryptdError
from vmcryptd.core.text import escaped
from vmcryptd.posix.notify import notify
from vmcryptd.posix.run import run

log = logging.getLogger(__name__)

TARGET = "vmcryptd.target"
HOOK_S = 60.0
SYSTEMCTL_S = 15.0
LONGEST_STATUS = 1000  # characters


class SystemdHost:
    """The port `Host` on this host."""

    def __init__(self) -> None:
        self._status = ""
        self._hooks: set[asyncio.Task[None]] = set()

    def status(self, text: str) -> None:
        line = escaped(" ".join(text.split()), LONGEST_STATUS)
        if line != self._status:
            self._status = line
            notify(f"STATUS={line}")

    async def reach_target(self, reached: bool) -> None:
        verb = "start" if reached else "stop"
        try:
            done = await run(["systemctl", "--no-block", verb, TARGET], timeout_s=SYSTEMCTL_S)
        except VmcryptdError as error:
            log.warning("%s of %s failed: %s", verb, TARGET, error)
            return
        if done.code != 0:
            log.warning("%s of %s failed: %s", verb, TARGET, done.complaint)

    async def run_hook(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        hook = asyncio.create_task(_run_hook(tuple(argv), dict(environment)))
        self._hooks.add(hook)  # the loop holds only weak references
        hook.add_done_callback(self._hooks.discard)


async def _run_hook(argv: tuple[str, ...], environment: dict[str, str]) -> None:
    if not argv:
        return
    try:
        done = await run(argv, timeout_s=HOOK_S, environment=environment, stderr_to_journal=True)
    except VmcryptdError as error:
        log.warning("the command %s failed: %s", argv[0], error)
        return
    if done.code != 0:
        log.warning("the command %s failed: %s", argv[0], done.reason)
