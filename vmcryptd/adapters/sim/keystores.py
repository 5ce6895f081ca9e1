# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes keystores on a simulated host: each has a name, a place and the digest of its key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from vmcryptd.adapters.sim.luks import digest
from vmcryptd.core.errors import ConfigError, StorageError
from vmcryptd.core.model import VolumeSpec
from vmcryptd.core.ports import Key


class Made(NamedTuple):
    spec: VolumeSpec
    digest: str


class SimKeystores:
    """The ports `Formatting` and `Tables`."""

    def __init__(
        self, volumes: Mapping[str, object], empty: tuple[str, ...], calls: list[str]
    ) -> None:
        self._volumes = volumes  # the existing ones
        self._empty = set(empty)  # empty block devices
        self._files: set[str] = set()
        self._digests: dict[str, str] = {}  # mapping → of the key
        self._calls = calls
        self.made: dict[str, Made] = {}

    async def check_file(self, name: str, path: str) -> None:
        if path in self._files:
            raise StorageError(
                f"{path} is there already; nothing is overwritten: name another file"
            )

    async def check_device(self, name: str, path: str) -> None:
        if path not in self._empty:
            raise StorageError(f"{path} is not empty (simulated), so it is not formatted")

    async def new_file(self, path: str, size: int) -> int:
        return os.memfd_create("keystore", os.MFD_CLOEXEC)

    async def name_file(self, fd: int, path: str) -> None:
        self._files.add(path)

    async def format(self, place: str | int, uuid: str, key: Key) -> None:
        self._digests[uuid] = await digest(key)
        self._calls.append("format")

    async def open(self, place: str | int, name: str, key: Key) -> None:
        if await digest(key) not in self._digests.values():
            raise StorageError("`cryptsetup open` of what was just formatted failed (simulated)")
        self._calls.append(f"open {name}")

    async def make_file_system(self, name: str) -> None:
        self._calls.append(f"mkfs {name}")

    async def take_back(self, place: str, uuid: str, *, is_file: bool) -> None:
        self._digests.pop(uuid, None)
        self._files.discard(place)

    def check(self, name: str, table: str) -> None:
        from vmcryptd.config import schema

        schema.parse({f"{name}.toml": table})
        if name in self._volumes:
            raise ConfigError(
                f'{name}.toml: [volume.{name}]: the volume "{name}" is defined already'
            )

    def has(self, name: str) -> bool:
        return name in self.made

    def write(self, name: str, table: str) -> None:
        from vmcryptd.config import schema

        spec = schema.parse({f"{name}.toml": table}).volumes[name]
        self.made[name] = Made(spec, self._digests[spec.uuid or ""])

    def remove(self, name: str) -> None:
        del self.made[name]
