# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds disks of a guest that hold a volume or that another guest writes: starting it would destroy data. Pure."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from vmcryptd.core.graph import Graph, GuestDisk


class Conflict(NamedTuple):
    """The reason why a guest must not start, the disk, and what to do."""

    disk: GuestDisk
    text: str
    advice: str


def overwritten_volume(graph: Graph, guest: str) -> Conflict | None:
    """A disk of the guest that is a volume's LUKS device, or carries it."""
    for disk in graph.guests[guest].disks:
        if (volume := graph.carriers.get(disk.identity)) is None:
            continue
        node = graph.volumes[volume]
        if disk.identity == node.device:
            return Conflict(
                disk,
                f"its disk {_shown(disk)} is the LUKS device of volume {volume}: the guest would "
                "overwrite the LUKS header",
                f"give it /dev/mapper/{volume} instead: `virsh edit {guest}`",
            )
        return Conflict(
            disk,
            f"its disk {_shown(disk)} carries volume {volume} ({node.spec.device}): the guest would "
            "overwrite that",
            f"give it another disk: `virsh edit {guest}`",
        )
    return None


def shared_disk(graph: Graph, guest: str, starting: Container[str] = ()) -> Conflict | None:
    """A disk that another running or `starting` guest writes."""
    for disk in graph.guests[guest].disks:
        others = () if disk.is_shareable else graph.writers.get(disk.identity, ())
        for other in others:
            if other != guest and (graph.guests[other].is_running or other in starting):
                return Conflict(
                    disk,
                    f"guest {other}, which runs, writes its disk {_shown(disk)}: two would destroy it",
                    f"stop that one first: `vmcryptctl stop {other}`; if the guests are made to share "
                    "it, <shareable/> in both says so",
                )
    return None


def _shown(disk: GuestDisk) -> str:
    identity = disk.identity if disk.identity.startswith("/") else f"/dev/{disk.identity}"
    return disk.path if identity == disk.path else f"{disk.path} ({identity})"
