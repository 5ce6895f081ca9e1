# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's own commands, run when something happens."""

from __future__ import annotations

import logging

from vmcryptd.core.ports import Host
from vmcryptd.engine.inventory import Inventory

log = logging.getLogger(__name__)


class Hooks:
    """Runs what `[daemon]` names, with what it is about in the environment."""

    def __init__(self, host: Host, inventory: Inventory) -> None:
        self._host = host
        self._inventory = inventory

    async def waiting(self, names: list[str]) -> None:
        """Volumes begin to wait for a person."""
        log.warning("waiting for the key of %s; `vmcryptctl unlock` takes it", ", ".join(names))
        if argv := self._inventory.settings.daemon.on_waiting:
            await self._host.run_hook(argv, {"VMCRYPTD_WAITING": " ".join(names)})
