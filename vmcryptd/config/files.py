# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the configuration files, and caches the settings of their last validation.

Importing pydantic and building its models takes longer than the rest of the daemon's start. Files that have not
changed since their validation need neither.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from vmcryptd import __version__
from vmcryptd.config.decoding import decoded
from vmcryptd.core.errors import ConfigError, Mistake
from vmcryptd.core.model import Settings
from vmcryptd.core.text import escaped
from vmcryptd.posix.files import read_bounded, write_atomically

DIRECTORY = Path("/etc/vmcryptd")
MAIN, DROP_INS = "vmcryptd.toml", "conf.d"
LARGEST = 16 << 20  # bytes of one file: a hundred thousand volumes
LARGEST_VALIDATED = 256 << 20  # bytes of the cached settings
LONGEST_PATH = 4096  # characters of a path in an error
NULL = os.makedev(1, 3)
VALIDATED = Path("/var/lib/vmcryptd/settings.json")

log = logging.getLogger(__name__)


def read(directory: Path, *, required: bool = False) -> dict[str, str]:
    """The files below the directory in their order, name → text.

    A file that exists and cannot be read is a mistake: its volumes would vanish. So is a missing directory if it is
    `required`. Raises ConfigError.
    """
    texts: dict[str, str] = {}
    mistakes: list[Mistake] = []
    if not directory.is_dir() and (required or os.path.lexists(directory)):
        text = "is no directory" if os.path.lexists(directory) else "there is no such directory"
        raise ConfigError(f"{directory}: {text}; expected the one in which {MAIN} lies")
    main, drop_ins = directory / MAIN, directory / DROP_INS
    paths = [main]
    try:
        paths += [drop_ins / name for name in sorted(os.listdir(drop_ins)) if _is_read(name)]
    except OSError as error:
        if not isinstance(error, FileNotFoundError) or os.path.lexists(drop_ins):
            mistakes.append(_unreadable(drop_ins, error))
    for path in paths:
        try:
            texts[str(path)] = _text(path)
        except FileNotFoundError:
            if target := _link(path):  # else the file does not exist, or was just removed
                text = f"a link to {target}, which is not there; correct it, or remove it"
                mistakes.append(Mistake(escaped(f"{path}: {text}", 2 * LONGEST_PATH)))
        except (OSError, ValueError) as error:
            mistakes.append(_unreadable(path, error))
    if mistakes:
        raise ConfigError.of(mistakes)
    return texts


def not_read(directory: Path) -> list[str]:
    """The files in conf.d that are not read: not *.toml, or hidden."""
    try:
        names = sorted(os.listdir(directory / DROP_INS))
    except OSError:
        return []
    # Editors make hidden files: ".#NAME" is Emacs' lock, ".NAME.swp" vim's copy.
    return [
        name
        for name in names
        if not _is_read(name)
        and not name.startswith(".#")
        and (not name.startswith(".") or name.endswith(".toml"))
    ]


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _is_read(name: str) -> bool:
    return name.endswith(".toml") and not name.startswith(".")


def _text(path: Path) -> str:
    """Raises OSError and ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        # As with systemd, a link to /dev/null disables a drop-in.
        if not stat.S_ISREG(status.st_mode) and status.st_rdev != NULL:
            is_directory = stat.S_ISDIR(status.st_mode)
            raise ValueError("it is a directory" if is_directory else "it is no regular file")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(LARGEST + 1)
    finally:
        os.close(fd)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")  # editors of Windows add a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save it as UTF-8") from None


def _unreadable(path: Path, error: Exception) -> Mistake:
    why = str(error)
    if isinstance(error, OSError):
        why = (error.strerror or why).lower()
    return Mistake(f"{escaped(str(path), LONGEST_PATH)}: cannot be read: {why}")


def load(
    directory: Path = DIRECTORY, validated: Path | None = None, *, required: bool = False
) -> Settings:
    """The settings in the files below the directory. Raises ConfigError."""
    return settings(read(directory, required=required), validated)


def settings(texts: Mapping[str, str], validated: Path | None = None) -> Settings:
    """The settings, from the file `validated` if that was written for exactly these files.

    Raises ConfigError.
    """
    if validated is not None and (known := _load_validated(validated, texts)) is not None:
        return known
    from vmcryptd.config import schema

    return schema.parse(texts)


def keep(validated: Path, texts: Mapping[str, str], settings: Settings) -> None:
    """Keep what these files meant, once a daemon runs with it: a circle of volumes shows only then."""
    if _load_validated(validated, texts) is not None:
        return
    content = {"version": __version__, "texts": texts, "settings": asdict(settings)}
    try:
        # For root only: the arguments of a fetcher may hold a token.
        write_atomically(validated, json.dumps(content).encode(), 0o600)
    except OSError as error:
        log.debug("%s cannot be written, the next start takes longer: %s", validated, error)


def last_valid(validated: Path) -> Settings | None:
    """The last valid settings, regardless of the present files; None if none were kept.

    An older vmcryptd may have written them.
    """
    return _load_validated(validated, None)


def _load_validated(validated: Path, texts: Mapping[str, str] | None) -> Settings | None:
    try:
        content = json.loads(read_bounded(validated, LARGEST_VALIDATED))
        if texts is not None and (content["version"] != __version__ or content["texts"] != texts):
            return None
        return decoded(Settings, content["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # missing or incomplete: validate again
