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
from typing import NamedTuple

from vmcryptd.adapters.storage import sysfs
from vmcryptd.posix.run import run

log = logging.getLogger(__name__)

REMOVE_S = 30.0


# A killed rotation of the volume key leaves these mappings behind, by the ends of their names; the first has the keys.
_LEFT_BEHIND = ("-overlay", "-hotzone-forward")


class Mapping(NamedTuple):
    """A device-mapper device, as sysfs shows it."""

    name: str
    path: str

    @property
    def uuid(self) -> str:
        return _attribute(f"{self.path}/dm/uuid")

    @property
    def is_plain(self) -> bool:
        """Whether it is one table of dm-crypt on a device that is not its own, and has its key.

        Under one with integrity, or one that is being re-encrypted, lie others named after it.
        """
        try:
            slaves = os.listdir(f"{self.path}/slaves")
        except OSError:
            return False  # went away meanwhile
        below = (_attribute(f"{self.path}/slaves/{slave}/dm/name") for slave in slaves)
        return (
            self.uuid.startswith("CRYPT-LUKS")
            and _attribute(f"{self.path}/dm/suspended") == "0"
            and not any(other.startswith((f"{self.name}_", f"{self.name}-")) for other in below)
        )


@dataclass
class Removal:
    """Gathers what is to be removed within one turn of the event loop."""

    sys_block: Path = Path("/sys/class/block")
    _names: list[str] = field(default_factory=list)
    _turn: asyncio.Task[set[str]] | None = None

    def present(self) -> dict[str, Mapping]:
        """All there are. Asked of the kernel: without udev the links in /dev/mapper tell nothing."""
        with os.scandir(self.sys_block) as entries:
            paths = [entry.path for entry in entries if entry.name.startswith("dm-")]
        return {
            name: Mapping(name, path) for path in paths if (name := _attribute(f"{path}/dm/name"))
        }

    def left_behind(self, name: str) -> list[str]:
        """The mappings that a killed rotation of its volume key has left beneath it."""
        return _left_behind(name, self.present())

    async def attempt(self, name: str) -> bool:
        """Whether it is gone; if not, cryptsetup knows better what to do about it and what to say.

        Raises DeadlineError when something hung.
        """
        if self._turn is None:
            self._turn = asyncio.create_task(self._remove())
        turn = self._turn
        self._names.append(name)
        # Not awaited itself: a caller that is cancelled must not cancel it for the others.
        await asyncio.wait({turn})
        return name in turn.result()

    async def _remove(self) -> set[str]:
        """Begins when everybody of this turn has said what is to go. Returns what has gone."""
        wanted, self._names, self._turn = self._names, [], None
        present = self.present()
        names = [
            name
            for name in wanted
            if name in present and not _left_behind(name, present) and present[name].is_plain
        ]
        if not names:
            return set()
        children = min(len(names), os.cpu_count() or 1)
        parts = (_child(names[first::children]) for first in range(children))
        for failed in await asyncio.gather(*parts, return_exceptions=True):
            if failed is not None:
                raise failed
        return set(names).difference(self.present())


def _left_behind(name: str, present: dict[str, Mapping]) -> list[str]:
    """Somebody else's may have the name, but not the mark."""
    return [
        other
        for end in _LEFT_BEHIND
        if (other := f"{name}{end}") in present and present[other].uuid.startswith("CRYPT-SUBDEV-")
    ]


async def _child(names: list[str]) -> None:
    """Where one is in use, dmsetup leaves it and those after it as they are."""
    done = await run(["dmsetup", "remove", "--", *names], timeout_s=REMOVE_S)
    if done.code != 0:
        log.info(
            "not all of the mappings %s can be removed at once: %s",
            ", ".join(names),
            done.complaint,
        )


def _attribute(path: str) -> str:
    """Empty when it went away meanwhile, or there is none."""
    return sysfs.attribute(path) or ""
