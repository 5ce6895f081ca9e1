# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes plain mappings, those that are asked for at once by as many children as there are cores.

A `cryptsetup close` for each costs most of the time that closing takes: it reads the header of a volume only to see
what kind of mapping is to be removed. Sysfs tells that, too; what is not plain is left to cryptsetup.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from vmcryptd.adapters.run import run

log = logging.getLogger(__name__)

REMOVE_S = 30.0


@dataclass(frozen=True)
class Mapping:
    """A device-mapper device of that name, as sysfs shows it."""

    path: Path

    @property
    def uuid(self) -> str:
        return _attribute(self.path / "dm/uuid")

    @property
    def is_plain(self) -> bool:
        """Whether it is one table of dm-crypt on a device that is not its own, and has its key.

        Under one with integrity, or one that is being re-encrypted, lie others named after it.
        """
        name = _attribute(self.path / "dm/name")
        below = (_attribute(path / "dm/name") for path in self.path.glob("slaves/dm-*"))
        return (
            self.uuid.startswith("CRYPT-LUKS")
            and _attribute(self.path / "dm/suspended") == "0"
            and not any(other.startswith((f"{name}_", f"{name}-")) for other in below)
        )


@dataclass
class Removal:
    """Gathers what is to be removed within one turn of the event loop."""

    sys_block: Path = Path("/sys/class/block")
    _names: list[str] = field(default_factory=list)
    _turn: asyncio.Task[None] | None = None

    def find(self, name: str) -> Mapping | None:
        """Asked of the kernel: without udev the links in /dev/mapper tell nothing."""
        for path in self.sys_block.glob("dm-*"):
            if _attribute(path / "dm/name") == name:
                return Mapping(path)
        return None

    async def attempt(self, name: str) -> bool:
        """Whether it is gone; if not, cryptsetup knows better what to do about it and what to say.

        Raises DeadlineError when something hung.
        """
        mapping = self.find(name)
        if mapping is None or not mapping.is_plain:
            return False
        await self._together(name)
        return self.find(name) is None

    async def _together(self, name: str) -> None:
        if self._turn is None:
            self._turn = asyncio.create_task(self._remove())
        turn = self._turn
        self._names.append(name)
        # Not awaited itself: who is called off takes nobody with him.
        await asyncio.wait({turn})
        if (error := turn.exception()) is not None:
            raise error

    async def _remove(self) -> None:
        """Begins when everybody of this turn has said what is to go."""
        names, self._names, self._turn = self._names, [], None
        children = min(len(names), os.cpu_count() or 1)
        parts = (_child(names[first::children]) for first in range(children))
        for failed in await asyncio.gather(*parts, return_exceptions=True):
            if failed is not None:
                raise failed


async def _child(names: list[str]) -> None:
    """Where one is in use, dmsetup leaves it and those after it as they are."""
    done = await run(["dmsetup", "remove", "--", *names], timeout_s=REMOVE_S)
    if done.code != 0:
        log.info("Not all of %s could be removed at once: %s", ", ".join(names), done.complaint)


def _attribute(path: Path) -> str:
    try:
        return path.read_text().rstrip("\n")
    except OSError:
        return ""  # went away meanwhile, or has none
