# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl keystore init`: a small LUKS volume that holds the keys of others. All of it is made, or nothing.

What is not empty is never formatted, and no file of the administrator is changed: the keystore's table goes
into a file of its own, which is only there when all before it has worked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

from vmcryptd.adapters.luks.mappings import Cryptsetup
from vmcryptd.bus.client import Client, is_root
from vmcryptd.cli import key_input
from vmcryptd.cli.output import changing, say
from vmcryptd.cli.verbs import UsageError
from vmcryptd.config import files
from vmcryptd.core.errors import (
    EXIT_OK,
    BusyError,
    ConfigError,
    NotAuthorizedError,
    StorageError,
    VmcryptdError,
)
from vmcryptd.posix.memfd import MemfdKey
from vmcryptd.posix.run import Completed, run

SMALLEST = 20 << 20  # 16 MiB for the header, the rest for files
MOUNTS = "/run/vmcryptd-keystore"  # not below /run/vmcryptd: the package removes that
MAPPINGS = Path("/dev/mapper")
# Emptied at boot or by age (tmpfiles.d), in memory, or removed with the package: no place for keys.
SWEPT = ("/dev", "/proc", "/run", "/sys", "/tmp", "/var/cache", "/var/lib/vmcryptd", "/var/tmp")
# A mount point may be in memory, but nothing may remove files from below it.
SWEPT_MOUNTS = ("/run/vmcryptd", "/tmp", "/var/cache", "/var/lib/vmcryptd", "/var/tmp")
FORMAT_S, LOOK_S, UNDO_S = 600.0, 60.0, 60.0

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Keystore(NamedTuple):
    """What is to be made."""

    name: str
    place: str  # a block device, or a file that is made first
    size: int  # of the file; 0 for a block device
    mount: str
    uuid: str

    @property
    def file(self) -> Path:
        return files.DIRECTORY / "conf.d" / f"{self.name}.toml"

    @property
    def table(self) -> str:
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
                *(
                    f"{key} = {json.dumps(value, ensure_ascii=False)}"
                    for key, value in lines.items()
                ),
                "",
            )
        )


async def init(arguments: Namespace) -> int:
    keystore = _wanted(arguments)
    if not is_root():
        raise NotAuthorizedError("only root makes a keystore; run this as root")
    _check(keystore)
    if not keystore.size:
        await _check_empty(keystore.place)
    async with changing() as client:
        await client.ping()  # before anything is made that nobody would take up
        async with key_input.new(client, keystore.name, arguments.key_file) as key:
            await _make(client, keystore, key)
    print(f"keystore {keystore.name} is made: {keystore.place}, configured in {keystore.file}")
    say(
        f"next: vmcryptctl unlock {keystore.name}, then vmcryptctl key add VOLUME --keystore {keystore.name}, "
        f"then vmcryptctl lock {keystore.name}; and a backup: vmcryptctl header backup {keystore.name} FILE"
    )
    return EXIT_OK


def _wanted(arguments: Namespace) -> Keystore:
    """Raises UsageError."""
    if (arguments.file is None) == (arguments.device is None):
        raise UsageError("name either a new file (--file) or an empty device (--device) for it")
    place = arguments.file or arguments.device
    mount = arguments.mount or f"{MOUNTS}/{arguments.NAME}"
    for path in (place, mount):
        if not path.startswith("/") or os.path.normpath(path) != path or not path.isprintable():
            raise UsageError(f"{path!r} is no absolute path without detours; give one")
    _check_swept(mount, SWEPT_MOUNTS, "mounts no keystore")
    if arguments.device is not None:
        if arguments.size is not None:
            raise UsageError("--size is for --file: a device has the size it has")
        return Keystore(arguments.NAME, place, 0, mount, str(uuid.uuid4()))
    _check_swept(place, SWEPT, "makes no keystore")
    match = re.fullmatch(r"(\d{1,12})([KMG]?)", arguments.size or "32M")
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < SMALLEST:
        raise UsageError(f'"{arguments.size}" is no size such as 32M, of at least 20M')
    return Keystore(arguments.NAME, place, size, mount, str(uuid.uuid4()))


def _check_swept(path: str, swept: tuple[str, ...], refusal: str) -> None:
    """Raises UsageError for a path, as given or behind its links, in a directory that something empties."""
    for place in dict.fromkeys((path, os.path.realpath(path))):
        for directory in swept:
            if place == directory or place.startswith(f"{directory}/"):
                raise UsageError(
                    f"vmcryptd {refusal} at {path}: files in {directory} do not stay (they are removed at boot, by "
                    "age or with the package), and the keys would be lost; name another place, such as /var/lib"
                )


def _check(keystore: Keystore) -> None:
    """What would be refused later is refused before anybody types or anything is made. Raises VmcryptdError."""
    from vmcryptd.config import schema

    if os.path.lexists(keystore.file):
        raise ConfigError(f"{keystore.file} is there already; nothing is overwritten")
    texts = files.read(files.DIRECTORY)
    schema.parse({**texts, str(keystore.file): keystore.table})
    if os.path.lexists(MAPPINGS / keystore.name):
        raise BusyError(f"there is a mapping {keystore.name} already; take another name")
    if keystore.size and os.path.lexists(keystore.place):
        raise _is_there(keystore.place)


