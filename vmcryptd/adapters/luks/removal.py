# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes plain mappings in batches, with as many dmsetup children as there are cores.

A `cryptsetup close` for each mapping takes most of the time of closing: it reads the header only to learn the kind of
the mapping. Sysfs shows that, too. Other kinds are left to cryptsetup.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import NamedTuple

from vmcryptd.adapters.storage import sysfs
from vmcryptd.posix.run import run

log = logging.getLogger(__name__)

REMOVE_S = 30.0


# The suffixes of the mappings that a killed rotation of the volume key leaves behind; the first has the keys.
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
        """Whether it is one dm-crypt table on a device that cryptsetup did not make, and has its key.

        A mapping with integrity, or one that is being reencrypted, lies on others that are named after it.
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


class Removal:
    """Collects the mappings to remove within one turn of the event loop."""

    def __init__(self, sys_block: Path = Path("/sys/class/block")) -> None:
        self.sys_block = sys_block
        self._names: list[str] = []
        self._turn: asyncio.Task[set[str]] | None = None

    def present(self) -> dict[str, Mapping]:
        """All mappings. From the kernel: without udev the links in /dev/mapper are stale."""
        with os.scandir(self.sys_block) as entries:
            paths = [entry.path for entry in entries if entry.name.startswith("dm-")]
        return {
            name: Mapping(name, path) for path in paths if (name := _attribute(f"{path}/dm/name"))
        }

    def left_behind(self, name: str) -> list[str]:
        """The mappings that a killed rotation of the volume key has left beneath a mapping."""
        return _left_behind(name, self.present())

    async def attempt(self, name: str) -> bool:
        """Whether the mapping was removed; if not, use cryptsetup, which knows more cases and errors.

        Raises DeadlineError when something hung.
        """
        if self._turn is None:
            self._turn = asyncio.create_task(self._remove())
            self._turn.add_done_callback(_read)
        turn = self._turn
        self._names.append(name)
        # Not awaited itself: a caller that is cancelled must not cancel it for the others.
        await asyncio.wait({turn})
        return name in turn.result()

    async def _remove(self) -> set[str]:
        """Start when all calls of this turn have named their mappings. Returns the removed ones."""
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


def _read(turn: asyncio.Task[set[str]]) -> None:
    """Its error has no other reader when all its callers were cancelled."""
    if not turn.cancelled() and (error := turn.exception()) is not None:
        log.info("mappings cannot be removed at once: %s", error)


def _left_behind(name: str, present: dict[str, Mapping]) -> list[str]:
    """Another program's mapping may have the same name, but not the same UUID."""
    return [
        other
        for end in _LEFT_BEHIND
        if (other := f"{name}{end}") in present and present[other].uuid.startswith("CRYPT-SUBDEV-")
    ]


async def _child(names: list[str]) -> None:
    """Remove some mappings. dmsetup stops at one that is in use, and leaves the rest."""
    done = await run(["dmsetup", "remove", "--", *names], timeout_s=REMOVE_S)
    if done.code != 0:
        log.info(
            "not all of the mappings %s can be removed at once: %s",
            ", ".join(names),
            done.complaint,
        )


def _attribute(path: str) -> str:
    """An attribute in sysfs; empty if it does not exist, or no longer."""
    return sysfs.attribute(path) or ""
