# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's own commands, run when something happens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from vmcryptd.core import events
from vmcryptd.core.ports import Host
from vmcryptd.core.requester import Requester
from vmcryptd.core.text import escaped
from vmcryptd.engine.inventory import Inventory

log = logging.getLogger(__name__)

# The kernel refuses to run a program with a longer variable (MAX_ARG_STRLEN, 128 KiB), and other ones are beside it.
LONGEST = 64 * 1024
LONGEST_LINE = 1000


class Hooks:
    """Runs the commands in `[daemon]`, with details in the environment."""

    def __init__(self, host: Host, inventory: Inventory) -> None:
        self._host = host
        self._inventory = inventory

    async def waiting(self, names: list[str]) -> None:
        """Volumes begin to wait for a person."""
        log.warning(
            "waiting for the key of %s; `vmcryptctl unlock` takes it", ", ".join(names),
            extra=events.fields(events.WAITING, volume=names, requester=Requester()),
        )  # fmt: skip
        if argv := self._inventory.settings.daemon.on_waiting:
            await self._host.run_hook(argv, {"VMCRYPTD_WAITING": _joined(" ", names)})

    async def failed(self, reasons: Mapping[str, str]) -> None:
        """The host is degraded: name → reason of each failure. The empty name is libvirt."""
        if argv := self._inventory.settings.daemon.on_failed:
            environment = {
                "VMCRYPTD_FAILED": _joined(" ", filter(None, reasons)),
                "VMCRYPTD_REASONS": _joined(
                    "\n", (escaped(one, LONGEST_LINE) for one in reasons.values())
                ),
            }
            await self._host.run_hook(argv, environment)


def _joined(separator: str, words: Iterable[str]) -> str:
    """As many whole words as a variable can hold."""
    found, size = [], 0
    for word in words:
        size += len(word.encode(errors="surrogateescape")) + 1
        if size > LONGEST:
            break
        found.append(word)
    return separator.join(found)
