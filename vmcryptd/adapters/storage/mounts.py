# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses mountinfo and the fstab."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from vmcryptd.core.model import Mount
from vmcryptd.core.text import octal_unescaped

# A path on one of these may hang when its server is away; on autofs, because any access mounts it.
NETWORK = {
    *("9p", "afs", "autofs", "beegfs", "ceph", "cifs", "coda", "gfs2"),
    *("lustre", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "virtiofs"),
}

MOST = 64 << 20  # bytes: more than any mount table holds


class Bind(NamedTuple):
    """A line of the fstab that mounts a directory a second time."""

    source: str
    target: str


@functools.lru_cache(maxsize=1)
def parse_mounts(text: str) -> tuple[Mount, ...]:
    """proc_pid_mountinfo(5): id parent major:minor root target options optional… - type source."""
    found = []
    for line in text.split("\n"):  # not splitlines(): the kernel escapes no other line end
        fields = line.split(" ")
        try:
            dash = fields.index("-", 6)
            fstype, source = fields[dash + 1], octal_unescaped(fields[dash + 2])
        except (ValueError, IndexError):
            continue
        number = fields[2]
        if number.startswith("0:") and source.startswith("/dev/"):  # btrfs
            number = device_number(source) or number
        found.append(Mount(number, octal_unescaped(fields[4]), source, fstype))
    return tuple(found)


def is_remote(mount: Mount) -> bool:
    """Whether an access may hang because of another host or program."""
    return mount.fstype in NETWORK or mount.fstype.startswith("fuse.")


class MountTable:
    """Finds the mount that a path lies on."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        # Of several mounts on one target, the last is on top.
        self._by_target: Mapping[str, Mount] = {mount.target: mount for mount in mounts}

    def has(self, place: str) -> bool:
        """Whether something is mounted at exactly this path."""
        return place in self._by_target

    def on(self, real: str) -> Mount:
        """The mount of an absolute path without symbolic links."""
        while True:
            if mount := self._by_target.get(real):
                return mount
            if real == "/":
                return Mount("", "/")
            real = real[: real.rfind("/")] or "/"


def parse_binds(text: str) -> Iterator[Bind]:
    """The bind mounts in the fstab(5): what to mount, where, type, options."""
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4 or fields[0].startswith("#"):
            continue
        source, target, _, options = map(octal_unescaped, fields[:4])
        if {"bind", "rbind"} & set(options.split(",")) and source.startswith("/"):
            yield Bind(os.path.normpath(source), os.path.normpath(target))


def read_file(path: str, most: int = MOST) -> str:
    """A file of /proc to its end (a read gives one page at most), or `most` bytes; empty if it does not exist."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        content = bytearray()
        while len(content) < most and (block := os.read(fd, min(most - len(content), 64 * 1024))):
            content += block
    except OSError:
        return ""
    finally:
        os.close(fd)
    return content.decode(errors="surrogateescape")


def device_number(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return number_of(status.st_rdev) if stat.S_ISBLK(status.st_mode) else ""


def number_of(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
