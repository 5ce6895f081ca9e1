# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration files, and what they meant when they were last validated.

Importing pydantic and building its models takes longer than all else that the daemon does until it is ready. Files that
have not changed since they were validated need neither.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmcryptd import __version__
from vmcryptd.core.errors import ConfigError
from vmcryptd.core.model import (
    Content,
    DaemonSpec,
    GuestSpec,
    KeySource,
    Lock,
    OnStopTimeout,
    Settings,
    SourceKind,
    Start,
    Unlock,
    VolumeSpec,
)

DIRECTORY = Path("/etc/vmcryptd")
VALIDATED = Path("/var/lib/vmcryptd/settings.json")

log = logging.getLogger(__name__)


def read(directory: Path) -> dict[str, str]:
    """The files below the directory in their order, name → text. Raises ConfigError."""
    texts: dict[str, str] = {}
    for path in (directory / "vmcryptd.toml", *sorted((directory / "conf.d").glob("*.toml"))):
        try:
            texts[str(path)] = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
    return texts


def load(directory: Path = DIRECTORY, validated: Path | None = None) -> Settings:
    """The settings, from the file `validated` if that was written for these very files.

    Raises ConfigError.
    """
    texts = read(directory)
    if validated is not None and (known := _load_validated(validated, texts)) is not None:
        return known
    from vmcryptd.config import schema

    settings = schema.parse(texts)
    if validated is None:
        return settings
    content = {"version": __version__, "texts": texts, "settings": asdict(settings)}
    try:
        temporary = validated.with_suffix(".new")
        # Not for everybody: the arguments of a fetcher may tell more than they should.
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(temporary, validated)
    except OSError as error:
        log.debug("%s cannot be written, the next start takes longer: %s", validated, error)
    return settings


def _load_validated(validated: Path, texts: Mapping[str, str]) -> Settings | None:
    try:
        content = json.loads(validated.read_text(encoding="utf-8"))
        if content["version"] != __version__ or content["texts"] != texts:
            return None
        raw = content["settings"]
        return Settings(
            daemon=_daemon(raw["daemon"]),
            volumes={name: _volume(entry) for name, entry in raw["volumes"].items()},
            guests={name: _guest(entry) for name, entry in raw["guests"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or not whole: validate again


def _daemon(raw: dict[str, Any]) -> DaemonSpec:
    return DaemonSpec(**{**raw, "on_waiting": tuple(raw["on_waiting"])})


def _volume(raw: dict[str, Any]) -> VolumeSpec:
    keys = tuple(KeySource(SourceKind(key["kind"]), key["argument"]) for key in raw["keys"])
    enums = {
        "unlock": Unlock(raw["unlock"]),
        "lock": Lock(raw["lock"]),
        "content": Content(raw["content"]),
    }
    return VolumeSpec(**{**raw, **enums, "keys": keys, "after": tuple(raw["after"])})


def _guest(raw: dict[str, Any]) -> GuestSpec:
    enums = {
        "start": Start(raw["start"]),
        "on_stop_timeout": OnStopTimeout(raw["on_stop_timeout"]),
    }
    lists = {"needs": tuple(raw["needs"]), "after": tuple(raw["after"])}
    return GuestSpec(**{**raw, **enums, **lists})
