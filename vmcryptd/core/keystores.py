# SPDX-License-Identifier: LGPL-2.1-or-later
"""A keystore that is to be made: what callers ask for, what of it is refused, and its table. No I/O."""

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

# Emptied at boot or by age (tmpfiles.d), in memory, or removed with the package: no place for keys.
SWEPT = ("/dev", "/proc", "/run", "/sys", "/tmp", "/var/cache", "/var/lib/vmcryptd", "/var/tmp")
# A mount point may be in memory, but nothing may remove files from below it.
SWEPT_MOUNTS = ("/run/vmcryptd", "/tmp", "/var/cache", "/var/lib/vmcryptd", "/var/tmp")

_OPTIONS: Mapping[str, type] = {
    "file": str, "device": str, "size": int, "mount": str, "dry-run": bool,
}  # fmt: skip


class Keystore(NamedTuple):
    """What is to be made."""

    name: str
    place: str  # a block device, or a file that is made first
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
                # A JSON text without escapes is one of TOML.
                *(f"{key} = {json.dumps(text, ensure_ascii=False)}" for key, text in lines.items()),
                "",
            )
        )


class Making(NamedTuple):
    """What is known of a keystore that is being made, for a daemon that comes after a crash."""

    name: str
    place: str
    uuid: str
    is_file: bool


def wanted(name: str, options: Mapping[str, object], uuid: str) -> Keystore:
    """The keystore that a caller describes by `file` and `size` or `device`, and `mount`. Raises OptionError."""
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
    """Raises OptionError for a path in a directory that something empties."""
    for directory in swept:
        if path == directory or path.startswith(f"{directory}/"):
            raise OptionError(
                f"keystore {name}: {path} is no place for it: files in {directory} do not stay (they are removed at "
                "boot, by age or with the package), and the keys would be lost; name another place, such as /var/lib"
            )
