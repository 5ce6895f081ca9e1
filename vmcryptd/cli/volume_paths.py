# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds volumes by paths of their devices and mappings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vmcryptd.core.model import VolumeSpec

Volumes = Mapping[str, Mapping[str, Any]]


def resolve(words: Iterable[str], volumes: Volumes) -> list[str]:
    """The volumes' names. No name contains "/" or "="; a path of no volume is returned unchanged."""
    return [_volume(word, volumes) if "/" in word or "=" in word else word for word in words]


def _volume(word: str, volumes: Volumes) -> str:
    wanted = _identity(VolumeSpec("", word).device_path)
    opened = _luks_uuid(wanted)
    for name, values in volumes.items():
        device = str(values["Device"])
        spec = VolumeSpec(name, device)
        uuid = str(values["Uuid"]).replace("-", "")
        if (
            word in (device, spec.mapper_path)
            or wanted in (_identity(spec.device_path), _identity(spec.mapper_path))
            or (uuid and uuid == opened)
        ):
            return name
    return word


def _identity(path: str) -> str:
    """A value that is the same for all links to one device."""
    return os.path.realpath(path)


def _luks_uuid(path: str) -> str:
    """The LUKS UUID of a mapping of any name, without hyphens. Empty if it is no LUKS mapping.

    The mapping's UUID is CRYPT-LUKS2-<UUID>-<name>, as libcryptsetup writes it.
    """
    try:
        text = Path("/sys/class/block", os.path.basename(path), "dm/uuid").read_text("ascii")
    except (OSError, ValueError):
        return ""
    parts = text.split("-", 3)
    return (
        parts[2]
        if len(parts) == 4 and parts[:2] in (["CRYPT", "LUKS1"], ["CRYPT", "LUKS2"])
        else ""
    )