async def _make(client: Client, keystore: Keystore, key: MemfdKey) -> None:
    """All of it, or nothing. Raises VmcryptdError."""
    async with contextlib.AsyncExitStack() as undo:
        if keystore.size:
            _make_file(keystore)
            undo.callback(_remove, keystore.place)
        else:
            await _check_empty(keystore.place)
            # It was empty, so whatever is on it after this was written here.
            undo.push_async_callback(_undo, ["wipefs", "--all", "--quiet", "--", keystore.place])
        argv = ["luksFormat", "--type=luks2", f"--uuid={keystore.uuid}", "--", keystore.place]
        await _with_key(argv, key, f"{keystore.place} cannot be formatted")
        argv = ["open", "--type=luks2", "--", keystore.place, keystore.name]
        await _with_key(argv, key, f"{keystore.place} cannot be opened")
        async with _closed_afterwards(keystore.name):
            # No blocks are kept for root: nobody else writes here.
            mapping = str(MAPPINGS / keystore.name)
            done = await run(["mkfs.ext4", "-q", "-m", "0", mapping], timeout_s=FORMAT_S)
            _demand(done, f"no file system can be made on {mapping}")
        _write(keystore.file, keystore.table)
        undo.push_async_callback(_unconfigure, client, keystore.file)
        await client.call("Reload")
        undo.pop_all()


def _make_file(keystore: Keystore) -> None:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(keystore.place, flags, 0o600)
    except FileExistsError:
        raise _is_there(keystore.place) from None
    except OSError as error:
        raise StorageError(f"{keystore.place} cannot be made: {error.strerror}") from None
    try:
        # Its blocks are taken now: a disk that is full later must not fail writes into the keystore.
        os.posix_fallocate(fd, 0, keystore.size)
        os.fsync(fd)
    except OSError as error:
        _remove(keystore.place)
        raise StorageError(f"{keystore.place} cannot be made: {error.strerror}") from None
    except BaseException:
        _remove(keystore.place)
        raise
    finally:
        os.close(fd)


def _is_there(path: str) -> StorageError:
    return StorageError(f"{path} is there already; nothing is overwritten: name another file")


async def _check_empty(device: str) -> None:
    """Raises StorageError, BusyError unless it is a block device, unused, and nothing is found on it."""
    try:
        # O_EXCL: of a block device the kernel refuses that while it is mounted or part of something.
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        kind = BusyError if error.errno == errno.EBUSY else StorageError
        text = f"{device} cannot be used: {error.strerror}; `lsblk {device}` tells more"
        raise kind(text) from None
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise StorageError(f"{device} is no block device; --file is for files")
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if size < SMALLEST:
        raise StorageError(f"{device} is too small for a keystore: 20 MiB are needed")
    probed = await run(["blkid", "--probe", "--", device], timeout_s=LOOK_S)
    found = await run(["wipefs", "--no-act", "--noheadings", "--", device], timeout_s=LOOK_S)
    # 2: there is nothing on it, blkid(8). All else, also that it cannot tell, is a no.
    if probed.code != 2 or found.code != 0 or found.out.strip():
        what = " ".join(found.out.split()) or probed.out.strip() or "what it is cannot be told"
        raise StorageError(
            f"{device} is not empty ({what}), so it is not formatted; if nobody needs that any more, "
            f"`wipefs --all {device}` empties it"
        )


async def _with_key(argv: list[str], key: MemfdKey, failure: str) -> None:
    reader = key.reader()
    try:
        command = [
            "cryptsetup",
            argv[0],
            "--batch-mode",
            f"--key-file=/proc/self/fd/{reader}",
            *argv[1:],
        ]
        done = await run(command, fds=[reader], timeout_s=FORMAT_S, expendable=True)
    finally:
        os.close(reader)
    _demand(done, failure)


def _demand(done: Completed, failure: str) -> None:
    if done.code != 0:
        raise StorageError(f"{failure}: {done.complaint}")


@contextlib.asynccontextmanager
async def _closed_afterwards(name: str) -> AsyncIterator[None]:
    crypt = Cryptsetup()  # which waits for udev: it looks at a file system that is new
    try:
        yield
    except BaseException:
        try:
            await crypt.close(name)
        except VmcryptdError as error:
            say(f"{error}; `cryptsetup close {name}` by hand")
        raise
    await crypt.close(name)


def _write(path: Path, text: str) -> None:
    """As a whole or not at all, and only where nothing is. Raises ConfigError."""
    new = path.with_name(f".{path.name}.new")  # not a name that is read
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _unlinked(new):
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(fd)
            os.link(new, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _unlinked(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


async def _unconfigure(client: Client, file: Path) -> None:
    _remove(str(file))
    # Refused, it has kept what it had; was only its answer lost, it has to forget this again.
    with contextlib.suppress(VmcryptdError):
        await client.call("Reload")


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        say(f"{path} stays behind: {error.strerror}")


async def _undo(argv: list[str]) -> None:
    try:
        _demand(await run(argv, timeout_s=UNDO_S), f"`{' '.join(argv)}` failed")
    except VmcryptdError as error:
        say(f"{error}; do it by hand")
