# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks up paths on file systems that may hang: each file system in its own threads, for a bounded time.

A lookup walks over the parts of a path. Mountinfo shows which file system each part is on. A walk that reaches
another file system continues in that one's thread, so one that hangs does not hold up the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple, TypeVar

from vmcryptd.adapters.storage.mounts import Bind, MountTable, number_of, parse_binds, read_file
from vmcryptd.core.errors import DeadlineError
from vmcryptd.core.model import Mount
from vmcryptd.posix.threads import PlaceThreads

LOOK_S = 2.0
T = TypeVar("T")

LINKS_LIMIT = 40  # as in the kernel's own path walk


class Answer(NamedTuple):
    """Where a path leads, without symbolic links, and what is there."""

    real: str  # as far as it could be followed
    on: str = ""  # "major:minor" of the file system, for a file or directory
    block: str = ""  # "major:minor" of a block device
    is_silent: bool = False  # its file system does not answer, or must not be asked


class _Walk(NamedTuple):
    path: str
    done: str = ""
    todo: tuple[str, ...] = ()  # the next part last
    links: int = 0

    @property
    def here(self) -> str:
        return self.done or "/"

    @property
    def real(self) -> str:
        """The path, resolved as far as it is known."""
        return os.path.normpath("/".join([self.done, *reversed(self.todo)]) or "/")


class Paths:
    """The results of lookups; `look` repeats them, all other methods never block."""

    def __init__(self, fstab: str = "/etc/fstab") -> None:
        self._binds: tuple[Bind, ...] = ()
        self._fstab = fstab
        self._answers: dict[str, Answer] = {}
        self._threads = PlaceThreads()  # the places are file systems, by their numbers

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` when a file system answers that had timed out."""
        self._threads.returned = changed

    @property
    def binds(self) -> tuple[Bind, ...]:
        """The fstab's bind mounts, outer ones first."""
        return tuple(sorted(self._binds, key=lambda bind: len(bind.target)))

    def known(self, path: str) -> Answer | None:
        return self._answers.get(path)

    def through_binds(self, real: str, table: MountTable) -> str:
        """The path's place once all bind mounts of the fstab are mounted."""
        for bind in reversed(self.binds):
            if within(real, bind.target) and not table.has(bind.target):
                return bind.source + real[len(bind.target) :]
        return real

    async def look(
        self, paths: Iterable[str], mounts: Sequence[Mount], suspended: Container[str]
    ) -> None:
        """Look up these paths, and forget all others. File systems whose number is in `suspended` are not asked."""
        paths = set(paths)
        if not paths:
            self._answers.clear()
            return
        table = MountTable(mounts)
        old, answers = self._answers, {path: Answer(path) for path in paths}
        self._answers = {path: answer for path, answer in old.items() if path in paths}

        async def on(mount: Mount, walks: list[_Walk]) -> None:
            if mount.number in suspended or mount.fstype == "autofs":  # access mounts autofs
                reached: list[_Walk | tuple[str, Answer]] = []
                stuck = walks
            else:
                reached, stuck = await self._ask(mount, walks, table)
            for walk in stuck:
                before = old.get(walk.path) or Answer(walk.real)
                answers[walk.path] = before._replace(is_silent=True)
            further: dict[Mount, list[_Walk]] = {}
            for one in reached:
                if isinstance(one, _Walk):
                    further.setdefault(table.on(one.here), []).append(one)
                else:
                    answers[one[0]] = one[1]
            await asyncio.gather(*(on(other, left) for other, left in further.items()))

        begun = [_Walk(path, todo=tuple(reversed(path.split("/")))) for path in sorted(paths)]
        await asyncio.gather(on(table.on("/"), begun), self._read_binds(table, suspended))
        self._answers = answers

    async def _ask(
        self, mount: Mount, walks: list[_Walk], table: MountTable
    ) -> tuple[list[_Walk | tuple[str, Answer]], list[_Walk]]:
        """The results of the walks on one file system, and the walks that timed out."""

        def work() -> list[_Walk | tuple[str, Answer]]:
            links: dict[str, str | None] = {}  # a cache: most paths share parts
            return [_go_on(walk, mount, table, links) for walk in walks]

        try:
            return await self._call(mount, work), []
        except DeadlineError:
            return [], walks

    async def _read_binds(self, table: MountTable, suspended: Container[str]) -> None:
        mount = table.on(self._fstab)
        if mount.number not in suspended:
            with contextlib.suppress(DeadlineError):
                text = await self._call(mount, functools.partial(read_file, self._fstab))
                self._binds = tuple(parse_binds(text))

    async def _call(self, mount: Mount, function: Callable[[], T]) -> T:
        if mount.number in self._threads.silent:
            raise DeadlineError("it does not answer")  # an earlier call has waited for it
        return await self._threads.call(mount.number, LOOK_S, function)


def _go_on(
    walk: _Walk, mount: Mount, table: MountTable, links: dict[str, str | None]
) -> _Walk | tuple[str, Answer]:
    """Walk on one file system, to the end or to where another one begins. Blocks."""
    path, done, todo, count = walk.path, walk.done, list(walk.todo), walk.links
    while True:
        if table.on(done or "/") != mount:
            return _Walk(path, done, tuple(todo), count)
        if not todo:
            return path, _look_at(done or "/", mount)
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            done = done[: done.rfind("/")] if done else ""
            continue
        place = f"{done}/{part}"
        if table.has(place):
            done = place  # a mount point is no link
            continue
        if place not in links:
            links[place] = _link(place)
        target = links[place] if count < LINKS_LIMIT else None
        if target is None:
            return path, Answer(_Walk(path, place, tuple(todo)).real)
        if not target:
            done = place
            continue
        count += 1
        todo += target.split("/")[::-1]
        if target.startswith("/"):
            done = ""


def within(path: str, directory: str) -> bool:
    """Whether the path is the directory, or something in it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _link(place: str) -> str | None:
    """The target of a symbolic link; empty if it is none, None if nothing exists there."""
    try:
        return os.readlink(place)
    except OSError as error:
        return "" if error.errno == errno.EINVAL else None


def _look_at(real: str, mount: Mount) -> Answer:
    try:
        status = os.stat(real)
    except OSError:
        return Answer(real)
    if stat.S_ISBLK(status.st_mode):
        return Answer(real, block=number_of(status.st_rdev))
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return Answer(real)
    # btrfs gives each subvolume a number of its own, which no block device has: the mount's is that of its device.
    return Answer(real, on=mount.number or number_of(status.st_dev))
