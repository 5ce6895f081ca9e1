# SPDX-License-Identifier: LGPL-2.1-or-later
"""Describes new keystores: checks a caller's options, and makes the configuration table. No I/O."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

from vmcryptd.core.errors import OptionError

SMALLEST_BYTES = 20 << 20  # 16 MiB for the header, the rest for files
LARGEST_BYTES = 1 << 40
DEFAULT_BYTES = 32 << 20
MOUNTS = "/run/vmcryptd-keystore"  # not below /run/vmcryptd: the package removes that

# Directories in memory, cleaned at boot or by age (tmpfiles.d), or removed with the package: no place for keys.
SWEPT = ("/dev", "/proc", "/run", "/sys", "/tmp", "/var/cache", "/var/lib/vmcryptd", "/var/tmp")
# A mount point may be in memory, but nothing may delete files below it.
SWEPT_MOUNTS = ("/run/vmcryptd", "/tmp", "/var/cache", "/var/lib/vmcryptd", "/var/tmp")

_OPTIONS: Mapping[str, type] = {
    "file": str, "device": str, "size": int, "mount": str, "dry-run": bool,
}  # fmt: skip


class Keystore(NamedTuple):
    """A keystore to be made."""

    name: str
    place: str  # a block device, or a new file
    size: int  # bytes of the file; 0 for a block device
    mount: str
    uuid: str

    @property
    def table(self) -> str:
        """The file for conf.d."""
        lines = {
            "device": self.place, "uuid": self.uuid, "keys": ["prompt"],
            "content": "filesystem", "mount": self.mount, "lock": "boot",
        }  # fmt: skip
        return "\n".join(
            (
                "# Made by `vmcryptctl keystore init`: it holds keys of other volumes, and is open",
                "# at boot only until these are.",
                f"[volume.{json.dumps(self.name)}]",
                # A JSON string without escapes is valid TOML.
                *(f"{key} = {json.dumps(text, ensure_ascii=False)}" for key, text in lines.items()),
                "",
            )
        )


class Making(NamedTuple):
    """A keystore that is being made, as kept for the next daemon after a crash."""

    name: str
    place: str
    uuid: str
    is_file: bool


def wanted(name: str, options: Mapping[str, object], uuid: str) -> Keystore:
    """The keystore for the options `file` and `size`, or `device`, and `mount`. Raises OptionError."""
    for option, value in options.items():
        if option not in _OPTIONS:
            raise OptionError(f'keystore {name}: there is no option "{option}"')
        if type(value) is not _OPTIONS[option]:
            raise OptionError(f'keystore {name}: the option "{option}" has the wrong type')
    file, device = options.get("file"), options.get("device")
    if (file is None) == (device is None):
        raise OptionError(
            f"keystore {name}: name either a new file (--file) or an empty device (--device) for it"
        )
    place = str(file or device)
    mount = str(options.get("mount", f"{MOUNTS}/{name}"))
    for path in (place, mount):
        if not path.startswith("/") or os.path.normpath(path) != path or not path.isprintable():
            raise OptionError(
                f'keystore {name}: "{path}" is no absolute path without detours; give one'
            )
    check_swept(name, mount, SWEPT_MOUNTS)
    if file is None:
        if "size" in options:
            raise OptionError(
                f"keystore {name}: a size is for a file: a device has the size it has"
            )
        return Keystore(name, place, 0, mount, uuid)
    check_swept(name, place, SWEPT)
    size = options.get("size", DEFAULT_BYTES)
    assert isinstance(size, int)
    if not SMALLEST_BYTES <= size <= LARGEST_BYTES:
        raise OptionError(f"keystore {name}: its size is from 20 MiB to 1 TiB, not {size} bytes")
    return Keystore(name, place, size, mount, uuid)


def check_swept(name: str, path: str, swept: tuple[str, ...]) -> None:
    """Raises OptionError for a path in a directory that is cleaned."""
    if directory := swept_by(path, swept):
        raise OptionError(
            f"keystore {name}: {path} is no place for it: files in {directory} do not stay (they are removed at "
            "boot, by age or with the package), and the keys would be lost; name another place, such as /var/lib"
        )


def swept_by(path: str, swept: tuple[str, ...]) -> str:
    """The directory that is cleaned and in which the path lies; empty if there is none."""
    found = (one for one in swept if path == one or path.startswith(f"{one}/"))
    return next(found, "")
