# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes configuration files for volumes that vmcryptd makes, one for each. No other file is ever written."""

from __future__ import annotations

import os
from pathlib import Path

from vmcryptd.config import files
from vmcryptd.core.errors import ConfigError
from vmcryptd.posix.files import write_new


class Tables:
    """The port `Tables`."""

    def __init__(self, directory: Path = files.DIRECTORY) -> None:
        self._directory = directory

    def check(self, name: str, table: str) -> None:
        from vmcryptd.config import schema

        path = self._path(name)
        if os.path.lexists(path):
            raise ConfigError(f"{path} is there already; nothing is overwritten")
        schema.parse({**files.read(self._directory), str(path): table})

    def has(self, name: str) -> bool:
        return os.path.lexists(self._path(name))

    def write(self, name: str, table: str) -> None:
        path = self._path(name)
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_new(path, table.encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None

    def remove(self, name: str) -> None:
        try:
            self._path(name).unlink()
        except OSError as error:
            raise ConfigError(f"{self._path(name)} stays behind: {error.strerror}") from None

    def _path(self, name: str) -> Path:
        return self._directory / files.DROP_INS / f"{name}.toml"
