# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that appear are noticed once their writers are done, wherever their directories come from."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vmcryptd.adapters.storage.blocks import SysfsBlocks
from vmcryptd.adapters.storage.sysfs import Roots
from vmcryptd.posix.appearance import Appearances

PATIENCE_S = 30.0


class News:
    """Counts the calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._come = asyncio.Event()

    def __call__(self) -> None:
        self.calls += 1
        self._come.set()

    async def next(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._come.wait()
        self._come.clear()


async def armed(appearances: Appearances) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while appearances._arming is not None:
            await asyncio.sleep(0.001)


def scene(test: Callable[[Appearances, News, Path], Awaitable[None]], place: Path) -> None:
    async def play() -> None:
        news = News()
        appearances = Appearances(news)
        before = set(os.listdir("/proc/self/fd"))
        try:
            await test(appearances, news, place)
        finally:
            await armed(appearances)
            appearances.close()
        assert len(os.listdir("/proc/self/fd")) == len(before)

    asyncio.run(play())


def test_a_file_counts_once_it_is_written(tmp_path: Path) -> None:
    async def test(appearances: Appearances, news: News, place: Path) -> None:
        appearances.await_([f"{place}/key", f"{place}/other"])
        await armed(appearances)
        (place / "something").write_text("else")
        with (place / "key").open("w") as file:
            file.write("half")
            file.flush()
            (place / "other").touch()
            await news.next()  # of the other one
            assert news.calls == 1
        await news.next()

    scene(test, tmp_path)


@pytest.mark.parametrize("way", ["rename", "symlink", "link"])
def test_ways_to_appear(tmp_path: Path, way: str) -> None:
    async def test(appearances: Appearances, news: News, place: Path) -> None:
        (place / "made").write_text("key")
        appearances.await_([f"{place}/key"])
        await armed(appearances)
        getattr(os, way)(place / "made", place / "key")
        await news.next()

    scene(test, tmp_path)


def test_its_directories_appear_first(tmp_path: Path) -> None:
    async def test(appearances: Appearances, news: News, place: Path) -> None:
        path = place / "stick" / "keys" / "key"
        appearances.await_([f"{path}"])
        await armed(appearances)
        path.parent.mkdir(parents=True)
        path.write_text("key")
        await news.next()
        await armed(appearances)
        await asyncio.sleep(0)
        path.unlink()
        path.parent.rmdir()
        await armed(appearances)

    scene(test, tmp_path)


def test_it_appears_while_the_watch_is_set_up(tmp_path: Path) -> None:
    async def test(appearances: Appearances, news: News, place: Path) -> None:
        appearances.await_([f"{place}/key"])
        (place / "key").write_text("key")
        await news.next()
        appearances.await_([])
        await armed(appearances)

    scene(test, tmp_path)


def test_what_a_look_misses_is_awaited(tmp_path: Path) -> None:
    """By way of symbolic links, too."""
    (tmp_path / "sys").mkdir()
    (tmp_path / "mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n")
    (tmp_path / "keys").symlink_to(tmp_path / "stick")
    key = tmp_path / "keys/key"

    async def test() -> None:
        news = News()
        blocks = SysfsBlocks(Roots(f"{tmp_path}/sys", "/proc", f"{tmp_path}/mountinfo"))
        blocks.watch(news)
        try:
            await blocks.look([f"{key}"])
            assert blocks.observe([f"{key}"]).files == {}
            (tmp_path / "stick").mkdir()
            (tmp_path / "stick/key").write_text("key")
            while f"{key}" not in blocks.observe([f"{key}"]).files:
                await news.next()
                await blocks.look([f"{key}"])
        finally:
            blocks.close()

    asyncio.run(test())
